#include "bench/payload.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "bench/support.h"
#include "common/base/state_layout.h"

namespace modelstate {
namespace {

TensorSpec Parameter(size_t index, uint64_t bytes) {
  TensorSpec spec;
  spec.name = absl::StrCat("layers.", index, ".weight");
  spec.shape = OrDie(Shape::Create({static_cast<int64_t>(bytes / sizeof(float))}));
  return spec;
}

}  // namespace

std::vector<TensorSpec> MixedTensors(uint64_t bytes) {
  constexpr uint64_t kSmallest = 4;
  constexpr uint64_t kLargest = uint64_t{64} << 20;
  std::vector<TensorSpec> specs;
  uint64_t size = kSmallest;
  for (uint64_t left = bytes / 4 * 4; left > 0;) {
    const uint64_t take = std::min(size, left);
    specs.push_back(Parameter(specs.size(), take));
    left -= take;
    size = size == kLargest ? kSmallest : size * 4;
  }
  return specs;
}

std::vector<TensorSpec> EqualTensors(uint64_t count, uint64_t bytes_each) {
  std::vector<TensorSpec> specs;
  for (uint64_t i = 0; i < count; ++i) specs.push_back(Parameter(i, bytes_each));
  return specs;
}

Payload::Payload(std::vector<TensorSpec> specs) : specs_(std::move(specs)) {
  const StateLayout layout(specs_);
  for (size_t i = 0; i < specs_.size(); ++i) offsets_.push_back(layout.range(i).begin);
  words_.resize(layout.total_bytes() / sizeof(uint32_t));
  // Floats from 1 to 2: the bits of the place, scrambled, are the mantissa.
  for (size_t i = 0; i < words_.size(); ++i) {
    words_[i] = 0x3f800000U | (static_cast<uint32_t>(i) * 2654435761U >> 9);
  }
}

absl::Span<const uint8_t> Payload::bytes() const {
  return {reinterpret_cast<const uint8_t*>(words_.data()), words_.size() * sizeof(uint32_t)};
}

std::vector<client::TensorRef> Payload::Tensors(TensorKind kind) const {
  std::vector<client::TensorRef> tensors(specs_.size());
  for (size_t i = 0; i < specs_.size(); ++i) {
    tensors[i].spec = specs_[i];
    tensors[i].spec.kind = kind;
    tensors[i].bytes = bytes().subspan(offsets_[i], specs_[i].nbytes());
  }
  return tensors;
}

void Payload::Check(absl::Span<const uint8_t> received, const char* what) const {
  const absl::Span<const uint8_t> sent = bytes();
  if (received.size() == sent.size() &&
      std::memcmp(received.data(), sent.data(), sent.size()) == 0) {
    return;
  }
  std::fprintf(stderr, "%s: other bytes arrived than were sent\n", what);
  std::exit(1);
}

}  // namespace modelstate
