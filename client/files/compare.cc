#include "client/files/compare.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/base/status.h"
#include "common/base/tensor_cast.h"

namespace modelstate::client {
namespace {

constexpr uint64_t kBatchBytes = uint64_t{32} << 20;
constexpr size_t kBatchTensors = 10000;
constexpr int64_t kBlock = 4096;

// Numbers of `count` elements; a complex element is two.
struct Numbers {
  DType dtype;
  int64_t count;
};
Numbers NumbersOf(const TensorSpec& spec) {
  const int64_t count = spec.shape.num_elements();
  if (spec.dtype == DType::kC64) return {DType::kF32, 2 * count};
  return {spec.dtype, count};
}

void CompareElements(const TensorSpec& spec_a, absl::Span<const uint8_t> bytes_a,
                     const TensorSpec& spec_b, absl::Span<const uint8_t> bytes_b,
                     TensorComparison* result) {
  Numbers a = NumbersOf(spec_a);
  Numbers b = NumbersOf(spec_b);
  const bool same_dtype = spec_a.dtype == spec_b.dtype;
  std::vector<uint8_t> real;
  if (a.count != b.count) {
    // Complex against real: as complex.
    TensorSpec widened = a.count < b.count ? spec_a : spec_b;
    const DType from = widened.dtype;
    widened.dtype = DType::kC64;
    absl::Span<const uint8_t>& bytes = a.count < b.count ? bytes_a : bytes_b;
    real.resize(widened.nbytes());
    CastElements(from, bytes.data(), DType::kC64, real.data(), widened.shape.num_elements());
    bytes = real;
    (a.count < b.count ? a : b) = NumbersOf(widened);
  }
  const size_t size_a = DTypeSize(a.dtype);
  const size_t size_b = DTypeSize(b.dtype);
  double block_a[kBlock];
  double block_b[kBlock];
  result->compared = true;
  result->elements = static_cast<uint64_t>(a.count);
  for (int64_t begin = 0; begin < a.count; begin += kBlock) {
    const int64_t count = std::min(kBlock, a.count - begin);
    const uint8_t* from_a = bytes_a.data() + static_cast<size_t>(begin) * size_a;
    const uint8_t* from_b = bytes_b.data() + static_cast<size_t>(begin) * size_b;
    CastElements(a.dtype, from_a, DType::kF64, reinterpret_cast<uint8_t*>(block_a), count);
    CastElements(b.dtype, from_b, DType::kF64, reinterpret_cast<uint8_t*>(block_b), count);
    for (int64_t i = 0; i < count; ++i) {
      const bool finite_a = std::isfinite(block_a[i]);
      const bool finite_b = std::isfinite(block_b[i]);
      result->nonfinite_a += finite_a ? 0 : 1;
      result->nonfinite_b += finite_b ? 0 : 1;
      const size_t at = static_cast<size_t>(i);
      const bool differs =
          same_dtype
              ? std::memcmp(from_a + at * size_a, from_b + at * size_b, size_a) != 0
              : block_a[i] != block_b[i] && !(std::isnan(block_a[i]) && std::isnan(block_b[i]));
      if (!differs) continue;
      ++result->different;
      if (finite_a && finite_b) {
        result->max_abs_difference =
            std::max(result->max_abs_difference, std::fabs(block_a[i] - block_b[i]));
      }
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
    absl::StrAppend(&text, result.different, " of ", result.elements,
                    " elements differ, by at most ",
                    absl::StrFormat("%.6g", result.max_abs_difference));
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
    result.equal = spec_a.dtype == spec_b.dtype && result.different == 0;
    result.what = Describe(spec_a, spec_b, result);
    if (result.equal) ++comparison->equal;
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
    batch.push_back({i, index_b, comparison.tensors.size()});
    batch_bytes += bytes;
    comparison.tensors.push_back(std::move(result));
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
