#include "server/state/optimizer.h"

#include <charconv>
#include <cmath>
#include <limits>
#include <utility>

#include "absl/algorithm/container.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/status.h"
#include "server/rules/rule_info.h"

namespace modelstate {
namespace {

// Each group is held against every tensor.
constexpr size_t kMaxGroups = 1000;
constexpr size_t kMaxGroupNameBytes = 256;  // an answer has each name twice, and must fit a message
constexpr char kDefaultGroup[] = "default";
constexpr uint32_t kMaxQuorum = 4096;
// Characters looked at to find who is in which group: a second or two.
constexpr uint64_t kMaxMatchSteps = 1'000'000'000;

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

absl::Status CheckKnown(Algorithm algorithm, const std::string& group,
                        const Hyperparameters& given) {
  const RuleInfo& rule = GetRule(algorithm);
  for (const HyperparameterField& field : HyperparameterFields()) {
    if (rule.has(field) || !field.is_set(given)) continue;
    std::vector<absl::string_view> known;
    for (const HyperparameterField& other : HyperparameterFields()) {
      if (rule.has(other)) known.push_back(other.name);
    }
    return Invalid(group, field.name,
                   absl::StrCat(AlgorithmName(algorithm), " has no ", field.name, "; it has ",
                                absl::StrJoin(known, ", ")));
  }
  return absl::OkStatus();
}

const char* FieldName(const HyperparameterRule& rule) {
  for (const HyperparameterField& field : HyperparameterFields()) {
    if (field.number == rule.number && field.flag == rule.flag) return field.name;
  }
  return "";
}

// torch's checks, in torch's order and words, over complete hyper-parameters. Stricter in that no
// value may be infinite or NaN.
absl::Status CheckRanges(Algorithm algorithm, const std::string& group,
                         const Hyperparameters& complete) {
  const RuleInfo& info = GetRule(algorithm);
  for (const HyperparameterRule& rule : info.hyperparameters) {
    if (rule.number == nullptr) continue;
    const double value = *(complete.*rule.number);
    bool good = std::isfinite(value);
    const char* must = "finite";
    switch (rule.range) {
      case Range::kAtLeastZero:
        good = good && value >= 0;
        must = "finite and at least 0";
        break;
      case Range::kZeroToOne:
        good = good && value >= 0 && value <= 1;
        must = "at least 0 and at most 1";
        break;
      case Range::kZeroToBelowOne:
        good = good && value >= 0 && value < 1;
        must = "at least 0 and less than 1";
        break;
      case Range::kFinite:
        break;
    }
    // Parameters of 32 bits and less are stepped in 32 bits.
    if (good && !std::isfinite(static_cast<float>(value))) {
      good = false;
      must = "at most 3.4e38, the largest 32-bit float";
    }
    if (good) continue;
    return Invalid(
        group, FieldName(rule),
        absl::StrCat("Invalid ", rule.what, ": ", PythonFloat(value), "; it must be ", must));
  }
  const char* problem = info.check(complete);
  return problem == nullptr ? absl::OkStatus() : Invalid(group, "nesterov", problem);
}

absl::Status CheckClipping(const OptimizerConfig& config) {
  const std::pair<const char*, std::optional<double>> limits[] = {
      {"max_grad_norm", config.max_grad_norm}, {"max_grad_value", config.max_grad_value}};
  for (const auto& [name, limit] : limits) {
    // A limit that 32 bits do not tell from 0 would be none.
    if (!limit || static_cast<float>(*limit) > 0) continue;
    return Invalid(
        "", name,
        absl::StrCat("Invalid ", name, ": ", PythonFloat(*limit), "; it must be greater than 0",
                     *limit > 0 ? " as a 32-bit float, so at least 1.4e-45" : "",
                     ", or unset for no clipping"));
  }
  if (config.max_grad_norm && config.max_grad_value) {
    return Invalid("", "max_grad_value",
                   "max_grad_norm and max_grad_value are both set; clip by one of them");
  }
  return absl::OkStatus();
}

absl::Status CheckRounds(const Rounds& rounds) {
  if (rounds.quorum > kMaxQuorum) {
    return Invalid("", "rounds.quorum",
                   absl::StrCat("rounds.quorum is ", rounds.quorum, "; at most ", kMaxQuorum,
                                " workers can make a round"));
  }
  if ((rounds.min_contributions > 0) != (rounds.round_timeout > absl::ZeroDuration())) {
    return Invalid("", "rounds.round_timeout",
                   "rounds.round_timeout and rounds.min_contributions say together when a round "
                   "closes early: set both above 0, or neither");
  }
  if (rounds.min_contributions > rounds.quorum) {
    return Invalid(
        "", "rounds.min_contributions",
        absl::StrCat("rounds.min_contributions is ", rounds.min_contributions,
                     ", more than the quorum, ", rounds.quorum, ": set it to at most that"));
  }
  return absl::OkStatus();
}

absl::Status CheckGroupNames(const OptimizerConfig& config) {
  const std::vector<ParameterGroup>& groups = config.groups;
  if (groups.size() > kMaxGroups) {
    return Invalid("", "groups",
                   absl::StrCat("groups: there are ", groups.size(), "; at most ", kMaxGroups,
                                " are allowed; put parameters with the same hyper-parameters into "
                                "one group"));
  }
  absl::flat_hash_set<absl::string_view> names;
  for (const ParameterGroup& group : groups) {
    if (group.name.size() > kMaxGroupNameBytes) {
      return Invalid(
          "", "groups",
          absl::StrCat("groups: the name of group ", &group - groups.data(), " has ",
                       group.name.size(), " bytes; at most ", kMaxGroupNameBytes, " are allowed"));
    }
    // It is shown in logs and error texts.
    if (absl::c_any_of(group.name, [](unsigned char c) { return absl::ascii_iscntrl(c); })) {
      return Invalid("", "groups",
                     absl::StrCat("groups: the name of group ", &group - groups.data(),
                                  " has a control character (a NUL, a line end or the like); use "
                                  "one that can be printed"));
    }
    if (group.name == kDefaultGroup && !config.no_default_group) {
      return Invalid(group.name, "groups",
                     "the group of what no other group takes has this name; use another, or set "
                     "no_default_group");
    }
    if (group.name.empty() || names.insert(group.name).second) continue;
    return Invalid(group.name, "groups",
                   "two groups have this name; give each another, or leave it empty");
  }
  return absl::OkStatus();
}

// That the parameters that a group names are there, and in no group before it.
absl::Status CheckNamed(const ParameterGroup& given, const ModuleSchema& schema,
                        const std::vector<uint32_t>& group_of,
                        const std::vector<Optimizer::Group>& groups) {
  std::vector<std::string> unknown;
  for (const std::string& name : given.selection.names) {
    if (!schema.Find(name)) unknown.push_back(name);
  }
  if (!unknown.empty()) {
    return MakeError(Reason::kTensorNotFound,
                     absl::StrCat("group \"", given.name, "\": the module has no tensor named ",
                                  QuotedList(unknown), "; list its parameters to see the names"),
                     {{"tensor", unknown.front()}, {"group", given.name}});
  }
  for (const std::string& name : given.selection.names) {
    const uint32_t index = *schema.Find(name);
    if (schema.spec(index).kind != TensorKind::kParameter) {
      return MakeError(Reason::kNotAParameter,
                       absl::StrCat("group \"", given.name, "\": \"", name,
                                    "\" is a buffer; an optimizer updates parameters only, leave "
                                    "it out of the group"),
                       {{"tensor", name}, {"group", given.name}});
    }
    const uint32_t other = group_of[schema.owner(index)];
    if (other == Optimizer::kNoGroup) continue;
    return MakeError(Reason::kInvalidField,
                     absl::StrCat("group \"", given.name,
                                  "\": some parameters appear in more than one parameter group: \"",
                                  name, "\" is in group ", other, " (\"", groups[other].name,
                                  "\") already; name it in one of them"),
                     {{"tensor", name}, {"group", given.name}});
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::shared_ptr<const Optimizer>> Optimizer::Create(const OptimizerConfig& config,
                                                                   const ModuleSchema& schema) {
  std::shared_ptr<Optimizer> optimizer(new Optimizer());
  optimizer->config_ = config;
  if (config.algorithm == Algorithm::kUnknown) {
    std::vector<std::string> known;
    for (Algorithm algorithm : AllAlgorithms()) {
      known.push_back(absl::AsciiStrToUpper(AlgorithmName(algorithm)));
    }
    return Invalid("", "optimizer.algorithm",
                   absl::StrCat("optimizer.algorithm is not set, or not known here; use one of ",
                                absl::StrJoin(known, ", ")));
  }
  if (config.no_default_group && config.groups.empty()) {
    return Invalid("", "no_default_group",
                   "optimizer got an empty parameter list: name groups, or unset no_default_group");
  }
  MS_RETURN_IF_ERROR(CheckClipping(config));
  MS_RETURN_IF_ERROR(CheckRounds(config.rounds));
  MS_RETURN_IF_ERROR(CheckGroupNames(config));
  MS_RETURN_IF_ERROR(CheckKnown(config.algorithm, "", config.hyperparameters));
  const Hyperparameters base =
      MergeHyperparameters(GetRule(config.algorithm).defaults(), config.hyperparameters);
  MS_RETURN_IF_ERROR(CheckRanges(config.algorithm, "", base));

  std::vector<uint32_t>& group_of = optimizer->group_of_;
  group_of.assign(schema.size(), kNoGroup);
  uint64_t taken = 0;
  uint64_t steps = 0;
  for (const ParameterGroup& given : config.groups) {
    MS_RETURN_IF_ERROR(CheckKnown(config.algorithm, given.name, given.hyperparameters));
    Group group{given.name, MergeHyperparameters(base, given.hyperparameters), 0};
    MS_RETURN_IF_ERROR(CheckRanges(config.algorithm, given.name, group.hyperparameters));
    const uint32_t number = static_cast<uint32_t>(optimizer->groups_.size());
    MS_RETURN_IF_ERROR(CheckNamed(given, schema, group_of, optimizer->groups_));
    const auto take = [&](uint32_t owner) {
      group_of[owner] = number;
      ++group.parameter_count;
    };
    for (const std::string& name : given.selection.names) {
      const uint32_t owner = schema.owner(*schema.Find(name));
      if (group_of[owner] == kNoGroup) take(owner);
    }
    const bool only_names = !given.selection.names.empty() && given.selection.prefixes.empty() &&
                            given.selection.globs.empty();
    for (uint32_t i = 0; i < schema.size() && !only_names; ++i) {
      const uint32_t owner = schema.owner(i);
      if (group_of[owner] != kNoGroup) continue;
      if (schema.spec(owner).kind != TensorKind::kParameter) continue;
      if (MatchesPattern(given.selection, schema.spec(i).name, &steps)) take(owner);
      if (steps <= kMaxMatchSteps) continue;
      return Invalid(given.name, "groups",
                     absl::StrCat("the groups' globs and prefixes are held against the names of ",
                                  schema.parameter_count(), " parameters, which takes more than ",
                                  kMaxMatchSteps,
                                  " comparisons of characters: use fewer or "
                                  "simpler ones, or name the parameters"));
    }
    taken += group.parameter_count;
    optimizer->groups_.push_back(std::move(group));
  }
  if (config.no_default_group) {
    optimizer->ungrouped_count_ = schema.parameter_count() - taken;
  } else if (taken < schema.parameter_count() || config.groups.empty()) {
    const uint32_t last = static_cast<uint32_t>(optimizer->groups_.size());
    optimizer->groups_.push_back({kDefaultGroup, base, schema.parameter_count() - taken});
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
      for (const HyperparameterField& field : HyperparameterFields()) {
        if (!field.is_set(override.hyperparameters) || !field.is_set(given[g])) continue;
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
