#include "server/state/optimizer_config.h"

#include <charconv>
#include <cmath>
#include <limits>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/status.h"

namespace modelstate {
namespace {

// Each group is held against every tensor.
constexpr size_t kMaxGroups = 1000;
constexpr uint32_t kNoGroup = std::numeric_limits<uint32_t>::max();

// As Python prints a float, because the texts are torch's: "-1.0", "1e-05", "0.1".
std::string PythonFloat(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value > 0 ? "inf" : "-inf";
  const double magnitude = std::fabs(value);
  const bool fixed = magnitude == 0 || (magnitude >= 1e-4 && magnitude < 1e16);
  char text[64];
  const std::to_chars_result result =
      std::to_chars(text, text + sizeof(text), value,
                    fixed ? std::chars_format::fixed : std::chars_format::scientific);
  std::string out(text, result.ptr);
  if (fixed && out.find('.') == std::string::npos) out += ".0";
  return out;
}

absl::Status Invalid(const std::string& group, absl::string_view field, absl::string_view text) {
  return MakeError(
      Reason::kInvalidField,
      group.empty() ? std::string(text) : absl::StrCat("group \"", group, "\": ", text),
      {{"field", std::string(field)}, {"group", group}});
}

struct Field {
  const char* name;
  std::optional<double> Hyperparameters::*number;
  std::optional<bool> Hyperparameters::*flag;
  bool sgd;
  bool adamw;
};

constexpr Field kFields[] = {
    {"lr", &Hyperparameters::lr, nullptr, true, true},
    {"weight_decay", &Hyperparameters::weight_decay, nullptr, true, true},
    {"maximize", nullptr, &Hyperparameters::maximize, true, true},
    {"momentum", &Hyperparameters::momentum, nullptr, true, false},
    {"dampening", &Hyperparameters::dampening, nullptr, true, false},
    {"nesterov", nullptr, &Hyperparameters::nesterov, true, false},
    {"beta1", &Hyperparameters::beta1, nullptr, false, true},
    {"beta2", &Hyperparameters::beta2, nullptr, false, true},
    {"eps", &Hyperparameters::eps, nullptr, false, true},
};

bool Has(const Field& field, Algorithm algorithm) {
  return algorithm == Algorithm::kSgd ? field.sgd : field.adamw;
}

bool IsSet(const Field& field, const Hyperparameters& from) {
  return field.number != nullptr ? (from.*field.number).has_value()
                                 : (from.*field.flag).has_value();
}

Hyperparameters Defaults(Algorithm algorithm) {
  Hyperparameters defaults;
  defaults.lr = 1e-3;
  defaults.maximize = false;
  if (algorithm == Algorithm::kSgd) {
    defaults.weight_decay = 0;
    defaults.momentum = 0;
    defaults.dampening = 0;
    defaults.nesterov = false;
  } else {
    defaults.weight_decay = 1e-2;
    defaults.beta1 = 0.9;
    defaults.beta2 = 0.999;
    defaults.eps = 1e-8;
  }
  return defaults;
}

absl::Status CheckKnown(Algorithm algorithm, const std::string& group,
                        const Hyperparameters& given) {
  for (const Field& field : kFields) {
    if (Has(field, algorithm) || !IsSet(field, given)) continue;
    std::vector<absl::string_view> known;
    for (const Field& other : kFields) {
      if (Has(other, algorithm)) known.push_back(other.name);
    }
    return Invalid(group, field.name,
                   absl::StrCat(AlgorithmName(algorithm), " has no ", field.name, "; it has ",
                                absl::StrJoin(known, ", ")));
  }
  return absl::OkStatus();
}

// torch's checks, in torch's order and words, over complete hyper-parameters. Stricter in that no
// value may be infinite or NaN.
absl::Status CheckRanges(Algorithm algorithm, const std::string& group,
                         const Hyperparameters& complete) {
  auto at_least_zero = [&](const char* field, const char* what, double value) {
    if (value >= 0 && std::isfinite(value)) return absl::OkStatus();
    return Invalid(group, field,
                   absl::StrCat("Invalid ", what, ": ", PythonFloat(value),
                                "; it must be finite and at least 0"));
  };
  MS_RETURN_IF_ERROR(at_least_zero("lr", "learning rate", *complete.lr));
  if (algorithm == Algorithm::kSgd) {
    MS_RETURN_IF_ERROR(at_least_zero("momentum", "momentum value", *complete.momentum));
    MS_RETURN_IF_ERROR(at_least_zero("weight_decay", "weight_decay value", *complete.weight_decay));
    if (!std::isfinite(*complete.dampening)) {
      return Invalid(group, "dampening",
                     absl::StrCat("Invalid dampening value: ", PythonFloat(*complete.dampening),
                                  "; it must be finite"));
    }
    if (*complete.nesterov && (*complete.momentum <= 0 || *complete.dampening != 0)) {
      return Invalid(group, "nesterov", "Nesterov momentum requires a momentum and zero dampening");
    }
    return absl::OkStatus();
  }
  MS_RETURN_IF_ERROR(at_least_zero("eps", "epsilon value", *complete.eps));
  const std::pair<const char*, double> betas[] = {{"beta1", *complete.beta1},
                                                  {"beta2", *complete.beta2}};
  for (int i = 0; i < 2; ++i) {
    if (betas[i].second >= 0 && betas[i].second < 1) continue;
    return Invalid(
        group, betas[i].first,
        absl::StrCat("Invalid beta parameter at index ", i, ": ", PythonFloat(betas[i].second),
                     "; it must be at least 0 and less than 1"));
  }
  return at_least_zero("weight_decay", "weight_decay value", *complete.weight_decay);
}

absl::Status CheckGroupNames(absl::Span<const ParameterGroupConfig> groups) {
  if (groups.size() > kMaxGroups) {
    return Invalid("", "groups",
                   absl::StrCat("groups: there are ", groups.size(), "; at most ", kMaxGroups,
                                " are allowed; put parameters with the same hyper-parameters into "
                                "one group"));
  }
  absl::flat_hash_set<absl::string_view> names;
  for (const ParameterGroupConfig& group : groups) {
    if (group.name.empty() || names.insert(group.name).second) continue;
    return Invalid(group.name, "groups",
                   "two groups have this name; give each another, or leave it empty");
  }
  return absl::OkStatus();
}

}  // namespace

const char* AlgorithmName(Algorithm algorithm) {
  return algorithm == Algorithm::kSgd ? "sgd" : "adamw";
}

std::optional<Algorithm> ParseAlgorithm(absl::string_view name) {
  if (name == "sgd") return Algorithm::kSgd;
  if (name == "adamw") return Algorithm::kAdamW;
  return std::nullopt;
}

Hyperparameters MergeHyperparameters(const Hyperparameters& base,
                                     const Hyperparameters& overrides) {
  Hyperparameters merged = base;
  for (const Field& field : kFields) {
    if (!IsSet(field, overrides)) continue;
    if (field.number != nullptr) {
      merged.*field.number = overrides.*field.number;
    } else {
      merged.*field.flag = overrides.*field.flag;
    }
  }
  return merged;
}

absl::StatusOr<std::shared_ptr<const Optimizer>> Optimizer::Create(const OptimizerConfig& config,
                                                                   const ModuleSchema& schema) {
  std::shared_ptr<Optimizer> optimizer(new Optimizer());
  optimizer->config_ = config;
  if (config.max_grad_norm && !(*config.max_grad_norm > 0)) {
    return Invalid("", "max_grad_norm",
                   absl::StrCat("Invalid max_grad_norm: ", PythonFloat(*config.max_grad_norm),
                                "; it must be greater than 0, or unset for no clipping"));
  }
  MS_RETURN_IF_ERROR(CheckGroupNames(config.groups));
  MS_RETURN_IF_ERROR(CheckKnown(config.algorithm, "", config.hyperparameters));
  const Hyperparameters base =
      MergeHyperparameters(Defaults(config.algorithm), config.hyperparameters);
  MS_RETURN_IF_ERROR(CheckRanges(config.algorithm, "", base));

  std::vector<uint32_t>& group_of = optimizer->group_of_;
  group_of.assign(schema.size(), kNoGroup);
  uint64_t taken = 0;
  for (const ParameterGroupConfig& given : config.groups) {
    MS_RETURN_IF_ERROR(CheckKnown(config.algorithm, given.name, given.hyperparameters));
    Group group{given.name, MergeHyperparameters(base, given.hyperparameters), 0};
    MS_RETURN_IF_ERROR(CheckRanges(config.algorithm, given.name, group.hyperparameters));
    Selection selection = given.selection;
    selection.kinds.clear();
    std::vector<std::string> unknown;
    const std::vector<uint32_t> selected = Select(selection, schema.specs(), &unknown);
    if (!unknown.empty()) {
      return MakeError(Reason::kTensorNotFound,
                       absl::StrCat("group \"", given.name, "\": the module has no tensor named ",
                                    QuotedList(unknown), "; list its parameters to see the names"),
                       {{"tensor", unknown.front()}, {"group", given.name}});
    }
    for (const std::string& name : selection.names) {
      const uint32_t index = *schema.Find(name);
      if (schema.spec(index).kind == TensorKind::kParameter) {
        const uint32_t other = group_of[schema.owner(index)];
        if (other == kNoGroup) continue;
        return MakeError(
            Reason::kInvalidField,
            absl::StrCat("group \"", given.name,
                         "\": some parameters appear in more than one parameter group: \"", name,
                         "\" is in group ", other, " (\"", optimizer->groups_[other].name,
                         "\") already; name it in one of them"),
            {{"tensor", name}, {"group", given.name}});
      }
      return MakeError(Reason::kNotAParameter,
                       absl::StrCat("group \"", given.name, "\": \"", name,
                                    "\" is a buffer; an optimizer updates parameters only, leave "
                                    "it out of the group"),
                       {{"tensor", name}, {"group", given.name}});
    }
    for (uint32_t index : selected) {
      const uint32_t owner = schema.owner(index);
      if (schema.spec(owner).kind != TensorKind::kParameter || group_of[owner] != kNoGroup) {
        continue;
      }
      group_of[owner] = static_cast<uint32_t>(optimizer->groups_.size());
      ++group.parameter_count;
    }
    taken += group.parameter_count;
    optimizer->groups_.push_back(std::move(group));
  }
  if (taken < schema.parameter_count() || config.groups.empty()) {
    const uint32_t last = static_cast<uint32_t>(optimizer->groups_.size());
    optimizer->groups_.push_back({"default", base, schema.parameter_count() - taken});
    for (uint32_t i = 0; i < schema.size(); ++i) {
      const bool owner = schema.owner(i) == i && schema.spec(i).kind == TensorKind::kParameter;
      if (owner && group_of[i] == kNoGroup) group_of[i] = last;
    }
  }
  for (uint32_t i = 0; i < schema.size(); ++i) group_of[i] = group_of[schema.owner(i)];
  return optimizer;
}

absl::StatusOr<std::vector<Hyperparameters>> Optimizer::Resolve(
    absl::Span<const GroupOverride> overrides) const {
  std::vector<Hyperparameters> given(groups_.size());
  for (const GroupOverride& override : overrides) {
    if (override.group && *override.group >= groups_.size()) {
      return MakeError(
          Reason::kOverrideConflict,
          absl::StrCat("group_overrides name group ", *override.group, "; the optimizer has ",
                       groups_.size(), " groups, counted from 0"),
          {{"group", absl::StrCat(*override.group)}});
    }
    const size_t begin = override.group.value_or(0);
    const size_t end = override.group ? begin + 1 : groups_.size();
    for (size_t g = begin; g < end; ++g) {
      MS_RETURN_IF_ERROR(CheckKnown(algorithm(), groups_[g].name, override.hyperparameters));
      for (const Field& field : kFields) {
        if (!IsSet(field, override.hyperparameters) || !IsSet(field, given[g])) continue;
        return MakeError(Reason::kOverrideConflict,
                         absl::StrCat("group_overrides set ", field.name, " of group ", g, " (\"",
                                      groups_[g].name, "\") twice; set it once"),
                         {{"group", absl::StrCat(g)}, {"field", field.name}});
      }
      given[g] = MergeHyperparameters(given[g], override.hyperparameters);
    }
  }
  for (size_t g = 0; g < groups_.size(); ++g) {
    given[g] = MergeHyperparameters(groups_[g].hyperparameters, given[g]);
    MS_RETURN_IF_ERROR(CheckRanges(algorithm(), groups_[g].name, given[g]));
  }
  return given;
}

}  // namespace modelstate
