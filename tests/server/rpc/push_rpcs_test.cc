// ApplyStep and LoadStateDict: what they do, and that a push that is refused changes nothing and
// keeps nothing.
#include <functional>

#include "tests/server/rpc/server_fixture.h"

namespace modelstate {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

v1::TensorInfo Gradient(const std::string& name, const std::vector<int64_t>& shape) {
  return Tensor(name, v1::GRADIENT, shape);
}

class PushRpcsTest : public ServerTest {
 protected:
  void SetUp() override {
    ServerTest::SetUp();
    CreateTiny();
    ASSERT_TRUE(Configure("tiny", v1::SGD, 0.5).ok());
  }

  static std::vector<v1::StepPart> GoodPush() {
    return StepParts("tiny", {{Gradient("weight", {2, 3}), FloatBytes({2, 2, 2, 4, 4, 4})},
                              {Gradient("bias", {2}), FloatBytes({1, -1})}});
  }

  std::vector<float> Values(const std::string& name) {
    return FloatsOf(FetchAll("tiny").Bytes()[name]);
  }
};

TEST_F(PushRpcsTest, ApplyStepUpdatesParametersAndNoBuffer) {
  const absl::StatusOr<v1::ApplyStepResponse> answer = Push(GoodPush());
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_EQ(answer->outcome(), v1::APPLIED);
  EXPECT_EQ(answer->step(), 1);
  EXPECT_EQ(answer->updated(), 2);
  EXPECT_THAT(Values("weight"), ElementsAre(0, 1, 2, 2, 3, 4));
  EXPECT_THAT(Values("bias"), ElementsAre(0, 0));
  EXPECT_THAT(Values("running_mean"), ElementsAre(7, 8));
}

TEST_F(PushRpcsTest, ApplyStepAssignsBuffersInTheSameVersion) {
  const auto answer =
      Push(StepParts("tiny", {{Gradient("bias", {2}), FloatBytes({1, 1})},
                              {Tensor("running_mean", v1::BUFFER, {2}), FloatBytes({9, 10})}}));
  ASSERT_TRUE(answer.ok()) << answer.status();
  const Fetched state = FetchAll("tiny");
  EXPECT_EQ(state.header.version().number(), answer->version().number());
  EXPECT_THAT(FloatsOf(state.Bytes()["running_mean"]), ElementsAre(9, 10));
}

TEST_F(PushRpcsTest, ApplyStepTakesInlineValues) {
  std::vector<v1::StepPart> parts =
      StepParts("tiny", {{WithValues(Gradient("bias", {2}), {1, -1}), ""}});
  const auto answer = Push(parts);
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_THAT(Values("bias"), ElementsAre(0, 0));
}

TEST_F(PushRpcsTest, ChunksMayBeCutAnywhere) {
  std::vector<v1::StepPart> parts = GoodPush();
  const std::string region = parts[2].chunk().data();
  std::vector<v1::StepPart> cut = {parts[0], parts[1]};
  for (size_t i = 0; i < region.size(); i += 3) {
    v1::Chunk* chunk = cut.emplace_back().mutable_chunk();
    chunk->set_offset(i);
    chunk->set_data(region.substr(i, 3));
  }
  cut.push_back(parts[3]);
  ASSERT_TRUE(Push(cut).ok());
  EXPECT_THAT(Values("weight"), ElementsAre(0, 1, 2, 2, 3, 4));
}

TEST_F(PushRpcsTest, RepeatedStepIsAnsweredOnceMoreAndAppliedOnce) {
  std::vector<v1::StepPart> parts = GoodPush();
  parts[0].mutable_header()->set_worker("w0");
  parts[0].mutable_header()->set_sequence(5);
  const auto first = Push(parts);
  ASSERT_TRUE(first.ok()) << first.status();
  const std::string after = StateOf("tiny");

  const auto again = Push(parts);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_TRUE(again->replayed());
  EXPECT_EQ(again->version().number(), first->version().number());
  const auto header_alone = Push({parts[0]});
  ASSERT_TRUE(header_alone.ok()) << header_alone.status();
  EXPECT_TRUE(header_alone->replayed());
  EXPECT_EQ(StateOf("tiny"), after);
}

TEST_F(PushRpcsTest, RepeatedStepIsAnsweredEvenWhenItWouldNoLongerBeTaken) {
  std::vector<v1::StepPart> parts = GoodPush();
  parts[0].mutable_header()->set_worker("w0");
  parts[0].mutable_header()->set_sequence(5);
  ASSERT_TRUE(Push(parts).ok());
  v1::SetRequiresGradRequest freeze;
  freeze.set_module("tiny");
  freeze.mutable_selection();
  freeze.set_requires_grad(false);
  ASSERT_TRUE(Call(&v1::ModelState::Stub::SetRequiresGrad, freeze).ok());
  const auto again = Push(parts);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_TRUE(again->replayed());
}

TEST_F(PushRpcsTest, SameSequenceWithAnotherPayloadIsRefused) {
  std::vector<v1::StepPart> parts = GoodPush();
  parts[0].mutable_header()->set_worker("w0");
  parts[0].mutable_header()->set_sequence(5);
  ASSERT_TRUE(Push(parts).ok());
  const std::string after = StateOf("tiny");

  std::vector<v1::StepPart> other = parts;
  (*other[2].mutable_chunk()->mutable_data())[0] ^= 1;
  EXPECT_THAT(Push(other), FailsWith(Reason::kSequenceReused));
  other = parts;
  other[0].mutable_header()->set_grad_scale(2);
  EXPECT_THAT(Push(other), FailsWith(Reason::kSequenceReused));
  other = parts;
  other[0].mutable_header()->set_sequence(4);
  EXPECT_THAT(Push(other), FailsWith(Reason::kSequenceReused));
  EXPECT_EQ(StateOf("tiny"), after);
}

TEST_F(PushRpcsTest, HeaderAloneOfAnUnknownStepIsAnError) {
  std::vector<v1::StepPart> parts = GoodPush();
  parts[0].mutable_header()->set_worker("w0");
  parts[0].mutable_header()->set_sequence(5);
  EXPECT_THAT(Push({parts[0]}), FailsWith(Reason::kStepNotSeen));
}

TEST_F(PushRpcsTest, NonfiniteGradientsAreSkippedAndNamed) {
  const std::string before = Values("weight").empty() ? "" : StateOf("tiny");
  const auto answer = Push(StepParts(
      "tiny", {{Gradient("bias", {2}), FloatBytes({std::numeric_limits<float>::infinity(), 0})}}));
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_EQ(answer->outcome(), v1::SKIPPED_NONFINITE);
  EXPECT_THAT(answer->nonfinite(), ElementsAre("bias"));
  EXPECT_EQ(StateOf("tiny"), before);
}

// A push that must be refused, made from a good one.
struct BadPush {
  const char* name;
  Reason reason;
  const char* says;
  std::function<void(std::vector<v1::StepPart>*)> spoil;
};

class MalformedPushTest : public PushRpcsTest, public testing::WithParamInterface<BadPush> {};

TEST_P(MalformedPushTest, IsRefusedAndLeavesNoTrace) {
  const std::string before = StateOf("tiny");
  const v1::GetServerInfoResponse usage = Info();
  std::vector<v1::StepPart> parts = GoodPush();
  GetParam().spoil(&parts);
  const auto answer = Push(parts);
  EXPECT_THAT(answer, FailsWith(GetParam().reason));
  EXPECT_THAT(std::string(answer.status().message()), HasSubstr(GetParam().says));
  ASSERT_TRUE(WaitUntilIdle());
  EXPECT_EQ(StateOf("tiny"), before);
  EXPECT_EQ(Info().limits().push_memory_used_bytes(), 0);
  EXPECT_EQ(Info().devices(0).memory_used_bytes(), usage.devices(0).memory_used_bytes());
}

v1::TensorInfo* Entry(std::vector<v1::StepPart>* parts, int index) {
  return (*parts)[1].mutable_tensors()->mutable_tensors(index);
}

INSTANTIATE_TEST_SUITE_P(
    All, MalformedPushTest,
    testing::Values(
        BadPush{"NoModule", Reason::kInvalidField, "module",
                [](auto* parts) { (*parts)[0].mutable_header()->clear_module(); }},
        BadPush{"UnknownModule", Reason::kModuleNotFound, "nobody",
                [](auto* parts) { (*parts)[0].mutable_header()->set_module("nobody"); }},
        BadPush{"SequenceWithoutWorker", Reason::kInvalidField, "worker",
                [](auto* parts) { (*parts)[0].mutable_header()->set_sequence(1); }},
        BadPush{"WorkerWithANul", Reason::kInvalidField, "worker",
                [](auto* parts) {
                  (*parts)[0].mutable_header()->set_worker(std::string("a\0b", 3));
                  (*parts)[0].mutable_header()->set_sequence(1);
                }},
        BadPush{"WorkerWithALineEnd", Reason::kInvalidField, "control character",
                [](auto* parts) {
                  (*parts)[0].mutable_header()->set_worker("a\n");
                  (*parts)[0].mutable_header()->set_sequence(1);
                }},
        BadPush{"ParameterAsBuffer", Reason::kInvalidField, "kind GRADIENT",
                [](auto* parts) { Entry(parts, 0)->set_kind(v1::BUFFER); }},
        BadPush{"WrongShape", Reason::kShapeMismatch, "weight",
                [](auto* parts) {
                  Entry(parts, 0)->set_shape(0, 3);
                  Entry(parts, 0)->set_shape(1, 2);
                }},
        BadPush{"WrongDType", Reason::kDTypeMismatch, "weight",
                [](auto* parts) { Entry(parts, 0)->set_dtype(v1::I32); }},
        BadPush{"UnknownName", Reason::kUnknownKey, "nothing",
                [](auto* parts) { Entry(parts, 0)->set_name("nothing"); }},
        BadPush{"GradientOfBuffer", Reason::kNotAParameter, "running_mean",
                [](auto* parts) { Entry(parts, 1)->set_name("running_mean"); }},
        BadPush{"TensorTwice", Reason::kInvalidField, "bias",
                [](auto* parts) {
                  Entry(parts, 0)->set_name("bias");
                  Entry(parts, 0)->clear_shape();
                  Entry(parts, 0)->add_shape(6);
                }},
        BadPush{"WeightZero", Reason::kInvalidField, "weight is 0; it must be positive",
                [](auto* parts) { (*parts)[0].mutable_header()->set_weight(0); }},
        BadPush{"Alias", Reason::kInvalidField, "alias_of",
                [](auto* parts) { Entry(parts, 1)->set_alias_of("elsewhere"); }},
        BadPush{"ChunkTwice", Reason::kChunkInvalid, "",
                [](auto* parts) { parts->insert(parts->begin() + 2, (*parts)[2]); }},
        BadPush{"ChunkMissing", Reason::kChunkInvalid, "0 of 32 bytes",
                [](auto* parts) { parts->erase(parts->begin() + 2); }},
        BadPush{"ChunkShort", Reason::kChunkInvalid, "bias",
                [](auto* parts) { (*parts)[2].mutable_chunk()->mutable_data()->resize(30); }},
        BadPush{"ChunkAtAnotherOffset", Reason::kChunkInvalid, "offset",
                [](auto* parts) { (*parts)[2].mutable_chunk()->set_offset(4); }},
        BadPush{"ChunkPastTheEnd", Reason::kChunkInvalid, "",
                [](auto* parts) { (*parts)[2].mutable_chunk()->mutable_data()->resize(40); }},
        BadPush{"ChunkBeforeTable", Reason::kChunkInvalid, "",
                [](auto* parts) { std::swap((*parts)[1], (*parts)[2]); }},
        BadPush{"NoHeader", Reason::kChunkInvalid, "header",
                [](auto* parts) { parts->erase(parts->begin()); }},
        BadPush{"NoTrailer", Reason::kChunkInvalid, "trailer",
                [](auto* parts) { parts->pop_back(); }},
        BadPush{"PartAfterTrailer", Reason::kChunkInvalid, "trailer",
                [](auto* parts) { parts->push_back(parts->back()); }},
        BadPush{"PlacesOverlap", Reason::kChunkInvalid, "bias",
                [](auto* parts) { Entry(parts, 1)->set_offset(20); }},
        BadPush{"DigestOfOtherBytes", Reason::kDigestMismatch, "weight",
                [](auto* parts) {
                  v1::TensorDigest* digest = (*parts)[3].mutable_trailer()->add_digests();
                  digest->set_xxh3("0123456789abcdef");
                }},
        BadPush{
            "TooLarge", Reason::kPushMemory, "--push_memory_bytes",
            [](auto* parts) { (*parts)[0].mutable_header()->set_total_bytes(uint64_t{1} << 40); }},
        BadPush{"StaleIncarnation", Reason::kIncarnationChanged, "",
                [](auto* parts) {
                  (*parts)[0].mutable_header()->mutable_base()->set_incarnation(1);
                  (*parts)[0].mutable_header()->mutable_base()->set_number(1);
                }}),
    [](const auto& info) { return info.param.name; });

TEST_F(PushRpcsTest, ClientThatGoesInMidPushLeavesNoTrace) {
  const std::string before = StateOf("tiny");
  const v1::GetServerInfoResponse usage = Info();
  std::vector<v1::StepPart> parts = GoodPush();
  {
    grpc::ClientContext context;
    v1::ApplyStepResponse response;
    auto writer = stub_->ApplyStep(&context, &response);
    ASSERT_TRUE(writer->Write(parts[0]));
    ASSERT_TRUE(writer->Write(parts[1]));
    v1::StepPart half;
    half.mutable_chunk()->set_data(parts[2].chunk().data().substr(0, 16));
    ASSERT_TRUE(writer->Write(half));
    // Asked until the server has staged it: a client that goes before that proves nothing.
    const absl::Time deadline = absl::Now() + absl::Seconds(30);
    while (Info().limits().push_memory_used_bytes() == 0 && absl::Now() < deadline) {
    }
    EXPECT_GT(Info().limits().push_memory_used_bytes(), 0);
    context.TryCancel();
    EXPECT_EQ(writer->Finish().error_code(), grpc::StatusCode::CANCELLED);
  }
  ASSERT_TRUE(WaitUntilIdle());
  EXPECT_EQ(StateOf("tiny"), before);
  EXPECT_EQ(Info().limits().push_memory_used_bytes(), 0);
  EXPECT_EQ(Info().devices(0).memory_used_bytes(), usage.devices(0).memory_used_bytes());
}

TEST_F(PushRpcsTest, StepWithoutOptimizerIsRefused) {
  CreateTiny("plain");
  EXPECT_THAT(Push(StepParts("plain", {{Gradient("bias", {2}), FloatBytes({1, 1})}})),
              FailsWith(Reason::kNoOptimizer));
}

std::vector<v1::LoadPart> LoadParts(
    const std::string& module, bool strict,
    const std::vector<std::pair<v1::TensorInfo, std::string>>& tensors) {
  std::vector<v1::LoadPart> parts(2);
  std::string region;
  for (const auto& [info, bytes] : tensors) {
    v1::TensorInfo* entry = parts[1].mutable_tensors()->add_tensors();
    *entry = info;
    entry->set_offset(region.size());
    region += bytes;
  }
  v1::LoadHeader* header = parts[0].mutable_header();
  header->set_module(module);
  header->mutable_options()->set_strict(strict);
  header->set_tensor_count(tensors.size());
  header->set_total_bytes(region.size());
  if (!region.empty()) parts.emplace_back().mutable_chunk()->set_data(region);
  parts.emplace_back().mutable_trailer();
  return parts;
}

TEST_F(PushRpcsTest, LoadStateDictWritesWhatItBringsAndCastsToTheModulesDType) {
  v1::TensorInfo doubles = Tensor("running_mean", v1::BUFFER, {2}, v1::F64);
  const double values[] = {0.25, -3};
  const std::string bytes(reinterpret_cast<const char*>(values), sizeof(values));
  const auto result = Load(LoadParts(
      "tiny", false, {{doubles, bytes}, {Tensor("extra", v1::BUFFER, {1}), FloatBytes({1})}}));
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->loaded(), 1);
  EXPECT_THAT(result->missing_keys(), ElementsAre("weight", "bias"));
  EXPECT_THAT(result->unexpected_keys(), ElementsAre("extra"));
  EXPECT_THAT(Values("running_mean"), ElementsAre(0.25, -3));
  EXPECT_THAT(Values("bias"), ElementsAre(0.5, -0.5));
}

// The master copy of what a load wrote is of the loaded values: the next step begins from them.
TEST_F(PushRpcsTest, LoadStateDictRefreshesMasterCopies) {
  Create("narrow", {WithValues(Tensor("w", v1::PARAMETER, {2}, v1::BF16), {1, 2})});
  ASSERT_TRUE(Configure("narrow", v1::SGD, 1).ok());
  const auto step = [this](float gradient) {
    return Push(StepParts("narrow", {{Gradient("w", {2}), FloatBytes({gradient, gradient})}}));
  };
  // Less than half of the last place of 1 in BF16, which the master keeps.
  ASSERT_TRUE(step(-0.001953125F).ok());
  ASSERT_TRUE(
      Load(LoadParts("narrow", true, {{Tensor("w", v1::PARAMETER, {2}), FloatBytes({4, 8})}}))
          .ok());
  ASSERT_TRUE(step(0.001953125F).ok());
  v1::StreamStateDictRequest fetch;
  fetch.set_module("narrow");
  fetch.set_optimizer_state(true);
  const Fetched fetched = Fetch(fetch);
  ASSERT_TRUE(fetched.status.ok()) << fetched.status;
  ASSERT_EQ(fetched.tensors.size(), 3u) << "w, its step, and its master";
  const v1::TensorInfo& master = fetched.tensors.back();
  ASSERT_EQ(master.slot(), "master");
  EXPECT_THAT(FloatsOf(fetched.Region().substr(master.offset(), master.nbytes())),
              ElementsAre(3.998046875F, 7.998046875F));
}

TEST_F(PushRpcsTest, LoadStateDictMakesTheSchemaOfAnEmptyModuleWithTiedNames) {
  Create("empty", {});
  v1::TensorInfo tied = Tensor("head.weight", v1::PARAMETER, {2});
  tied.set_alias_of("embed.weight");
  const auto result =
      Load(LoadParts("empty", true,
                     {{Tensor("embed.weight", v1::PARAMETER, {2}), FloatBytes({1, 2})},
                      {tied, ""},
                      {Tensor("bn.running_var", v1::BUFFER, {1}), FloatBytes({3})}}));
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->module().parameter_count(), 1);
  EXPECT_EQ(result->module().buffer_count(), 1);
  std::map<std::string, std::string> bytes = FetchAll("empty").Bytes();
  EXPECT_THAT(FloatsOf(bytes["head.weight"]), ElementsAre(1, 2));
  EXPECT_THAT(FloatsOf(bytes["bn.running_var"]), ElementsAre(3));
}

TEST_F(PushRpcsTest, ChunksAboveTheLimitAreRefused) {
  const uint64_t limit = Info().limits().max_chunk_bytes();
  Create("large", {Tensor("big", v1::PARAMETER, {static_cast<int64_t>(limit / 4) + 1})});
  ASSERT_TRUE(Configure("large", v1::SGD, 1).ok());
  const std::string bytes(limit + 4, '\0');
  const v1::TensorInfo gradient = Gradient("big", {static_cast<int64_t>(limit / 4) + 1});
  const v1::TensorInfo value = Tensor("big", v1::PARAMETER, {static_cast<int64_t>(limit / 4) + 1});
  std::vector<v1::StepPart> parts = StepParts("large", {{gradient, bytes}});
  parts.resize(3);
  parts[2].mutable_chunk()->set_data(bytes);
  const auto push = Push(parts);
  EXPECT_THAT(push, FailsWith(Reason::kChunkInvalid));
  EXPECT_THAT(std::string(push.status().message()), HasSubstr(absl::StrCat("at most ", limit)));
  const auto load = Load(LoadParts("large", true, {{value, bytes}}));
  EXPECT_THAT(load, FailsWith(Reason::kChunkInvalid));
  EXPECT_THAT(std::string(load.status().message()), HasSubstr(absl::StrCat("at most ", limit)));
}

TEST_F(PushRpcsTest, RefusedLoadsChangeNothing) {
  const std::string before = StateOf("tiny");
  const auto bias = [](std::vector<int64_t> shape) { return Tensor("bias", v1::PARAMETER, shape); };
  EXPECT_THAT(Load(LoadParts("tiny", true, {{bias({2}), FloatBytes({1, 2})}})),
              FailsWith(Reason::kMissingKey));
  EXPECT_THAT(Load(LoadParts("tiny", false, {{bias({1}), FloatBytes({1})}})),
              FailsWith(Reason::kShapeMismatch));
  std::vector<v1::LoadPart> globs = LoadParts("tiny", false, {{bias({2}), FloatBytes({1, 2})}});
  const std::string star = "*";  // gcc 12 takes literals in loops for overlapping copies
  for (int i = 0; i < 65; ++i) globs[0].mutable_header()->mutable_options()->add_buffers(star);
  const auto too_many = Load(globs);
  EXPECT_THAT(too_many, FailsWith(Reason::kInvalidField));
  EXPECT_THAT(std::string(too_many.status().message()), HasSubstr("options.buffers"));
  std::vector<v1::LoadPart> stale = LoadParts("tiny", false, {{bias({2}), FloatBytes({1, 2})}});
  stale[0].mutable_header()->mutable_base()->set_number(1);
  stale[0].mutable_header()->mutable_base()->set_incarnation(
      FetchAll("tiny").header.version().incarnation());
  EXPECT_THAT(Load(stale), FailsWith(Reason::kStaleBase));
  std::vector<v1::LoadPart> cut = LoadParts("tiny", false, {{bias({2}), FloatBytes({1, 2})}});
  cut.pop_back();
  EXPECT_THAT(Load(cut), FailsWith(Reason::kChunkInvalid));
  ASSERT_TRUE(WaitUntilIdle());
  EXPECT_EQ(StateOf("tiny"), before);
  EXPECT_EQ(Info().limits().push_memory_used_bytes(), 0);
}

}  // namespace
}  // namespace modelstate
