#include "server/optim/norm_stream.h"

#include <algorithm>
#include <cstring>

#include "server/optim/block_kernels.h"
#include "server/optim/default_arithmetic.h"
#include "server/optim/tree_sum.h"

namespace modelstate {

struct NormStream::Impl {
  explicit Impl(InstructionSet set) : kernels(GetBlockKernels(set)) {}

  void AddBlock(const uint8_t* data, size_t bytes) {
    part.data = data;
    const BlockNorm norm = kernels.part_norm(part, wide, bytes / DTypeSize(part.dtype));
    sums.push_back(norm.sum_of_squares);
    finite &= norm.finite;
  }

  const BlockKernels& kernels;
  GradientPart part;
  bool wide = false;
  size_t block_bytes = 0;
  std::vector<double> sums;
  bool finite = true;
  // A block of which a part has come.
  std::vector<uint8_t> begun;
};

NormStream::NormStream(InstructionSet set) : impl_(std::make_unique<Impl>(set)) {}
NormStream::~NormStream() = default;

void NormStream::Begin(DType dtype, DType parameter_dtype, double grad_scale) {
  const DefaultArithmetic arithmetic;  // of the division
  impl_->part.dtype = dtype;
  impl_->part.inverse_scale = 1 / grad_scale;
  impl_->wide = parameter_dtype == DType::kF64;
  impl_->block_bytes = kBlockElements * DTypeSize(dtype);
  impl_->sums.clear();
  impl_->finite = true;
  impl_->begun.clear();
}

void NormStream::Update(absl::Span<const uint8_t> bytes) {
  std::vector<uint8_t>& begun = impl_->begun;
  const size_t block = impl_->block_bytes;
  if (!begun.empty()) {
    const size_t more = std::min(bytes.size(), block - begun.size());
    begun.insert(begun.end(), bytes.begin(), bytes.begin() + static_cast<int64_t>(more));
    bytes.remove_prefix(more);
    if (begun.size() < block) return;
    impl_->AddBlock(begun.data(), block);
    begun.clear();
  }
  for (; bytes.size() >= block; bytes.remove_prefix(block)) impl_->AddBlock(bytes.data(), block);
  begun.insert(begun.end(), bytes.begin(), bytes.end());
}

TensorNorm NormStream::Finish() {
  const DefaultArithmetic arithmetic;
  if (!impl_->begun.empty()) impl_->AddBlock(impl_->begun.data(), impl_->begun.size());
  return {TreeSum(absl::MakeSpan(impl_->sums)), impl_->finite};
}

}  // namespace modelstate
