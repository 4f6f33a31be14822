#include "server/optim/cuda/step_executor.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "server/device/cuda/cuda_status.h"
#include "server/optim/cuda/kernels.h"
#include "server/optim/default_arithmetic.h"
#include "server/optim/tree_sum.h"

namespace modelstate {

absl::StatusOr<CudaStepExecutor> CudaStepExecutor::Create(const CudaStream& stream) {
  MS_ASSIGN_OR_RETURN(CudaEvent event, CudaEvent::Create(stream.device()));
  return CudaStepExecutor(stream, std::move(event));
}

CudaStepExecutor::~CudaStepExecutor() {
  if (done_.handle() != nullptr) (void)done_.Synchronize();
}

uint64_t CudaStepExecutor::Place(uint64_t bytes) {
  const uint64_t place = end_;
  end_ += (bytes + 255) / 256 * 256;
  return place;
}

template <typename T>
void CudaStepExecutor::Write(uint64_t place, const std::vector<T>& list) {
  if (!list.empty()) std::memcpy(host_.data() + place, list.data(), list.size() * sizeof(T));
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

absl::Status CudaStepExecutor::CopyToDevice(uint64_t bytes) {
  if (bytes == 0) return absl::OkStatus();
  return CudaStatus(cudaMemcpyAsync(device_.data(), host_.data(), bytes, cudaMemcpyHostToDevice,
                                    stream_->handle()),
                    "copy a step's lists to the device");
}

template <typename T>
void CudaStepExecutor::PlaceLists(Placed<T>* step) {
  step->tensors = Place(step->lists.tensors.size() * sizeof(CudaTensor<T>));
  step->parts = Place(step->lists.parts.size() * sizeof(CudaPart<T>));
  step->scalars = Place(step->lists.scalars.size() * sizeof(T));
  step->blocks = Place(step->lists.blocks.size() * sizeof(CudaBlock));
}

template <typename T>
void CudaStepExecutor::WriteLists(const Placed<T>& step) {
  Write(step.tensors, step.lists.tensors);
  Write(step.parts, step.lists.parts);
  Write(step.scalars, step.lists.scalars);
  Write(step.blocks, step.lists.blocks);
}

absl::Status CudaStepExecutor::Prepare(const StepPlan& plan) {
  const DefaultArithmetic arithmetic;  // of the scalars that are rounded
  MS_ASSIGN_OR_RETURN(narrow_.lists, MakeCudaStepLists<float>(plan));
  MS_ASSIGN_OR_RETURN(wide_.lists, MakeCudaStepLists<double>(plan));
  algorithm_ = plan.algorithm;
  clip_value_ = plan.clip_value;
  tensor_count_ = plan.tensors.size();
  MS_RETURN_IF_ERROR(done_.Synchronize());
  end_ = 0;
  PlaceLists(&narrow_);
  PlaceLists(&wide_);
  norms_ = end_;
  narrow_.norms = Place(narrow_.lists.blocks.size() * sizeof(CudaBlockNorm));
  wide_.norms = Place(wide_.lists.blocks.size() * sizeof(CudaBlockNorm));
  MS_RETURN_IF_ERROR(Reserve());
  WriteLists(narrow_);
  WriteLists(wide_);
  CudaDeviceGuard guard(stream_->device());
  MS_RETURN_IF_ERROR(guard.status());
  MS_RETURN_IF_ERROR(CopyToDevice(norms_));
  return done_.Record(*stream_);
}

template <typename T>
cudaError_t CudaStepExecutor::LaunchNorms(const Placed<T>& step) {
  const CudaNormWork<T> work = {OnDevice<CudaBlock>(step.blocks), step.lists.blocks.size(),
                                OnDevice<CudaTensor<T>>(step.tensors),
                                OnDevice<CudaPart<T>>(step.parts),
                                reinterpret_cast<CudaBlockNorm*>(device_.data() + step.norms)};
  return LaunchNorm(work, stream_->handle());
}

template <typename T>
void CudaStepExecutor::JoinNorms(const Placed<T>& step, std::vector<double>* sums,
                                 std::vector<bool>* finite) const {
  const auto* norms = reinterpret_cast<const CudaBlockNorm*>(host_.data() + step.norms);
  std::vector<double> blocks;
  for (size_t t = 0; t < step.lists.tensors.size(); ++t) {
    const uint64_t first = step.lists.first_block[t];
    const uint64_t count =
        (step.lists.tensors[t].elements + kCudaBlockElements - 1) / kCudaBlockElements;
    blocks.clear();
    bool all = true;
    for (uint64_t b = first; b < first + count; ++b) {
      blocks.push_back(norms[b].sum_of_squares);
      all &= norms[b].finite != 0;
    }
    (*sums)[step.lists.index[t]] = TreeSum(absl::MakeSpan(blocks));
    (*finite)[step.lists.index[t]] = all;
  }
}

absl::StatusOr<CudaStepNorm> CudaStepExecutor::ComputeNorm() {
  const DefaultArithmetic arithmetic;
  CudaDeviceGuard guard(stream_->device());
  MS_RETURN_IF_ERROR(guard.status());
  MS_RETURN_IF_ERROR(CudaStatus(LaunchNorms(narrow_), "start the kernel of the gradients' norm"));
  MS_RETURN_IF_ERROR(CudaStatus(LaunchNorms(wide_), "start the kernel of the gradients' norm"));
  if (end_ > norms_) {
    MS_RETURN_IF_ERROR(
        CudaStatus(cudaMemcpyAsync(host_.data() + norms_, device_.data() + norms_, end_ - norms_,
                                   cudaMemcpyDeviceToHost, stream_->handle()),
                   "copy the gradients' norms from the device"));
  }
  MS_RETURN_IF_ERROR(done_.Record(*stream_));
  MS_RETURN_IF_ERROR(done_.Synchronize());
  std::vector<double> sums(tensor_count_);
  std::vector<bool> finite(tensor_count_);
  JoinNorms(narrow_, &sums, &finite);
  JoinNorms(wide_, &sums, &finite);
  CudaStepNorm norm;
  for (uint32_t t = 0; t < tensor_count_; ++t) {
    if (!finite[t]) norm.nonfinite.push_back(t);
  }
  norm.total = std::sqrt(TreeSum(absl::MakeSpan(sums)));
  return norm;
}

template <typename T>
cudaError_t CudaStepExecutor::LaunchUpdates(const Placed<T>& step, double clip_coef) {
  for (const auto& launch : step.lists.launches) {
    const CudaUpdateWork<T> work = {OnDevice<CudaBlock>(step.blocks) + launch.first_block,
                                    launch.block_count,
                                    OnDevice<CudaTensor<T>>(step.tensors),
                                    OnDevice<CudaPart<T>>(step.parts),
                                    OnDevice<T>(step.scalars),
                                    static_cast<T>(clip_coef),
                                    static_cast<T>(clip_value_)};
    const cudaError_t error = LaunchUpdate(algorithm_, launch.variant, work, stream_->handle());
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

absl::Status CudaStepExecutor::Update(double clip_coef) {
  const DefaultArithmetic arithmetic;
  CudaDeviceGuard guard(stream_->device());
  MS_RETURN_IF_ERROR(guard.status());
  MS_RETURN_IF_ERROR(CudaStatus(LaunchUpdates(narrow_, clip_coef), "start an update's kernel"));
  MS_RETURN_IF_ERROR(CudaStatus(LaunchUpdates(wide_, clip_coef), "start an update's kernel"));
  return done_.Record(*stream_);
}

namespace {

template <typename T>
absl::Status MakeAdditions(absl::Span<const CudaStepExecutor::Addition> additions, bool wide,
                           std::vector<CudaAddition<T>>* made, std::vector<CudaBlock>* blocks) {
  for (const CudaStepExecutor::Addition& addition : additions) {
    if (addition.wide != wide) continue;
    CudaAddition<T> each{};
    MS_ASSIGN_OR_RETURN(each.from, MakeCudaPart<T>(addition.from));
    each.to = reinterpret_cast<T*>(addition.to);
    each.elements = addition.elements;
    each.add = addition.add;
    each.vectors = AllowsVectors(addition.from.data) && AllowsVectors(addition.to);
    AppendCudaBlocks(static_cast<uint32_t>(made->size()), addition.elements, blocks);
    made->push_back(each);
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CudaStepExecutor::Accumulate(absl::Span<const Addition> additions) {
  const DefaultArithmetic arithmetic;
  std::vector<CudaAddition<float>> narrow;
  std::vector<CudaAddition<double>> wide;
  std::vector<CudaBlock> narrow_blocks, wide_blocks;
  MS_RETURN_IF_ERROR(MakeAdditions(additions, false, &narrow, &narrow_blocks));
  MS_RETURN_IF_ERROR(MakeAdditions(additions, true, &wide, &wide_blocks));
  MS_RETURN_IF_ERROR(done_.Synchronize());
  end_ = 0;
  const uint64_t narrow_place = Place(narrow.size() * sizeof(narrow[0]));
  const uint64_t wide_place = Place(wide.size() * sizeof(wide[0]));
  const uint64_t narrow_blocks_place = Place(narrow_blocks.size() * sizeof(CudaBlock));
  const uint64_t wide_blocks_place = Place(wide_blocks.size() * sizeof(CudaBlock));
  MS_RETURN_IF_ERROR(Reserve());
  Write(narrow_place, narrow);
  Write(wide_place, wide);
  Write(narrow_blocks_place, narrow_blocks);
  Write(wide_blocks_place, wide_blocks);
  CudaDeviceGuard guard(stream_->device());
  MS_RETURN_IF_ERROR(guard.status());
  MS_RETURN_IF_ERROR(CopyToDevice(end_));
  const CudaAccumulateWork<float> narrow_work = {OnDevice<CudaBlock>(narrow_blocks_place),
                                                 narrow_blocks.size(),
                                                 OnDevice<CudaAddition<float>>(narrow_place)};
  const CudaAccumulateWork<double> wide_work = {OnDevice<CudaBlock>(wide_blocks_place),
                                                wide_blocks.size(),
                                                OnDevice<CudaAddition<double>>(wide_place)};
  MS_RETURN_IF_ERROR(CudaStatus(LaunchAccumulate(narrow_work, stream_->handle()),
                                "start the kernel that accumulates"));
  MS_RETURN_IF_ERROR(CudaStatus(LaunchAccumulate(wide_work, stream_->handle()),
                                "start the kernel that accumulates"));
  return done_.Record(*stream_);
}

}  // namespace modelstate
