// The calls about modules: what the library sends for its structs, and what it makes of answers.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "client/client.h"
#include "client/key_lists.h"
#include "client/module_spec_proto.h"
#include "tests/client/fake_server.h"

namespace modelstate::client {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::SizeIs;

class ModuleCallsTest : public ::testing::Test {
 protected:
  FakeServer server_;
  Client client_ = server_.Connect();
};

Registration Parameter(const std::string& name, std::vector<int64_t> shape) {
  Registration tensor;
  tensor.spec.name = name;
  tensor.spec.shape = *Shape::Create(shape);
  return tensor;
}

ModuleSpec EveryKindOfTensor() {
  ModuleSpec spec;
  spec.seed = 7;
  spec.metadata["git"] = "abc";
  const auto add = [&spec](const char* name, Initializer initializer) {
    spec.tensors.push_back(Parameter(name, {4, 2}));
    spec.tensors.back().initializer = std::move(initializer);
  };
  using Kind = Initializer::Kind;
  const auto of = [](Kind kind) {
    Initializer initializer;
    initializer.kind = kind;
    return initializer;
  };
  add("zeros", of(Kind::kZeros));
  add("ones", of(Kind::kOnes));
  Initializer constant = of(Kind::kConstant);
  constant.constant = 0.25;
  add("constant", constant);
  Initializer uniform = of(Kind::kUniform);
  uniform.low = -1;
  uniform.high = 2;
  add("uniform", uniform);
  Initializer normal = of(Kind::kNormal);
  normal.mean = 1;
  normal.std = 0.02;
  normal.seed = 9;
  add("normal", normal);
  Initializer kaiming = of(Kind::kKaimingUniform);
  kaiming.a = 0.2;
  kaiming.mode = "fan_out";
  kaiming.nonlinearity = "relu";
  add("kaiming_uniform", kaiming);
  kaiming.kind = Kind::kKaimingNormal;
  add("kaiming_normal", kaiming);
  Initializer xavier = of(Kind::kXavierUniform);
  xavier.gain = 1.5;
  add("xavier_uniform", xavier);
  xavier.kind = Kind::kXavierNormal;
  add("xavier_normal", xavier);
  spec.tensors.push_back(Parameter("frozen", {2}));
  spec.tensors.back().spec.requires_grad = false;
  spec.tensors.back().values = std::vector<double>{1, 2};
  Registration count = Parameter("count", {});
  count.spec.kind = TensorKind::kBuffer;
  count.spec.dtype = DType::kI64;
  count.spec.persistent = false;
  count.values = std::vector<int64_t>{3};
  spec.tensors.push_back(count);
  Registration tied = Parameter("tied", {2});
  tied.spec.alias_of = "frozen";
  tied.spec.requires_grad = false;
  spec.tensors.push_back(tied);
  return spec;
}

TEST_F(ModuleCallsTest, CreateModuleSendsTheWholeSpec) {
  const absl::StatusOr<ModuleInfo> module =
      client_.CreateModule("new", EveryKindOfTensor(), "cpu:1");
  ASSERT_TRUE(module.ok()) << module.status();
  ASSERT_THAT(server_.creates, SizeIs(1));
  const v1::CreateModuleRequest& request = server_.creates[0];
  EXPECT_EQ(request.name(), "new");
  EXPECT_EQ(request.device(), "cpu:1");
  EXPECT_EQ(request.spec().seed(), 7u);
  EXPECT_EQ(request.spec().metadata().at("git"), "abc");
  ASSERT_EQ(request.spec().tensors_size(), 12);
  EXPECT_EQ(request.spec().tensors(3).initializer().uniform().high(), 2);
  EXPECT_EQ(request.spec().tensors(4).initializer().seed(), 9u);
  EXPECT_EQ(request.spec().tensors(5).initializer().kaiming_uniform().mode(), "fan_out");
  EXPECT_EQ(request.spec().tensors(7).initializer().xavier_uniform().gain(), 1.5);
  EXPECT_FALSE(request.spec().tensors(9).requires_grad());
  EXPECT_EQ(request.spec().tensors(9).values().doubles().values(1), 2);
  EXPECT_FALSE(request.spec().tensors(10).persistent());
  EXPECT_EQ(request.spec().tensors(10).values().ints().values(0), 3);
  // Of a tied name the server takes nothing else.
  EXPECT_EQ(request.spec().tensors(11).alias_of(), "frozen");
  EXPECT_EQ(request.spec().tensors(11).dtype(), v1::DTYPE_UNSPECIFIED);
}

TEST_F(ModuleCallsTest, SpecsSurviveTheWireBothWays) {
  v1::ModuleSpec proto;
  ToProto(EveryKindOfTensor(), &proto);
  const absl::StatusOr<ModuleSpec> back = FromProto(proto);
  ASSERT_TRUE(back.ok()) << back.status();
  v1::ModuleSpec again;
  ToProto(*back, &again);
  EXPECT_EQ(again.DebugString(), proto.DebugString());
  EXPECT_EQ(back->tensors[11].spec.shape, back->tensors[9].spec.shape);
}

TEST_F(ModuleCallsTest, GetModuleSpecJoinsItsPages) {
  ToProto(EveryKindOfTensor(), &server_.spec);
  const absl::StatusOr<ModuleSpec> spec = client_.GetModuleSpec("m");
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_THAT(spec->tensors, SizeIs(12));
  EXPECT_EQ(spec->metadata.at("git"), "abc");
  EXPECT_EQ(spec->tensors[11].spec.alias_of, "frozen");  // on a later page than its owner
}

TEST_F(ModuleCallsTest, ASpecTooLargeForOneMessageGoesAsALoad) {
  ModuleSpec spec = EveryKindOfTensor();
  for (int i = 0; i < 100000; ++i) {
    spec.tensors.push_back(Parameter(absl::StrCat("layers.", i, ".a.long.name.weight"), {2, 3}));
  }
  const absl::StatusOr<ModuleInfo> module = client_.CreateModule("big", spec, "cpu:1");
  ASSERT_TRUE(module.ok()) << module.status();
  ASSERT_THAT(server_.creates, SizeIs(1));
  EXPECT_EQ(server_.creates[0].spec().tensors_size(), 0);
  EXPECT_EQ(server_.creates[0].spec().metadata().at("git"), "abc");
  EXPECT_EQ(server_.creates[0].device(), "cpu:1");
  ASSERT_THAT(server_.load_headers, SizeIs(1));
  EXPECT_EQ(server_.load_headers[0].seed(), 7u);
  EXPECT_EQ(server_.load_headers[0].tensor_count(), 100012u);
  EXPECT_EQ(server_.load_headers[0].total_bytes(), 0u);
  ASSERT_THAT(server_.load_table, SizeIs(100012));
  EXPECT_TRUE(server_.load_trailer);
  EXPECT_EQ(server_.load_table[4].initializer().normal().std(), 0.02);
  EXPECT_EQ(server_.load_table[11].alias_of(), "frozen");
  EXPECT_EQ(server_.load_table[11].dtype(), v1::F32);
  EXPECT_TRUE(server_.load_table[12].initializer().zeros());
  EXPECT_THAT(server_.deletes, IsEmpty());

  server_.refuse_loads = true;
  EXPECT_EQ(GetReason(client_.CreateModule("big", spec).status()), Reason::kDeviceMemory);
  EXPECT_THAT(server_.deletes, ElementsAre("big"));
}

TEST_F(ModuleCallsTest, ALargeSpecIsCancelledAndLeavesNoModule) {
  ModuleSpec spec;
  for (int i = 0; i < 100000; ++i) {
    spec.tensors.push_back(Parameter(absl::StrCat("layers.", i, ".a.long.name.weight"), {2, 3}));
  }
  Cancellation cancellation;
  server_.on_load = [&cancellation] { cancellation.Cancel(); };
  const absl::StatusOr<ModuleInfo> module = client_.CreateModule("big", spec, "", &cancellation);
  EXPECT_TRUE(absl::IsCancelled(module.status())) << module.status();
  EXPECT_THAT(server_.deletes, ElementsAre("big"));
}

TEST_F(ModuleCallsTest, ListOptionsReachTheServer) {
  ListOptions options;
  options.view = ListView::kStateDict;
  options.statistics = true;
  options.max_tensors = 3;
  options.selection.globs = {"*"};
  const absl::StatusOr<TensorList> list = client_.ListParameters("m", options);
  ASSERT_TRUE(list.ok()) << list.status();
  EXPECT_EQ(server_.list.view(), v1::STATE_DICT);
  EXPECT_TRUE(server_.list.statistics());
  EXPECT_EQ(server_.list.page_size(), 3);
  EXPECT_THAT(list->tensors, SizeIs(3));
  EXPECT_EQ(list->total, 33u);
  const absl::StatusOr<TensorList> state = client_.ListOptimizerState("m");
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_EQ(state->tensors[0].slot, "exp_avg");
  EXPECT_EQ(state->tensors[0].spec.kind, TensorKind::kOptimizerState);
}

TEST_F(ModuleCallsTest, GetTensorAsksForASlice) {
  const absl::StatusOr<TensorElements> part =
      client_.GetTensor("m", "layer2.weight", {.count = 5, .slice = "-1, ::2"});
  ASSERT_TRUE(part.ok()) << part.status();
  EXPECT_EQ(server_.get_tensor.slice(), "-1, ::2");
  EXPECT_EQ(server_.get_tensor.count(), 5u);
  EXPECT_THAT(part->slice_shape, ElementsAre(4));
  EXPECT_THAT(part->doubles, ElementsAre(0.5));
  EXPECT_EQ(part->statistics.nonfinite, 3u);
  // Without a slice it is the tensor's shape.
  EXPECT_THAT(client_.GetTensor("m", "layer2.weight")->slice_shape, ElementsAre(2, 100));
}

TEST_F(ModuleCallsTest, MoveModuleSendsWhatIsSet) {
  ASSERT_TRUE(client_.MoveModule("m", {.dtype = DType::kBF16}).ok());
  EXPECT_EQ(server_.move.device(), "");
  EXPECT_EQ(server_.move.dtype(), v1::BF16);
  EXPECT_EQ(client_.MoveModule("m", {.device = "cpu:1"})->device, "cpu:1");
  EXPECT_FALSE(server_.move.has_dtype());
}

TEST_F(ModuleCallsTest, ListVersionsStopsAtTheLimit) {
  const absl::StatusOr<std::vector<VersionInfo>> all = client_.ListVersions("m");
  ASSERT_TRUE(all.ok()) << all.status();
  EXPECT_THAT(*all, SizeIs(30));
  EXPECT_EQ(all->front().mutation, "BUFFER_WRITE");
  EXPECT_EQ(all->front().detail, "statistics.safetensors");
  EXPECT_TRUE(all->front().held);
  EXPECT_EQ(all->back().version, (Version{77, 1}));
  EXPECT_THAT(*client_.ListVersions("m", 9), SizeIs(9));
}

TEST_F(ModuleCallsTest, ADryRunSendsTheTableAloneAndGetsWholeLists) {
  server_.missing_keys = {"a", "b", "c", "d", "e"};
  server_.unexpected_keys = {"x"};
  TensorRef tensor;
  tensor.spec = Parameter("w", {1000}).spec;  // and no bytes
  LoadOptions options;
  options.dry_run = true;
  const absl::StatusOr<LoadResult> result = client_.LoadStateDict("m", {&tensor, 1}, options);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_THAT(result->missing_keys, ElementsAre("a", "b", "c", "d", "e"));
  EXPECT_THAT(result->unexpected_keys, ElementsAre("x"));
  ASSERT_THAT(server_.load_headers, SizeIs(3));
  EXPECT_EQ(server_.load_headers[2].options().skip_keys(), 4u);
  EXPECT_EQ(server_.load_headers[0].total_bytes(), 4000u);
  EXPECT_FALSE(server_.load_trailer);
}

// Lists end at different places of the answers; nothing comes twice or is lost.
TEST(CompleteKeyLists, JoinsListsThatEndAtDifferentPlaces) {
  const std::vector<std::string> missing = {"m0", "m1", "m2", "m3", "m4", "m5"};
  const std::vector<std::string> mismatches = {"s0", "s1", "s2"};
  const auto answer = [&](uint64_t skip) {
    LoadResult result;
    result.missing_count = missing.size();
    result.size_mismatch_count = mismatches.size();
    for (uint64_t i = skip; i < std::min<uint64_t>(skip + 3, missing.size()); ++i) {
      result.missing_keys.push_back(missing[i]);
    }
    for (uint64_t i = skip; i < std::min<uint64_t>(skip + 1, mismatches.size()); ++i) {
      result.size_mismatches.push_back(mismatches[i]);
    }
    return result;
  };
  LoadResult result = answer(0);
  const auto ask = [&](uint64_t skip) -> absl::StatusOr<LoadResult> { return answer(skip); };
  ASSERT_TRUE(CompleteKeyLists(ask, &result).ok());
  EXPECT_EQ(result.missing_keys, missing);
  EXPECT_EQ(result.size_mismatches, mismatches);
}

TEST(CompleteKeyLists, EndsWhenTheModuleChangesOrNothingComes) {
  LoadResult result;
  result.missing_count = 2;
  result.missing_keys = {"a"};
  EXPECT_TRUE(absl::IsInternal(CompleteKeyLists(
      [](uint64_t) -> absl::StatusOr<LoadResult> {
        LoadResult more;
        more.missing_count = 2;
        return more;
      },
      &result)));
  EXPECT_TRUE(absl::IsAborted(CompleteKeyLists(
      [](uint64_t) -> absl::StatusOr<LoadResult> { return LoadResult(); }, &result)));
}

TEST_F(ModuleCallsTest, IgnoringFrozenGradientsIsAskedForAndCounted) {
  StepOptions options;
  options.ignore_frozen = true;
  TensorRef gradient{server_.specs[1], server_.bytes(1)};
  gradient.spec.kind = TensorKind::kGradient;
  const absl::StatusOr<StepResult> result = client_.ApplyStep("m", {&gradient, 1}, options);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_TRUE(server_.step_headers[0].ignore_frozen());
  EXPECT_EQ(result->ignored, 2u);
}

}  // namespace
}  // namespace modelstate::client
