// What freezing a parameter changes, and what it does not.
#include "tests/server/rpc/server_fixture.h"

namespace modelstate {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using Stub = v1::ModelState::Stub;

class FreezingRpcsTest : public ServerTest {
 protected:
  void SetUp() override {
    ServerTest::SetUp();
    CreateTiny();
    v1::ConfigureOptimizerRequest request;
    request.set_module("tiny");
    request.mutable_optimizer()->set_algorithm(v1::SGD);
    request.mutable_optimizer()->mutable_hyperparameters()->set_lr(1);
    request.mutable_optimizer()->mutable_hyperparameters()->set_momentum(0.5);
    const auto configured = Call(&Stub::ConfigureOptimizer, request);
    ASSERT_TRUE(configured.ok()) << configured.status();
  }

  absl::StatusOr<v1::SetRequiresGradResponse> SetRequiresGrad(
      bool requires_grad, const std::vector<std::string>& globs) {
    v1::SetRequiresGradRequest request;
    request.set_module("tiny");
    request.set_requires_grad(requires_grad);
    for (const std::string& glob : globs) request.mutable_selection()->add_globs(glob);
    return Call(&Stub::SetRequiresGrad, request);
  }

  // Gradients for both parameters.
  static std::vector<v1::StepPart> Both(bool ignore_frozen, uint64_t sequence = 0) {
    std::vector<v1::StepPart> parts =
        StepParts("tiny", {{Tensor("weight", v1::GRADIENT, {2, 3}), FloatBytes({1, 1, 1, 1, 1, 1})},
                           {Tensor("bias", v1::GRADIENT, {2}), FloatBytes({1, 1})}});
    parts[0].mutable_header()->set_ignore_frozen(ignore_frozen);
    if (sequence > 0) {
      parts[0].mutable_header()->set_worker("w");
      parts[0].mutable_header()->set_sequence(sequence);
    }
    return parts;
  }

  // Saves the module, and loads the checkpoint as another.
  void SaveAndLoad(const std::string& name) {
    grpc::ClientContext save_context;
    v1::SaveCheckpointRequest save;
    save.set_module("tiny");
    save.set_path("kept");
    auto saved = stub_->SaveCheckpoint(&save_context, save);
    v1::SaveCheckpointResponse save_event;
    while (saved->Read(&save_event)) {
    }
    ASSERT_TRUE(saved->Finish().ok());
    grpc::ClientContext load_context;
    v1::LoadCheckpointRequest load;
    load.set_module(name);
    load.set_path("kept");
    load.set_create_module(true);
    auto loaded = stub_->LoadCheckpoint(&load_context, load);
    v1::LoadCheckpointResponse load_event;
    while (loaded->Read(&load_event)) {
    }
    ASSERT_TRUE(loaded->Finish().ok());
  }

  std::vector<float> Values(const std::string& name, const std::string& module = "tiny") {
    return FloatsOf(FetchAll(module).Bytes()[name]);
  }
};

TEST_F(FreezingRpcsTest, NoBufferIsEverTouched) {
  v1::ListTensorsRequest buffers;
  buffers.set_module("tiny");
  const auto list = [&] {
    auto page = Call(&Stub::ListBuffers, buffers);
    EXPECT_TRUE(page.ok()) << page.status();
    return page->tensors(0).DebugString();
  };
  const std::string before = list();
  EXPECT_EQ(SetRequiresGrad(false, {"*"})->changed(), 2);
  EXPECT_EQ(list(), before);
  EXPECT_EQ(SetRequiresGrad(true, {"*"})->changed(), 2);
  EXPECT_EQ(list(), before);
  EXPECT_EQ(SetRequiresGrad(false, {"running_*"})->changed(), 0);
  EXPECT_EQ(FetchAll("tiny").header.version().number(), 4) << "nothing changed: no new version";
}

TEST_F(FreezingRpcsTest, AFrozenParameterIsAParameterEverywhere) {
  ASSERT_TRUE(SetRequiresGrad(false, {"bias"}).ok());
  v1::ListTensorsRequest request;
  request.set_module("tiny");
  const auto listed = Call(&Stub::ListParameters, request);
  ASSERT_EQ(listed->tensors_size(), 2);
  EXPECT_EQ(listed->tensors(1).name(), "bias");
  EXPECT_FALSE(listed->tensors(1).requires_grad());
  const Fetched fetched = FetchAll("tiny");
  ASSERT_EQ(fetched.tensors.size(), 3u);
  EXPECT_EQ(fetched.tensors[1].kind(), v1::PARAMETER);
  EXPECT_FALSE(fetched.tensors[1].requires_grad());
  EXPECT_THAT(Values("bias"), ElementsAre(0.5, -0.5));

  SaveAndLoad("again");
  request.set_module("again");
  const auto again = Call(&Stub::ListParameters, request);
  ASSERT_EQ(again->tensors_size(), 2);
  EXPECT_FALSE(again->tensors(1).requires_grad());
  EXPECT_TRUE(again->tensors(0).requires_grad());
  EXPECT_THAT(Values("bias", "again"), ElementsAre(0.5, -0.5));
}

TEST_F(FreezingRpcsTest, OptimizerStateWaitsForTheUnfreeze) {
  ASSERT_TRUE(Push(Both(false)).ok());  // the momentum buffer is 1
  EXPECT_THAT(Values("bias"), ElementsAre(-0.5, -1.5));
  ASSERT_TRUE(SetRequiresGrad(false, {"bias"}).ok());
  const auto frozen = Push(Both(true));
  ASSERT_TRUE(frozen.ok()) << frozen.status();
  EXPECT_EQ(frozen->updated(), 1);
  EXPECT_THAT(Values("bias"), ElementsAre(-0.5, -1.5));
  ASSERT_TRUE(SetRequiresGrad(true, {"bias"}).ok());
  ASSERT_TRUE(Push(Both(false)).ok());
  // 0.5 * 1 + 1: neither begun anew (1) nor gone on while frozen (1.75).
  EXPECT_THAT(Values("bias"), ElementsAre(-2, -3));
}

TEST_F(FreezingRpcsTest, GradientsOfFrozenParametersAreRefusedOrIgnoredWhole) {
  ASSERT_TRUE(SetRequiresGrad(false, {"bias"}).ok());
  const std::string before = StateOf("tiny");
  const auto refused = Push(Both(false));
  EXPECT_THAT(refused, FailsWith(Reason::kParameterFrozen));
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr("ignore_frozen"));
  EXPECT_EQ(StateOf("tiny"), before);

  const auto answer = Push(Both(true));
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_EQ(answer->updated(), 1);
  EXPECT_EQ(answer->ignored(), 1);
  EXPECT_EQ(answer->skipped(), 0) << "it is not trainable";
  EXPECT_THAT(Values("weight"), ElementsAre(0, 1, 2, 3, 4, 5));
  EXPECT_THAT(Values("bias"), ElementsAre(0.5, -0.5));
  // The norm is of what steps.
  EXPECT_DOUBLE_EQ(answer->grad_norm(), std::sqrt(6.0));
}

TEST_F(FreezingRpcsTest, IgnoredGradientsAreStillChecked) {
  ASSERT_TRUE(SetRequiresGrad(false, {"bias"}).ok());
  const std::string before = StateOf("tiny");
  const auto push = [&](v1::TensorInfo info, const std::string& bytes) {
    std::vector<v1::StepPart> parts =
        StepParts("tiny", {{Tensor("weight", v1::GRADIENT, {2, 3}), FloatBytes({1, 1, 1, 1, 1, 1})},
                           {std::move(info), bytes}});
    parts[0].mutable_header()->set_ignore_frozen(true);
    return Push(parts);
  };
  EXPECT_THAT(push(Tensor("bias", v1::GRADIENT, {3}), FloatBytes({1, 1, 1})),
              FailsWith(Reason::kShapeMismatch));
  EXPECT_THAT(push(Tensor("bias", v1::GRADIENT, {2}, v1::F64), std::string(16, '\0')),
              FailsWith(Reason::kDTypeMismatch));
  EXPECT_THAT(push(Tensor("running_mean", v1::GRADIENT, {2}), FloatBytes({1, 1})),
              FailsWith(Reason::kNotAParameter));
  std::vector<v1::StepPart> wrong_digest = Both(true);
  v1::TensorDigest* digest = wrong_digest.back().mutable_trailer()->add_digests();
  digest->set_index(1);
  digest->set_xxh3("0000000000000000");
  EXPECT_THAT(Push(wrong_digest), FailsWith(Reason::kDigestMismatch));
  EXPECT_EQ(StateOf("tiny"), before);
  // What is dropped need not be finite, and may come inline.
  const auto inline_values = push(
      WithValues(Tensor("bias", v1::GRADIENT, {2}), {std::numeric_limits<double>::quiet_NaN(), 1}),
      "");
  ASSERT_TRUE(inline_values.ok()) << inline_values.status();
  EXPECT_EQ(inline_values->outcome(), v1::APPLIED);
}

TEST_F(FreezingRpcsTest, LargeIgnoredGradientsAreReceivedInPieces) {
  const int64_t count = 300000;  // more than the scratch
  Create("large", {Tensor("w", v1::PARAMETER, {count}), Tensor("b", v1::PARAMETER, {1})});
  ASSERT_TRUE(Configure("large", v1::SGD, 1).ok());
  v1::SetRequiresGradRequest freeze;
  freeze.set_module("large");
  freeze.set_requires_grad(false);
  freeze.mutable_selection()->add_names("w");
  ASSERT_TRUE(Call(&Stub::SetRequiresGrad, freeze).ok());
  std::vector<v1::StepPart> parts = StepParts(
      "large", {{Tensor("w", v1::GRADIENT, {count}), FloatBytes(std::vector<float>(count, 1))},
                {Tensor("b", v1::GRADIENT, {1}), FloatBytes({2})}});
  parts[0].mutable_header()->set_ignore_frozen(true);
  const auto answer = Push(parts);
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_EQ(answer->ignored(), 1);
  EXPECT_THAT(Values("b", "large"), ElementsAre(-2));
}

TEST_F(FreezingRpcsTest, RepeatsKeepTheCountAndTheFlagIsPartOfThePayload) {
  ASSERT_TRUE(SetRequiresGrad(false, {"bias"}).ok());
  const auto first = Push(Both(true, 1));
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_EQ(first->ignored(), 1);
  const auto repeat = Push(Both(true, 1));
  ASSERT_TRUE(repeat.ok()) << repeat.status();
  EXPECT_TRUE(repeat->replayed());
  EXPECT_EQ(repeat->ignored(), 1);
  EXPECT_EQ(repeat->step(), first->step());
  EXPECT_THAT(Push(Both(false, 1)), FailsWith(Reason::kSequenceReused));
  const auto header_alone = Push({Both(true, 1)[0]});
  ASSERT_TRUE(header_alone.ok()) << header_alone.status();
  EXPECT_EQ(header_alone->ignored(), 1);

  SaveAndLoad("again");
  v1::StepPart header = Both(true, 1)[0];
  header.mutable_header()->set_module("again");
  const auto after_a_load = Push({header});
  ASSERT_TRUE(after_a_load.ok()) << after_a_load.status();
  EXPECT_TRUE(after_a_load->replayed());
  EXPECT_EQ(after_a_load->ignored(), 1);
}

}  // namespace
}  // namespace modelstate
