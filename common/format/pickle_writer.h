#ifndef MODELSTATE_COMMON_FORMAT_PICKLE_WRITER_H_
#define MODELSTATE_COMMON_FORMAT_PICKLE_WRITER_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "common/base/dtype.h"
#include "common/base/shape.h"

namespace modelstate {

// Writes the text of a pickle, protocol 2, by the opcodes that torch.load(weights_only=True) takes.
// Internal to the folder.
class PickleWriter {
 public:
  PickleWriter() : text_("\x80\x02") {}

  void Op(char opcode) { text_.push_back(opcode); }
  void Int(uint64_t value);
  void Float(double value);
  void String(absl::string_view text);
  // Not remembered, as there is no second mention of it.
  void UniqueString(absl::string_view text);
  void Global(absl::string_view module, absl::string_view name);
  void Tuple(absl::Span<const uint64_t> items);
  // A contiguous tensor that is the whole storage `key`, without requires_grad. PyTorch 1.13 reads
  // those of dtypes that have a storage class there: all but F8_* and U16, U32 and U64.
  void Tensor(absl::string_view key, DType dtype, const Shape& shape);
  void OrderedDict();  // an empty one

  std::string Finish() &&;

 private:
  void Little(uint64_t value, size_t width);
  bool Recall(const std::string& what);
  void Memoize(const std::string& what);

  std::string text_;
  absl::flat_hash_map<std::string, size_t> memo_;
};

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_FORMAT_PICKLE_WRITER_H_
