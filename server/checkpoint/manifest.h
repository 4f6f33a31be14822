#ifndef MODELSTATE_SERVER_CHECKPOINT_MANIFEST_H_
#define MODELSTATE_SERVER_CHECKPOINT_MANIFEST_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "common/base/file.h"
#include "common/base/optimizer_config.h"
#include "common/base/tensor_spec.h"
#include "common/format/json_view.h"
#include "common/format/manifest_text.h"
#include "server/state/module_version.h"
#include "server/state/optimizer_state.h"
#include "server/state/step_record.h"

namespace modelstate {

// What `manifest.json` of a directory checkpoint says: everything but the elements.
// docs/checkpoints.md specifies it. Value types.
struct ManifestHead {
  using FileEntry = ManifestFile;

  std::string module;
  Version version;
  uint64_t step = 0;
  absl::Time create_time = absl::UnixEpoch();  // not before it
  bool weights_only = false;
  ModuleMetadata metadata;
  std::vector<FileEntry> files;

  const FileEntry* FindFile(absl::string_view name) const;
};

struct Manifest : ManifestHead {
  struct TensorEntry {
    TensorSpec spec;    // alias_of only where the owner is in the file
    uint64_t xxh3 = 0;  // of the elements; an alias has its owner's
  };
  struct ParameterEntry {
    std::string parameter;
    uint64_t step = 0;
    float product = 1;               // ParameterState::product
    std::vector<std::string> slots;  // `slot/parameter` in the optimizer file
  };

  std::vector<TensorEntry> tensors;  // the state_dict, in its order
  std::optional<OptimizerConfig> optimizer;
  std::vector<ParameterEntry> optimizer_state;  // of parameters that have stepped
  WorkerRecords workers;
};

// INVALID_ARGUMENT NOT_REPRESENTABLE for text that is not UTF-8, and what is too long to be read.
absl::StatusOr<std::string> ManifestToText(const Manifest& manifest);

// A manifest as it is stored. Every field has been checked; what grows with the module stays text,
// and is made from it for who asks, one by one. So to open one takes the memory of its text and
// less than 16 MiB, whatever it says. Move-only.
class StoredManifest {
 public:
  // Checks every field and the digest at the text's end. DATA_LOSS CHECKPOINT_CORRUPT,
  // DIGEST_MISMATCH; INVALID_ARGUMENT CHECKPOINT_UNSUPPORTED (written by a newer format).
  static absl::StatusOr<StoredManifest> Parse(std::string text);

  const ManifestHead& head() const { return head_; }
  size_t tensor_count() const { return tensor_count_; }
  bool has_optimizer() const { return !optimizer_.is_null(); }
  uint64_t nbytes() const { return text_->size(); }

  // In the order of the text; the first error of `take` ends it.
  absl::Status ForEachTensor(
      absl::FunctionRef<absl::Status(Manifest::TensorEntry entry)> take) const;
  absl::Status ForEachParameter(
      absl::FunctionRef<absl::Status(Manifest::ParameterEntry entry)> take) const;
  absl::StatusOr<std::optional<OptimizerConfig>> Optimizer() const;
  absl::StatusOr<WorkerRecords> Workers() const;

 private:
  StoredManifest() = default;
  absl::Status ReadHead(JsonView json);
  absl::Status ForEachWorker(
      absl::FunctionRef<absl::Status(std::string worker, WorkerRecord record)> take) const;

  std::unique_ptr<const std::string> text_;  // what the views borrow
  ManifestHead head_;
  size_t tensor_count_ = 0;
  JsonView tensors_;
  JsonView optimizer_;
  JsonView optimizer_state_;
  JsonView workers_;
};

// The manifest in `directory`, which messages call `path`. CHECKPOINT_NOT_FOUND when there is none:
// the checkpoint is not complete.
absl::StatusOr<StoredManifest> ReadManifest(const RootDirectory& directory,
                                            const std::string& path);
// Whether the files that `head` records are there in their sizes. DATA_LOSS CHECKPOINT_CORRUPT.
absl::Status CheckManifestSizes(const RootDirectory& directory, const std::string& path,
                                const ManifestHead& head);

// Opens the directory `path` once for `use`, which finds all its files through it, so that they are
// of one checkpoint even where a save takes its place meanwhile. The replaced one loses its files
// sooner or later: where `use` fails and `path` is no longer that directory, it is tried again.
absl::Status WithDirectory(const RootDirectory& root, const std::string& path,
                           absl::FunctionRef<absl::Status(const RootDirectory& directory)> use);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_CHECKPOINT_MANIFEST_H_
