#include "server/state/load_plan.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/status.h"

namespace modelstate {
namespace {

constexpr uint32_t kNone = std::numeric_limits<uint32_t>::max();
constexpr absl::string_view kPickledParameter = "pickled Parameter";

absl::string_view LastPart(absl::string_view name) {
  const size_t dot = name.rfind('.');
  return dot == absl::string_view::npos ? name : name.substr(dot + 1);
}

// `"a", "b" and 12 more`, with as many names as fit in `limit` bytes, one at least.
std::string KeyList(absl::Span<const std::string> keys, size_t limit) {
  std::string text = QuotedList(keys);
  for (size_t shown = std::min<size_t>(keys.size(), 10); text.size() > limit && shown > 1;) {
    --shown;
    text = absl::StrCat(QuotedList(keys.subspan(0, shown)), " and ", keys.size() - shown, " more");
  }
  return text;
}

std::string TorchSize(const Shape& shape) {
  return absl::StrCat("torch.Size(", shape.ToString(), ")");
}

// The incoming tensors under the names that they are to have here.
struct Renamed {
  std::vector<std::string> names;
  absl::flat_hash_map<absl::string_view, uint32_t> by_name;  // views into `names`
  // Index of the tensor that has the bytes.
  std::vector<uint32_t> source;
};

absl::Status Rename(absl::Span<const IncomingTensor> incoming, const LoadOptions& options,
                    Renamed* renamed) {
  if (incoming.size() >= kNone) {
    return MakeError(Reason::kInvalidField,
                     absl::StrCat("a load cannot bring ", incoming.size(), " tensors"));
  }
  auto rename = [&options](absl::string_view name) {
    if (absl::StartsWith(name, options.strip_prefix)) {
      name.remove_prefix(options.strip_prefix.size());
    }
    return absl::StrCat(options.add_prefix, name);
  };
  renamed->names.reserve(incoming.size());
  renamed->by_name.reserve(incoming.size());
  for (uint32_t i = 0; i < incoming.size(); ++i) {
    renamed->names.push_back(rename(incoming[i].name));
    if (!renamed->by_name.emplace(renamed->names.back(), i).second) {
      return MakeError(Reason::kChunkInvalid,
                       absl::StrCat("key \"", renamed->names.back(),
                                    "\" comes twice; each key of a state_dict may come once (also "
                                    "after strip_prefix and add_prefix)"),
                       {{"tensor", renamed->names.back()}});
    }
  }
  for (uint32_t i = 0; i < incoming.size(); ++i) {
    uint32_t source = i;
    if (!incoming[i].alias_of.empty()) {
      auto it = renamed->by_name.find(rename(incoming[i].alias_of));
      if (it == renamed->by_name.end() || !incoming[it->second].alias_of.empty() ||
          incoming[it->second].dtype != incoming[i].dtype ||
          incoming[it->second].shape != incoming[i].shape) {
        return MakeError(
            Reason::kUnknownKey,
            absl::StrCat("tensor \"", incoming[i].name, "\" is an alias of \"",
                         incoming[i].alias_of,
                         "\", which is not a tensor of this load with elements of its own and the "
                         "same dtype and shape"),
            {{"tensor", incoming[i].name}});
      }
      source = it->second;
    }
    renamed->source.push_back(source);
  }
  return absl::OkStatus();
}

void Count(const std::string& rule, TensorKind kind, std::vector<LoadPlan::Decision>* decisions) {
  auto it = std::find_if(decisions->begin(), decisions->end(),
                         [&rule](const LoadPlan::Decision& d) { return d.rule == rule; });
  if (it == decisions->end()) it = decisions->insert(decisions->end(), {rule, 0, 0});
  ++(kind == TensorKind::kParameter ? it->parameters : it->buffers);
}

std::pair<TensorKind, std::string> DecideKind(const IncomingTensor& tensor, const std::string& name,
                                              const LoadOptions& options) {
  const absl::string_view rule = tensor.kind_rule == nullptr ? "checkpoint kind" : tensor.kind_rule;
  const bool pickled = tensor.kind && rule == kPickledParameter;
  if (tensor.kind && !pickled) return {*tensor.kind, std::string(rule)};
  for (const std::string& glob : options.buffer_globs) {
    if (GlobMatch(glob, name)) {
      return {TensorKind::kBuffer, absl::StrCat("buffers glob \"", glob, "\"")};
    }
  }
  if (pickled) return {*tensor.kind, std::string(rule)};
  if (!CanRequireGrad(tensor.dtype)) return {TensorKind::kBuffer, "dtype cannot require grad"};
  const absl::string_view last = LastPart(name);
  if (last == "running_mean" || last == "running_var" || last == "num_batches_tracked") {
    return {TensorKind::kBuffer, "name of a running statistic"};
  }
  return {TensorKind::kParameter, "default"};
}

void AddItem(uint32_t source, DType source_dtype, uint32_t target, LoadPlan* out) {
  const TensorSpec& spec = out->schema->spec(target);
  out->items.push_back({source, target, source_dtype, spec.dtype, spec.nbytes()});
  out->total_bytes += spec.nbytes();
}

absl::Status PlanIntoEmpty(absl::Span<const IncomingTensor> incoming, const Renamed& renamed,
                           const LoadOptions& options, LoadPlan* plan) {
  std::vector<TensorSpec> specs;
  specs.reserve(incoming.size());
  std::vector<uint32_t> first_of(incoming.size(), kNone);  // by source: first tensor of the tie
  for (uint32_t i = 0; i < incoming.size(); ++i) {
    TensorSpec spec;
    spec.name = renamed.names[i];
    spec.dtype = incoming[i].dtype;
    spec.shape = incoming[i].shape;
    uint32_t& first = first_of[renamed.source[i]];
    if (first == kNone) {
      first = i;
      auto [kind, rule] = DecideKind(incoming[i], spec.name, options);
      spec.kind = kind;
      spec.requires_grad = kind == TensorKind::kParameter && CanRequireGrad(spec.dtype) &&
                           incoming[i].requires_grad.value_or(true);
      Count(rule, kind, &plan->decisions);
    } else {
      // The first name of a tie owns the storage and decides for all.
      spec.alias_of = specs[first].name;
      spec.kind = specs[first].kind;
      spec.requires_grad = specs[first].requires_grad;
    }
    specs.push_back(std::move(spec));
  }
  MS_ASSIGN_OR_RETURN(plan->schema,
                      ModuleSchema::Create(std::move(specs), plan->base->revision() + 1));
  for (uint32_t i = 0; i < incoming.size(); ++i) {
    if (plan->schema->owner(i) == i) {
      AddItem(renamed.source[i], incoming[i].dtype, i, plan);
    }
  }
  return absl::OkStatus();
}

// The legacy exception of torch's batch norm: a count that old files do not have.
bool MayBeAbsent(const TensorSpec& spec, const LoadOptions& options) {
  return options.old_batch_norm && spec.kind == TensorKind::kBuffer &&
         LastPart(spec.name) == "num_batches_tracked";
}

struct Mismatches {
  std::vector<std::string> texts;
  size_t count = 0;
  std::string first;
};

absl::Status TorchError(absl::string_view module, const LoadPlan& plan, bool strict,
                        const Mismatches& mismatches) {
  constexpr size_t kListBytes = 300;
  std::vector<std::string> parts = {
      absl::StrCat("Error(s) in loading state_dict for ", module, ":")};
  ErrorMetadata metadata = {{"module", std::string(module)}};
  std::optional<Reason> reason;
  if (strict && !plan.missing_keys.empty()) {
    parts.push_back(absl::StrCat(
        "Missing key(s) in state_dict: ", KeyList(plan.missing_keys, kListBytes), ". "));
    reason = Reason::kMissingKey;
    metadata["tensor"] = plan.missing_keys.front();
    metadata["missing"] = absl::StrCat(plan.missing_keys.size());
  }
  if (strict && !plan.unexpected_keys.empty()) {
    parts.push_back(absl::StrCat(
        "Unexpected key(s) in state_dict: ", KeyList(plan.unexpected_keys, kListBytes), ". "));
    if (!reason) {
      reason = Reason::kUnknownKey;
      metadata["tensor"] = plan.unexpected_keys.front();
    }
    metadata["unexpected"] = absl::StrCat(plan.unexpected_keys.size());
  }
  if (mismatches.count > 0) {
    parts.insert(parts.end(), mismatches.texts.begin(), mismatches.texts.end());
    if (mismatches.count > mismatches.texts.size()) {
      parts.push_back(absl::StrCat("and ", mismatches.count - mismatches.texts.size(),
                                   " more size mismatches"));
    }
    if (!reason) {
      reason = Reason::kShapeMismatch;
      metadata["tensor"] = mismatches.first;
    }
    metadata["size_mismatches"] = absl::StrCat(mismatches.count);
  }
  if (strict && reason != Reason::kShapeMismatch) {
    parts.push_back("With the option strict set to false such keys are passed over.");
  }
  return MakeError(*reason, absl::StrJoin(parts, "\n\t"), std::move(metadata));
}

absl::Status PlanIntoExisting(absl::string_view module, absl::Span<const IncomingTensor> incoming,
                              const Renamed& renamed, const LoadOptions& options, LoadPlan* plan) {
  const ModuleSchema& base = *plan->base;
  // By owner. Where both names of a tie come, torch copies both in order: the later one stays.
  std::vector<uint32_t> source_of(base.size(), kNone);
  std::vector<bool> covered(base.size(), false);
  Mismatches mismatches;
  for (uint32_t i = 0; i < base.size(); ++i) {
    const TensorSpec& spec = base.spec(i);
    auto it = renamed.by_name.find(spec.name);
    if (!spec.persistent || it == renamed.by_name.end()) continue;
    covered[base.owner(i)] = true;
    const IncomingTensor& tensor = incoming[it->second];
    // A scalar was saved with shape [1] before PyTorch 0.4.
    const bool scalar_of_old =
        spec.shape.rank() == 0 && tensor.shape.rank() == 1 && tensor.shape.num_elements() == 1;
    if (tensor.shape != spec.shape && !scalar_of_old) {
      if (mismatches.count++ == 0) mismatches.first = spec.name;
      if (mismatches.texts.size() < 2) {
        mismatches.texts.push_back(absl::StrCat(
            "size mismatch for ", spec.name, ": copying a param with shape ",
            TorchSize(tensor.shape), " from checkpoint, the shape in current model is ",
            TorchSize(spec.shape), "."));
      }
      continue;
    }
    source_of[base.owner(i)] = it->second;
  }
  for (uint32_t i = 0; i < base.size(); ++i) {
    const TensorSpec& spec = base.spec(i);
    // A tie is complete with any of its names: safetensors files carry only one of them.
    if (spec.persistent && !covered[base.owner(i)] && !MayBeAbsent(spec, options)) {
      plan->missing_keys.push_back(spec.name);
    }
  }
  for (const std::string& name : renamed.names) {
    const std::optional<uint32_t> found = base.Find(name);
    if (!found || !base.spec(*found).persistent) plan->unexpected_keys.push_back(name);
  }
  const bool keys_differ = !plan->missing_keys.empty() || !plan->unexpected_keys.empty();
  if ((options.strict && keys_differ) || mismatches.count > 0) {
    return TorchError(module, *plan, options.strict, mismatches);
  }

  plan->schema = plan->base;
  if (options.assign) {
    std::vector<TensorSpec> specs(base.specs().begin(), base.specs().end());
    bool changed = false;
    for (uint32_t i = 0; i < base.size(); ++i) {
      const uint32_t source = source_of[base.owner(i)];
      if (source == kNone || incoming[source].dtype == specs[i].dtype) continue;
      if (specs[i].kind == TensorKind::kParameter && specs[i].requires_grad &&
          !CanRequireGrad(incoming[source].dtype)) {
        return MakeError(
            Reason::kDTypeMismatch,
            absl::StrCat("parameter \"", specs[i].name, "\" requires grad, so it cannot take ",
                         DTypeName(incoming[source].dtype),
                         " by assign; load without assign, or freeze it first"),
            {{"tensor", specs[i].name}});
      }
      specs[i].dtype = incoming[source].dtype;
      changed = true;
    }
    if (changed) {
      MS_ASSIGN_OR_RETURN(plan->schema,
                          ModuleSchema::Create(std::move(specs), base.revision() + 1));
    }
  }
  for (uint32_t i = 0; i < base.size(); ++i) {
    if (source_of[i] == kNone) continue;
    AddItem(renamed.source[source_of[i]], incoming[source_of[i]].dtype, i, plan);
    Count("existing module", base.spec(i).kind, &plan->decisions);
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<LoadPlan> LoadPlan::Create(absl::string_view module,
                                          std::shared_ptr<const ModuleSchema> base,
                                          absl::Span<const IncomingTensor> incoming,
                                          const LoadOptions& options) {
  LoadPlan plan;
  plan.base = std::move(base);
  Renamed renamed;
  MS_RETURN_IF_ERROR(Rename(incoming, options, &renamed));
  if (plan.base->empty()) {
    MS_RETURN_IF_ERROR(PlanIntoEmpty(incoming, renamed, options, &plan));
  } else {
    MS_RETURN_IF_ERROR(PlanIntoExisting(module, incoming, renamed, options, &plan));
  }
  return plan;
}

}  // namespace modelstate
