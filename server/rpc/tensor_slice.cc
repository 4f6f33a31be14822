#include "server/rpc/tensor_slice.h"

#include <algorithm>
#include <cstring>
#include <optional>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/base/status.h"

namespace modelstate {
namespace {

constexpr size_t kMaxTextBytes = 4096;

absl::Status Refuse(absl::string_view text, absl::string_view rule) {
  return MakeError(
      Reason::kInvalidField,
      absl::StrCat("slice \"", absl::Utf8SafeCEscape(text.substr(0, 100)), "\": ", rule,
                   "; write it as between the brackets in Python: \"0\", \"-1, ::2\", "
                   "\"..., 3:5\""),
      {{"field", "slice"}});
}

// Elements start, start + step, ... of a dimension, `count` of them.
struct Range {
  int64_t start = 0;
  int64_t step = 1;
  int64_t count = 0;
};

// Python's slice.indices(size), for positive steps.
Range MakeRange(std::optional<int64_t> start, std::optional<int64_t> stop, int64_t step,
                int64_t size) {
  const auto clamp = [size](int64_t index) {
    if (index < 0) index = index < -size ? 0 : index + size;
    return std::min(index, size);
  };
  const int64_t begin = clamp(start.value_or(0));
  const int64_t end = clamp(stop.value_or(size));
  return {begin, step, begin < end ? (end - begin - 1) / step + 1 : 0};
}

}  // namespace

TensorSlice::TensorSlice(const Shape& shape)
    : shape_(shape.dims().begin(), shape.dims().end()),
      strides_(shape.rank(), 1),
      elements_(static_cast<uint64_t>(shape.num_elements())) {
  for (size_t d = shape.rank(); d-- > 1;) strides_[d - 1] = strides_[d] * shape_[d];
}

absl::StatusOr<TensorSlice> TensorSlice::Parse(absl::string_view text, const Shape& shape) {
  if (text.size() > kMaxTextBytes) {
    return Refuse(text, absl::StrCat("it has ", text.size(), " bytes"));
  }
  std::vector<absl::string_view> items = absl::StrSplit(text, ',');
  for (absl::string_view& item : items) item = absl::StripAsciiWhitespace(item);
  if (items.size() > 1 && items.back().empty()) items.pop_back();  // Python's "0,"
  const size_t rank = shape.rank();
  const auto dots = static_cast<size_t>(std::count(items.begin(), items.end(), "..."));
  if (dots > 1) return Refuse(text, "an index can only have a single ellipsis ('...')");
  const size_t given = items.size() - dots;

  // Overflow is not possible: sizes are Shape's, and a tensor without elements has no offsets.
  const TensorSlice whole(shape);
  TensorSlice result;
  size_t d = 0;
  const auto keep = [&](int64_t count, int64_t stride) {
    result.shape_.push_back(count);
    result.strides_.push_back(stride);
    result.elements_ *= static_cast<uint64_t>(count);
  };
  const auto integer = [&](absl::string_view item) -> absl::StatusOr<int64_t> {
    int64_t value = 0;
    if (absl::SimpleAtoi(item, &value)) return value;
    return Refuse(text, absl::StrCat("\"", absl::Utf8SafeCEscape(item.substr(0, 40)),
                                     "\" is not an integer, a slice or \"...\""));
  };
  for (absl::string_view item : items) {
    if (item == "...") {
      for (size_t skip = rank - std::min(rank, given); skip > 0; --skip, ++d) {
        keep(whole.shape_[d], whole.strides_[d]);
      }
      continue;
    }
    const std::vector<absl::string_view> parts = absl::StrSplit(item, ':');
    std::optional<int64_t> numbers[3];
    if (parts.size() > 3) return Refuse(text, "a slice has at most start, stop and step");
    for (size_t p = 0; p < parts.size(); ++p) {
      if (parts.size() > 1 && absl::StripAsciiWhitespace(parts[p]).empty()) continue;
      MS_ASSIGN_OR_RETURN(numbers[p], integer(parts[p]));
    }
    if (rank == 0) {
      return Refuse(text, parts.size() > 1 ? "slice() cannot be applied to a 0-dim tensor."
                                           : "invalid index of a 0-dim tensor: leave it out");
    }
    if (given > rank) {
      return Refuse(text, absl::StrCat("too many indices for tensor of dimension ", rank));
    }
    const int64_t size = whole.shape_[d];
    if (parts.size() == 1) {
      const int64_t index = *numbers[0];
      if (index < -size || index >= size) {
        return MakeError(
            Reason::kRangeOutsideLayout,
            absl::StrCat("slice: index ", index, " is out of bounds for dimension ", d,
                         " with size ", size, "; the tensor's shape is ", shape.ToString()),
            {{"field", "slice"}, {"shape", shape.ToString()}});
      }
      result.offset_ += (index < 0 ? index + size : index) * whole.strides_[d];
    } else {
      const int64_t step = numbers[2].value_or(1);
      if (step == 0) {
        return Refuse(text, "slice step cannot be zero: step must be greater than zero");
      }
      if (step < 0) return Refuse(text, "step must be greater than zero");
      const Range range = MakeRange(numbers[0], numbers[1], step, size);
      // An empty or single range needs neither: so its product with the stride cannot overflow.
      if (range.count > 0) result.offset_ += range.start * whole.strides_[d];
      keep(range.count, range.count > 1 ? range.step * whole.strides_[d] : 0);
    }
    ++d;
  }
  for (; d < rank; ++d) keep(whole.shape_[d], whole.strides_[d]);
  return result;
}

std::vector<uint8_t> TensorSlice::Gather(absl::Span<const uint8_t> tensor, size_t width,
                                         uint64_t first, uint64_t count) const {
  std::vector<uint8_t> out(count * width);
  for (uint64_t i = 0; i < count; ++i) {
    uint64_t rest = first + i;
    int64_t at = offset_;
    for (size_t d = shape_.size(); d-- > 0;) {
      const auto size = static_cast<uint64_t>(shape_[d]);
      at += static_cast<int64_t>(rest % size) * strides_[d];
      rest /= size;
    }
    std::memcpy(out.data() + i * width, tensor.data() + static_cast<uint64_t>(at) * width, width);
  }
  return out;
}

}  // namespace modelstate
