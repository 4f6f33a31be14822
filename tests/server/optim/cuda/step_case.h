#ifndef MODELSTATE_TESTS_SERVER_OPTIM_CUDA_STEP_CASE_H_
#define MODELSTATE_TESTS_SERVER_OPTIM_CUDA_STEP_CASE_H_

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "server/optim/block_kernels.h"
#include "server/optim/step_plan.h"
#include "server/optim/tree_sum.h"
#include "server/rules/rule_info.h"
#include "tests/server/optim/cuda/two_arenas.h"

namespace modelstate {

// One parameter of a step, and how its gradient and state lie.
struct TensorCase {
  DType dtype = DType::kF32;
  uint64_t elements = 0;
  std::vector<DType> parts;    // of the gradient
  bool over_gradient = false;  // the new parameter goes over the first part, of the same width
  bool master = false;         // of a narrow one
  bool moves = false;          // its slots go to other storage each step
  uint64_t shift = 0;          // of every start, in elements
};

// Steps of a list of parameters, planned alike for the CPU's memory and a GPU's.
class StepCase {
 public:
  // Group 0 has `options.hyperparameters[0]`, every third tensor is in group 1.
  StepCase(Algorithm algorithm, StepOptions options, std::vector<TensorCase> tensors)
      : algorithm_(algorithm), options_(std::move(options)) {
    for (TensorCase& tensor : tensors) {
      Placed placed;
      const auto add = [&](DType dtype) {
        return arenas_.Add(dtype, tensor.elements, tensor.shift * DTypeSize(dtype));
      };
      for (uint64_t& value : placed.values) value = add(tensor.dtype);
      for (size_t k = 0; k < tensor.parts.size(); ++k) {
        placed.parts.push_back(k == 0 && tensor.over_gradient ? 0 : add(tensor.parts[k]));
      }
      for (auto& slot : placed.slots) {
        slot[0] = add(Computed(tensor.dtype));
        slot[1] = tensor.moves ? add(Computed(tensor.dtype)) : slot[0];
      }
      placed.tensor = std::move(tensor);
      tensors_.push_back(std::move(placed));
    }
  }

  TwoArenas& arenas() { return arenas_; }

  // Fills the parameters.
  absl::Status Begin(uint64_t seed) {
    MS_RETURN_IF_ERROR(arenas_.Allocate());
    Numbers numbers(seed);
    for (const Placed& placed : tensors_) {
      numbers.Fill(placed.tensor.dtype, placed.tensor.elements, 1,
                   arenas_.host() + placed.values[0]);
    }
    return absl::OkStatus();
  }

  // The next step's gradients, in the host's arena, multiplied by `scale`. `step` counts from 0.
  void FillGradients(uint64_t seed, uint64_t step, double scale) {
    Numbers numbers(seed);
    for (const Placed& placed : tensors_) {
      for (size_t k = 0; k < placed.parts.size(); ++k) {
        const DType dtype = placed.tensor.parts[k];
        // What is too large for this type becomes a NaN.
        numbers.Fill(dtype, placed.tensor.elements,
                     dtype == DType::kF8E4M3 ? std::min(scale, 8.0) : scale,
                     arenas_.host() + PartPlace(placed, step, k));
      }
    }
  }
  // Sets one element of a part.
  void SetGradient(size_t tensor, size_t part, uint64_t element, uint64_t step, double value) {
    const Placed& placed = tensors_[tensor];
    Numbers::Store(placed.tensor.parts[part], value, arenas_.host() + PartPlace(placed, step, part),
                   element);
  }

  // The plan of `step` over the memory at `base`. Parts are unscaled by `inverse_scale` and
  // averaged with weights that differ.
  StepPlan Plan(uint8_t* base, uint64_t step, double inverse_scale, double clip_value) {
    const RuleInfo& rule = GetRule(algorithm_);
    StepPlan plan;
    plan.algorithm = algorithm_;
    plan.options = &options_;
    plan.clip_value = clip_value;
    const size_t groups = options_.hyperparameters.size();
    std::vector<float> products(groups, 1);
    for (size_t group = 0; group < groups; ++group) {
      const Hyperparameters& h = options_.hyperparameters[group];
      for (uint64_t s = 1; s <= step + 1; ++s) {
        products[group] = rule.next_product(h, s, products[group]);
      }
      plan.scalars.push_back(rule.make_scalars(h, step + 1, products[group]));
    }
    plan.tensor_memory = std::make_unique<TensorStep[]>(tensors_.size());
    plan.tensors = absl::MakeSpan(plan.tensor_memory.get(), tensors_.size());
    for (size_t t = 0; t < tensors_.size(); ++t) {
      const Placed& placed = tensors_[t];
      TensorStep& tensor = plan.tensors[t];
      tensor.index = static_cast<uint32_t>(t);
      tensor.dtype = placed.tensor.dtype;
      tensor.elements = placed.tensor.elements;
      tensor.parameter = base + placed.values[step % 2];
      tensor.output = base + placed.values[(step + 1) % 2];
      tensor.group = t % 3 == 2 ? static_cast<uint32_t>(groups - 1) : 0;
      tensor.scalars = tensor.group;
      tensor.first_part = static_cast<uint32_t>(plan.parts.size());
      tensor.part_count = static_cast<uint32_t>(placed.parts.size());
      for (size_t k = 0; k < placed.parts.size(); ++k) {
        const double weight = placed.parts.size() == 1 ? 1 : (k + 1.0) / 7;
        plan.parts.push_back(
            {base + PartPlace(placed, step, k), placed.tensor.parts[k], inverse_scale, weight});
      }
      tensor.in_place = placed.tensor.over_gradient && placed.parts.size() == 1 &&
                        placed.tensor.parts[0] == tensor.dtype &&
                        tensor.dtype == Computed(tensor.dtype) && inverse_scale == 1;
      PlanSlots(base, step, placed, &tensor);
    }
    return plan;
  }

  // What the CPU's step computes.
  static double Norm(const StepPlan& plan, std::vector<uint32_t>* nonfinite) {
    const BlockKernels& kernels = GetBlockKernels(SupportedInstructionSets().back());
    std::vector<double> sums;
    for (uint32_t t = 0; t < plan.tensors.size(); ++t) {
      const TensorStep& tensor = plan.tensors[t];
      std::vector<double> blocks;
      bool finite = true;
      for (uint64_t begin = 0; begin < tensor.elements; begin += kBlockElements) {
        const BlockNorm norm =
            kernels.norm(plan, tensor, begin, std::min(tensor.elements, begin + kBlockElements));
        blocks.push_back(norm.sum_of_squares);
        finite &= norm.finite;
      }
      if (!finite) nonfinite->push_back(t);
      sums.push_back(TreeSum(absl::MakeSpan(blocks)));
    }
    return std::sqrt(TreeSum(absl::MakeSpan(sums)));
  }
  // The same, of the norms that an executor has computed.
  static double Join(absl::Span<const TensorNorm> norms, std::vector<uint32_t>* nonfinite) {
    std::vector<double> sums;
    for (uint32_t t = 0; t < norms.size(); ++t) {
      if (!norms[t].finite) nonfinite->push_back(t);
      sums.push_back(norms[t].sum_of_squares);
    }
    return std::sqrt(TreeSum(absl::MakeSpan(sums)));
  }
  static void Update(const StepPlan& plan) {
    const BlockKernels& kernels = GetBlockKernels(SupportedInstructionSets().back());
    for (const TensorStep& tensor : plan.tensors) {
      if (tensor.elements > 0) kernels.update(plan, tensor, 0, tensor.elements);
    }
  }

  static DType Computed(DType dtype) { return dtype == DType::kF64 ? dtype : DType::kF32; }

 private:
  struct Placed {
    TensorCase tensor;
    uint64_t values[2];
    std::vector<uint64_t> parts;
    uint64_t slots[kMaxSlots][2];
  };

  static uint64_t PartPlace(const Placed& placed, uint64_t step, size_t part) {
    return part == 0 && placed.tensor.over_gradient ? placed.values[(step + 1) % 2]
                                                    : placed.parts[part];
  }

  void PlanSlots(uint8_t* base, uint64_t step, const Placed& placed, TensorStep* tensor) const {
    const Hyperparameters& h = options_.hyperparameters[tensor->group];
    const auto plan = [&](size_t place) -> PlannedSlot& {
      PlannedSlot& slot = tensor->slots[place];
      slot.data = base + placed.slots[place][(step + 1) % 2];
      if (step > 0) slot.from = base + placed.slots[place][step % 2];
      return slot;
    };
    if (placed.tensor.master) plan(kMasterPlace);
    const std::span<const SlotRule> rules = GetRule(algorithm_).slots;
    for (size_t s = 0; s < rules.size(); ++s) {
      if (rules[s].kept != nullptr && !rules[s].kept(h)) continue;
      PlannedSlot& slot = plan(kMasterPlace + 1 + s);
      if (rules[s].initial != nullptr) slot.initial = rules[s].initial(h);
    }
  }

  const Algorithm algorithm_;
  const StepOptions options_;
  TwoArenas arenas_;
  std::vector<Placed> tensors_;
};

}  // namespace modelstate

#endif  // MODELSTATE_TESTS_SERVER_OPTIM_CUDA_STEP_CASE_H_
