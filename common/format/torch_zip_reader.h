#ifndef MODELSTATE_COMMON_FORMAT_TORCH_ZIP_READER_H_
#define MODELSTATE_COMMON_FORMAT_TORCH_ZIP_READER_H_

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"
#include "common/base/file.h"
#include "common/format/checkpoint_reader.h"
#include "common/format/torch_state_dict.h"
#include "common/format/zip_directory.h"

namespace modelstate {

// A file that torch.save wrote (1.6 or newer). Nothing in it is executed.
//
// A record's CRC is checked once, by whichever Read needs the record first. A tensor that is a
// whole storage is read and checked in one pass; of a larger storage only its own range is read
// after the check; one that is scattered over its storage is gathered from a buffer of that range
// or storage. Read is thread-safe.
class TorchZipReader : public CheckpointReader {
 public:
  static absl::StatusOr<std::unique_ptr<TorchZipReader>> Open(File file,
                                                              const OpenOptions& options);

  // The same for tensors that lie elsewhere in the pickle than a state_dict has them.
  using Extract = absl::FunctionRef<absl::StatusOr<TorchStateDict>(const PickleTree&)>;
  static absl::StatusOr<std::unique_ptr<TorchZipReader>> Open(File file, Extract extract);

  CheckpointFormat format() const override { return CheckpointFormat::kTorchZip; }
  absl::Status ReadGated(size_t index, absl::Span<uint8_t> out, Gate gate) const override;

 private:
  using Bytes = std::shared_ptr<const std::vector<uint8_t>>;

  struct Storage {
    ZipRecord record;
    mutable absl::Mutex mutex;
    mutable bool checked ABSL_GUARDED_BY(mutex) = false;
    mutable absl::Status result ABSL_GUARDED_BY(mutex);
  };

  explicit TorchZipReader(File file) : file_(std::move(file)) {}

  absl::Status AddTensors(std::vector<TorchTensor> tensors, const ZipDirectory& directory);
  absl::Status ReadContiguous(const Storage& storage, uint64_t offset, absl::Span<uint8_t> out,
                              Gate gate) const;
  absl::Status ReadStrided(size_t index, uint64_t span_elements, absl::Span<uint8_t> out,
                           Gate gate) const;
  absl::Status CheckRecord(const Storage& storage, Gate gate) const;
  absl::Status CompareCrc(const Storage& storage, uint32_t crc) const;
  absl::StatusOr<Bytes> WholeStorage(size_t storage, Gate gate) const;

  File file_;
  bool has_crc_ = false;
  bool big_endian_ = false;
  // One view per tensor, and the place of its storage.
  std::vector<TensorView> views_;
  std::vector<size_t> storage_of_;
  std::vector<std::unique_ptr<Storage>> storages_;

  // The storage that was last gathered from: many scattered views of one storage read it once.
  mutable absl::Mutex cache_mutex_;
  mutable size_t cached_storage_ ABSL_GUARDED_BY(cache_mutex_) = 0;
  mutable Bytes cached_bytes_ ABSL_GUARDED_BY(cache_mutex_);
};

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_FORMAT_TORCH_ZIP_READER_H_
