// ListOptimizerState.
#include <cmath>

#include "common/base/digest.h"
#include "tests/server/rpc/server_fixture.h"

namespace modelstate {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using Stub = v1::ModelState::Stub;

class OptimizerStateRpcsTest : public ServerTest {
 protected:
  absl::StatusOr<v1::ListTensorsResponse> List(const v1::ListTensorsRequest& request) {
    return Call(&Stub::ListOptimizerState, request);
  }
  static v1::ListTensorsRequest Of(const std::string& module) {
    v1::ListTensorsRequest request;
    request.set_module(module);
    return request;
  }
  static std::vector<std::string> Slots(const v1::ListTensorsResponse& response) {
    std::vector<std::string> slots;
    for (const v1::TensorInfo& tensor : response.tensors()) {
      slots.push_back(tensor.slot() + "/" + tensor.name());
    }
    return slots;
  }
  void Step(const std::string& name, const std::vector<int64_t>& shape, float value) {
    int64_t count = 1;
    for (int64_t dim : shape) count *= dim;
    const auto answer = Push(
        StepParts("tiny", {{Tensor(name, v1::GRADIENT, shape),
                            FloatBytes(std::vector<float>(static_cast<size_t>(count), value))}}));
    ASSERT_TRUE(answer.ok()) << answer.status();
  }
};

TEST_F(OptimizerStateRpcsTest, NeedsAnOptimizer) {
  CreateTiny();
  EXPECT_THAT(List(Of("tiny")), FailsWith(Reason::kNoOptimizer));
  EXPECT_THAT(List(Of("nobody")), FailsWith(Reason::kModuleNotFound));
}

TEST_F(OptimizerStateRpcsTest, ShowsSlotsOfWhatHasStepped) {
  CreateTiny();
  ASSERT_TRUE(Configure("tiny", v1::ADAMW, 0.01).ok());
  auto list = List(Of("tiny"));
  ASSERT_TRUE(list.ok()) << list.status();
  EXPECT_THAT(Slots(*list), IsEmpty());
  EXPECT_EQ(list->total_size(), 0);
  Step("bias", {2}, 1);
  Step("bias", {2}, 1);
  list = List(Of("tiny"));
  ASSERT_TRUE(list.ok()) << list.status();
  EXPECT_THAT(Slots(*list), ElementsAre("step/bias", "exp_avg/bias", "exp_avg_sq/bias"));
  EXPECT_EQ(list->total_size(), 3);
  EXPECT_EQ(list->step(), 2);
  EXPECT_EQ(list->version().number(), 4);
  const v1::TensorInfo& step = list->tensors(0);
  EXPECT_EQ(step.kind(), v1::OPTIMIZER_STATE);
  EXPECT_EQ(step.dtype(), v1::F32);
  EXPECT_EQ(step.shape_size(), 0);
  EXPECT_EQ(step.nbytes(), 4);
  EXPECT_THAT(step.values().doubles().values(), ElementsAre(2));
  const v1::TensorInfo& average = list->tensors(1);
  EXPECT_EQ(average.dtype(), v1::F32);
  EXPECT_THAT(average.shape(), ElementsAre(2));
  EXPECT_EQ(average.nbytes(), 8);
  EXPECT_FALSE(average.has_values());
  EXPECT_EQ(average.xxh3(), "");

  Step("weight", {2, 3}, 1);
  list = List(Of("tiny"));
  EXPECT_THAT(Slots(*list), ElementsAre("step/weight", "exp_avg/weight", "exp_avg_sq/weight",
                                        "step/bias", "exp_avg/bias", "exp_avg_sq/bias"))
      << "in the module's order";
}

TEST_F(OptimizerStateRpcsTest, MomentumAndMasterHaveTheirNames) {
  Create("tiny", {Tensor("w", v1::PARAMETER, {2}, v1::BF16)});
  v1::ConfigureOptimizerRequest request;
  request.set_module("tiny");
  request.mutable_optimizer()->set_algorithm(v1::SGD);
  request.mutable_optimizer()->mutable_hyperparameters()->set_momentum(0.9);
  ASSERT_TRUE(Call(&Stub::ConfigureOptimizer, request).ok());
  const auto answer =
      Push(StepParts("tiny", {{Tensor("w", v1::GRADIENT, {2}, v1::BF16), std::string(4, '\0')}}));
  ASSERT_TRUE(answer.ok()) << answer.status();
  const auto list = List(Of("tiny"));
  ASSERT_TRUE(list.ok()) << list.status();
  EXPECT_THAT(Slots(*list), ElementsAre("step/w", "master/w", "momentum_buffer/w"));
  EXPECT_EQ(list->tensors(1).dtype(), v1::F32);
}

TEST_F(OptimizerStateRpcsTest, NAdamShowsItsProduct) {
  CreateTiny();
  ASSERT_TRUE(Configure("tiny", v1::NADAM, 0.01).ok());
  Step("bias", {2}, 1);
  Step("weight", {2, 3}, 1);
  v1::ListTensorsRequest request = Of("tiny");
  request.set_digests(true);
  request.set_page_size(3);
  std::vector<v1::TensorInfo> all;
  absl::StatusOr<v1::ListTensorsResponse> page;
  do {
    page = List(request);
    ASSERT_TRUE(page.ok()) << page.status();
    EXPECT_EQ(page->total_size(), 8);
    all.insert(all.end(), page->tensors().begin(), page->tensors().end());
    request.set_page_token(page->next_page_token());
  } while (!page->next_page_token().empty());
  ASSERT_EQ(all.size(), 8u);
  for (const size_t i : {size_t{3}, size_t{7}}) {
    EXPECT_EQ(all[i].slot(), "mu_product");
    EXPECT_EQ(all[i].shape_size(), 0);
    // beta1 (1 - 0.5 * 0.96^(1 * 0.004)), as in torch/optim/nadam.py
    const float product = static_cast<float>(0.9 * (1 - 0.5 * std::pow(0.96, 0.004)));
    ASSERT_EQ(all[i].values().doubles().values_size(), 1);
    EXPECT_EQ(all[i].values().doubles().values(0), product);
    EXPECT_NE(all[i].xxh3(), "");
  }
  EXPECT_EQ(all[7].name(), "bias");
}

TEST_F(OptimizerStateRpcsTest, DigestsAndStatisticsOnRequest) {
  CreateTiny();
  ASSERT_TRUE(Configure("tiny", v1::ADAMW, 0.01).ok());
  Step("bias", {2}, 1);
  v1::ListTensorsRequest request = Of("tiny");
  request.set_digests(true);
  request.set_statistics(true);
  const auto list = List(request);
  ASSERT_TRUE(list.ok()) << list.status();
  ASSERT_EQ(list->tensors_size(), 3);
  EXPECT_EQ(list->tensors(0).statistics().max(), 1);
  const v1::TensorInfo& average = list->tensors(1);
  const float moment = static_cast<float>(1 - 0.9);
  EXPECT_FLOAT_EQ(static_cast<float>(average.statistics().max()), moment);
  EXPECT_EQ(average.statistics().count(), 2);
  const std::string bytes =
      FloatBytes(std::vector<float>(2, static_cast<float>(average.statistics().max())));
  EXPECT_EQ(average.xxh3(), DigestToHex(Xxh3(absl::MakeConstSpan(
                                reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size()))));
  // A later step changes them: no digest is kept for longer than it is right.
  Step("bias", {2}, 1);
  EXPECT_NE(List(request)->tensors(1).xxh3(), average.xxh3());
}

TEST_F(OptimizerStateRpcsTest, SelectsParametersByEitherTiedName) {
  v1::TensorInfo tied;
  tied.set_name("head.weight");
  tied.set_alias_of("embed.weight");
  Create("tiny", {Tensor("embed.weight", v1::PARAMETER, {2}), tied, Tensor("w", v1::PARAMETER, {1}),
                  Tensor("n", v1::BUFFER, {1})});
  ASSERT_TRUE(Configure("tiny", v1::ADAMW, 0.01).ok());
  Step("head.weight", {2}, 1);
  Step("w", {1}, 1);
  v1::ListTensorsRequest request = Of("tiny");
  for (const char* name : {"head.weight", "embed.weight"}) {
    request.clear_selection();
    request.mutable_selection()->add_names(name);
    const auto list = List(request);
    ASSERT_TRUE(list.ok()) << list.status();
    EXPECT_THAT(Slots(*list), ElementsAre("step/embed.weight", "exp_avg/embed.weight",
                                          "exp_avg_sq/embed.weight"));
  }
  request.clear_selection();
  request.mutable_selection()->add_globs("*");
  request.mutable_selection()->add_kinds(v1::OPTIMIZER_STATE);
  EXPECT_EQ(List(request)->total_size(), 6);
  request.clear_selection();
  request.mutable_selection()->add_names("n");
  EXPECT_THAT(Slots(*List(request)), IsEmpty()) << "a buffer has none";
  request.mutable_selection()->add_names("nope");
  EXPECT_THAT(List(request), FailsWith(Reason::kTensorNotFound));
}

TEST_F(OptimizerStateRpcsTest, PagesAreStableWhileMoreParametersStep) {
  std::vector<v1::TensorInfo> tensors;
  for (char name = 'a'; name <= 'e'; ++name) {
    tensors.push_back(Tensor(std::string(1, name), v1::PARAMETER, {1}));
  }
  Create("tiny", tensors);
  ASSERT_TRUE(Configure("tiny", v1::ADAMW, 0.01).ok());
  for (const char* name : {"b", "d"}) Step(name, {1}, 1);
  v1::ListTensorsRequest request = Of("tiny");
  request.set_page_size(2);
  auto page = List(request);
  ASSERT_TRUE(page.ok()) << page.status();
  EXPECT_THAT(Slots(*page), ElementsAre("step/b", "exp_avg/b"));
  EXPECT_EQ(page->total_size(), 6);
  // One before what was shown, one after it.
  for (const char* name : {"a", "c"}) Step(name, {1}, 1);
  std::vector<std::string> rest;
  do {
    request.set_page_token(page->next_page_token());
    page = List(request);
    ASSERT_TRUE(page.ok()) << page.status();
    EXPECT_LE(page->tensors_size(), 2);
    EXPECT_EQ(page->total_size(), 12) << "of the page's own version";
    for (const std::string& slot : Slots(*page)) rest.push_back(slot);
  } while (!page->next_page_token().empty());
  EXPECT_THAT(rest, ElementsAre("exp_avg_sq/b", "step/c", "exp_avg/c", "exp_avg_sq/c", "step/d",
                                "exp_avg/d", "exp_avg_sq/d"));

  request.clear_page_token();
  const std::string token = List(request)->next_page_token();
  v1::SetRequiresGradRequest freeze;
  freeze.set_module("tiny");
  freeze.mutable_selection()->add_names("e");
  freeze.set_requires_grad(false);
  ASSERT_TRUE(Call(&Stub::SetRequiresGrad, freeze).ok());
  request.set_page_token(token);
  EXPECT_THAT(List(request), FailsWith(Reason::kInvalidField)) << "the schema has changed";

  request.clear_page_token();
  request.set_page_token(List(request)->next_page_token());
  ASSERT_TRUE(Configure("tiny", v1::SGD, 0.1).ok());
  EXPECT_THAT(List(request), FailsWith(Reason::kInvalidField)) << "all the state is another";
}

TEST_F(OptimizerStateRpcsTest, FrozenParametersKeepTheirState) {
  CreateTiny();
  ASSERT_TRUE(Configure("tiny", v1::ADAMW, 0.01).ok());
  Step("bias", {2}, 1);
  v1::ListTensorsRequest request = Of("tiny");
  request.set_digests(true);
  const auto before = List(request);
  v1::SetRequiresGradRequest freeze;
  freeze.set_module("tiny");
  freeze.mutable_selection()->add_globs("*");
  freeze.set_requires_grad(false);
  ASSERT_TRUE(Call(&Stub::SetRequiresGrad, freeze).ok());
  const auto after = List(request);
  ASSERT_TRUE(after.ok()) << after.status();
  ASSERT_EQ(after->tensors_size(), 3);
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(after->tensors(i).DebugString(), before->tensors(i).DebugString());
  }
}

// A page without digests and statistics refers to nothing, so the next step writes in place: no
// memory beyond the push's. (What would refer is the response, which is held here.)
TEST_F(OptimizerStateRpcsTest, ListingCostsNoMemory) {
  CreateTiny();
  ASSERT_TRUE(Configure("tiny", v1::ADAMW, 0.01).ok());
  Step("bias", {2}, 1);
  const uint64_t used = Info().devices(0).memory_used_bytes();
  const auto held = List(Of("tiny"));
  ASSERT_TRUE(held.ok());
  Step("bias", {2}, 1);
  EXPECT_EQ(Info().devices(0).memory_used_bytes(), used);
}

}  // namespace
}  // namespace modelstate
