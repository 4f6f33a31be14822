// Optimizer state that leaves with StreamStateDict and comes back with LoadOptimizerState.
#include <functional>
#include <limits>

#include "absl/strings/ascii.h"
#include "common/base/digest.h"
#include "common/base/hyperparameters.h"
#include "tests/server/rpc/server_fixture.h"

namespace modelstate {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using Stub = v1::ModelState::Stub;
using State = std::map<std::string, std::string>;  // "exp_avg/weight" -> bytes

class OptimizerStateStreamTest : public ServerTest {
 protected:
  static v1::StreamStateDictRequest Request(const std::string& module) {
    v1::StreamStateDictRequest request;
    request.set_module(module);
    request.set_optimizer_state(true);
    return request;
  }
  static std::string NameOf(const v1::TensorInfo& tensor) {
    return tensor.slot().empty() ? tensor.name() : tensor.slot() + "/" + tensor.name();
  }
  static std::vector<std::string> Names(const Fetched& fetched) {
    std::vector<std::string> names;
    for (const v1::TensorInfo& tensor : fetched.tensors) names.push_back(NameOf(tensor));
    return names;
  }
  static State BytesOf(const Fetched& fetched) {
    const std::string region = fetched.Region();
    State state;
    for (const v1::TensorInfo& tensor : fetched.tensors) {
      state[NameOf(tensor)] = region.substr(tensor.offset(), tensor.nbytes());
    }
    return state;
  }
  State FetchState(const std::string& module) {
    const Fetched fetched = Fetch(Request(module));
    EXPECT_TRUE(fetched.status.ok()) << fetched.status;
    return BytesOf(fetched);
  }

  absl::StatusOr<v1::Optimizer> LoadState(const std::vector<v1::OptimizerStatePart>& parts) {
    grpc::ClientContext context;
    v1::Optimizer response;
    auto writer = stub_->LoadOptimizerState(&context, &response);
    for (const v1::OptimizerStatePart& part : parts) {
      if (!writer->Write(part)) break;
    }
    writer->WritesDone();
    const grpc::Status status = writer->Finish();
    if (!status.ok()) return FromGrpcStatus(status);
    return response;
  }
  // Header, table, one chunk and trailer. Entries with values have no bytes.
  static std::vector<v1::OptimizerStatePart> Parts(
      const std::string& module,
      const std::vector<std::pair<v1::TensorInfo, std::string>>& tensors) {
    std::vector<v1::OptimizerStatePart> parts(2);
    parts[1].mutable_tensors();
    std::string region;
    for (const auto& [info, bytes] : tensors) {
      v1::TensorInfo* entry = parts[1].mutable_tensors()->add_tensors();
      *entry = info;
      entry->set_offset(region.size());
      region += bytes;
    }
    parts[0].mutable_header()->set_module(module);
    parts[0].mutable_header()->set_tensor_count(tensors.size());
    parts[0].mutable_header()->set_total_bytes(region.size());
    if (!region.empty()) parts.emplace_back().mutable_chunk()->set_data(region);
    parts.emplace_back().mutable_trailer()->set_total_bytes(region.size());
    return parts;
  }
  // What `fetched` brought of optimizer state, but for the slots named.
  static std::vector<v1::OptimizerStatePart> PartsOf(const std::string& module,
                                                     const Fetched& fetched,
                                                     const std::string& without = "") {
    const std::string region = fetched.Region();
    std::vector<std::pair<v1::TensorInfo, std::string>> tensors;
    for (const v1::TensorInfo& tensor : fetched.tensors) {
      if (tensor.kind() != v1::OPTIMIZER_STATE || tensor.slot() == without) continue;
      tensors.emplace_back(tensor, region.substr(tensor.offset(), tensor.nbytes()));
    }
    return Parts(module, tensors);
  }
  static v1::TensorInfo Slot(const std::string& name, const std::string& slot,
                             const std::vector<int64_t>& shape, const std::vector<double>& values,
                             v1::DType dtype = v1::F32) {
    v1::TensorInfo info = Tensor(name, v1::OPTIMIZER_STATE, shape, dtype);
    info.set_slot(slot);
    return WithValues(info, values);
  }
  // A complete state of "bias" for AdamW.
  static std::vector<std::pair<v1::TensorInfo, std::string>> BiasState() {
    return {{Slot("bias", "step", {}, {3}), ""},
            {Slot("bias", "exp_avg", {2}, {0.5, -1}), ""},
            {Slot("bias", "exp_avg_sq", {2}, {0.25, 2}), ""}};
  }

  void Step(const std::string& module, const std::string& name, const std::vector<int64_t>& shape,
            float value, v1::DType dtype = v1::F32) {
    int64_t count = 1;
    for (int64_t dim : shape) count *= dim;
    const auto answer = Push(
        StepParts(module, {{Tensor(name, v1::GRADIENT, shape, dtype),
                            FloatBytes(std::vector<float>(static_cast<size_t>(count), value))}}));
    ASSERT_TRUE(answer.ok()) << answer.status();
  }
  absl::StatusOr<v1::Snapshot> Pin(const std::string& module, bool optimizer_state,
                                   const std::string& id = "") {
    v1::PinSnapshotRequest request;
    request.set_module(module);
    request.set_snapshot_id(id);
    request.set_optimizer_state(optimizer_state);
    return Call(&Stub::PinSnapshot, request);
  }
  // What must not change when a call fails, optimizer state included.
  std::string AllOf(const std::string& module) {
    v1::ListTensorsRequest request;
    request.set_module(module);
    request.set_digests(true);
    std::string all = StateOf(module);
    const auto list = Call(&Stub::ListOptimizerState, request);
    if (!list.ok()) return all + list.status().ToString();
    for (const v1::TensorInfo& tensor : list->tensors()) {
      absl::StrAppend(&all, NameOf(tensor), " ", tensor.xxh3(), "\n");
    }
    v1::GetOptimizerRequest get;
    get.set_module(module);
    return all + Call(&Stub::GetOptimizer, get)->config().DebugString();
  }
};

TEST_F(OptimizerStateStreamTest, FollowsTheStateDictForWhatHasStepped) {
  CreateTiny();
  ASSERT_TRUE(Configure("tiny", v1::ADAMW, 0.01).ok());
  Step("tiny", "bias", {2}, 1);
  Step("tiny", "bias", {2}, 1);
  const Fetched plain = FetchAll("tiny");
  const Fetched state = Fetch(Request("tiny"));
  ASSERT_TRUE(state.status.ok()) << state.status;
  EXPECT_THAT(Names(state), ElementsAre("weight", "bias", "running_mean", "step/bias",
                                        "exp_avg/bias", "exp_avg_sq/bias"));
  EXPECT_EQ(state.header.tensor_count(), 6);
  EXPECT_EQ(state.header.total_bytes(), plain.header.total_bytes() + 4 + 8 + 8);
  EXPECT_EQ(state.header.step(), 2);
  EXPECT_NE(state.header.layout_digest(), plain.header.layout_digest());
  State bytes = BytesOf(state);
  for (const auto& [name, value] : plain.Bytes()) EXPECT_EQ(bytes[name], value) << name;
  EXPECT_THAT(FloatsOf(bytes["step/bias"]), ElementsAre(2));
  v1::ListTensorsRequest request;
  request.set_module("tiny");
  request.set_digests(true);
  const auto list = Call(&Stub::ListOptimizerState, request);
  ASSERT_TRUE(list.ok()) << list.status();
  ASSERT_EQ(list->tensors_size(), 3);
  for (int i = 0; i < 3; ++i) {
    const v1::TensorInfo& sent = state.tensors[3 + static_cast<size_t>(i)];
    EXPECT_EQ(sent.kind(), v1::OPTIMIZER_STATE);
    EXPECT_EQ(sent.dtype(), list->tensors(i).dtype());
    const std::string& data = bytes[NameOf(sent)];
    EXPECT_EQ(list->tensors(i).xxh3(),
              DigestToHex(Xxh3(absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(data.data()),
                                                   data.size()))));
  }
  ASSERT_EQ(state.trailer.digests_size(), 6);
  for (const v1::TensorDigest& digest : state.trailer.digests()) {
    const std::string& data = bytes[NameOf(state.tensors[digest.index()])];
    EXPECT_EQ(digest.xxh3(), DigestToHex(Xxh3(absl::MakeConstSpan(
                                 reinterpret_cast<const uint8_t*>(data.data()), data.size()))));
  }
}

TEST_F(OptimizerStateStreamTest, RangesJoinUnderTheirOwnLayout) {
  Create("large", {Tensor("a", v1::PARAMETER, {3}), Tensor("b", v1::PARAMETER, {1000})});
  ASSERT_TRUE(Configure("large", v1::NADAM, 0.01).ok());
  Step("large", "a", {3}, 1);
  Step("large", "b", {1000}, 0.5);
  const auto pin = Pin("large", true);
  ASSERT_TRUE(pin.ok()) << pin.status();
  EXPECT_TRUE(pin->optimizer_state());
  v1::StreamStateDictRequest request = Request("large");
  request.set_snapshot_id(pin->snapshot_id());
  const Fetched whole = Fetch(request);
  ASSERT_TRUE(whole.status.ok()) << whole.status;
  const std::string region = whole.Region();
  request.set_layout_digest(whole.header.layout_digest());
  request.set_chunk_bytes(1024);
  for (const uint64_t cut : {uint64_t{1}, uint64_t{13}, region.size() / 2, region.size() - 3}) {
    std::string joined;
    for (const auto& [begin, end] : {std::pair(uint64_t{0}, cut), std::pair(cut, region.size())}) {
      request.clear_ranges();
      request.add_ranges()->set_begin(begin);
      request.mutable_ranges(0)->set_end(end);
      const Fetched part = Fetch(request);
      ASSERT_TRUE(part.status.ok()) << part.status;
      for (const v1::Chunk& chunk : part.chunks) joined += chunk.data();
    }
    EXPECT_EQ(joined, region) << cut;
  }
  request.clear_ranges();
  request.set_layout_digest(FetchAll("large").header.layout_digest());
  EXPECT_THAT(Fetch(request).status, FailsWith(Reason::kLayoutMismatch));
}

TEST_F(OptimizerStateStreamTest, SelectionChoosesWhoseStateComes) {
  v1::TensorInfo tied;
  tied.set_name("head");
  tied.set_alias_of("embed");
  Create("tiny", {Tensor("embed", v1::PARAMETER, {2}), tied, Tensor("w", v1::PARAMETER, {1}),
                  Tensor("n", v1::BUFFER, {1})});
  v1::ConfigureOptimizerRequest configure;
  configure.set_module("tiny");
  configure.mutable_optimizer()->set_algorithm(v1::SGD);
  configure.mutable_optimizer()->mutable_hyperparameters()->set_momentum(0.9);
  ASSERT_TRUE(Call(&Stub::ConfigureOptimizer, configure).ok());
  Step("tiny", "embed", {2}, 1);
  Step("tiny", "w", {1}, 1);
  v1::StreamStateDictRequest request = Request("tiny");
  request.mutable_selection()->add_names("head");
  EXPECT_THAT(Names(Fetch(request)), ElementsAre("head", "step/embed", "momentum_buffer/embed"));
  request.mutable_selection()->clear_names();
  request.mutable_selection()->add_kinds(v1::BUFFER);
  EXPECT_THAT(Names(Fetch(request)), ElementsAre("n"));
  request.mutable_selection()->clear_kinds();
  request.mutable_selection()->add_kinds(v1::OPTIMIZER_STATE);
  EXPECT_THAT(Names(Fetch(request)),
              ElementsAre("step/embed", "momentum_buffer/embed", "step/w", "momentum_buffer/w"))
      << "the state alone";
  request.clear_selection();
  request.mutable_selection()->add_names("w");
  request.mutable_selection()->set_float_dtype(v1::BF16);
  const Fetched cast = Fetch(request);
  ASSERT_EQ(cast.tensors.size(), 3);
  EXPECT_EQ(cast.tensors[0].dtype(), v1::BF16);
  EXPECT_EQ(cast.tensors[2].dtype(), v1::F32) << "state is as it is kept";
  request.mutable_selection()->add_names("nope");
  EXPECT_THAT(Fetch(request).status, FailsWith(Reason::kTensorNotFound));
}

TEST_F(OptimizerStateStreamTest, ComesOfTheNewestVersionOrOfAPinThatHasIt) {
  CreateTiny();
  EXPECT_THAT(Fetch(Request("tiny")).status, FailsWith(Reason::kNoOptimizer));
  EXPECT_THAT(Pin("tiny", true), FailsWith(Reason::kNoOptimizer));
  ASSERT_TRUE(Configure("tiny", v1::ADAMW, 0.01).ok());
  Step("tiny", "bias", {2}, 1);
  const auto without = Pin("tiny", false);
  const auto with = Pin("tiny", true);
  ASSERT_TRUE(without.ok() && with.ok()) << with.status();
  EXPECT_FALSE(without->optimizer_state());
  const State pinned = FetchState("tiny");
  Step("tiny", "bias", {2}, 2);
  Step("tiny", "weight", {2, 3}, 2);
  EXPECT_NE(FetchState("tiny"), pinned);

  v1::StreamStateDictRequest request = Request("tiny");
  request.set_snapshot_id(with->snapshot_id());
  const Fetched of_pin = Fetch(request);
  ASSERT_TRUE(of_pin.status.ok()) << of_pin.status;
  EXPECT_EQ(BytesOf(of_pin), pinned);
  EXPECT_EQ(of_pin.header.step(), 1);
  request.set_snapshot_id(without->snapshot_id());
  Fetched refused = Fetch(request);
  EXPECT_THAT(refused.status, FailsWith(Reason::kInvalidField));
  EXPECT_THAT(std::string(refused.status.message()), HasSubstr("pin the module with"));
  EXPECT_THAT(Pin("tiny", true, without->snapshot_id()), FailsWith(Reason::kInvalidField));
  const auto renewed = Pin("tiny", false, with->snapshot_id());
  ASSERT_TRUE(renewed.ok()) << renewed.status();
  EXPECT_TRUE(renewed->optimizer_state()) << "a renewal takes nothing away";

  request.set_version(with->version().number());  // held, but its state is not found by number
  refused = Fetch(request);
  EXPECT_THAT(refused.status, FailsWith(Reason::kInvalidField));
  EXPECT_THAT(std::string(refused.status.message()), HasSubstr("PinSnapshot"));
  request.set_version(with->version().number() + 2);
  EXPECT_TRUE(Fetch(request).status.ok()) << "that is the newest";
}

TEST_F(OptimizerStateStreamTest, WhoIsUpToDateGetsAHeaderAlone) {
  CreateTiny();
  ASSERT_TRUE(Configure("tiny", v1::ADAMW, 0.01).ok());
  Step("tiny", "bias", {2}, 1);
  v1::StreamStateDictRequest request = Request("tiny");
  *request.mutable_if_newer_than() = Fetch(request).header.version();
  Fetched same = Fetch(request);
  ASSERT_TRUE(same.status.ok()) << same.status;
  EXPECT_TRUE(same.header.not_modified());
  EXPECT_THAT(same.tensors, IsEmpty());
  Step("tiny", "bias", {2}, 1);
  same = Fetch(request);
  EXPECT_FALSE(same.header.not_modified());
  EXPECT_EQ(same.tensors.size(), 6);
}

TEST_F(OptimizerStateStreamTest, HeldStateIsChargedOnceAndGivenBack) {
  CreateTiny();
  ASSERT_TRUE(Configure("tiny", v1::ADAMW, 0.01).ok());
  Step("tiny", "bias", {2}, 1);
  Step("tiny", "weight", {2, 3}, 1);
  const auto held = [this] { return Info().limits().snapshot_memory_used_bytes(); };
  ASSERT_TRUE(WaitUntilIdle());
  ASSERT_EQ(held(), 0);
  const uint64_t used = Info().devices(0).memory_used_bytes();
  const uint64_t state_dict = (6 + 2 + 2) * 4;
  const uint64_t moments = 2 * (6 + 2) * 4;
  const auto first = Pin("tiny", true);
  EXPECT_EQ(held(), state_dict + moments);
  const auto second = Pin("tiny", true);
  EXPECT_EQ(held(), state_dict + moments);
  Step("tiny", "bias", {2}, 1);
  EXPECT_GT(Info().devices(0).memory_used_bytes(), used) << "written beside what is held";
  v1::ReleaseSnapshotRequest release;
  for (const auto& pin : {first, second}) {
    release.set_snapshot_id(pin->snapshot_id());
    ASSERT_TRUE(Call(&Stub::ReleaseSnapshot, release).ok());
  }
  EXPECT_EQ(held(), 0);
  EXPECT_EQ(Info().devices(0).memory_used_bytes(), used);
  ASSERT_TRUE(Fetch(Request("tiny")).status.ok());
  ASSERT_TRUE(WaitUntilIdle());
  EXPECT_EQ(held(), 0);
}

class TightOptimizerStateStreamTest : public OptimizerStateStreamTest {
 protected:
  void SetUp() override {
    options_.snapshot_memory_bytes = 3 << 20;
    ServerTest::SetUp();
  }
};

TEST_F(TightOptimizerStateStreamTest, IsRefusedWhereItDoesNotFitAndStepsGoOn) {
  constexpr int64_t kCount = 1 << 18;
  Create("large", {Tensor("a", v1::PARAMETER, {kCount}), Tensor("b", v1::PARAMETER, {2})});
  ASSERT_TRUE(Configure("large", v1::ADAMW, 0.01).ok());
  Step("large", "a", {kCount}, 1);
  Step("large", "b", {2}, 1);
  EXPECT_TRUE(FetchAll("large").status.ok()) << "without it fits";
  EXPECT_THAT(Fetch(Request("large")).status, FailsWith(Reason::kSnapshotLimit));
  EXPECT_THAT(Pin("large", true), FailsWith(Reason::kSnapshotLimit));
  v1::StreamStateDictRequest some = Request("large");
  some.mutable_selection()->add_names("b");
  EXPECT_TRUE(Fetch(some).status.ok()) << "only what is selected is held";
  Step("large", "a", {kCount}, 1);
}

// Out of one module and into another: both go on with the same bits.
TEST_F(OptimizerStateStreamTest, EveryAlgorithmGoesOnBitEqualWhereItsStateIsLoaded) {
  v1::TensorInfo tied;
  tied.set_name("head");
  tied.set_alias_of("embed");
  for (int number = v1::Algorithm_MIN + 1; number <= v1::Algorithm_MAX; ++number) {
    const auto algorithm = static_cast<v1::Algorithm>(number);
    for (const bool more : {false, true}) {
      SCOPED_TRACE(absl::StrCat(v1::Algorithm_Name(algorithm), more ? ", every slot" : ""));
      v1::OptimizerConfig config;
      config.set_algorithm(algorithm);
      v1::Hyperparameters& h = *config.mutable_hyperparameters();
      if (more && (algorithm == v1::SGD || algorithm == v1::RMSPROP)) h.set_momentum(0.8);
      if (more && algorithm == v1::RMSPROP) h.set_centered(true);
      if (more && (algorithm == v1::ADAM || algorithm == v1::ADAMW)) h.set_amsgrad(true);
      if (more) config.set_master_weights(false);
      for (const char* name : {"from", "to"}) {
        Create(name, {WithValues(Tensor("embed", v1::PARAMETER, {3}), {1, -2, 0.3}), tied,
                      WithValues(Tensor("half", v1::PARAMETER, {2}, v1::BF16), {1, -1}),
                      WithValues(Tensor("wide", v1::PARAMETER, {1}, v1::F64), {0.1})});
      }
      v1::ConfigureOptimizerRequest configure;
      configure.set_module("from");
      *configure.mutable_optimizer() = config;
      ASSERT_TRUE(Call(&Stub::ConfigureOptimizer, configure).ok());
      const auto train = [&](const std::string& module, float value) {
        Step(module, "head", {3}, value);
        Step(module, "half", {2}, -value);
        Step(module, "wide", {1}, value);
      };
      for (const float value : {0.5F, -0.1F, 0.25F}) train("from", value);

      const Fetched fetched = Fetch(Request("from"));
      ASSERT_TRUE(fetched.status.ok()) << fetched.status;
      std::vector<v1::LoadPart> weights(2);
      const std::string region = fetched.Region();
      std::string sent;
      for (const v1::TensorInfo& tensor : fetched.tensors) {
        if (tensor.kind() == v1::OPTIMIZER_STATE) continue;
        v1::TensorInfo* entry = weights[1].mutable_tensors()->add_tensors();
        *entry = tensor;
        entry->set_offset(sent.size());
        if (!tensor.alias_of().empty()) continue;
        sent += region.substr(tensor.offset(), tensor.nbytes());
      }
      weights[0].mutable_header()->set_module("to");
      weights[0].mutable_header()->set_tensor_count(
          static_cast<uint64_t>(weights[1].tensors().tensors_size()));
      weights[0].mutable_header()->set_total_bytes(sent.size());
      weights.emplace_back().mutable_chunk()->set_data(sent);
      weights.emplace_back().mutable_trailer();
      const auto loaded = Load(weights);
      ASSERT_TRUE(loaded.ok()) << loaded.status();
      auto parts = PartsOf("to", fetched);
      *parts[0].mutable_header()->mutable_optimizer() = config;
      parts[0].mutable_header()->set_step(fetched.header.step());
      const auto optimizer = LoadState(parts);
      ASSERT_TRUE(optimizer.ok()) << optimizer.status();
      EXPECT_EQ(optimizer->step(), 9);

      EXPECT_EQ(FetchState("to"), FetchState("from"));
      for (const float value : {-0.75F, 0.1F}) {
        train("from", value);
        train("to", value);
      }
      EXPECT_EQ(FetchState("to"), FetchState("from"));
      for (const char* name : {"from", "to"}) {
        v1::DeleteModuleRequest request;
        request.set_module(name);
        ASSERT_TRUE(Call(&Stub::DeleteModule, request).ok());
      }
    }
  }
}

TEST_F(OptimizerStateStreamTest, LoadReplacesAllStateAndTheConfigurationInOneVersion) {
  CreateTiny();
  ASSERT_TRUE(Configure("tiny", v1::SGD, 0.01).ok());
  Step("tiny", "weight", {2, 3}, 1);
  auto parts = Parts("tiny", BiasState());
  parts[0].mutable_header()->mutable_optimizer()->set_algorithm(v1::ADAMW);
  parts[0].mutable_header()->set_step(41);
  const uint64_t before = FetchAll("tiny").header.version().number();
  const auto optimizer = LoadState(parts);
  ASSERT_TRUE(optimizer.ok()) << optimizer.status();
  EXPECT_EQ(optimizer->config().algorithm(), v1::ADAMW);
  EXPECT_EQ(optimizer->step(), 41);
  EXPECT_EQ(optimizer->state_bytes(), 16);
  EXPECT_EQ(optimizer->version().number(), before + 1);
  State state = FetchState("tiny");
  EXPECT_EQ(state.count("step/weight"), 0) << "what is not in the table has none";
  EXPECT_THAT(FloatsOf(state["step/bias"]), ElementsAre(3));
  EXPECT_THAT(FloatsOf(state["exp_avg/bias"]), ElementsAre(0.5, -1));
  EXPECT_THAT(FloatsOf(state["exp_avg_sq/bias"]), ElementsAre(0.25, 2));
  v1::ListVersionsRequest versions;
  versions.set_module("tiny");
  const auto list = Call(&Stub::ListVersions, versions);
  ASSERT_TRUE(list.ok()) << list.status();
  EXPECT_EQ(list->versions(0).mutation(), v1::LOAD);
  EXPECT_EQ(list->versions(0).detail(), "optimizer state of 1 parameter, for adamw");
  Step("tiny", "bias", {2}, 1);
  EXPECT_THAT(FloatsOf(FetchState("tiny")["step/bias"]), ElementsAre(4));

  // An empty table is the state of an optimizer that has not stepped.
  const auto none = LoadState(Parts("tiny", {}));
  ASSERT_TRUE(none.ok()) << none.status();
  EXPECT_EQ(none->state_bytes(), 0);
  EXPECT_EQ(none->step(), 42) << "unset: as it is";
  auto beyond = Parts("tiny", {});
  beyond[0].mutable_header()->set_step((uint64_t{1} << 53) + 2);
  EXPECT_THAT(LoadState(beyond), FailsWith(Reason::kInvalidField)) << "the next steps would wrap";
}

TEST_F(OptimizerStateStreamTest, AnyFloatingPointDTypeIsCastToWhatIsKept) {
  CreateTiny();
  ASSERT_TRUE(Configure("tiny", v1::ADAMW, 0.01).ok());
  ASSERT_TRUE(LoadState(Parts("tiny", {{Slot("bias", "step", {}, {7}, v1::F64), ""},
                                       {Slot("bias", "exp_avg", {2}, {0.5, -1}, v1::BF16), ""},
                                       {Slot("bias", "exp_avg_sq", {2}, {0.1, 2}, v1::F64), ""}}))
                  .ok());
  State state = FetchState("tiny");
  EXPECT_THAT(FloatsOf(state["step/bias"]), ElementsAre(7));
  EXPECT_THAT(FloatsOf(state["exp_avg/bias"]), ElementsAre(0.5, -1));
  EXPECT_THAT(FloatsOf(state["exp_avg_sq/bias"]), ElementsAre(0.1F, 2));
  ASSERT_TRUE(WaitUntilIdle());
  EXPECT_EQ(Info().limits().push_memory_used_bytes(), 0);
}

TEST_F(OptimizerStateStreamTest, MasterMayBeLeftOut) {
  Create("tiny", {WithValues(Tensor("w", v1::PARAMETER, {2}, v1::BF16), {1, 2})});
  ASSERT_TRUE(Configure("tiny", v1::ADAMW, 0.01).ok());
  Step("tiny", "w", {2}, 1);
  const Fetched fetched = Fetch(Request("tiny"));
  ASSERT_EQ(BytesOf(fetched).count("master/w"), 1);
  ASSERT_TRUE(LoadState(PartsOf("tiny", fetched, "master")).ok());
  EXPECT_EQ(FetchState("tiny").count("master/w"), 0);
  Step("tiny", "w", {2}, 1);
  EXPECT_EQ(FetchState("tiny").count("master/w"), 1) << "made from the parameter";
}

TEST_F(OptimizerStateStreamTest, WrongTablesAreRefusedWhole) {
  v1::TensorInfo tied;
  tied.set_name("tied");
  tied.set_alias_of("bias");
  Create("tiny", {Tensor("weight", v1::PARAMETER, {2, 3}), Tensor("bias", v1::PARAMETER, {2}), tied,
                  Tensor("running_mean", v1::BUFFER, {2})});
  EXPECT_THAT(LoadState(Parts("tiny", BiasState())), FailsWith(Reason::kNoOptimizer));
  EXPECT_THAT(LoadState(Parts("nobody", BiasState())), FailsWith(Reason::kModuleNotFound));
  Create("empty", {});
  EXPECT_THAT(LoadState(Parts("empty", BiasState())), FailsWith(Reason::kModuleEmpty));
  ASSERT_TRUE(Configure("tiny", v1::ADAMW, 0.01).ok());
  Step("tiny", "bias", {2}, 1);
  const std::string before = AllOf("tiny");

  using Tensors = std::vector<std::pair<v1::TensorInfo, std::string>>;
  struct Case {
    const char* what;
    Reason reason;
    const char* text;
    std::function<void(Tensors&)> change;
  };
  const Case cases[] = {
      {"no such parameter", Reason::kTensorNotFound, "\"step/nope\"",
       [](Tensors& t) { t[0].first.set_name("nope"); }},
      {"a buffer", Reason::kNotAParameter, "buffer",
       [](Tensors& t) { t[0].first.set_name("running_mean"); }},
      {"a slot that AdamW has not", Reason::kUnknownKey, "exp_avg, exp_avg_sq, max_exp_avg_sq",
       [](Tensors& t) { t[1].first.set_slot("momentum_buffer"); }},
      {"no slot", Reason::kInvalidField, "slot", [](Tensors& t) { t[1].first.clear_slot(); }},
      {"a slot too long", Reason::kInvalidField, "slot",
       [](Tensors& t) { t[1].first.set_slot(std::string(65, 'x')); }},
      {"another kind", Reason::kInvalidField, "slot",
       [](Tensors& t) { t[1].first.set_kind(v1::PARAMETER); }},
      {"another kind without slot", Reason::kInvalidField, "OPTIMIZER_STATE",
       [](Tensors& t) {
         t[1].first.set_kind(v1::PARAMETER);
         t[1].first.clear_slot();
       }},
      {"alias_of", Reason::kInvalidField, "alias_of",
       [](Tensors& t) { t[1].first.set_alias_of("weight"); }},
      {"no step", Reason::kMissingKey, "\"step\"", [](Tensors& t) { t.erase(t.begin()); }},
      {"a moment missing", Reason::kMissingKey, "exp_avg_sq", [](Tensors& t) { t.pop_back(); }},
      {"another shape", Reason::kShapeMismatch, "[2]",
       [](Tensors& t) {
         t[1].first = Slot("bias", "exp_avg", {1, 2}, {0, 0});
       }},
      {"a step of two", Reason::kShapeMismatch, "one number",
       [](Tensors& t) {
         t[0].first = Slot("bias", "step", {2}, {1, 1});
       }},
      {"integers", Reason::kDTypeMismatch, "I64",
       [](Tensors& t) { t[0].first = Slot("bias", "step", {}, {3}, v1::I64); }},
      {"twice", Reason::kInvalidField, "twice", [](Tensors& t) { t.push_back(t[1]); }},
      {"twice by two names", Reason::kInvalidField, "twice",
       [](Tensors& t) {
         t.push_back(t[1]);
         t.back().first.set_name("tied");
       }},
      {"step 0", Reason::kInvalidField, "\"step/bias\" is 0",
       [](Tensors& t) { t[0].first = Slot("bias", "step", {}, {0}); }},
      {"half a step", Reason::kInvalidField, "2.5",
       [](Tensors& t) { t[0].first = Slot("bias", "step", {}, {2.5}); }},
      {"no number", Reason::kInvalidField, "step",
       [](Tensors& t) {
         t[0].first = Slot("bias", "step", {}, {std::numeric_limits<double>::quiet_NaN()});
       }},
      {"a master of an F32 parameter", Reason::kUnknownKey, "master",
       [](Tensors& t) {
         t.emplace_back(Slot("bias", "master", {2}, {0, 0}), "");
       }},
      {"a product", Reason::kUnknownKey, "mu_product",
       [](Tensors& t) { t.emplace_back(Slot("bias", "mu_product", {}, {0.5}), ""); }},
  };
  for (const Case& wrong : cases) {
    SCOPED_TRACE(wrong.what);
    Tensors tensors = BiasState();
    wrong.change(tensors);
    auto parts = Parts("tiny", tensors);
    parts[0].mutable_header()->set_step(99);
    const auto answer = LoadState(parts);
    EXPECT_THAT(answer, FailsWith(wrong.reason));
    EXPECT_THAT(std::string(answer.status().message()), HasSubstr(wrong.text));
    EXPECT_EQ(AllOf("tiny"), before);
  }

  auto parts = Parts("tiny", BiasState());
  *parts[0].mutable_header()->mutable_base() = FetchAll("tiny").header.version();
  parts[0].mutable_header()->mutable_base()->set_number(1);
  EXPECT_THAT(LoadState(parts), FailsWith(Reason::kStaleBase));
  parts[0].mutable_header()->mutable_base()->set_incarnation(1);
  EXPECT_THAT(LoadState(parts), FailsWith(Reason::kIncarnationChanged));
  parts = Parts("tiny", BiasState());
  parts[0].mutable_header()->mutable_optimizer()->set_algorithm(v1::NADAM);
  EXPECT_THAT(LoadState(parts), FailsWith(Reason::kMissingKey)) << "mu_product";
  parts[0].mutable_header()->mutable_optimizer()->set_algorithm(v1::ADAM);
  parts[0].mutable_header()->mutable_optimizer()->mutable_hyperparameters()->set_lr(-1);
  EXPECT_THAT(LoadState(parts), FailsWith(Reason::kInvalidField));
  parts = Parts("tiny", BiasState());
  v1::OptimizerConfig& config = *parts[0].mutable_header()->mutable_optimizer();
  config.set_algorithm(v1::ADAM);
  config.set_no_default_group(true);
  config.add_groups()->mutable_selection()->add_names("weight");
  EXPECT_THAT(LoadState(parts), FailsWith(Reason::kNotInAGroup));
  config.clear_groups();
  config.clear_no_default_group();
  v1::OptimizerConfig rounds = config;
  rounds.mutable_rounds()->set_quorum(4096);
  Create("wide", {Tensor("w", v1::PARAMETER, {1 << 20})});
  parts = Parts("wide", {});
  *parts[0].mutable_header()->mutable_optimizer() = rounds;
  EXPECT_THAT(LoadState(parts), FailsWith(Reason::kPushMemory)) << "memory for its rounds";
  v1::GetOptimizerRequest get;
  get.set_module("wide");
  EXPECT_THAT(Call(&Stub::GetOptimizer, get), FailsWith(Reason::kNoOptimizer));
  EXPECT_EQ(AllOf("tiny"), before);
  ASSERT_TRUE(WaitUntilIdle());
  EXPECT_EQ(Info().limits().push_memory_used_bytes(), 0);
}

TEST_F(OptimizerStateStreamTest, BrokenStreamsLeaveNoTrace) {
  CreateTiny();
  ASSERT_TRUE(Configure("tiny", v1::ADAMW, 0.01).ok());
  Step("tiny", "bias", {2}, 1);
  Step("tiny", "weight", {2, 3}, 1);
  const auto whole = PartsOf("tiny", Fetch(Request("tiny")));
  Step("tiny", "weight", {2, 3}, -1);
  const std::string before = AllOf("tiny");
  ASSERT_TRUE(WaitUntilIdle());  // the streams above hold nothing any more
  const uint64_t used = Info().devices(0).memory_used_bytes();
  for (size_t count = 0; count < whole.size(); ++count) {
    EXPECT_THAT(LoadState({whole.begin(), whole.begin() + static_cast<int64_t>(count)}),
                FailsWith(Reason::kChunkInvalid))
        << count;
  }
  auto corrupt = whole;
  v1::TensorDigest* digest = corrupt.back().mutable_trailer()->add_digests();
  digest->set_index(1);
  digest->set_xxh3(std::string(16, '0'));
  EXPECT_THAT(LoadState(corrupt), FailsWith(Reason::kDigestMismatch));
  auto huge = whole;
  huge[0].mutable_header()->set_total_bytes(uint64_t{1} << 40);
  EXPECT_THAT(LoadState(huge), FailsWith(Reason::kPushMemory));
  EXPECT_EQ(AllOf("tiny"), before);
  ASSERT_TRUE(WaitUntilIdle());
  EXPECT_EQ(Info().limits().push_memory_used_bytes(), 0);
  EXPECT_EQ(Info().devices(0).memory_used_bytes(), used);
  EXPECT_TRUE(LoadState(whole).ok());
  EXPECT_NE(AllOf("tiny"), before);
}

// Slots tell nothing apart where there is no optimizer state.
TEST_F(OptimizerStateStreamTest, OtherTablesTakeNoSlots) {
  CreateTiny();
  ASSERT_TRUE(Configure("tiny", v1::SGD, 0.01).ok());
  v1::TensorInfo gradient = Tensor("bias", v1::GRADIENT, {2});
  v1::TensorInfo slotted = gradient;
  slotted.set_slot("exp_avg");
  const std::string bytes = FloatBytes({1, 1});
  EXPECT_THAT(Push(StepParts("tiny", {{gradient, bytes}, {slotted, bytes}})),
              FailsWith(Reason::kInvalidField));
  slotted.set_kind(v1::OPTIMIZER_STATE);
  EXPECT_FALSE(Push(StepParts("tiny", {{gradient, bytes}, {slotted, bytes}})).ok());
  std::vector<v1::LoadPart> load(2);
  load[0].mutable_header()->set_module("tiny");
  load[0].mutable_header()->mutable_options()->set_strict(false);
  load[0].mutable_header()->set_tensor_count(2);
  *load[1].mutable_tensors()->add_tensors() =
      WithValues(Tensor("bias", v1::PARAMETER, {2}), {1, 1});
  *load[1].mutable_tensors()->add_tensors() = WithValues(slotted, {1, 1});
  load.emplace_back().mutable_trailer();
  EXPECT_THAT(Load(load), FailsWith(Reason::kInvalidField));
}

}  // namespace
}  // namespace modelstate
