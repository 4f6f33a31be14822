#include "server/state/load_plan.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "common/base/status.h"
#include "server/state/load_error.h"

namespace modelstate {
namespace {

constexpr uint32_t kNone = std::numeric_limits<uint32_t>::max();
constexpr absl::string_view kPickledParameter = "pickled Parameter";
constexpr absl::string_view kRequestRule = "request";
constexpr absl::string_view kBatchCount = "num_batches_tracked";

absl::string_view LastPart(absl::string_view name) {
  const size_t dot = name.rfind('.');
  return dot == absl::string_view::npos ? name : name.substr(dot + 1);
}

bool IsPickledParameter(const IncomingTensor& tensor) {
  return tensor.kind && tensor.kind_rule != nullptr && tensor.kind_rule == kPickledParameter;
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
    if (!options.add_prefix.empty() && renamed->names.back().size() > kMaxTensorNameBytes) {
      return MakeError(Reason::kInvalidField,
                       absl::StrCat("add_prefix makes a name of ", renamed->names.back().size(),
                                    " bytes of \"", incoming[i].name.substr(0, 256), "\"; at most ",
                                    kMaxTensorNameBytes, " are allowed: use a shorter prefix"),
                       {{"field", "options.add_prefix"}});
    }
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
  const bool pickled = IsPickledParameter(tensor);
  if (tensor.kind && !pickled) {
    return {*tensor.kind, tensor.kind_rule == nullptr ? "checkpoint kind" : tensor.kind_rule};
  }
  for (const std::string& glob : options.buffer_globs) {
    if (GlobMatch(glob, name)) {
      return {TensorKind::kBuffer, absl::StrCat("buffers glob \"", glob, "\"")};
    }
  }
  if (pickled) return {*tensor.kind, std::string(kPickledParameter)};
  if (!CanRequireGrad(tensor.dtype)) return {TensorKind::kBuffer, "dtype cannot require grad"};
  const absl::string_view last = LastPart(name);
  if (last == "running_mean" || last == "running_var" || last == kBatchCount) {
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
    spec.persistent = incoming[i].persistent;
    uint32_t& first = first_of[renamed.source[i]];
    if (first == kNone) {
      first = i;
      auto [kind, rule] = DecideKind(incoming[i], spec.name, options);
      spec.kind = kind;
      // Registered by its kind, a parameter requires grad unless it says not; integers then fail.
      const bool registered = rule == kRequestRule;
      spec.requires_grad =
          kind == TensorKind::kParameter &&
          incoming[i].requires_grad.value_or(registered || CanRequireGrad(spec.dtype));
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

// The version that the source gives the module `prefix` ("bn1.", as keys here begin with).
std::optional<int64_t> SourceVersion(absl::string_view prefix, const LoadOptions& options) {
  if (!absl::ConsumePrefix(&prefix, options.add_prefix)) return std::nullopt;
  const auto find = [&options](std::string module) -> std::optional<int64_t> {
    if (absl::EndsWith(module, ".")) module.pop_back();
    const auto it = options.module_versions.find(module);
    if (it == options.module_versions.end()) return std::nullopt;
    return it->second;
  };
  // As its name was before strip_prefix, or where it did not have that.
  const std::optional<int64_t> stripped = find(absl::StrCat(options.strip_prefix, prefix));
  return stripped ? stripped : find(std::string(prefix));
}

bool MayBeAbsent(const TensorSpec& spec, const LoadOptions& options) {
  if (options.source_is_whole || spec.kind != TensorKind::kBuffer) return false;
  const absl::string_view last = LastPart(spec.name);
  if (last != kBatchCount) return false;
  const absl::string_view prefix =
      absl::string_view(spec.name).substr(0, spec.name.size() - last.size());
  return SourceVersion(prefix, options).value_or(0) < 2;
}

// The source of each owner in an existing module, and what the keys and sizes have against it.
struct Match {
  std::vector<uint32_t> source_of;  // by index of the schema; kNone where nothing comes
  std::vector<SizeMismatch> mismatches;
};

Match MatchKeys(absl::Span<const IncomingTensor> incoming, const Renamed& renamed,
                const LoadOptions& options, LoadPlan* plan) {
  const ModuleSchema& base = *plan->base;
  Match match;
  match.source_of.assign(base.size(), kNone);
  std::vector<bool> covered(base.size(), false);
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
      match.mismatches.push_back({Reason::kShapeMismatch, spec.name,
                                  SizeMismatchText(spec.name, tensor.shape, spec.shape)});
      continue;
    }
    if (options.assign && spec.kind == TensorKind::kParameter && spec.requires_grad &&
        !CanRequireGrad(tensor.dtype)) {
      match.mismatches.push_back({Reason::kDTypeMismatch, spec.name,
                                  CannotRequireGradText(spec.name, tensor.shape, spec.shape)});
      continue;
    }
    // Where both names of a tie come, torch copies both in order: the later one stays.
    match.source_of[base.owner(i)] = it->second;
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
  SortByModule(base, &plan->unexpected_keys);
  return match;
}

absl::Status PlanIntoExisting(absl::string_view module, absl::Span<const IncomingTensor> incoming,
                              const Renamed& renamed, const LoadOptions& options, LoadPlan* plan) {
  const ModuleSchema& base = *plan->base;
  Match match = MatchKeys(incoming, renamed, options, plan);
  const bool keys_differ = !plan->missing_keys.empty() || !plan->unexpected_keys.empty();
  if (options.dry_run) {
    for (SizeMismatch& mismatch : match.mismatches) {
      plan->size_mismatches.push_back(std::move(mismatch.text));
    }
  } else if ((options.strict && keys_differ) || !match.mismatches.empty()) {
    return LoadError(module, options.strict, plan->missing_keys, plan->unexpected_keys,
                     match.mismatches);
  }

  plan->schema = plan->base;
  if (options.assign) {
    std::vector<TensorSpec> specs(base.specs().begin(), base.specs().end());
    bool changed = false;
    for (uint32_t i = 0; i < base.size(); ++i) {
      const uint32_t source = match.source_of[base.owner(i)];
      if (source == kNone || incoming[source].dtype == specs[i].dtype) continue;
      specs[i].dtype = incoming[source].dtype;
      changed = true;
    }
    if (changed) {
      MS_ASSIGN_OR_RETURN(plan->schema,
                          ModuleSchema::Create(std::move(specs), base.revision() + 1));
    }
  }
  for (uint32_t i = 0; i < base.size(); ++i) {
    const uint32_t source = match.source_of[i];
    if (source == kNone) continue;
    AddItem(renamed.source[source], incoming[source].dtype, i, plan);
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
