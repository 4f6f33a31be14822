#include "server/optim/cuda/step_executor.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/string_view.h"
#include "common/base/status.h"
#include "server/device/cuda/copy_list.h"
#include "server/device/cuda/cuda_status.h"
#include "server/optim/cuda/kernels.h"
#include "server/optim/default_arithmetic.h"

namespace modelstate {

absl::StatusOr<CudaStepExecutor> CudaStepExecutor::Create(const CudaStream& stream) {
  MS_ASSIGN_OR_RETURN(CudaEvent event, CudaEvent::Create(stream.device()));
  return CudaStepExecutor(stream, std::move(event));
}

CudaStepExecutor::~CudaStepExecutor() {
  if (done_.handle() != nullptr) (void)Finish();
}

absl::Status CudaStepExecutor::Finish() const {
  return recorded_ ? done_.Synchronize() : stream_->Synchronize();
}

absl::Status CudaStepExecutor::RecordEnd() {
  MS_RETURN_IF_ERROR(done_.Record(*stream_));
  recorded_ = true;
  return absl::OkStatus();
}

uint64_t CudaStepExecutor::Place(uint64_t bytes) {
  const uint64_t place = end_;
  end_ += (bytes + 255) / 256 * 256;
  return place;
}

absl::Status CudaStepExecutor::Reserve() {
  // Half as much again, so that steps that grow do not allocate every time.
  const uint64_t bytes = end_ + end_ / 2;
  if (host_.size() < end_) {
    host_ = PinnedMemory();
    MS_ASSIGN_OR_RETURN(host_, PinnedMemory::Allocate(bytes));
  }
  if (device_.size() < end_) {
    device_ = CudaMemory();
    MS_ASSIGN_OR_RETURN(device_, CudaMemory::Allocate(stream_->device(), bytes));
  }
  return absl::OkStatus();
}

// By a kernel: the copy engines may be busy with what readers and loads have enqueued.
absl::Status CudaStepExecutor::CopyToDevice(uint64_t bytes) {
  if (bytes == 0) return absl::OkStatus();
  auto* const copies = OnHost<CudaCopy>(copies_);
  const CudaCopy* const end = AppendCopy({host_.data(), device_.data(), bytes}, copies);
  return CudaStatus(
      LaunchCopyList({copies, static_cast<uint64_t>(end - copies)}, stream_->handle()),
      "copy a step's lists to the device");
}

void CudaStepExecutor::PlaceCopies(uint64_t bytes) {
  copies_ = Place((bytes / kCudaCopyBytes + 1) * sizeof(CudaCopy));
}

template <typename T>
void CudaStepExecutor::PlaceLists(const StepPlan& plan, const CudaStepLayout::Half& half,
                                  Places* places) {
  if (half.tensors == 0) return;
  places->tensors = Place(half.tensors * sizeof(CudaTensor<T>));
  places->parts = Place(plan.parts.size() * sizeof(CudaPart<T>));
  places->scalars = Place(plan.scalars.size() * kMaxRuleScalars * sizeof(T));
  places->blocks = Place(half.blocks * sizeof(CudaBlock));
}

template <typename T>
absl::Status CudaStepExecutor::FillLists(const StepPlan& plan, const CudaStepLayout::Half& half,
                                         const Places& places, ComputePool& compute) {
  if (half.tensors == 0) return absl::OkStatus();
  return FillCudaStepLists<T>(
      plan, layout_, compute,
      {OnHost<CudaTensor<T>>(places.tensors), OnHost<CudaPart<T>>(places.parts),
       OnHost<T>(places.scalars), OnHost<CudaBlock>(places.blocks)});
}

absl::Status CudaStepExecutor::Prepare(const StepPlan& plan, ComputePool& compute) {
  const DefaultArithmetic arithmetic;  // of the scalars that are rounded
  layout_ = MakeCudaStepLayout(plan, compute);
  algorithm_ = plan.algorithm;
  clip_value_ = plan.clip_value;
  tensor_count_ = plan.tensors.size();
  MS_RETURN_IF_ERROR(Finish());
  end_ = 0;
  PlaceLists<float>(plan, layout_.narrow, &narrow_);
  PlaceLists<double>(plan, layout_.wide, &wide_);
  joins_ = Place(tensor_count_ * sizeof(CudaJoin));
  const uint64_t lists_end = end_;
  PlaceCopies(lists_end);
  results_ = Place(tensor_count_ * sizeof(CudaBlockNorm));
  const uint64_t blocks = layout_.narrow.blocks + layout_.wide.blocks;
  norms_ = Place(blocks * sizeof(CudaBlockNorm));
  scratch_ = Place(blocks * sizeof(CudaBlockNorm));
  narrow_.norms = norms_;
  wide_.norms = norms_ + layout_.narrow.blocks * sizeof(CudaBlockNorm);
  MS_RETURN_IF_ERROR(Reserve());
  MS_RETURN_IF_ERROR(FillLists<float>(plan, layout_.narrow, narrow_, compute));
  MS_RETURN_IF_ERROR(FillLists<double>(plan, layout_.wide, wide_, compute));
  ForEachPiece(tensor_count_, compute, [&](size_t begin, size_t end) {
    for (size_t t = begin; t < end; ++t) {
      const bool wide = plan.tensors[t].dtype == DType::kF64;
      OnHost<CudaJoin>(joins_)[t] = {layout_.first_block[t] + (wide ? layout_.narrow.blocks : 0),
                                     CudaBlockCount(plan.tensors[t].elements)};
    }
  });
  CudaDeviceGuard guard(stream_->device());
  MS_RETURN_IF_ERROR(guard.status());
  recorded_ = false;
  MS_RETURN_IF_ERROR(CopyToDevice(lists_end));
  return RecordEnd();
}

template <typename T>
cudaError_t CudaStepExecutor::LaunchNorms(const CudaStepLayout::Half& half, const Places& places) {
  return LaunchNorm(
      CudaNormWork<T>{OnDevice<CudaBlock>(places.blocks), half.blocks,
                      OnDevice<CudaTensor<T>>(places.tensors), OnDevice<CudaPart<T>>(places.parts),
                      OnDevice<CudaBlockNorm>(places.norms)},
      stream_->handle());
}

absl::StatusOr<std::vector<TensorNorm>> CudaStepExecutor::ComputeNorms() {
  constexpr absl::string_view kWhat = "start the kernels of the gradients' norm";
  CudaDeviceGuard guard(stream_->device());
  MS_RETURN_IF_ERROR(guard.status());
  recorded_ = false;
  MS_RETURN_IF_ERROR(CudaStatus(LaunchNorms<float>(layout_.narrow, narrow_), kWhat));
  MS_RETURN_IF_ERROR(CudaStatus(LaunchNorms<double>(layout_.wide, wide_), kWhat));
  // The results go to the host's memory by the kernel: a copy would wait behind those of readers.
  const CudaJoinWork joins = {OnDevice<CudaJoin>(joins_), tensor_count_,
                              OnDevice<CudaBlockNorm>(norms_), OnDevice<CudaBlockNorm>(scratch_),
                              OnHost<CudaBlockNorm>(results_)};
  MS_RETURN_IF_ERROR(CudaStatus(LaunchJoin(joins, stream_->handle()), kWhat));
  MS_RETURN_IF_ERROR(RecordEnd());
  MS_RETURN_IF_ERROR(done_.Synchronize());
  std::vector<TensorNorm> norms(tensor_count_);
  for (size_t t = 0; t < tensor_count_; ++t) {
    const CudaBlockNorm& result = OnHost<CudaBlockNorm>(results_)[t];
    norms[t] = {result.sum_of_squares, result.finite != 0};
  }
  return norms;
}

template <typename T>
cudaError_t CudaStepExecutor::LaunchUpdates(const CudaStepLayout::Half& half, const Places& places,
                                            double clip_coef) {
  for (const CudaStepLayout::Launch& launch : half.launches) {
    const CudaUpdateWork<T> work = {OnDevice<CudaBlock>(places.blocks) + launch.first_block,
                                    launch.block_count,
                                    OnDevice<CudaTensor<T>>(places.tensors),
                                    OnDevice<CudaPart<T>>(places.parts),
                                    OnDevice<T>(places.scalars),
                                    static_cast<T>(clip_coef),
                                    static_cast<T>(clip_value_)};
    const cudaError_t error = LaunchUpdate(algorithm_, launch.variant, work, stream_->handle());
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

absl::Status CudaStepExecutor::Update(double clip_coef) {
  const DefaultArithmetic arithmetic;
  constexpr absl::string_view kWhat = "start an update's kernel";
  CudaDeviceGuard guard(stream_->device());
  MS_RETURN_IF_ERROR(guard.status());
  recorded_ = false;
  MS_RETURN_IF_ERROR(CudaStatus(LaunchUpdates<float>(layout_.narrow, narrow_, clip_coef), kWhat));
  MS_RETURN_IF_ERROR(CudaStatus(LaunchUpdates<double>(layout_.wide, wide_, clip_coef), kWhat));
  return RecordEnd();
}

namespace {

template <typename T>
absl::Status MakeAdditions(absl::Span<const StepExecutor::Addition> additions, bool wide,
                           std::vector<CudaAddition<T>>* made, std::vector<CudaBlock>* blocks) {
  for (const StepExecutor::Addition& addition : additions) {
    if (addition.wide != wide) continue;
    CudaAddition<T> each{};
    MS_ASSIGN_OR_RETURN(each.from, MakeCudaPart<T>(addition.from));
    each.to = reinterpret_cast<T*>(addition.to);
    each.elements = addition.elements;
    each.add = addition.add;
    each.vectors = AllowsVectors(addition.from.data) && AllowsVectors(addition.to);
    for (uint64_t b = 0; b < CudaBlockCount(addition.elements); ++b) {
      blocks->push_back({static_cast<uint32_t>(made->size()), static_cast<uint32_t>(b)});
    }
    made->push_back(each);
  }
  return absl::OkStatus();
}

template <typename T>
void WriteTo(T* to, const std::vector<T>& list) {
  if (!list.empty()) std::memcpy(to, list.data(), list.size() * sizeof(T));
}

}  // namespace

absl::Status CudaStepExecutor::Prepare(absl::Span<const StepExecutor::Addition> additions) {
  const DefaultArithmetic arithmetic;
  std::vector<CudaAddition<float>> narrow;
  std::vector<CudaAddition<double>> wide;
  std::vector<CudaBlock> narrow_blocks, wide_blocks;
  MS_RETURN_IF_ERROR(MakeAdditions(additions, false, &narrow, &narrow_blocks));
  MS_RETURN_IF_ERROR(MakeAdditions(additions, true, &wide, &wide_blocks));
  MS_RETURN_IF_ERROR(Finish());
  end_ = 0;
  const uint64_t narrow_place = Place(narrow.size() * sizeof(narrow[0]));
  const uint64_t wide_place = Place(wide.size() * sizeof(wide[0]));
  const uint64_t narrow_blocks_place = Place(narrow_blocks.size() * sizeof(CudaBlock));
  const uint64_t wide_blocks_place = Place(wide_blocks.size() * sizeof(CudaBlock));
  const uint64_t lists_end = end_;
  PlaceCopies(lists_end);
  MS_RETURN_IF_ERROR(Reserve());
  WriteTo(OnHost<CudaAddition<float>>(narrow_place), narrow);
  WriteTo(OnHost<CudaAddition<double>>(wide_place), wide);
  WriteTo(OnHost<CudaBlock>(narrow_blocks_place), narrow_blocks);
  WriteTo(OnHost<CudaBlock>(wide_blocks_place), wide_blocks);
  CudaDeviceGuard guard(stream_->device());
  MS_RETURN_IF_ERROR(guard.status());
  recorded_ = false;
  MS_RETURN_IF_ERROR(CopyToDevice(lists_end));
  narrow_sums_ = {OnDevice<CudaBlock>(narrow_blocks_place), narrow_blocks.size(),
                  OnDevice<CudaAddition<float>>(narrow_place)};
  wide_sums_ = {OnDevice<CudaBlock>(wide_blocks_place), wide_blocks.size(),
                OnDevice<CudaAddition<double>>(wide_place)};
  return RecordEnd();
}

absl::Status CudaStepExecutor::Accumulate() {
  constexpr absl::string_view kWhat = "start the kernel that accumulates";
  CudaDeviceGuard guard(stream_->device());
  MS_RETURN_IF_ERROR(guard.status());
  recorded_ = false;
  MS_RETURN_IF_ERROR(CudaStatus(LaunchAccumulate(narrow_sums_, stream_->handle()), kWhat));
  MS_RETURN_IF_ERROR(CudaStatus(LaunchAccumulate(wide_sums_, stream_->handle()), kWhat));
  return RecordEnd();
}

}  // namespace modelstate
