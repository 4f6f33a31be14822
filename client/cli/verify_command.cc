#include <filesystem>
#include <iostream>
#include <memory>
#include <string>
#include <system_error>
#include <vector>

#include "absl/strings/str_cat.h"
#include "client/cli/context.h"
#include "client/cli/output.h"
#include "common/base/status.h"
#include "common/format/manifest_text.h"
#include "common/format/open_path.h"

namespace modelstate::cli {
namespace {

namespace fs = std::filesystem;

struct Verified {
  std::string path;
  const char* format = "";
  uint64_t tensors = 0;
  uint64_t by_digest = 0;
  uint64_t by_crc = 0;
  uint64_t unverifiable = 0;  // read, but the file has nothing to hold them against
};

// Reads every tensor. An error names the first that is wrong.
absl::StatusOr<Verified> VerifyFile(const Context& context, const std::string& path,
                                    const std::string& state_dict_key) {
  MS_ASSIGN_OR_RETURN(const std::unique_ptr<CheckpointReader> reader,
                      OpenCheckpointPath(path, state_dict_key, /*allow_opaque=*/true));
  Verified verified;
  verified.path = path;
  verified.format = CheckpointFormatName(reader->format());
  ReadPass pass([&context] { return context.CheckNotInterrupted(); });
  for (size_t i = 0; i < reader->tensors().size(); ++i) {
    const StoredTensor& tensor = reader->tensors()[i];
    if (!tensor.alias_of.empty()) continue;
    const absl::Status read = reader->Verify(i, pass);
    if (!read.ok()) return Annotate(read, path);
    ++verified.tensors;
    ++(tensor.xxh3 ? verified.by_digest : tensor.has_crc ? verified.by_crc : verified.unverifiable);
  }
  return verified;
}

absl::Status Verify(const Context& context, const std::string& path,
                    const std::string& state_dict_key) {
  std::vector<std::string> paths = {path};
  std::error_code error;
  // Of a directory that a server saved: the moments too.
  const fs::path moments = fs::path(path) / kOptimizerFile;
  if (fs::is_directory(path, error) && fs::exists(moments, error)) {
    paths.push_back(moments.string());
  }
  // What a server saved has a digest of each header too.
  const bool has_manifest = fs::exists(fs::path(path) / kManifestFile, error);
  std::vector<ManifestFile> listed;
  if (has_manifest) {
    absl::StatusOr<std::vector<ManifestFile>> verified = CheckManifestFiles(path);
    if (!verified.ok()) return Annotate(verified.status(), path);
    listed = *std::move(verified);
  }
  std::vector<Verified> files;
  for (const std::string& file : paths) {
    MS_ASSIGN_OR_RETURN(files.emplace_back(), VerifyFile(context, file, state_dict_key));
  }
  if (context.json) {
    Json json = {{"path", path}, {"files", Json::array()}, {"manifest_verified", has_manifest}};
    for (const Verified& file : files) {
      json["files"].push_back({{"path", file.path},
                               {"format", file.format},
                               {"tensors", file.tensors},
                               {"by_digest", file.by_digest},
                               {"by_crc", file.by_crc},
                               {"unverifiable", file.unverifiable}});
    }
    Context::Print(json);
    return absl::OkStatus();
  }
  for (const Verified& file : files) {
    std::cout << Printable(file.path) << ": " << file.format << ", "
              << Counted(file.tensors, "tensor") << " read whole";
    if (file.by_digest > 0) std::cout << ", " << file.by_digest << " held against a digest";
    if (file.by_crc > 0) std::cout << ", " << file.by_crc << " held against a CRC";
    if (file.unverifiable > 0) {
      std::cout << ", " << file.unverifiable << " not verifiable: the file records nothing of them";
    }
    std::cout << "\n";
  }
  if (has_manifest) {
    std::cout << kManifestFile << " and " << Counted(listed.size(), "header")
              << " held against their digests\n";
  }
  return absl::OkStatus();
}

}  // namespace

void AddVerifyCommand(CLI::App* app, Context* context) {
  struct Arguments {
    std::string path;
    std::string state_dict_key;
  };
  auto verify = std::make_shared<Arguments>();
  CLI::App* command = app->add_subcommand(
      "verify",
      "Hold every tensor of a checkpoint file against its digest or CRC, without a server");
  command->footer("Exits with 6 where something is wrong, and 0 also where nothing is recorded.");
  command->group(kTransferGroup);
  command->add_option("PATH", verify->path, "A file, an index, or a folder that holds one")
      ->required();
  command->add_option("--state-dict-key", verify->state_dict_key,
                      "Where in a nested PyTorch file the state_dict is, as ema.model");
  command->callback([context, verify] {
    context->Finish(Verify(*context, verify->path, verify->state_dict_key));
  });
}

}  // namespace modelstate::cli
