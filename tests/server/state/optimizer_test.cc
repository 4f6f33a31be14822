#include "server/state/optimizer.h"

#include <gmock/gmock.h>

#include <cmath>
#include <functional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "server/rules/rule_info.h"
#include "server/state/optimizer_state.h"

namespace modelstate {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

class OptimizerTest : public ::testing::Test {
 protected:
  OptimizerTest() {
    std::vector<TensorSpec> specs(5);
    const char* names[] = {"a.w", "a.b", "norm.w", "norm.mean", "tied"};
    for (int i = 0; i < 5; ++i) specs[i].name = names[i];
    specs[3].kind = TensorKind::kBuffer;
    specs[4].alias_of = "a.w";
    schema_ = *ModuleSchema::Create(std::move(specs), 1);
  }

  absl::Status Error(const OptimizerConfig& config) {
    return Optimizer::Create(config, *schema_).status();
  }

  std::shared_ptr<const ModuleSchema> schema_;
};

TEST_F(OptimizerTest, DefaultsAreTorchs) {
  OptimizerConfig config;
  config.algorithm = Algorithm::kSgd;
  Hyperparameters h = (*Optimizer::Create(config, *schema_))->groups()[0].hyperparameters;
  EXPECT_EQ(h.lr, 1e-3);
  EXPECT_EQ(h.weight_decay, 0.0);
  EXPECT_EQ(h.momentum, 0.0);
  EXPECT_EQ(h.dampening, 0.0);
  EXPECT_EQ(h.nesterov, false);
  EXPECT_EQ(h.maximize, false);
  EXPECT_FALSE(h.beta1.has_value());
  config.algorithm = Algorithm::kAdamW;
  h = (*Optimizer::Create(config, *schema_))->groups()[0].hyperparameters;
  EXPECT_EQ(h.weight_decay, 1e-2);
  EXPECT_EQ(h.beta1, 0.9);
  EXPECT_EQ(h.beta2, 0.999);
  EXPECT_EQ(h.eps, 1e-8);
  EXPECT_FALSE(h.momentum.has_value());
}

TEST_F(OptimizerTest, RefusesValuesInTorchsWords) {
  using H = Hyperparameters;
  struct Case {
    Algorithm algorithm;
    std::function<void(H&)> set;
    std::string text;
  };
  std::vector<Case> cases = {
      {Algorithm::kSgd, [](H& h) { h.lr = std::nan(""); }, "Invalid learning rate: nan"},
      {Algorithm::kSgd, [](H& h) { h.lr = INFINITY; }, "Invalid learning rate: inf"},
      {Algorithm::kSgd, [](H& h) { h.lr = 1e308; },
       "Invalid learning rate: 1e+308; it must be at most 3.4e38, the largest 32-bit float"},
      {Algorithm::kAdamW, [](H& h) { h.weight_decay = 1e39; }, "Invalid weight_decay value: 1e+39"},
      {Algorithm::kSgd, [](H& h) { h.nesterov = true; },
       "Nesterov momentum requires a momentum and zero dampening"},
      {Algorithm::kSgd,
       [](H& h) {
         h.nesterov = true;
         h.momentum = 0.9;
         h.dampening = 0.1;
       },
       "Nesterov momentum requires a momentum and zero dampening"},
      // Of two mistakes the one that torch looks for first.
      {Algorithm::kRmsprop, [](H& h) { h.alpha = h.momentum = -1; },
       "Invalid momentum value: -1.0"},
      {Algorithm::kSgd, [](H& h) { h.beta1 = 0.9; }, "sgd has no beta1"},
      {Algorithm::kAdamW, [](H& h) { h.nesterov = true; }, "adamw has no nesterov"},
  };
  const std::vector<Algorithm> all(AllAlgorithms().begin(), AllAlgorithms().end());
  // Lion is not one of torch.optim's: the same words.
  const std::vector<Algorithm> with_betas = {Algorithm::kAdam,   Algorithm::kAdamW,
                                             Algorithm::kNAdam,  Algorithm::kRAdam,
                                             Algorithm::kAdamax, Algorithm::kLion};
  const std::vector<Algorithm> with_eps = {
      Algorithm::kAdam,   Algorithm::kAdamW,   Algorithm::kNAdam,   Algorithm::kRAdam,
      Algorithm::kAdamax, Algorithm::kAdagrad, Algorithm::kRmsprop, Algorithm::kAdadelta};
  struct OutOfRange {
    std::optional<double> H::*field;
    double value;
    std::string text;
    std::vector<Algorithm> algorithms;
  };
  const OutOfRange values[] = {
      {&H::lr, -1, "Invalid learning rate: -1.0", all},
      {&H::weight_decay, -0.1, "Invalid weight_decay value: -0.1", all},
      {&H::eps, -1e-8, "Invalid epsilon value: -1e-08", with_eps},
      {&H::beta1, 1, "Invalid beta parameter at index 0: 1.0", with_betas},
      {&H::beta2, -0.25, "Invalid beta parameter at index 1: -0.25", with_betas},
      {&H::momentum,
       -1e-5,
       "Invalid momentum value: -1e-05",
       {Algorithm::kSgd, Algorithm::kRmsprop}},
      {&H::alpha, -3, "Invalid alpha value: -3.0", {Algorithm::kRmsprop}},
      {&H::rho, 1.5, "Invalid rho value: 1.5", {Algorithm::kAdadelta}},
      {&H::lr_decay, -0.5, "Invalid lr_decay value: -0.5", {Algorithm::kAdagrad}},
      {&H::initial_accumulator_value,
       -2,
       "Invalid initial_accumulator_value value: -2.0",
       {Algorithm::kAdagrad}},
      {&H::momentum_decay, -4e-3, "Invalid momentum_decay value: -0.004", {Algorithm::kNAdam}},
  };
  for (const OutOfRange& v : values) {
    for (Algorithm algorithm : v.algorithms) {
      cases.push_back({algorithm, [&v](H& h) { h.*v.field = v.value; }, v.text});
    }
  }
  for (const Case& c : cases) {
    SCOPED_TRACE(absl::StrCat(AlgorithmName(c.algorithm), ": ", c.text));
    OptimizerConfig config;
    config.algorithm = c.algorithm;
    c.set(config.hyperparameters);
    const absl::Status error = Error(config);
    EXPECT_EQ(GetReason(error), Reason::kInvalidField);
    EXPECT_THAT(std::string(error.message()), StartsWith(c.text));
    // The same in a group, and as an override of one step.
    OptimizerConfig grouped;
    grouped.algorithm = c.algorithm;
    grouped.groups = {{"g", {}, config.hyperparameters}};
    EXPECT_THAT(std::string(Error(grouped).message()), HasSubstr("group \"g\": " + c.text));
    OptimizerConfig plain;
    plain.algorithm = c.algorithm;
    std::shared_ptr<const Optimizer> optimizer = *Optimizer::Create(plain, *schema_);
    EXPECT_EQ(GetReason(optimizer->Resolve({{std::nullopt, config.hyperparameters}}).status()),
              Reason::kInvalidField);
  }
  OptimizerConfig clip;
  clip.max_grad_norm = 0;
  EXPECT_EQ(GetReason(Error(clip)), Reason::kInvalidField);
  // In 32 bits it is 0, which the step takes for no clipping.
  clip.max_grad_norm.reset();
  clip.max_grad_value = 1e-46;
  EXPECT_EQ(GetReason(Error(clip)), Reason::kInvalidField);
}

TEST_F(OptimizerTest, EachParameterIsInTheFirstGroupThatTakesIt) {
  OptimizerConfig config;
  config.algorithm = Algorithm::kSgd;
  config.groups.resize(2);
  config.groups[0].name = "norm";
  config.groups[0].selection.globs = {"norm.*"};
  config.groups[0].hyperparameters.lr = 5;
  config.groups[1].name = "named";
  config.groups[1].selection.names = {"tied"};
  config.groups[1].selection.prefixes = {"norm.w"};
  std::shared_ptr<const Optimizer> optimizer = *Optimizer::Create(config, *schema_);
  ASSERT_EQ(optimizer->groups().size(), 3u);
  EXPECT_EQ(optimizer->group_of(2), 0u);
  EXPECT_EQ(optimizer->group_of(0), 1u) << "taken through its second name";
  EXPECT_EQ(optimizer->group_of(4), 1u);
  EXPECT_EQ(optimizer->group_of(1), 2u);
  EXPECT_EQ(optimizer->groups()[0].parameter_count, 1u) << "a glob leaves buffers out";
  EXPECT_EQ(optimizer->groups()[1].parameter_count, 1u);
  EXPECT_EQ(optimizer->groups()[2].parameter_count, 1u);
  EXPECT_EQ(optimizer->groups()[0].hyperparameters.lr, 5.0);
  EXPECT_EQ(optimizer->groups()[2].hyperparameters.lr, 1e-3);
}

TEST_F(OptimizerTest, GroupMayNotNameABufferOrNothing) {
  OptimizerConfig config;
  config.algorithm = Algorithm::kSgd;
  config.groups.resize(1);
  config.groups[0].selection.names = {"norm.mean"};
  EXPECT_EQ(GetReason(Error(config)), Reason::kNotAParameter);
  config.groups[0].selection.names = {"nope"};
  EXPECT_EQ(GetReason(Error(config)), Reason::kTensorNotFound);
}

TEST_F(OptimizerTest, NameThatAnEarlierGroupHasTakenIsRefusedInTorchsWords) {
  OptimizerConfig config;
  config.algorithm = Algorithm::kSgd;
  config.groups.resize(2);
  config.groups[0].name = "first";
  config.groups[0].selection.globs = {"a.*"};
  // "tied" is another name of a.w.
  for (const char* name : {"a.b", "tied"}) {
    config.groups[1].selection.names = {"norm.w", name};
    const absl::Status status = Error(config);
    EXPECT_EQ(GetReason(status), Reason::kInvalidField);
    EXPECT_THAT(std::string(status.message()),
                HasSubstr("some parameters appear in more than one parameter group"));
    EXPECT_THAT(std::string(status.message()), HasSubstr(name));
    EXPECT_THAT(std::string(status.message()), HasSubstr("\"first\""));
  }
  // Twice in one group is no conflict.
  config.groups[0].selection.globs.clear();
  config.groups[0].selection.names = {"a.w", "tied", "a.w"};
  config.groups[1].selection.names = {"norm.w"};
  EXPECT_TRUE(Error(config).ok()) << Error(config);
}

TEST_F(OptimizerTest, GroupsAreBoundedAndTheirNamesUnique) {
  OptimizerConfig config;
  config.algorithm = Algorithm::kSgd;
  config.groups.resize(1000);
  EXPECT_TRUE(Error(config).ok()) << "empty names may repeat";
  config.groups[3].name = "same";
  config.groups[999].name = "same";
  absl::Status status = Error(config);
  EXPECT_EQ(GetReason(status), Reason::kInvalidField);
  EXPECT_THAT(std::string(status.message()), HasSubstr("\"same\""));
  config.groups[999].name.clear();
  config.groups.resize(1001);
  status = Error(config);
  EXPECT_EQ(GetReason(status), Reason::kInvalidField);
  EXPECT_THAT(std::string(status.message()), HasSubstr("at most 1000"));
}

TEST_F(OptimizerTest, OverridesOfOneStep) {
  OptimizerConfig config;
  config.algorithm = Algorithm::kSgd;
  config.groups.resize(1);
  config.groups[0].selection.names = {"a.w"};
  std::shared_ptr<const Optimizer> optimizer = *Optimizer::Create(config, *schema_);
  GroupOverride all;
  all.hyperparameters.lr = 7;
  GroupOverride second;
  second.group = 1;
  second.hyperparameters.momentum = 0.5;
  std::vector<Hyperparameters> resolved = *optimizer->Resolve({all, second});
  EXPECT_EQ(resolved[0].lr, 7.0);
  EXPECT_EQ(resolved[1].lr, 7.0);
  EXPECT_EQ(resolved[0].momentum, 0.0);
  EXPECT_EQ(resolved[1].momentum, 0.5);
  EXPECT_EQ((*optimizer->Resolve({}))[0].lr, 1e-3) << "for that step only";

  second.hyperparameters.lr = 8;
  EXPECT_EQ(GetReason(optimizer->Resolve({all, second}).status()), Reason::kOverrideConflict);
  second.group = 2;
  EXPECT_EQ(GetReason(optimizer->Resolve({second}).status()), Reason::kOverrideConflict);
}

TEST(KeptSlots, AreTorchsWithAMasterForNarrowParameters) {
  auto names = [](Algorithm algorithm, double momentum, DType dtype) {
    OptimizerConfig config;
    config.algorithm = algorithm;
    Hyperparameters h = GetRule(algorithm).defaults();
    h.momentum = momentum;
    std::string text;
    for (const SlotInfo& slot : KeptSlots(config, h, dtype)) {
      text += std::string(slot.name) + ":" + std::string(DTypeName(slot.dtype)) + " ";
    }
    return text;
  };
  EXPECT_EQ(names(Algorithm::kSgd, 0, DType::kF32), "");
  EXPECT_EQ(names(Algorithm::kSgd, 0.9, DType::kF32), "momentum_buffer:F32 ");
  EXPECT_EQ(names(Algorithm::kSgd, 0.9, DType::kBF16), "master:F32 momentum_buffer:F32 ");
  EXPECT_EQ(names(Algorithm::kAdamW, 0, DType::kF64), "exp_avg:F64 exp_avg_sq:F64 ");
  EXPECT_EQ(names(Algorithm::kAdamW, 0, DType::kF16), "master:F32 exp_avg:F32 exp_avg_sq:F32 ");
}

TEST_F(OptimizerTest, NamesOfGroupsCanBePrintedAndAreNotThatOfTheDefaultGroup) {
  OptimizerConfig config;
  config.algorithm = Algorithm::kSgd;
  config.groups.resize(1);
  config.groups[0].selection.names = {"a.w"};
  for (const std::string& name :
       {std::string("a\nb"), std::string("a\0b", 3), std::string("\x1b[2J")}) {
    config.groups[0].name = name;
    EXPECT_EQ(GetReason(Error(config)), Reason::kInvalidField);
    EXPECT_THAT(std::string(Error(config).message()), HasSubstr("group 0 has a control character"));
  }
  config.groups[0].name = std::string(257, 'n');
  EXPECT_EQ(GetReason(Error(config)), Reason::kInvalidField);
  EXPECT_THAT(std::string(Error(config).message()), HasSubstr("at most 256"));
  config.groups[0].name.pop_back();
  EXPECT_TRUE(Error(config).ok());
  config.groups[0].name = "default";
  EXPECT_EQ(GetReason(Error(config)), Reason::kInvalidField);
  config.no_default_group = true;
  EXPECT_TRUE(Error(config).ok());
}

// Each pattern is fast, but there are up to 64,000 of them, and 100,000s of names.
TEST_F(OptimizerTest, PatternsThatTakeTooManyComparisonsAreRefused) {
  std::vector<TensorSpec> specs(20000);
  for (size_t i = 0; i < specs.size(); ++i) specs[i].name = absl::StrCat("layer.", i, ".weight");
  schema_ = *ModuleSchema::Create(std::move(specs), 1);
  OptimizerConfig config;
  config.algorithm = Algorithm::kSgd;
  config.groups.resize(1000);
  for (ParameterGroup& group : config.groups) {
    for (int i = 0; i < 60; ++i) {
      group.selection.globs.push_back(absl::StrCat("*0*1*2*3*4*5*6*7*", i));
    }
  }
  const absl::Status refused = Error(config);
  EXPECT_EQ(GetReason(refused), Reason::kInvalidField);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("20000 parameters"));
  // A group for each of 1000 layers is fine.
  for (size_t g = 0; g < config.groups.size(); ++g) {
    config.groups[g].selection.globs = {absl::StrCat("layer.", g, ".*")};
  }
  EXPECT_TRUE(Error(config).ok());
}

}  // namespace
}  // namespace modelstate
