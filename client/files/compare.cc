#include "client/files/compare.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "absl/base/casts.h"
#include "absl/container/flat_hash_map.h"
#include "absl/numeric/int128.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/base/status.h"
#include "common/base/tensor_cast.h"

namespace modelstate::client {
namespace {

constexpr uint64_t kBatchBytes = uint64_t{32} << 20;
constexpr uint64_t kPartBytes = uint64_t{4} << 20;
constexpr size_t kBatchTensors = 10000;
constexpr int64_t kBlock = 4096;

// Up to this every double is a multiple of 1 that fits into an absl::int128, or has a fraction.
constexpr double kInt128 = 0x1p126;

bool IsInteger(DType dtype) { return !IsFloatingPoint(dtype) && dtype != DType::kC64; }

// A block of a tensor's numbers, without rounding: integers as 64 bits, the rest as doubles.
class Numbers {
 public:
  // `as_pairs`: each number is followed by a zero, as a complex one.
  Numbers(const TensorSpec& spec, absl::Span<const uint8_t> bytes, bool as_pairs)
      : dtype_(spec.dtype == DType::kC64 ? DType::kF32 : spec.dtype),
        block_dtype_(!IsInteger(dtype_)      ? DType::kF64
                     : dtype_ == DType::kU64 ? DType::kU64
                                             : DType::kI64),
        bytes_(bytes.data()),
        as_pairs_(as_pairs) {}

  bool integer() const { return block_dtype_ != DType::kF64; }

  // `begin` and `count` count what is stored; it becomes twice as many where as_pairs.
  void Load(int64_t begin, int64_t count) {
    const uint8_t* from = bytes_ + static_cast<size_t>(begin) * DTypeSize(dtype_);
    CastElements(dtype_, from, block_dtype_, reinterpret_cast<uint8_t*>(block_), count);
    if (!as_pairs_) return;
    for (size_t i = static_cast<size_t>(count); i-- > 0;) {
      block_[2 * i] = block_[i];
      block_[2 * i + 1] = 0;  // also the bits of 0.0
    }
  }

  double real(size_t i) const { return absl::bit_cast<double>(block_[i]); }
  absl::int128 integer(size_t i) const {
    if (block_dtype_ == DType::kU64) return block_[i];
    return static_cast<int64_t>(block_[i]);
  }
  bool finite(size_t i) const { return integer() || std::isfinite(real(i)); }

 private:
  const DType dtype_;
  const DType block_dtype_;
  const uint8_t* const bytes_;
  const bool as_pairs_;
  uint64_t block_[kBlock];
};

double Difference(absl::int128 a, double b) {
  if (std::fabs(b) >= kInt128) return std::fabs(static_cast<double>(a) - b);
  const double whole = std::trunc(b);
  return std::fabs(static_cast<double>(a - static_cast<absl::int128>(whole)) - (b - whole));
}

// Adds the next elements of a pair of tensors to what is known of them.
void CompareElements(const TensorSpec& spec_a, absl::Span<const uint8_t> bytes_a,
                     const TensorSpec& spec_b, absl::Span<const uint8_t> bytes_b,
                     TensorComparison* result) {
  const bool complex_a = spec_a.dtype == DType::kC64;
  const bool complex_b = spec_b.dtype == DType::kC64;
  const bool complex = complex_a || complex_b;
  Numbers a(spec_a, bytes_a, complex && !complex_a);
  Numbers b(spec_b, bytes_b, complex && !complex_b);
  const bool same_dtype = spec_a.dtype == spec_b.dtype;
  const bool integers = a.integer() && b.integer();
  const int64_t per_element = complex ? 2 : 1;
  const size_t size = DTypeSize(spec_a.dtype) / static_cast<size_t>(per_element);
  const int64_t total =
      per_element * static_cast<int64_t>(bytes_a.size() / DTypeSize(spec_a.dtype));
  result->compared = true;
  result->elements += static_cast<uint64_t>(total);
  if (integers && !result->max_integer_difference) result->max_integer_difference = 0;
  for (int64_t begin = 0; begin < total; begin += kBlock) {
    const int64_t count = std::min(kBlock, total - begin);
    const int64_t stored_a = complex_a ? 1 : per_element;
    const int64_t stored_b = complex_b ? 1 : per_element;
    a.Load(begin / stored_a, count / stored_a);
    b.Load(begin / stored_b, count / stored_b);
    for (size_t i = 0; i < static_cast<size_t>(count); ++i) {
      const bool finite_a = a.finite(i);
      const bool finite_b = b.finite(i);
      result->nonfinite_a += finite_a ? 0 : 1;
      result->nonfinite_b += finite_b ? 0 : 1;
      double difference = 0;
      if (integers) {
        const absl::int128 x = a.integer(i);
        const absl::int128 y = b.integer(i);
        const absl::int128 magnitude = x > y ? x - y : y - x;
        difference = static_cast<double>(magnitude);
        result->max_integer_difference =
            std::max(*result->max_integer_difference,
                     magnitude > UINT64_MAX ? UINT64_MAX : static_cast<uint64_t>(magnitude));
      } else if (finite_a && finite_b) {
        difference = a.integer()   ? Difference(a.integer(i), b.real(i))
                     : b.integer() ? Difference(b.integer(i), a.real(i))
                                   : std::fabs(a.real(i) - b.real(i));
      }
      bool differs = difference != 0;
      if (same_dtype) {
        const size_t at = (static_cast<size_t>(begin) + i) * size;
        differs = std::memcmp(bytes_a.data() + at, bytes_b.data() + at, size) != 0;
      } else if (!finite_a || !finite_b) {
        // Of these at most one is an integer, and that is finite.
        const bool alike =
            !finite_a && !finite_b &&
            (a.real(i) == b.real(i) || (std::isnan(a.real(i)) && std::isnan(b.real(i))));
        differs = !alike;
      }
      if (!differs) continue;
      ++result->different;
      result->max_abs_difference = std::max(result->max_abs_difference, difference);
    }
  }
}

std::string Describe(const TensorSpec& a, const TensorSpec& b, const TensorComparison& result) {
  std::string text;
  if (a.dtype != b.dtype) {
    absl::StrAppend(&text, "dtype ", DTypeName(a.dtype), " and ", DTypeName(b.dtype), ", ");
  }
  if (result.different == 0) {
    absl::StrAppend(&text, text.empty() ? "equal" : "values equal");
  } else {
    absl::StrAppend(
        &text, result.different, " of ", result.elements, " elements differ, by at most ",
        result.max_integer_difference ? absl::StrCat(*result.max_integer_difference)
                                      : absl::StrFormat("%.6g", result.max_abs_difference));
  }
  if (result.nonfinite_a + result.nonfinite_b > 0) {
    absl::StrAppend(&text, ", non-finite ", result.nonfinite_a, " and ", result.nonfinite_b);
  }
  return text;
}

struct Pair {
  size_t a;
  size_t b;
  size_t result;
};

void Conclude(const TensorSpec& a, const TensorSpec& b, TensorComparison* result,
              Comparison* comparison) {
  result->equal = a.dtype == b.dtype && result->different == 0;
  result->what = Describe(a, b, *result);
  if (result->equal) ++comparison->equal;
}

// Of a pair that is more than a batch, so that neither has to be held whole.
absl::Status CompareInParts(TensorSource& a, TensorSource& b, const Pair& pair,
                            Comparison* comparison) {
  const TensorSpec& spec_a = a.specs()[pair.a];
  const TensorSpec& spec_b = b.specs()[pair.b];
  const uint64_t width_a = DTypeSize(spec_a.dtype);
  const uint64_t width_b = DTypeSize(spec_b.dtype);
  const uint64_t total = static_cast<uint64_t>(spec_a.shape.num_elements());
  const uint64_t most = kPartBytes / std::max(width_a, width_b);
  TensorComparison& result = comparison->tensors[pair.result];
  for (uint64_t begin = 0; begin < total; begin += most) {
    const uint64_t count = std::min(most, total - begin);
    MS_ASSIGN_OR_RETURN(const absl::Span<const uint8_t> part_a,
                        a.ReadPart(pair.a, begin * width_a, count * width_a));
    absl::Span<const uint8_t> part_b = part_a;
    if (&a != &b) {
      MS_ASSIGN_OR_RETURN(part_b, b.ReadPart(pair.b, begin * width_b, count * width_b));
    }
    CompareElements(spec_a, part_a, spec_b, part_b, &result);
  }
  Conclude(spec_a, spec_b, &result, comparison);
  return absl::OkStatus();
}

absl::Status CompareBatch(TensorSource& a, TensorSource& b, std::vector<Pair>* pairs,
                          Comparison* comparison) {
  std::vector<size_t> of_a;
  std::vector<size_t> of_b;
  for (const Pair& pair : *pairs) {
    of_a.push_back(pair.a);
    of_b.push_back(pair.b);
  }
  if (pairs->empty()) return absl::OkStatus();
  MS_ASSIGN_OR_RETURN(const std::vector<absl::Span<const uint8_t>> bytes_a, a.Read(of_a));
  // One source may be compared with itself, and a second Read ends the first.
  const bool itself = &a == &b;
  std::vector<absl::Span<const uint8_t>> bytes_b = bytes_a;
  if (!itself) {
    MS_ASSIGN_OR_RETURN(bytes_b, b.Read(of_b));
  }
  for (size_t i = 0; i < pairs->size(); ++i) {
    const TensorSpec& spec_a = a.specs()[of_a[i]];
    const TensorSpec& spec_b = b.specs()[of_b[i]];
    TensorComparison& result = comparison->tensors[(*pairs)[i].result];
    CompareElements(spec_a, bytes_a[i], spec_b, bytes_b[i], &result);
    Conclude(spec_a, spec_b, &result, comparison);
  }
  pairs->clear();
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<Comparison> CompareTensors(TensorSource& a, TensorSource& b) {
  absl::flat_hash_map<std::string, size_t> in_b;
  for (size_t i = 0; i < b.specs().size(); ++i) in_b.emplace(b.specs()[i].name, i);
  Comparison comparison;
  std::vector<Pair> batch;
  uint64_t batch_bytes = 0;
  for (size_t i = 0; i < a.specs().size(); ++i) {
    const TensorSpec& spec_a = a.specs()[i];
    TensorComparison result;
    result.name = spec_a.name;
    const auto it = in_b.find(spec_a.name);
    if (it == in_b.end()) {
      result.what = absl::StrCat("only in ", a.name());
      comparison.tensors.push_back(std::move(result));
      continue;
    }
    const size_t index_b = it->second;
    in_b.erase(it);
    const TensorSpec& spec_b = b.specs()[index_b];
    if (spec_a.shape != spec_b.shape) {
      result.what =
          absl::StrCat("shape ", spec_a.shape.ToString(), " and ", spec_b.shape.ToString());
      comparison.tensors.push_back(std::move(result));
      continue;
    }
    const uint64_t bytes = std::max(spec_a.nbytes(), spec_b.nbytes());
    if (batch_bytes + bytes > kBatchBytes || batch.size() >= kBatchTensors) {
      MS_RETURN_IF_ERROR(CompareBatch(a, b, &batch, &comparison));
      batch_bytes = 0;
    }
    const Pair pair = {i, index_b, comparison.tensors.size()};
    comparison.tensors.push_back(std::move(result));
    if (bytes > kBatchBytes) {
      MS_RETURN_IF_ERROR(CompareInParts(a, b, pair, &comparison));
    } else {
      batch.push_back(pair);
      batch_bytes += bytes;
    }
  }
  MS_RETURN_IF_ERROR(CompareBatch(a, b, &batch, &comparison));
  for (const TensorSpec& spec : b.specs()) {
    if (!in_b.contains(spec.name)) continue;
    TensorComparison result;
    result.name = spec.name;
    result.what = absl::StrCat("only in ", b.name());
    comparison.tensors.push_back(std::move(result));
  }
  return comparison;
}

}  // namespace modelstate::client
