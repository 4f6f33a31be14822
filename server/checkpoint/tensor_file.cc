#include "server/checkpoint/tensor_file.h"

#include <utility>

#include "common/base/bytes.h"
#include "common/base/digest.h"
#include "common/base/status.h"
#include "common/format/safetensors_writer.h"
#include "server/state/storage_blocks.h"

namespace modelstate {
namespace {

// Appends to a file and digests what it appends. Thread-compatible.
class FileAppender {
 public:
  FileAppender(File file, const JobControl& control, ProgressMeter& meter)
      : file_(std::move(file)), control_(control), meter_(meter) {}

  absl::Status Append(absl::Span<const TensorStorage* const> storages) {
    return ReadBlocks(
        storages,
        [this](absl::Span<const BlockPart>, absl::Span<const uint8_t> bytes) -> absl::Status {
          MS_RETURN_IF_ERROR(Write(bytes));
          meter_.Add(bytes.size());
          return absl::OkStatus();
        });
  }

  absl::Status Write(absl::Span<const uint8_t> bytes) {
    MS_RETURN_IF_ERROR(control_.CheckNotCancelled());
    MS_RETURN_IF_ERROR(file_.WriteAt(size_, bytes));
    digest_.Update(bytes);
    size_ += bytes.size();
    return absl::OkStatus();
  }

  absl::Status Finish() { return file_.SyncData(); }

  uint64_t size() const { return size_; }
  uint64_t digest() const { return digest_.Digest(); }

 private:
  const File file_;
  const JobControl& control_;
  ProgressMeter& meter_;
  uint64_t size_ = 0;
  Xxh3Stream digest_;
};

}  // namespace

absl::StatusOr<std::vector<uint64_t>> DigestTensors(absl::Span<const StorageRef> storages,
                                                    const JobControl& control) {
  std::vector<const TensorStorage*> list;
  list.reserve(storages.size());
  for (const StorageRef& storage : storages) list.push_back(storage.get());
  MS_RETURN_IF_ERROR(DigestStorages(list, [&control] { return control.CheckNotCancelled(); }));
  std::vector<uint64_t> digests;
  digests.reserve(storages.size());
  for (const TensorStorage* storage : list) digests.push_back(*storage->CachedDigest());
  return digests;
}

absl::StatusOr<Manifest::FileEntry> WriteTensorFile(const RootDirectory& root,
                                                    const std::string& path, TensorFile content,
                                                    absl::Span<const uint64_t> digests,
                                                    ProgressMeter& meter,
                                                    const JobControl& control) {
  content.metadata[kDigestsMetadataKey] = DigestsMetadata(content.specs, digests);
  MS_ASSIGN_OR_RETURN(const std::string header,
                      SafetensorsHeader(content.specs, *content.layout, content.metadata));
  MS_ASSIGN_OR_RETURN(File file, root.CreateFile(path));
  FileAppender appender(std::move(file), control, meter);
  MS_RETURN_IF_ERROR(appender.Write(AsBytes(header)));
  // Offset order has no gaps, so appending in it makes the layout's data region.
  std::vector<const TensorStorage*> storages;
  storages.reserve(content.storages.size());
  for (const uint32_t index : content.layout->by_offset()) {
    storages.push_back(content.storages[index].get());
  }
  MS_RETURN_IF_ERROR(appender.Append(storages));
  MS_RETURN_IF_ERROR(appender.Finish());
  if (appender.size() != header.size() + content.layout->total_bytes()) {
    return absl::InternalError("the storages of a checkpoint do not fit its layout");
  }
  return Manifest::FileEntry{path.substr(path.rfind('/') + 1), appender.size(), appender.digest()};
}

}  // namespace modelstate
