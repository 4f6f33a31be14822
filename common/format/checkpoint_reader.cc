#include "common/format/checkpoint_reader.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "common/base/status.h"
#include "common/format/safetensors_reader.h"
#include "common/format/text.h"
#include "common/format/torch_zip_reader.h"

namespace modelstate {
namespace {

constexpr size_t kSniffedBytes = 512;

// What a file that is neither format is, by its first bytes; OK when they tell nothing.
absl::Status RefuseKnownFormat(absl::string_view head) {
  // The magic number of the legacy stream, pickled as a long of ten bytes.
  static constexpr char kLegacyMagic[] = "\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19";
  if (head.size() > 14 && head[0] == '\x80' &&
      absl::StartsWith(head.substr(2), absl::string_view(kLegacyMagic, 12))) {
    return Unsupported(
        "the file is a legacy stream of torch.save, from before PyTorch 1.6, which is not "
        "supported yet; load it with torch.load and save it again with torch.save");
  }
  if (head.size() > 262 && head.substr(257, 5) == "ustar") {
    return Unsupported(
        "the file is a tar archive, perhaps of a very old torch.save; load it with an old "
        "torch.load and save it again with torch.save");
  }
  if (absl::StartsWith(head, "GGUF")) {
    return Unsupported(
        "the file is GGUF, which is not supported yet; give the safetensors or PyTorch file that "
        "it was made from");
  }
  if (absl::StartsWith(head, "\x93NUMPY")) {
    return Unsupported("the file is a NumPy array; save a dict of tensors with torch.save");
  }
  if (absl::StartsWith(head, "\x89HDF\r\n")) {
    return Unsupported(
        "the file is HDF5, perhaps of Keras; convert it to safetensors with its own framework");
  }
  if (!head.empty() && head[0] == '\x80' && head.size() > 1 && head[1] >= 2 && head[1] <= 5) {
    return Unsupported(
        "the file is a bare pickle, which is not read; save a state_dict with torch.save or as "
        "safetensors");
  }
  if (absl::StrContains(head, "\"weight_map\"") || absl::StartsWith(head, "{")) {
    return Unsupported(
        "the file is JSON, perhaps the index of a sharded checkpoint, which is not supported yet; "
        "give one .safetensors file (merge the shards first)");
  }
  return absl::OkStatus();
}

}  // namespace

const char* CheckpointFormatName(CheckpointFormat format) {
  switch (format) {
    case CheckpointFormat::kSafetensors:
      return "safetensors";
    case CheckpointFormat::kTorchZip:
      return "torch zip";
  }
  return "checkpoint";
}

absl::Status CheckpointReader::CheckReadArguments(size_t index, absl::Span<uint8_t> out) const {
  if (index >= tensors_.size()) {
    return MakeError(Reason::kInvalidField, absl::StrCat("there is no tensor ", index,
                                                         "; the file "
                                                         "has ",
                                                         tensors_.size()));
  }
  if (out.size() != tensors_[index].nbytes()) {
    return MakeError(
        Reason::kInvalidField,
        absl::StrCat("tensor ", ShowName(tensors_[index].name), " has ", tensors_[index].nbytes(),
                     " bytes, and the place for it has ", out.size()));
  }
  return absl::OkStatus();
}

absl::Status CheckpointReader::ReadPieces(const File& file, uint64_t offset,
                                          absl::Span<uint8_t> out, Gate gate) {
  do {
    MS_RETURN_IF_ERROR(gate());
    const absl::Span<uint8_t> piece = out.subspan(0, kPieceBytes);
    MS_RETURN_IF_ERROR(file.ReadAt(offset, piece));
    offset += piece.size();
    out.remove_prefix(piece.size());
  } while (!out.empty());
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<CheckpointReader>> OpenCheckpoint(File file,
                                                                 const OpenOptions& options) {
  const std::string name = file.name();
  const auto annotated = [&name](const absl::Status& status) {
    return Annotate(status, ShowName(name));
  };
  const absl::StatusOr<uint64_t> size = file.Size();
  if (!size.ok()) return size.status();
  std::string head(std::min<uint64_t>(*size, kSniffedBytes), '\0');
  absl::Status read =
      file.ReadAt(0, absl::MakeSpan(reinterpret_cast<uint8_t*>(head.data()), head.size()));
  if (!read.ok()) return read;

  // A file that is cut off to nothing but the first bytes is still told by them.
  if (absl::StartsWith(head, "PK\x03\x04") || absl::StartsWith(head, "PK\x05\x06") ||
      absl::StartsWith(head, "PK\x06\x06")) {
    auto reader = TorchZipReader::Open(std::move(file), options);
    if (!reader.ok()) return annotated(reader.status());
    return std::unique_ptr<CheckpointReader>(*std::move(reader));
  }
  const bool safetensors = head.size() > 8 && head[8] == '{';
  if (!safetensors) {
    const absl::Status known = RefuseKnownFormat(head);
    if (!known.ok()) return annotated(known);
  }
  if (!options.state_dict_key.empty()) {
    return annotated(Unsupported(absl::StrCat("state_dict_key ", ShowName(options.state_dict_key),
                                              " is for nested PyTorch files; a safetensors file "
                                              "is one state_dict: leave the key out")));
  }
  auto reader = SafetensorsReader::Open(std::move(file));
  if (!reader.ok()) {
    if (safetensors) return annotated(reader.status());
    return annotated(
        Annotate(reader.status(), "the file is neither safetensors nor a zip of torch.save"));
  }
  return std::unique_ptr<CheckpointReader>(*std::move(reader));
}

}  // namespace modelstate
