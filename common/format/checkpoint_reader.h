#ifndef MODELSTATE_COMMON_FORMAT_CHECKPOINT_READER_H_
#define MODELSTATE_COMMON_FORMAT_CHECKPOINT_READER_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "common/base/file.h"
#include "common/base/tensor_spec.h"
#include "common/format/read_pass.h"

namespace modelstate {

// A tensor as a file describes it.
struct StoredTensor {
  std::string name;
  DType dtype = DType::kF32;
  // Not 0, with OpenOptions::allow_opaque only: the width of a dtype of safetensors that is no
  // DType, by the name of that format ("F4"). `dtype` is kU8 then, and means nothing.
  uint8_t opaque_bits = 0;
  absl::string_view opaque_dtype;
  Shape shape;
  // What the file says of the kind: a pickled `Parameter`, or the kind that our own files carry.
  // nullopt: the file does not say.
  std::optional<TensorKind> kind;
  // Of a pickled Parameter or our own files; nullopt: the file does not say.
  std::optional<bool> requires_grad;
  // The first name of the same storage with the same dtype, shape and strides; empty: own bytes.
  std::string alias_of;
  // XXH3 of the elements where the file records it; checked by Read.
  std::optional<uint64_t> xxh3;
  // Whether the file has a CRC over the storage of the elements; checked by Read.
  bool has_crc = false;

  // Whether Verify has anything to hold the elements against.
  bool is_verifiable() const { return xxh3 || has_crc || nbytes() == 0; }
  // As safetensors calls it.
  absl::string_view dtype_name() const {
    return opaque_bits != 0 ? opaque_dtype : DTypeName(dtype);
  }
  uint64_t nbytes() const {
    const uint64_t elements = static_cast<uint64_t>(shape.num_elements());
    return opaque_bits != 0 ? elements * opaque_bits / 8 : elements * DTypeSize(dtype);
  }
};

enum class CheckpointFormat {
  kSafetensors,
  kTorchZip,
  kTorchLegacy,
  kSafetensorsIndex,
  kTorchIndex,
};

inline constexpr CheckpointFormat kAllCheckpointFormats[] = {
    CheckpointFormat::kSafetensors, CheckpointFormat::kTorchZip, CheckpointFormat::kTorchLegacy,
    CheckpointFormat::kSafetensorsIndex, CheckpointFormat::kTorchIndex};

// "safetensors", "torch zip", "torch legacy", "sharded safetensors", "sharded torch".
const char* CheckpointFormatName(CheckpointFormat format);
// Whether it is of torch.save, in one file or several.
bool IsTorchFormat(CheckpointFormat format);

// The state_dict of one checkpoint file, or of an index and its shards. Opening reads and checks
// everything but the elements: what a malformed file can make it allocate is bounded by the size of
// the file, and no file makes it abort or call anything. After that, Read may be called from
// several threads at once.
//
// Errors of opening and reading: DATA_LOSS CHECKPOINT_CORRUPT (truncated, lying sizes, overlaps,
// wrong CRC) and DIGEST_MISMATCH, INVALID_ARGUMENT CHECKPOINT_UNSUPPORTED (a pickle that names
// other than tensor constructors, a dtype without a DType, an older or newer format).
class CheckpointReader {
 public:
  virtual ~CheckpointReader() = default;

  virtual CheckpointFormat format() const = 0;

  // Of an index: the names of the files beside it that hold the tensors.
  virtual absl::Span<const std::string> shards() const { return {}; }

  // In the order of the file: state_dict order for PyTorch; for safetensors the order of the
  // header.
  absl::Span<const StoredTensor> tensors() const { return tensors_; }

  // safetensors `__metadata__`; empty for PyTorch.
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

  // The version of each module as PyTorch's `_metadata` of the state_dict gives it, by the module's
  // dotted name ("" is the whole); a module that it says nothing of is not here. Empty for
  // safetensors, and for files from before PyTorch 0.4.1.
  const std::map<std::string, int64_t>& module_versions() const { return module_versions_; }

  static constexpr uint64_t kPieceBytes = uint64_t{1} << 20;

  // Writes the elements of tensors()[index], contiguous, row-major and little-endian, to `out`,
  // whose size is that tensor's nbytes(). Also for an alias.
  absl::Status Read(size_t index, absl::Span<uint8_t> out) const {
    ReadPass pass;
    return ReadWith(index, out, pass);
  }
  virtual absl::Status ReadWith(size_t index, absl::Span<uint8_t> out, ReadPass& pass) const = 0;

  // Where the elements' bytes from `offset` on go: 1 to `max` of them; its error ends the read.
  // What it gave before is filled when it is asked again.
  using PlaceBytes =
      absl::FunctionRef<absl::StatusOr<absl::Span<uint8_t>>(uint64_t offset, uint64_t max)>;
  // The same, to memory that comes piece by piece, without another copy where the file holds the
  // elements as they are to be; where it does not, RESOURCE_EXHAUSTED when there is no memory for
  // all of the tensor.
  virtual absl::Status ReadInto(size_t index, PlaceBytes place, ReadPass& pass) const;

  // Takes the next bytes of a tensor; they are valid until it returns. Its error ends the read.
  using TakeBytes = absl::FunctionRef<absl::Status(absl::Span<const uint8_t> bytes)>;
  // As ReadInto, with the memory of one piece of at most `piece_bytes`.
  absl::Status ReadStream(size_t index, TakeBytes take, ReadPass& pass,
                          uint64_t piece_bytes = kPieceBytes) const;

  // Reads what the file holds of the elements, a piece at a time, and compares it with the digest
  // or CRC that it records.
  virtual absl::Status Verify(size_t index, ReadPass& pass) const;

  // All of a tensor in memory of its own. RESOURCE_EXHAUSTED where there is not so much.
  absl::StatusOr<std::unique_ptr<uint8_t[]>> ReadWhole(size_t index, ReadPass& pass) const;

  // Where a file holds the elements as they are to be; nullopt where they are made of what it
  // holds.
  struct Extent {
    const File* file = nullptr;  // borrowed from the reader
    uint64_t begin = 0;
    uint64_t end = 0;
  };
  virtual std::optional<Extent> StoredAt(size_t index) const = 0;

 protected:
  // INVALID_ARGUMENT INVALID_FIELD where `index` or the size of `out` is not as Read wants it.
  absl::Status CheckReadArguments(size_t index, absl::Span<uint8_t> out) const;
  // Reads `bytes` of the file from `offset` on. Each piece is given to `take` as well, while it is
  // in the cache.
  static absl::Status ReadPieces(
      const File& file, uint64_t offset, uint64_t bytes, PlaceBytes place, ReadPass& pass,
      absl::FunctionRef<void(absl::Span<const uint8_t>)> take = [](absl::Span<const uint8_t>) {});

  std::vector<StoredTensor> tensors_;
  std::map<std::string, std::string> metadata_;
  std::map<std::string, int64_t> module_versions_;
};

struct OpenOptions {
  // Key path of the state_dict inside a nested PyTorch file, parts joined by dots: "model",
  // "ema.state_dict". Empty: the top level, or else the first of model, state_dict, module,
  // model_state_dict, model_state that holds tensors.
  std::string state_dict_key;
  // Tensors of safetensors whose dtype no module holds are given as bytes; else they are refused.
  bool allow_opaque = false;
  // Opens a file that lies beside the one that is read, by its plain name: the shards of an index.
  // Not set: an index is refused. Called while opening only.
  std::function<absl::StatusOr<File>(const std::string& name)> open_sibling;
};

// Tells the format by the first bytes, not by the name.
absl::StatusOr<std::unique_ptr<CheckpointReader>> OpenCheckpoint(File file,
                                                                 const OpenOptions& options = {});

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_FORMAT_CHECKPOINT_READER_H_
