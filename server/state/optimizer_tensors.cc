#include "server/state/optimizer_tensors.h"

#include <algorithm>
#include <array>
#include <iterator>
#include <optional>
#include <string>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/status.h"
#include "server/rules/rule_info.h"

namespace modelstate {
namespace {

TensorSpec SpecOf(const std::string& parameter, const char* slot, DType dtype, Shape shape) {
  TensorSpec spec;
  spec.name = parameter;
  spec.kind = TensorKind::kOptimizerState;
  spec.dtype = dtype;
  spec.shape = std::move(shape);
  spec.slot = slot;
  return spec;
}

absl::Status Refuse(Reason reason, const TensorSpec& tensor, absl::string_view text) {
  return MakeError(reason, absl::StrCat("\"", DisplayName(tensor), "\": ", text),
                   {{"tensor", tensor.name}, {"slot", tensor.slot}});
}

// A parameter that the table has state of.
struct Seen {
  bool step = false;
  bool product = false;
  std::array<bool, kMaxSlots> slots = {};
};

class Matcher {
 public:
  Matcher(const ModuleSchema& schema, const Optimizer& optimizer)
      : schema_(schema), optimizer_(optimizer), rule_(GetRule(optimizer.algorithm())) {}

  absl::StatusOr<OptimizerStatePlan::Item> Match(const TensorSpec& tensor) {
    if (tensor.kind != TensorKind::kOptimizerState) {
      return Refuse(Reason::kInvalidField, tensor,
                    absl::StrCat("its kind is ", TensorKindName(tensor.kind),
                                 "; send OPTIMIZER_STATE alone here, or leave the kind out"));
    }
    if (tensor.slot.empty()) {
      return Refuse(Reason::kInvalidField, tensor,
                    "it has no slot; name one, as \"step\" or \"exp_avg\"");
    }
    MS_ASSIGN_OR_RETURN(const uint32_t index, FindParameter(tensor));
    const TensorSpec& parameter = schema_.spec(index);
    Seen& seen = seen_[index];
    OptimizerStatePlan::Item item;
    item.parameter = index;
    bool* had = nullptr;
    if (tensor.slot == kStepSlot) {
      item.part = OptimizerStatePlan::Part::kStep;
      had = &seen.step;
    } else if (rule_.product != nullptr && tensor.slot == rule_.product) {
      item.part = OptimizerStatePlan::Part::kProduct;
      had = &seen.product;
    } else {
      MS_ASSIGN_OR_RETURN(const SlotInfo slot, FindSlot(index, tensor));
      item.place = slot.place;
      item.dtype = slot.dtype;
      item.bytes = static_cast<uint64_t>(parameter.shape.num_elements()) * DTypeSize(slot.dtype);
      had = &seen.slots[slot.place];
    }
    const Shape shape = item.part == OptimizerStatePlan::Part::kSlot ? parameter.shape : Shape();
    if (tensor.shape != shape) {
      return Refuse(
          Reason::kShapeMismatch, tensor,
          absl::StrCat("it has shape ", tensor.shape.ToString(), "; send ", shape.ToString(),
                       item.part == OptimizerStatePlan::Part::kSlot ? ", which is its parameter's"
                                                                    : ", one number"));
    }
    if (!IsFloatingPoint(tensor.dtype)) {
      return Refuse(Reason::kDTypeMismatch, tensor,
                    absl::StrCat("it is ", DTypeName(tensor.dtype),
                                 "; send optimizer state in a floating-point dtype"));
    }
    if (std::exchange(*had, true)) {
      return Refuse(Reason::kInvalidField, tensor,
                    "it comes twice; send the state of a tied parameter under one of its names");
    }
    return item;
  }

  // After all: that nothing is missing.
  absl::Status CheckComplete() const {
    std::vector<uint32_t> parameters;
    for (const auto& [index, seen] : seen_) parameters.push_back(index);
    std::sort(parameters.begin(), parameters.end());  // for the same error each time
    for (uint32_t index : parameters) {
      const Seen& seen = seen_.at(index);
      std::vector<std::string> missing;
      if (!seen.step) missing.push_back(kStepSlot);
      if (rule_.product != nullptr && !seen.product) missing.push_back(rule_.product);
      for (const SlotInfo& slot : Kept(index)) {
        if (slot.place != kMasterPlace && !seen.slots[slot.place]) missing.push_back(slot.name);
      }
      if (missing.empty()) continue;
      const std::string& name = schema_.spec(index).name;
      return MakeError(Reason::kMissingKey,
                       absl::StrCat("optimizer state of \"", name, "\" lacks ", QuotedList(missing),
                                    ", which ", AlgorithmName(optimizer_.algorithm()),
                                    " keeps: send it, or nothing of this parameter"),
                       {{"tensor", name}, {"slot", missing.front()}});
    }
    return absl::OkStatus();
  }

 private:
  absl::StatusOr<uint32_t> FindParameter(const TensorSpec& tensor) const {
    const std::optional<uint32_t> found = schema_.Find(tensor.name);
    if (!found) {
      return Refuse(Reason::kTensorNotFound, tensor,
                    "the module has no such parameter; ListParameters shows their names");
    }
    const TensorSpec& spec = schema_.spec(*found);
    if (spec.kind != TensorKind::kParameter) {
      return Refuse(Reason::kNotAParameter, tensor,
                    "that is a buffer, which no optimizer keeps state of; leave it out");
    }
    if (!IsFloatingPoint(spec.dtype)) {
      return Refuse(Reason::kDTypeMismatch, tensor,
                    absl::StrCat("its parameter is ", DTypeName(spec.dtype),
                                 ", which no optimizer steps; leave it out"));
    }
    const uint32_t owner = schema_.owner(*found);
    if (optimizer_.group_of(owner) == Optimizer::kNoGroup) {
      return Refuse(Reason::kNotInAGroup, tensor,
                    "its parameter is in no group of the optimizer; leave it out, or configure a "
                    "group for it");
    }
    return owner;
  }

  SlotList Kept(uint32_t index) const {
    const Hyperparameters& h = optimizer_.groups()[optimizer_.group_of(index)].hyperparameters;
    return KeptSlots(optimizer_.config(), h, schema_.spec(index).dtype);
  }

  // Also what only other hyper-parameters keep: as a step with an override does, it is carried on.
  absl::StatusOr<SlotInfo> FindSlot(uint32_t index, const TensorSpec& tensor) const {
    std::vector<std::string> known = {kStepSlot};
    if (rule_.product != nullptr) known.push_back(rule_.product);
    const bool master = optimizer_.config().master_weights;
    for (const SlotInfo& slot : AllSlots(optimizer_.algorithm(), schema_.spec(index).dtype)) {
      if (slot.place == kMasterPlace && !master) continue;
      if (tensor.slot == slot.name) return slot;
      known.push_back(slot.name);
    }
    return Refuse(Reason::kUnknownKey, tensor,
                  absl::StrCat(AlgorithmName(optimizer_.algorithm()), " keeps no \"", tensor.slot,
                               "\" of this parameter; it keeps ", absl::StrJoin(known, ", ")));
  }

  const ModuleSchema& schema_;
  const Optimizer& optimizer_;
  const RuleInfo& rule_;
  absl::flat_hash_map<uint32_t, Seen> seen_;
};

}  // namespace

absl::StatusOr<ModuleSchema::Listing> SelectStateful(const ModuleSchema& schema,
                                                     Selection selection) {
  const auto state =
      std::find(selection.kinds.begin(), selection.kinds.end(), TensorKind::kOptimizerState);
  if (state != selection.kinds.end()) selection.kinds.clear();
  MS_ASSIGN_OR_RETURN(ModuleSchema::Listing named,
                      schema.List(TensorKind::kParameter, ListView::kNamed, selection));
  MS_ASSIGN_OR_RETURN(ModuleSchema::Listing all,
                      schema.List(TensorKind::kParameter, ListView::kAll, selection));
  if (all->size() == named->size()) return named;
  std::vector<uint32_t> owners;
  for (uint32_t index : *all) owners.push_back(schema.owner(index));
  std::sort(owners.begin(), owners.end());
  owners.erase(std::unique(owners.begin(), owners.end()), owners.end());
  return ModuleSchema::Listing(std::make_shared<const std::vector<uint32_t>>(std::move(owners)));
}

OptimizerTensors ListOptimizerTensors(const ModuleSchema& schema, const Optimizer& optimizer,
                                      absl::Span<const uint32_t> parameters,
                                      const OptimizerState& state) {
  OptimizerTensors tensors;
  const char* product = GetRule(optimizer.algorithm()).product;
  for (uint32_t index : parameters) {
    const ParameterState& parameter = state.parameters[index];
    if (parameter.step == 0) continue;
    const TensorSpec& spec = schema.spec(index);
    tensors.specs.push_back(SpecOf(spec.name, kStepSlot, DType::kF32, Shape()));
    tensors.values.push_back({nullptr, static_cast<float>(parameter.step)});
    for (const SlotInfo& slot : AllSlots(optimizer.algorithm(), spec.dtype)) {
      if (!parameter.slots[slot.place]) continue;
      tensors.specs.push_back(SpecOf(spec.name, slot.name, slot.dtype, spec.shape));
      tensors.values.push_back({parameter.slots[slot.place], 0});
    }
    if (product == nullptr) continue;
    tensors.specs.push_back(SpecOf(spec.name, product, DType::kF32, Shape()));
    tensors.values.push_back({nullptr, parameter.product});
  }
  return tensors;
}

std::shared_ptr<const StateView> ExtendView(const StateView& view, std::vector<TensorSpec> specs) {
  auto extended = std::make_shared<StateView>();
  extended->indices = view.indices;
  extended->specs = view.specs;
  extended->specs.insert(extended->specs.end(), std::make_move_iterator(specs.begin()),
                         std::make_move_iterator(specs.end()));
  extended->layout = StateLayout(extended->specs);
  return extended;
}

absl::StatusOr<OptimizerStatePlan> PlanOptimizerState(const ModuleSchema& schema,
                                                      const Optimizer& optimizer,
                                                      absl::Span<const TensorSpec* const> table) {
  Matcher matcher(schema, optimizer);
  OptimizerStatePlan plan;
  plan.items.reserve(table.size());
  for (const TensorSpec* tensor : table) {
    MS_ASSIGN_OR_RETURN(const OptimizerStatePlan::Item item, matcher.Match(*tensor));
    plan.items.push_back(item);
  }
  MS_RETURN_IF_ERROR(matcher.CheckComplete());
  return plan;
}

}  // namespace modelstate
