#include "server/optim/gradient_set.h"

#include <gmock/gmock.h>

#include "tests/server/optim/step_fixture.h"

namespace modelstate {
namespace {

using ::testing::HasSubstr;
using testing::SteppedModule;

class StageGradientsTest : public ::testing::Test {
 protected:
  StageGradientsTest() {
    TensorSpec frozen = SteppedModule::Parameter("frozen", {2});
    frozen.requires_grad = false;
    TensorSpec tied = SteppedModule::Parameter("tied", {2, 3});
    tied.alias_of = "w";
    schema_ = *ModuleSchema::Create({SteppedModule::Parameter("w", {2, 3}), tied, frozen,
                                     SteppedModule::Buffer("running_mean", {3}),
                                     SteppedModule::Parameter("complex", {1}, DType::kC64)},
                                    1);
  }

  static PushedTensor Tensor(std::string name, std::vector<int64_t> dims,
                             TensorKind kind = TensorKind::kGradient, DType dtype = DType::kF32) {
    return {std::move(name), kind, dtype, *Shape::Create(dims)};
  }

  absl::StatusOr<GradientSet> Stage(std::vector<PushedTensor> tensors) {
    return StageGradients(schema_, std::move(tensors), device_, *budget_);
  }

  CpuDevice device_{1 << 20};
  std::shared_ptr<const ModuleSchema> schema_;
  std::shared_ptr<MemoryBudget> budget_ = std::make_shared<MemoryBudget>(
      Reason::kPushMemory, "memory for arriving pushes", "--push_memory_bytes", 40);
};

TEST_F(StageGradientsTest, RefusesWhatDoesNotMatchAndTakesNothing) {
  struct Case {
    std::vector<PushedTensor> tensors;
    Reason reason;
    std::string text;
  };
  const Case cases[] = {
      {{Tensor("nope", {1})}, Reason::kUnknownKey, "nope"},
      {{Tensor("running_mean", {3})}, Reason::kNotAParameter, "is a buffer"},
      {{Tensor("w", {2, 3}, TensorKind::kBuffer)},
       Reason::kInvalidField,
       "is a parameter: push its gradient with kind GRADIENT"},
      {{Tensor("w", {2, 3}, TensorKind::kParameter)},
       Reason::kInvalidField,
       "gradients and buffer"},
      {{Tensor("frozen", {2})}, Reason::kParameterFrozen, "SetRequiresGrad"},
      {{Tensor("w", {3, 2})}, Reason::kShapeMismatch, "[3, 2]; the parameter has [2, 3]"},
      {{Tensor("w", {6})}, Reason::kShapeMismatch, "nothing is broadcast"},
      {{Tensor("w", {2, 3}, TensorKind::kGradient, DType::kF64)}, Reason::kDTypeMismatch, "F64"},
      {{Tensor("complex", {1}, TensorKind::kGradient, DType::kC64)}, Reason::kDTypeMismatch, "C64"},
      {{Tensor("w", {2, 3}), Tensor("w", {2, 3})}, Reason::kChunkInvalid, "twice"},
      {{Tensor("w", {2, 3}), Tensor("tied", {2, 3})}, Reason::kChunkInvalid, "tied to \"w\""},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(c.text);
    absl::StatusOr<GradientSet> set = Stage(c.tensors);
    ASSERT_FALSE(set.ok());
    EXPECT_EQ(GetReason(set.status()), c.reason) << set.status();
    EXPECT_THAT(std::string(set.status().message()), HasSubstr(c.text));
    EXPECT_EQ(budget_->used(), 0u);
    EXPECT_EQ(device_.pool()->usage().used_bytes, 0u);
  }
}

TEST_F(StageGradientsTest, ReservesBeforeItAllocates) {
  // 24 and 12 bytes fit in 40, twice do not.
  absl::StatusOr<GradientSet> first =
      Stage({Tensor("tied", {2, 3}), Tensor("running_mean", {3}, TensorKind::kBuffer)});
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_EQ(first->entries[0].index, 0u) << "the owner of the tie";
  EXPECT_EQ(first->entries[1].index, 3u);
  EXPECT_EQ(budget_->used(), 36u);
  const uint64_t used = device_.pool()->usage().used_bytes;
  absl::StatusOr<GradientSet> second = Stage({Tensor("w", {2, 3})});
  EXPECT_EQ(GetReason(second.status()), Reason::kPushMemory) << second.status();
  EXPECT_TRUE(GetRetryAfter(second.status()).has_value());
  EXPECT_THAT(std::string(second.status().message()), HasSubstr("--push_memory_bytes"));
  EXPECT_EQ(device_.pool()->usage().used_bytes, used);
  first = absl::UnknownError("given up");
  EXPECT_EQ(budget_->used(), 0u);
  EXPECT_EQ(device_.pool()->usage().used_bytes, 0u);
  EXPECT_TRUE(Stage({Tensor("w", {2, 3})}).ok());
}

TEST_F(StageGradientsTest, EmptyModuleIsAPrecondition) {
  schema_ = *ModuleSchema::Create({}, 1);
  EXPECT_EQ(GetReason(Stage({}).status()), Reason::kModuleEmpty);
}

TEST_F(StageGradientsTest, RematchFollowsANewerSchema) {
  absl::StatusOr<GradientSet> set = Stage({Tensor("w", {2, 3})});
  ASSERT_TRUE(set.ok());
  std::shared_ptr<const ModuleSchema> moved = *ModuleSchema::Create(
      {SteppedModule::Buffer("first", {1}), SteppedModule::Parameter("w", {2, 3})}, 2);
  ASSERT_TRUE(RematchGradients(moved, *set).ok());
  EXPECT_EQ(set->entries[0].index, 1u);
  EXPECT_EQ(set->schema, moved);

  const std::shared_ptr<const ModuleSchema> frozen = moved->WithRequiresGrad({1}, false);
  EXPECT_EQ(GetReason(RematchGradients(frozen, *set)), Reason::kParameterFrozen);
  EXPECT_EQ(set->schema, moved) << "unchanged by an error";
}

TEST_F(StageGradientsTest, IgnoresFrozenParametersWhereAsked) {
  absl::StatusOr<GradientSet> set =
      StageGradients(schema_,
                     {Tensor("frozen", {2}), Tensor("w", {2, 3}),
                      Tensor("running_mean", {3}, TensorKind::kBuffer)},
                     device_, *budget_, true);
  ASSERT_TRUE(set.ok()) << set.status();
  EXPECT_EQ(set->ignored, 1u);
  ASSERT_EQ(set->entries.size(), 2u);
  EXPECT_EQ(set->entries[0].index, 0u);
  EXPECT_EQ(set->entries[0].tensor, 1u);
  EXPECT_EQ(set->entries[1].tensor, 2u);
  EXPECT_EQ(budget_->used(), 36u) << "nothing is staged for what is ignored";
}

TEST_F(StageGradientsTest, WhatIsIgnoredIsCheckedLikeTheRest) {
  const auto stage = [&](PushedTensor tensor) {
    return StageGradients(schema_, {std::move(tensor)}, device_, *budget_, true).status();
  };
  EXPECT_EQ(GetReason(stage(Tensor("frozen", {3}))), Reason::kShapeMismatch);
  EXPECT_EQ(GetReason(stage(Tensor("frozen", {2}, TensorKind::kGradient, DType::kF64))),
            Reason::kDTypeMismatch);
  EXPECT_EQ(GetReason(stage(Tensor("running_mean", {3}))), Reason::kNotAParameter);
  EXPECT_EQ(GetReason(stage(Tensor("nope", {3}))), Reason::kUnknownKey);
  EXPECT_EQ(GetReason(StageGradients(schema_, {Tensor("frozen", {2}), Tensor("frozen", {2})},
                                     device_, *budget_, true)
                          .status()),
            Reason::kChunkInvalid);
}

TEST_F(StageGradientsTest, WhatIsFrozenMeanwhileIsDroppedAndStaysSo) {
  absl::StatusOr<GradientSet> set = StageGradients(
      schema_, {Tensor("w", {2, 3}), Tensor("running_mean", {3}, TensorKind::kBuffer)}, device_,
      *budget_, true);
  ASSERT_TRUE(set.ok());
  const std::shared_ptr<const ModuleSchema> frozen = schema_->WithRequiresGrad({0}, false);
  ASSERT_TRUE(RematchGradients(frozen, *set).ok());
  EXPECT_EQ(set->ignored, 1u);
  ASSERT_EQ(set->entries.size(), 1u);
  EXPECT_EQ(set->entries[0].index, 3u);
  // Its elements are gone: it cannot come back.
  ASSERT_TRUE(RematchGradients(frozen->WithRequiresGrad({0}, true), *set).ok());
  EXPECT_EQ(set->ignored, 1u);
  EXPECT_EQ(set->entries.size(), 1u);
  // All or nothing still.
  std::shared_ptr<const ModuleSchema> other = *ModuleSchema::Create(
      {SteppedModule::Parameter("w", {2, 3}), SteppedModule::Buffer("running_mean", {4})}, 9);
  EXPECT_EQ(GetReason(RematchGradients(other, *set)), Reason::kShapeMismatch);
  EXPECT_EQ(set->entries.size(), 1u);
}

}  // namespace
}  // namespace modelstate
