#include <atomic>
#include <random>
#include <thread>

#include "common/base/float_cast.h"
#include "common/base/tensor_cast.h"
#include "tests/server/module/module_fixture.h"
#include "tests/server/test_storage.h"

namespace modelstate {
namespace {

using ::testing::Eq;
using ::testing::HasSubstr;

class MoveTest : public ModuleFixture {
 protected:
  MoveTest() {
    TensorSpec tied = Parameter("tied", {300, 7});
    tied.alias_of = "weight";
    TensorSpec frozen = Parameter("frozen", {5});
    frozen.requires_grad = false;
    TensorSpec mask = Buffer("mask", {3});
    mask.persistent = false;
    module_ = MakeModule({Parameter("weight", {300, 7}), tied, Parameter("bias", {9}), frozen,
                          Buffer("running_mean", {9}), mask,
                          Buffer("num_batches_tracked", {}, DType::kI64),
                          Buffer("table", {4}, DType::kC64)});
  }

  absl::StatusOr<VersionRef> Move(Device* device, std::optional<DType> dtype = std::nullopt) {
    return Await<VersionRef>([&](ModuleInstance::Done<VersionRef> done) {
      module_->Move(device, dtype, std::move(done));
    });
  }

  void StepOnce(float gradient) {
    const auto answer = Push(*module_, {{"weight", gradient}, {"bias", -gradient}});
    ASSERT_TRUE(answer.ok()) << answer.status();
  }

  // The bytes of every slot of every parameter.
  std::vector<std::string> StateBytes() {
    std::vector<std::string> all;
    const CapturedState captured = *Capture(*module_);
    for (const ParameterState& parameter : captured.optimizer_state.parameters) {
      all.push_back(absl::StrCat("step ", parameter.step));
      for (const auto& slot : parameter.slots) all.push_back(slot ? Bytes(slot) : "none");
    }
    return all;
  }

  static std::string Cast(const std::string& bytes, DType from, DType to) {
    const size_t count = bytes.size() / DTypeSize(from);
    std::string cast(count * DTypeSize(to), '\0');
    CastElements(from, reinterpret_cast<const uint8_t*>(bytes.data()), to,
                 reinterpret_cast<uint8_t*>(cast.data()), static_cast<int64_t>(count));
    return cast;
  }

  CpuDevice other_{uint64_t{1} << 30, "cpu:1"};
  std::shared_ptr<ModuleInstance> module_;
};

TEST_F(MoveTest, ToBf16AndBackRoundsEveryFloatingElementAndNothingElse) {
  // Elements that rounding changes.
  std::mt19937 random(11);
  const VersionRef before = [&] {
    const auto schema = module_->Current()->schema;
    std::vector<StorageRef> storages;
    for (uint32_t i = 0; i < schema->size(); ++i) {
      if (schema->owner(i) != i) {
        storages.push_back(storages[schema->owner(i)]);
        continue;
      }
      std::vector<uint8_t> bytes(schema->spec(i).nbytes());
      for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
      storages.push_back(*TensorStorage::FromHost(device_, bytes));
    }
    module_ =
        std::make_shared<ModuleInstance>("tiny", Environment(), schema, storages, ModuleMetadata{});
    return module_->Current();
  }();
  const auto contents = Contents(*before);

  auto half = Move(nullptr, DType::kBF16);
  ASSERT_TRUE(half.ok()) << half.status();
  EXPECT_EQ((*half)->version.number, 2u);
  EXPECT_EQ((*half)->last_mutation, MutationKind::kMove);
  auto back = Move(nullptr, DType::kF32);
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ((*back)->schema->revision(), before->schema->revision() + 2);
  const auto after = Contents(**back);
  size_t rounded = 0;
  for (const TensorSpec& spec : before->schema->specs()) {
    const std::string& was = contents.at(spec.name);
    const std::string& is = after.at(spec.name);
    if (spec.dtype != DType::kF32) {
      EXPECT_EQ(is, was) << spec.name;
      continue;
    }
    ASSERT_EQ(is.size(), was.size());
    for (size_t i = 0; i < was.size(); i += 4) {
      float value = 0;
      float cast = 0;
      std::memcpy(&value, was.data() + i, 4);
      std::memcpy(&cast, is.data() + i, 4);
      const float expected = BFloat16ToFloat(FloatToBFloat16(value));
      ASSERT_EQ(std::memcmp(&cast, &expected, 4), 0) << spec.name << " element " << i / 4;
      rounded += std::memcmp(&cast, &value, 4) != 0;
    }
  }
  EXPECT_GT(rounded, 1000u);
}

TEST_F(MoveTest, ACastChangesDTypesAndNothingElseOfTheSchema) {
  const VersionRef before = module_->Current();
  const VersionRef after = *Move(nullptr, DType::kF16);
  EXPECT_EQ(after->device, &device_);
  EXPECT_EQ(after->schema->revision(), before->schema->revision() + 1);
  EXPECT_EQ(after->parameter_changes, before->parameter_changes + 1);
  for (uint32_t i = 0; i < before->schema->size(); ++i) {
    const TensorSpec& was = before->schema->spec(i);
    const TensorSpec& is = after->schema->spec(i);
    SCOPED_TRACE(was.name);
    const bool cast = was.dtype == DType::kF32;
    EXPECT_EQ(is.dtype, cast ? DType::kF16 : was.dtype);
    EXPECT_EQ(is.name, was.name);
    EXPECT_EQ(is.kind, was.kind);
    EXPECT_EQ(is.shape, was.shape);
    EXPECT_EQ(is.requires_grad, was.requires_grad);
    EXPECT_EQ(is.persistent, was.persistent);
    EXPECT_EQ(is.alias_of, was.alias_of);
    EXPECT_EQ(after->changed_version[i], cast ? 2u : 1u);
    EXPECT_EQ(after->storages[i] == before->storages[i], !cast);
  }
  EXPECT_EQ(after->storages[0], after->storages[1]) << "tied";
}

TEST_F(MoveTest, AnotherDeviceGetsTheSameElementsUnderTheSameSchema) {
  const uint64_t digest = *module_->Current()->storages[0]->Digest();
  const auto contents = Contents(*module_->Current());
  const auto schema = module_->Current()->schema;
  const uint64_t bytes = device_.pool()->usage().used_bytes;
  const VersionRef after = *Move(&other_);
  EXPECT_EQ(after->device, &other_);
  EXPECT_EQ(&module_->device(), &other_);
  EXPECT_EQ(after->version.number, 2u);
  EXPECT_EQ(after->schema, schema);
  EXPECT_EQ(after->parameter_changes, 1u);
  EXPECT_EQ(after->changed_version, std::vector<uint64_t>(schema->size(), 1));
  EXPECT_EQ(after->storages[0], after->storages[1]) << "tied";
  EXPECT_EQ(after->storages[0]->CachedDigest(), digest);
  for (const StorageRef& storage : after->storages) EXPECT_EQ(&storage->device(), &other_);
  EXPECT_EQ(Contents(*after), contents);
  EXPECT_EQ(device_.pool()->usage().used_bytes, 0u);
  EXPECT_EQ(other_.pool()->usage().used_bytes, bytes);
}

TEST_F(MoveTest, ReadersOfTheOldVersionKeepItAndItsMemory) {
  const Snapshot held = *module_->Hold();
  const auto contents = Contents(*held);
  ASSERT_TRUE(Move(&other_, DType::kBF16).ok());
  ASSERT_TRUE(Move(nullptr, DType::kF64).ok());
  EXPECT_EQ(Contents(*held), contents);
  EXPECT_EQ(held->device, &device_);
  EXPECT_GE(device_.pool()->usage().used_bytes, held->schema->storage_bytes());
  EXPECT_TRUE(module_->HoldNumber(1).ok());
}

TEST_F(MoveTest, NothingToChangeIsNoNewVersion) {
  const VersionRef before = module_->Current();
  EXPECT_EQ(*Move(nullptr, DType::kF32), before);
  EXPECT_EQ(*Move(&device_), before);
  EXPECT_EQ(*Move(&device_, DType::kF32), before);
  EXPECT_EQ(module_->Current(), before);
}

TEST_F(MoveTest, OnlyFloatingPointIsATarget) {
  const auto error = Move(&other_, DType::kI64).status();
  EXPECT_THAT(ReasonOf(error), Eq(Reason::kInvalidField));
  EXPECT_THAT(std::string(error.message()),
              HasSubstr("nn.Module.to only accepts floating point or complex dtypes, but got "
                        "desired dtype=torch.int64"));
  EXPECT_THAT(ReasonOf(Move(nullptr, DType::kC64)), Eq(Reason::kInvalidField));
  EXPECT_THAT(ReasonOf(Move(nullptr, DType::kBool)), Eq(Reason::kInvalidField));
  EXPECT_EQ(module_->Current()->version.number, 1u);
  module_ = MakeModule({});
  EXPECT_THAT(ReasonOf(Move(nullptr, DType::kF16)), Eq(Reason::kModuleEmpty));
}

TEST_F(MoveTest, AdamWGoesOnBitForBitAfterADeviceMove) {
  const auto run = [this](bool move) {
    module_ = MakeModule({Parameter("weight", {300, 7}), Parameter("bias", {9})});
    EXPECT_TRUE(Configure(*module_, AdamW()).ok());
    for (int i = 0; i < 3; ++i) StepOnce(0.25F * static_cast<float>(i + 1));
    if (move) {
      const std::vector<std::string> before = StateBytes();
      EXPECT_TRUE(Move(&other_).ok());
      EXPECT_EQ(StateBytes(), before);
      const CapturedState captured = *Capture(*module_);
      for (const auto& parameter : captured.optimizer_state.parameters) {
        EXPECT_EQ(&parameter.slots[1]->device(), &other_);
      }
    }
    for (int i = 0; i < 3; ++i) StepOnce(-0.5F);
    return std::make_pair(Contents(*module_->Current()), StateBytes());
  };
  EXPECT_EQ(run(true), run(false));
}

// A gradient that was staged before the move is brought along; the parameter must not go back.
TEST_F(MoveTest, APushStagedBeforeADeviceMoveStepsWhereTheModuleIs) {
  ASSERT_TRUE(Configure(*module_, Sgd(1)).ok());
  StepRequest request;
  request.base = module_->Current()->version;
  request.gradients = *Stage(*module_, {{"bias", 2}, {"running_mean", 3, TensorKind::kBuffer}});
  ASSERT_TRUE(Move(&other_).ok());
  const auto answer = Apply(*module_, std::move(request));
  ASSERT_TRUE(answer.ok()) << answer.status();
  const VersionRef after = module_->Current();
  for (const StorageRef& storage : after->storages) EXPECT_EQ(&storage->device(), &other_);
  float bias = 0;
  std::memcpy(&bias, BytesOf(*after->storages[2]).data(), 4);
  EXPECT_EQ(bias, 0.0F);
  std::memcpy(&bias, BytesOf(*after->storages[4]).data(), 4);
  EXPECT_EQ(bias, 3.0F);
  EXPECT_EQ(device_.pool()->usage().used_bytes, 0u);
}

TEST_F(MoveTest, APushStagedBeforeACastStepsWhereItsDTypeIsTaken) {
  OptimizerConfig config = Sgd(1);
  ASSERT_TRUE(Configure(*module_, config).ok());
  StepRequest request;
  request.gradients = *Stage(*module_, {{"bias", 2}});
  ASSERT_TRUE(Move(nullptr, DType::kF64).ok());
  StepRequest wide;
  wide.gradients = *Stage(*module_, {{"bias", 2}});
  ASSERT_TRUE(Move(nullptr, DType::kBF16).ok());
  EXPECT_TRUE(Apply(*module_, std::move(request)).ok()) << "F32 for BF16";
  EXPECT_THAT(ReasonOf(Apply(*module_, std::move(wide))), Eq(Reason::kDTypeMismatch));

  config.max_staleness = 0;
  ASSERT_TRUE(Configure(*module_, config).ok());
  StepRequest stale;
  stale.base = module_->Current()->version;
  ASSERT_TRUE(Move(&other_).ok());
  EXPECT_TRUE(Push(*module_, {{"bias", 1}}, std::move(stale)).ok()) << "a device move is no change";
  stale = StepRequest();
  stale.base = module_->Current()->version;
  ASSERT_TRUE(Move(nullptr, DType::kF32).ok());
  EXPECT_THAT(ReasonOf(Push(*module_, {{"bias", 1}}, std::move(stale))), Eq(Reason::kStaleBase));
}

TEST_F(MoveTest, CastOptimizerStateIsMatchedByName) {
  ASSERT_TRUE(Configure(*module_, AdamW()).ok());
  StepOnce(0.25F);
  const OptimizerState f32 = Capture(*module_)->optimizer_state;
  const std::string exp_avg = Bytes(f32.parameters[0].slots[1]);
  const std::string exp_avg_sq = Bytes(f32.parameters[0].slots[2]);

  // F64: the moments become F64.
  ASSERT_TRUE(Move(nullptr, DType::kF64).ok());
  OptimizerState state = Capture(*module_)->optimizer_state;
  EXPECT_EQ(state.parameters[0].step, 1u);
  EXPECT_EQ(Bytes(state.parameters[0].slots[1]), Cast(exp_avg, DType::kF32, DType::kF64));
  EXPECT_EQ(Bytes(state.parameters[0].slots[2]), Cast(exp_avg_sq, DType::kF32, DType::kF64));

  // BF16: a master comes first, made by the next step; the moments are F32 again.
  ASSERT_TRUE(Move(nullptr, DType::kBF16).ok());
  state = Capture(*module_)->optimizer_state;
  EXPECT_FALSE(state.parameters[0].slots[0]);
  EXPECT_EQ(Bytes(state.parameters[0].slots[1]), exp_avg);
  EXPECT_EQ(Bytes(state.parameters[0].slots[2]), exp_avg_sq);
  const std::string weight = Contents(*module_->Current())["weight"];
  StepOnce(0.25F);
  state = Capture(*module_)->optimizer_state;
  ASSERT_TRUE(state.parameters[0].slots[0]);
  EXPECT_EQ(state.parameters[0].step, 2u);
  const std::string master = Bytes(state.parameters[0].slots[0]);
  EXPECT_EQ(Cast(master, DType::kF32, DType::kBF16), Contents(*module_->Current())["weight"]);
  EXPECT_NE(master, Cast(weight, DType::kBF16, DType::kF32));

  // On another device with the same dtype the master is kept, in F32 it is dropped.
  ASSERT_TRUE(Move(&other_).ok());
  EXPECT_EQ(Bytes(Capture(*module_)->optimizer_state.parameters[0].slots[0]), master);
  const std::string later = Bytes(Capture(*module_)->optimizer_state.parameters[0].slots[1]);
  ASSERT_TRUE(Move(nullptr, DType::kF16).ok());
  state = Capture(*module_)->optimizer_state;
  EXPECT_FALSE(state.parameters[0].slots[0]) << "a cast parameter's master is of the old elements";
  EXPECT_EQ(Bytes(state.parameters[0].slots[1]), later);
  ASSERT_TRUE(Move(&device_, DType::kF32).ok());
  state = Capture(*module_)->optimizer_state;
  EXPECT_EQ(Bytes(state.parameters[0].slots[1]), later);
  EXPECT_FALSE(state.parameters[0].slots[0]);
  StepOnce(0.25F);
}

// A step may have used momentum that the group does not have: by an override.
TEST_F(MoveTest, MomentumOfAnOverrideMovesToo) {
  ASSERT_TRUE(Configure(*module_, Sgd(0.5, 0)).ok());
  StepRequest request;
  request.overrides.resize(1);
  request.overrides[0].hyperparameters.momentum = 0.9;
  ASSERT_TRUE(Push(*module_, {{"weight", 1}}, std::move(request)).ok());
  const std::vector<std::string> before = StateBytes();
  ASSERT_NE(before[2], "none");
  ASSERT_TRUE(Move(&other_).ok());
  EXPECT_EQ(StateBytes(), before);
}

TEST_F(MoveTest, WithoutRoomAllStaysAsItWas) {
  ASSERT_TRUE(Configure(*module_, AdamW()).ok());
  StepOnce(0.25F);
  const auto contents = Contents(*module_->Current());
  const std::vector<std::string> state = StateBytes();
  const VersionRef before = module_->Current();
  const uint64_t used = device_.pool()->usage().used_bytes;
  // From no room at all to all but the last of the optimizer's state.
  const uint64_t needed = used;
  for (uint64_t limit : {uint64_t{1}, before->schema->storage_bytes(), needed - 1}) {
    CpuDevice small(limit, "cpu:2");
    const auto error = Move(&small).status();
    EXPECT_THAT(ReasonOf(error), Eq(Reason::kDeviceMemory)) << limit;
    EXPECT_THAT(std::string(error.message()), HasSubstr("device cpu:2 has no room"));
    EXPECT_EQ(small.pool()->usage().used_bytes, 0u);
    EXPECT_EQ(module_->Current(), before);
    EXPECT_EQ(device_.pool()->usage().used_bytes, used);
    EXPECT_EQ(StateBytes(), state);
    EXPECT_EQ(Contents(*module_->Current()), contents);
  }
  // Exactly enough for the move; a save would need room for a step beside it.
  CpuDevice enough(needed, "cpu:3");
  ASSERT_TRUE(Move(&enough).ok());
  EXPECT_EQ(enough.pool()->usage().used_bytes, needed);
  EXPECT_EQ(Contents(*module_->Current()), contents);
  ASSERT_TRUE(Move(&device_).ok());
  EXPECT_EQ(StateBytes(), state);
  StepOnce(0);
  module_.reset();
}

TEST_F(MoveTest, ALoadStagedBeforeADeviceMoveIsStale) {
  const VersionRef before = module_->Current();
  const auto stage = [&](Device& device) {
    IncomingTensor incoming;
    incoming.name = "bias";
    incoming.shape = MakeShape({9});
    LoadOptions options;
    options.strict = false;
    StagedLoad load;
    load.plan = *LoadPlan::Create("tiny", before->schema, {&incoming, 1}, options);
    load.storages = {*TensorStorage::FromHost(device, std::vector<uint8_t>(36, 0))};
    return load;
  };
  const auto commit = [&](StagedLoad load) {
    return Await<VersionRef>([&](ModuleInstance::Done<VersionRef> done) {
      module_->CommitLoad(std::move(load), std::nullopt, std::nullopt, std::move(done));
    });
  };
  StagedLoad load = stage(device_);
  const VersionRef moved = *Move(&other_);
  const auto error = commit(std::move(load)).status();
  EXPECT_THAT(ReasonOf(error), Eq(Reason::kStaleBase));
  EXPECT_THAT(std::string(error.message()), HasSubstr("moved to cpu:1"));
  EXPECT_EQ(module_->Current(), moved);
  EXPECT_TRUE(commit(stage(other_)).ok());
}

// Steps, moves and readers at once: every version that is read is whole, and on one device.
TEST_F(MoveTest, StepsMovesAndReadersGoTogether) {
  module_ = MakeModule({Parameter("a", {70'000}), Parameter("b", {33}), Buffer("c", {5})}, 1.0F);
  ASSERT_TRUE(Configure(*module_, Sgd(1)).ok());
  std::atomic<bool> stop{false};
  std::vector<std::thread> readers;
  for (int r = 0; r < 2; ++r) {
    readers.emplace_back([&] {
      while (!stop.load()) {
        const Snapshot held = *module_->Hold();
        const DType dtype = held->schema->spec(0).dtype;
        std::string first;
        for (uint32_t i = 0; i < held->schema->size(); ++i) {
          ASSERT_EQ(&held->storages[i]->device(), held->device);
          ASSERT_EQ(held->schema->spec(i).dtype, dtype);
          const std::string bytes = Bytes(held->storages[i]);
          ASSERT_EQ(bytes.size(), held->schema->spec(i).nbytes());
          const std::string element = bytes.substr(0, DTypeSize(dtype));
          for (size_t k = 0; k < bytes.size(); k += element.size()) {
            ASSERT_EQ(bytes.compare(k, element.size(), element), 0) << "torn";
          }
          // The step gives both parameters the same elements.
          if (held->schema->spec(i).kind != TensorKind::kParameter) continue;
          if (first.empty()) first = element;
          ASSERT_EQ(element, first);
        }
      }
    });
  }
  const uint32_t seed = 20261124;
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937 random(seed);
  std::thread mover([&] {
    std::mt19937 choice(seed + 1);
    for (int i = 0; i < 60; ++i) {
      Device* to = choice() % 2 != 0 ? static_cast<Device*>(&other_) : &device_;
      const bool cast = choice() % 3 == 0;
      const auto moved = Move(
          to, cast ? std::optional(choice() % 2 != 0 ? DType::kBF16 : DType::kF32) : std::nullopt);
      ASSERT_TRUE(moved.ok()) << moved.status();
    }
  });
  uint64_t applied = 0;
  for (int i = 0; i < 200; ++i) {
    const float gradient = static_cast<float>(random() % 3) - 1;
    const auto answer = Push(*module_, {{"a", gradient}, {"b", gradient}});
    applied += answer.ok();
    if (answer.ok()) continue;
    ASSERT_THAT(ReasonOf(answer), Eq(Reason::kDTypeMismatch)) << answer.status();
  }
  mover.join();
  stop = true;
  for (std::thread& reader : readers) reader.join();
  EXPECT_GT(applied, 0u);
  EXPECT_EQ(module_->Current()->step, applied);
  module_.reset();
  EXPECT_EQ(device_.pool()->usage().used_bytes, 0u);
  EXPECT_EQ(other_.pool()->usage().used_bytes, 0u);
}

}  // namespace
}  // namespace modelstate
