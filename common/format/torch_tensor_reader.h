#ifndef MODELSTATE_COMMON_FORMAT_TORCH_TENSOR_READER_H_
#define MODELSTATE_COMMON_FORMAT_TORCH_TENSOR_READER_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"
#include "common/base/file.h"
#include "common/format/checkpoint_reader.h"
#include "common/format/pickle.h"
#include "common/format/torch_state_dict.h"

namespace modelstate {

// Tensors of a pickle: views of storages, each of which lies in one piece in the file. What the
// formats of torch.save have in common; each of them finds the pickle and the storages.
//
// A storage's CRC is checked once, by whichever Read needs the storage first. A tensor that is a
// whole storage is read and checked in one pass; of a larger storage only its own range is read
// after the check; one that is scattered over its storage is gathered from a buffer of that range
// or storage. Read is thread-safe.
class TorchTensorReader : public CheckpointReader {
 public:
  // Which tensors are taken of the pickle: those of a state_dict, or others.
  using Extract = absl::FunctionRef<absl::StatusOr<TorchStateDict>(const PickleTree&)>;

  // A zip or a stream of torch.save, by the first bytes. CHECKPOINT_UNSUPPORTED for any other file.
  static absl::StatusOr<std::unique_ptr<TorchTensorReader>> Open(File file, Extract extract);

  CheckpointFormat format() const override { return format_; }
  absl::Status ReadWith(size_t index, absl::Span<uint8_t> out, ReadPass& pass) const override;
  absl::Status ReadInto(size_t index, PlaceBytes place, ReadPass& pass) const override;
  // Its whole storage, once for all tensors of it.
  absl::Status Verify(size_t index, ReadPass& pass) const override;
  std::optional<Extent> StoredAt(size_t index) const override;

 protected:
  struct StoragePlace {
    std::string name;  // for messages: "record archive/data/0"
    uint64_t offset = 0;
    uint64_t size = 0;
    std::optional<uint32_t> crc32;
  };
  // The place of the storage of a tensor; asked once for each storage.
  using FindStorage = absl::FunctionRef<absl::StatusOr<StoragePlace>(const TorchTensor&)>;

  TorchTensorReader(File file, CheckpointFormat format) : file_(std::move(file)), format_(format) {}

  const File& file() const { return file_; }
  void set_big_endian(bool big_endian) { big_endian_ = big_endian; }
  // Once. CHECKPOINT_CORRUPT where a storage has another size than the pickle says.
  absl::Status SetStateDict(TorchStateDict state_dict, FindStorage find);

 private:
  using Bytes = std::shared_ptr<const std::vector<uint8_t>>;

  struct Storage {
    StoragePlace place;
    mutable absl::Mutex mutex;
    mutable bool checked ABSL_GUARDED_BY(mutex) = false;
    mutable absl::Status result ABSL_GUARDED_BY(mutex);
  };

  absl::Status ReadContiguous(const Storage& storage, uint64_t offset, uint64_t bytes,
                              PlaceBytes place, ReadPass& pass) const;
  absl::Status ReadStrided(size_t index, uint64_t span_elements, absl::Span<uint8_t> out,
                           ReadPass& pass) const;
  absl::Status CheckStorage(const Storage& storage, ReadPass& pass) const;
  absl::Status ReadStorage(const Storage& storage, ReadPass& pass) const;
  static absl::Status CompareCrc(const StoragePlace& place, uint32_t crc);
  absl::StatusOr<Bytes> WholeStorage(size_t storage, ReadPass& pass) const;

  const File file_;
  const CheckpointFormat format_;
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

#endif  // MODELSTATE_COMMON_FORMAT_TORCH_TENSOR_READER_H_
