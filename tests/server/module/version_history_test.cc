#include "server/module/version_history.h"

#include "tests/server/module/module_fixture.h"

namespace modelstate {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

ModuleVersion AtNumber(uint64_t number) {
  ModuleVersion version;
  version.version = {7, number};
  version.last_mutation = MutationKind::kStep;
  version.schema = *ModuleSchema::Create({}, 3);
  return version;
}

std::vector<uint64_t> Numbers(const std::vector<VersionRecord>& records) {
  std::vector<uint64_t> numbers;
  for (const VersionRecord& record : records) numbers.push_back(record.version.number);
  return numbers;
}

TEST(VersionHistory, GivesTheNewestFirstInPagesThatNewVersionsDoNotShift) {
  VersionHistory history;
  EXPECT_THAT(history.Before(0, 5), IsEmpty());
  for (uint64_t number = 1; number <= 5; ++number) {
    history.Add(AtNumber(number), absl::UnixEpoch(), {});
  }
  EXPECT_THAT(Numbers(history.Before(0, 2)), ElementsAre(5, 4));
  history.Add(AtNumber(6), absl::UnixEpoch(), {});
  EXPECT_THAT(Numbers(history.Before(4, 2)), ElementsAre(3, 2));
  EXPECT_THAT(Numbers(history.Before(2, 10)), ElementsAre(1));
  EXPECT_THAT(history.Before(1, 10), IsEmpty());
  EXPECT_THAT(Numbers(history.Before(100, 1)), ElementsAre(6));
}

TEST(VersionHistory, KeepsTheLast256) {
  VersionHistory history;
  for (uint64_t number = 1; number <= 300; ++number) {
    history.Add(AtNumber(number), absl::UnixEpoch(), {});
  }
  const auto records = history.Before(0, 1000);
  ASSERT_EQ(records.size(), 256u);
  EXPECT_EQ(records.front().version.number, 300u);
  EXPECT_EQ(records.back().version.number, 45u);
}

TEST(VersionHistory, CountsAllAndNamesTen) {
  VersionHistory history;
  VersionChange change;
  for (int i = 0; i < 12; ++i) change.AddElements(Parameter(absl::StrCat("p", i), {4}));
  change.AddElements(Buffer("b", {2}, DType::kI64));
  history.Add(AtNumber(1), absl::UnixEpoch(), change);
  history.Add(AtNumber(2), absl::UnixEpoch(), change);
  const auto records = history.Before(0, 2);
  EXPECT_EQ(records[0].changed_parameters, 12u);
  EXPECT_EQ(records[0].changed_buffers, 1u);
  EXPECT_EQ(records[0].changed_bytes, 12 * 16u + 16);
  EXPECT_EQ(records[0].schema_revision, 3u);
  EXPECT_EQ(records[0].tensors->size(), 10u);
  EXPECT_EQ(records[0].tensors, records[1].tensors) << "one list for all steps of the same tensors";
}

TEST(VersionHistory, CutsALongDetailBetweenCharacters) {
  VersionHistory history;
  VersionChange change;
  std::string detail;
  while (detail.size() < 2000) detail += "\xC3\xA4";  // a-umlaut
  change.set_detail("x" + detail);
  history.Add(AtNumber(1), absl::UnixEpoch(), change);
  const std::string kept = history.Before(0, 1)[0].detail;
  EXPECT_EQ(kept, "x" + detail.substr(0, 510) + "...");
}

class ModuleHistoryTest : public ModuleFixture {
 protected:
  ModuleHistoryTest() {
    TensorSpec tied = Parameter("tied", {8});
    tied.alias_of = "weight";
    module_ = MakeModule({Parameter("weight", {8}), tied, Parameter("bias", {2}),
                          Buffer("running_mean", {2}), Buffer("count", {}, DType::kI64)});
  }

  VersionRecord Last() { return module_->History(0, 1).at(0); }

  absl::StatusOr<VersionRef> Load(const std::string& name, std::vector<int64_t> shape,
                                  std::string detail) {
    IncomingTensor incoming;
    incoming.name = name;
    incoming.shape = MakeShape(shape);
    LoadOptions options;
    options.strict = false;
    StagedLoad load;
    MS_ASSIGN_OR_RETURN(
        load.plan, LoadPlan::Create("tiny", module_->Current()->schema, {&incoming, 1}, options));
    load.storages = {*TensorStorage::FromHost(
        device_, std::vector<uint8_t>(static_cast<size_t>(shape[0]) * 4, 0))};
    load.detail = std::move(detail);
    return Await<VersionRef>([&](ModuleInstance::Done<VersionRef> done) {
      module_->CommitLoad(std::move(load), std::nullopt, std::nullopt, std::move(done));
    });
  }

  std::shared_ptr<ModuleInstance> module_;
};

TEST_F(ModuleHistoryTest, SaysWhatEachMutationChangedAndWhy) {
  VersionRecord record = Last();
  EXPECT_EQ(record.mutation, MutationKind::kCreate);
  EXPECT_EQ(record.version, module_->Current()->version);
  EXPECT_EQ(record.time, now_);
  EXPECT_EQ(record.changed_parameters, 2u) << "tied ones once";
  EXPECT_EQ(record.changed_buffers, 2u);
  EXPECT_EQ(record.changed_bytes, 32u + 8 + 8 + 8);
  EXPECT_THAT(*record.tensors, ElementsAre("weight", "bias", "running_mean", "count"));

  now_ += absl::Seconds(5);
  ASSERT_TRUE(Configure(*module_, AdamW()).ok());
  record = Last();
  EXPECT_EQ(record.mutation, MutationKind::kConfigureOptimizer);
  EXPECT_EQ(record.detail, "adamw");
  EXPECT_EQ(record.time, now_);
  EXPECT_THAT(*record.tensors, IsEmpty());
  EXPECT_EQ(record.changed_bytes, 0u);
  ASSERT_TRUE(Configure(*module_, AdamW(), true).ok());
  EXPECT_EQ(Last().detail, "adamw, state reset");

  StepRequest request;
  request.worker = "w3";
  request.sequence = 17;
  ASSERT_TRUE(
      Push(*module_, {{"tied", 1}, {"running_mean", 2, TensorKind::kBuffer}}, std::move(request))
          .ok());
  record = Last();
  EXPECT_EQ(record.mutation, MutationKind::kStep);
  EXPECT_EQ(record.detail, "worker w3, sequence 17");
  EXPECT_EQ(record.step, 1u);
  EXPECT_EQ(record.changed_parameters, 1u);
  EXPECT_EQ(record.changed_buffers, 1u);
  EXPECT_EQ(record.changed_bytes, 40u);
  EXPECT_THAT(*record.tensors, ElementsAre("weight", "running_mean"));
  ASSERT_TRUE(Push(*module_, {{"bias", 1}}).ok());
  EXPECT_EQ(Last().detail, "");

  ASSERT_TRUE(SetRequiresGrad(*module_, Names({"tied"}), false).ok());
  record = Last();
  EXPECT_EQ(record.mutation, MutationKind::kFreeze);
  EXPECT_EQ(record.detail, "requires_grad = false");
  EXPECT_EQ(record.changed_parameters, 0u);
  EXPECT_EQ(record.schema_revision, 2u);
  EXPECT_THAT(*record.tensors, ElementsAre("weight"));

  ASSERT_TRUE(Load("bias", {2}, "bias.pth (torch zip)").ok());
  record = Last();
  EXPECT_EQ(record.mutation, MutationKind::kLoad);
  EXPECT_EQ(record.detail, "bias.pth (torch zip)");
  EXPECT_THAT(*record.tensors, ElementsAre("bias"));
  const VersionRef buffer = *Load("running_mean", {2}, "from the caller");
  EXPECT_EQ(buffer->last_mutation, MutationKind::kBufferWrite);
  record = Last();
  EXPECT_EQ(record.mutation, MutationKind::kBufferWrite);
  EXPECT_EQ(record.changed_buffers, 1u);

  CpuDevice other(1 << 20, "cpu:1");
  const auto move = [&](Device* device, std::optional<DType> dtype) {
    EXPECT_TRUE(Await<VersionRef>([&](ModuleInstance::Done<VersionRef> done) {
                  module_->Move(device, dtype, std::move(done));
                }).ok());
    return Last();
  };
  record = move(nullptr, DType::kBF16);
  EXPECT_EQ(record.mutation, MutationKind::kMove);
  EXPECT_EQ(record.detail, "F32 to BF16");
  EXPECT_EQ(record.changed_parameters, 2u);
  EXPECT_EQ(record.changed_buffers, 1u);
  EXPECT_EQ(record.changed_bytes, 16u + 4 + 4);
  record = move(&other, std::nullopt);
  EXPECT_EQ(record.detail, "cpu to cpu:1");
  EXPECT_EQ(record.changed_bytes, 0u);
  EXPECT_EQ(move(&device_, DType::kF16).detail, "BF16 to F16, cpu:1 to cpu");
  EXPECT_EQ(module_->History(0, 100).size(), module_->Current()->version.number);
}

TEST_F(ModuleHistoryTest, WhatFailsLeavesNoRecord) {
  EXPECT_FALSE(Push(*module_, {{"weight", 1}}).ok());
  EXPECT_FALSE(SetRequiresGrad(*module_, Names({"count"}), false).ok());
  ASSERT_TRUE(Configure(*module_, Sgd()).ok());
  EXPECT_FALSE(Push(*module_, {{"weight", 1}, {"count", 1}}).ok());
  EXPECT_EQ(module_->History(0, 100).size(), 2u);
}

}  // namespace
}  // namespace modelstate
