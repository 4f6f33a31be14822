#include "server/state/load_plan.h"

#include <gmock/gmock.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace modelstate {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

IncomingTensor Incoming(std::string name, std::vector<int64_t> dims, DType dtype = DType::kF32) {
  IncomingTensor tensor;
  tensor.name = std::move(name);
  tensor.shape = *Shape::Create(dims);
  tensor.dtype = dtype;
  return tensor;
}

TensorSpec Spec(std::string name, std::vector<int64_t> dims,
                TensorKind kind = TensorKind::kParameter, DType dtype = DType::kF32) {
  TensorSpec spec;
  spec.name = std::move(name);
  spec.shape = *Shape::Create(dims);
  spec.kind = kind;
  spec.dtype = dtype;
  spec.requires_grad = kind == TensorKind::kParameter;
  return spec;
}

std::shared_ptr<const ModuleSchema> Schema(std::vector<TensorSpec> specs) {
  return *ModuleSchema::Create(std::move(specs), 1);
}

std::shared_ptr<const ModuleSchema> Small() {
  return Schema({Spec("w", {2, 3}), Spec("b", {4}), Spec("m", {3}, TensorKind::kBuffer)});
}

absl::StatusOr<LoadPlan> Plan(std::shared_ptr<const ModuleSchema> base,
                              const std::vector<IncomingTensor>& incoming,
                              const LoadOptions& options = {}) {
  return LoadPlan::Create("M", std::move(base), incoming, options);
}

LoadOptions NotStrict() {
  LoadOptions options;
  options.strict = false;
  return options;
}

TEST(LoadPlanExisting, SpeaksTorchsWords) {
  // As torch 2.15.0 prints it for the same module and state_dict, but for the last line.
  const absl::Status error =
      Plan(Small(), {Incoming("w", {4, 4}), Incoming("c", {1}), Incoming("d", {1})}).status();
  EXPECT_EQ(error.message(),
            "Error(s) in loading state_dict for M:\n\t"
            "Missing key(s) in state_dict: \"b\", \"m\". \n\t"
            "Unexpected key(s) in state_dict: \"c\", \"d\". \n\t"
            "size mismatch for w: copying a param with shape torch.Size([4, 4]) from checkpoint, "
            "the shape in current model is torch.Size([2, 3]).\n\t"
            "(the option strict set to false passes over missing and unexpected keys)");
  EXPECT_EQ(GetReason(error), Reason::kMissingKey);
}

TEST(LoadPlanExisting, ReasonIsTheFirstThatApplies) {
  const IncomingTensor w = Incoming("w", {2, 3});
  const IncomingTensor b = Incoming("b", {4});
  const IncomingTensor m = Incoming("m", {3});
  const IncomingTensor extra = Incoming("x", {1});
  const IncomingTensor wrong = Incoming("m", {4});
  EXPECT_TRUE(Plan(Small(), {w, b, m}).ok());
  EXPECT_EQ(GetReason(Plan(Small(), {w, b}).status()), Reason::kMissingKey);
  EXPECT_EQ(GetReason(Plan(Small(), {w, b, m, extra}).status()), Reason::kUnknownKey);
  EXPECT_EQ(GetReason(Plan(Small(), {w, b, extra}).status()), Reason::kMissingKey);
  EXPECT_EQ(GetReason(Plan(Small(), {w, b, wrong}).status()), Reason::kShapeMismatch);
  EXPECT_EQ(GetReason(Plan(Small(), {w, b, wrong}, NotStrict()).status()), Reason::kShapeMismatch)
      << "also when not strict";
  EXPECT_EQ(GetReason(Plan(Small(), {w, w}).status()), Reason::kChunkInvalid);
}

TEST(LoadPlanExisting, LongListsFitInOneKibibyte) {
  std::vector<TensorSpec> specs;
  std::vector<IncomingTensor> incoming;
  const std::string deep(100, 'd');
  for (int i = 0; i < 500; ++i) {
    specs.push_back(Spec(absl::StrCat(deep, ".missing.", i), {1}));
    specs.push_back(Spec(absl::StrCat("mismatch.", i), {1}));
    incoming.push_back(Incoming(absl::StrCat(deep, ".unexpected.", i), {1}));
    incoming.push_back(Incoming(absl::StrCat("mismatch.", i), {2}));
  }
  const absl::Status error = Plan(Schema(specs), incoming).status();
  const std::string text(error.message());
  EXPECT_LE(text.size(), 1024u);
  EXPECT_THAT(text, HasSubstr("Missing key(s) in state_dict: \"ddd"));
  EXPECT_THAT(text, HasSubstr("Unexpected key(s)"));
  EXPECT_THAT(text, HasSubstr("size mismatch for mismatch.0"));
  EXPECT_THAT(text, HasSubstr(" more size mismatches"));
  EXPECT_THAT(text, HasSubstr("dry_run lists all"));
  EXPECT_EQ(GetErrorMetadata(error)["missing"], "500");
}

TEST(LoadPlanExisting, NotStrictReturnsTheTwoLists) {
  absl::StatusOr<LoadPlan> plan =
      Plan(Small(), {Incoming("m", {3}), Incoming("x", {1})}, NotStrict());
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_THAT(plan->missing_keys, ElementsAre("w", "b"));
  EXPECT_THAT(plan->unexpected_keys, ElementsAre("x"));
  ASSERT_EQ(plan->items.size(), 1u);
  EXPECT_EQ(plan->items[0].source, 0u);
  EXPECT_EQ(plan->items[0].target, 2u);
  EXPECT_EQ(plan->total_bytes, 12u);
  EXPECT_EQ(plan->schema, plan->base) << "nothing changes in the schema";
}

TEST(LoadPlanExisting, CopyKeepsTheDtypeAndAssignTakesIt) {
  const std::vector<IncomingTensor> incoming = {Incoming("w", {2, 3}, DType::kBF16),
                                                Incoming("b", {4}), Incoming("m", {3})};
  absl::StatusOr<LoadPlan> copy = Plan(Small(), incoming);
  ASSERT_TRUE(copy.ok());
  EXPECT_EQ(copy->items[0].source_dtype, DType::kBF16);
  EXPECT_EQ(copy->items[0].target_dtype, DType::kF32);
  EXPECT_EQ(copy->items[0].target_bytes, 24u);

  LoadOptions assign;
  assign.assign = true;
  const std::shared_ptr<const ModuleSchema> frozen = Small()->WithRequiresGrad({0}, false);
  absl::StatusOr<LoadPlan> assigned = Plan(frozen, incoming, assign);
  ASSERT_TRUE(assigned.ok()) << assigned.status();
  EXPECT_EQ(assigned->schema->spec(0).dtype, DType::kBF16);
  EXPECT_FALSE(assigned->schema->spec(0).requires_grad) << "kept";
  EXPECT_EQ(assigned->schema->revision(), frozen->revision() + 1);
  EXPECT_EQ(assigned->items[0].target_bytes, 12u);
  // An integer cannot require grad.
  EXPECT_EQ(
      GetReason(Plan(Small(),
                     {Incoming("w", {2, 3}, DType::kI32), Incoming("b", {4}), Incoming("m", {3})},
                     assign)
                    .status()),
      Reason::kDTypeMismatch);
}

// torch 2.15 takes shape [1] alone; 1.13 took the first element of any length.
TEST(LoadPlanExisting, ScalarsOfOldFiles) {
  EXPECT_EQ(GetReason(Plan(Schema({Spec("s", {})}), {Incoming("s", {0})}).status()),
            Reason::kShapeMismatch);
  EXPECT_TRUE(Plan(Schema({Spec("s", {})}), {Incoming("s", {1})}).ok());
  EXPECT_FALSE(Plan(Schema({Spec("s", {})}), {Incoming("s", {2})}).ok());
  EXPECT_FALSE(Plan(Schema({Spec("s", {1})}), {Incoming("s", {})}).ok());
  EXPECT_FALSE(Plan(Schema({Spec("s", {1, 2})}), {Incoming("s", {2, 1})}).ok());
}

TEST(LoadPlanExisting, NonPersistentBufferIsNoKey) {
  TensorSpec hidden = Spec("hidden", {1}, TensorKind::kBuffer);
  hidden.persistent = false;
  EXPECT_TRUE(Plan(Schema({Spec("w", {1}), hidden}), {Incoming("w", {1})}).ok());
  EXPECT_EQ(GetReason(Plan(Schema({Spec("w", {1}), hidden}),
                           {Incoming("w", {1}), Incoming("hidden", {1})})
                          .status()),
            Reason::kUnknownKey);
}

TEST(LoadPlanExisting, MissingBatchCountOfOldFiles) {
  const std::shared_ptr<const ModuleSchema> schema =
      Schema({Spec("bn.weight", {1}),
              Spec("bn.num_batches_tracked", {}, TensorKind::kBuffer, DType::kI64)});
  absl::StatusOr<LoadPlan> plan = Plan(schema, {Incoming("bn.weight", {1})});
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->items.size(), 1u) << "the count stays as it is";
  EXPECT_THAT(plan->missing_keys, IsEmpty());

  const auto versions = [&schema](std::map<std::string, int64_t> module_versions) {
    LoadOptions options;
    options.module_versions = std::move(module_versions);
    return Plan(schema, {Incoming("bn.weight", {1})}, options).status();
  };
  EXPECT_TRUE(versions({{"", 1}, {"bn", 1}}).ok());
  EXPECT_TRUE(versions({{"", 2}, {"other", 2}}).ok()) << "nothing is said of bn";
  EXPECT_EQ(GetReason(versions({{"bn", 2}})), Reason::kMissingKey);
  EXPECT_EQ(GetReason(versions({{"bn", 3}})), Reason::kMissingKey);
  LoadOptions whole;
  whole.source_is_whole = true;
  EXPECT_EQ(GetReason(Plan(schema, {Incoming("bn.weight", {1})}, whole).status()),
            Reason::kMissingKey);
  // Nothing else is excused, not even a parameter of that name.
  EXPECT_EQ(GetReason(Plan(Schema({Spec("bn.num_batches_tracked", {}), Spec("w", {1})}),
                           {Incoming("w", {1})})
                          .status()),
            Reason::kMissingKey);
}

TEST(LoadPlanExisting, BatchNormVersionsFollowThePrefixes) {
  const std::shared_ptr<const ModuleSchema> schema =
      Schema({Spec("net.bn.weight", {1}),
              Spec("net.bn.num_batches_tracked", {}, TensorKind::kBuffer, DType::kI64)});
  LoadOptions options;
  options.strip_prefix = "module.";
  options.add_prefix = "net.";
  const std::vector<IncomingTensor> incoming = {Incoming("module.bn.weight", {1})};
  options.module_versions = {{"module", 1}, {"module.bn", 2}};
  EXPECT_EQ(GetReason(Plan(schema, incoming, options).status()), Reason::kMissingKey);
  options.module_versions = {{"bn", 2}};
  EXPECT_EQ(GetReason(Plan(schema, {Incoming("bn.weight", {1})}, options).status()),
            Reason::kMissingKey)
      << "where the source does not have the prefix";
  options.module_versions = {{"bn", 2}, {"module.bn", 1}};
  EXPECT_TRUE(Plan(schema, incoming, options).ok()) << "the one with the prefix is its module";
  options.module_versions = {{"net.bn", 2}};
  EXPECT_TRUE(Plan(schema, incoming, options).ok()) << "names are those of the source";
  options.strip_prefix = "";
  options.module_versions = {{"module.bn", 2}};
  EXPECT_TRUE(Plan(schema, {Incoming("bn.weight", {1})}, options).ok());

  // The whole may be the batch norm.
  const std::shared_ptr<const ModuleSchema> bare = Schema(
      {Spec("weight", {1}), Spec("num_batches_tracked", {}, TensorKind::kBuffer, DType::kI64)});
  options = {};
  options.module_versions = {{"", 2}};
  EXPECT_EQ(GetReason(Plan(bare, {Incoming("weight", {1})}, options).status()),
            Reason::kMissingKey);
  options.module_versions = {{"", 1}, {"module", 2}};
  EXPECT_TRUE(Plan(bare, {Incoming("weight", {1})}, options).ok());
  options.strip_prefix = "module.";
  EXPECT_EQ(GetReason(Plan(bare, {Incoming("module.weight", {1})}, options).status()),
            Reason::kMissingKey);
}

TEST(LoadPlanExisting, Prefixes) {
  LoadOptions options;
  options.strip_prefix = "module.";
  EXPECT_TRUE(Plan(Schema({Spec("w", {1})}), {Incoming("module.w", {1})}, options).ok());
  EXPECT_FALSE(Plan(Schema({Spec("w", {1})}), {Incoming("module.w", {1})}).ok())
      << "never stripped by itself";
  EXPECT_EQ(GetReason(Plan(Schema({Spec("w", {1})}),
                           {Incoming("module.w", {1}), Incoming("w", {1})}, options)
                          .status()),
            Reason::kChunkInvalid);
  options = {};
  options.add_prefix = "net.";
  EXPECT_TRUE(Plan(Schema({Spec("net.w", {1})}), {Incoming("w", {1})}, options).ok());
}

std::shared_ptr<const ModuleSchema> Tied() {
  TensorSpec head = Spec("head", {2});
  head.alias_of = "embed";
  return Schema({Spec("embed", {2}), head});
}

TEST(LoadPlanExisting, TieIsCompleteWithAnyOfItsNames) {
  for (const char* name : {"embed", "head"}) {
    absl::StatusOr<LoadPlan> plan = Plan(Tied(), {Incoming(name, {2})});
    ASSERT_TRUE(plan.ok()) << plan.status();
    ASSERT_EQ(plan->items.size(), 1u);
    EXPECT_EQ(plan->items[0].target, 0u) << "the owner";
  }
  // Both, with elements of their own: torch copies both, so the later one stays.
  absl::StatusOr<LoadPlan> both = Plan(Tied(), {Incoming("head", {2}), Incoming("embed", {2})});
  ASSERT_TRUE(both.ok());
  ASSERT_EQ(both->items.size(), 1u);
  EXPECT_EQ(both->items[0].source, 0u);
}

TEST(LoadPlanExisting, AliasOfTheSourceGivesItsElementsToBoth) {
  IncomingTensor b = Incoming("b", {2});
  b.alias_of = "a";
  absl::StatusOr<LoadPlan> plan =
      Plan(Schema({Spec("a", {2}), Spec("b", {2})}), {Incoming("a", {2}), b});
  ASSERT_TRUE(plan.ok()) << plan.status();
  ASSERT_EQ(plan->items.size(), 2u);
  EXPECT_EQ(plan->items[1].source, 0u) << "where the bytes are";
  EXPECT_EQ(plan->items[1].target, 1u);
  b.alias_of = "nope";
  EXPECT_EQ(GetReason(Plan(Schema({Spec("b", {2})}), {b}).status()), Reason::kUnknownKey);
}

TEST(LoadPlanEmpty, DecidesKindsInOrder) {
  const std::shared_ptr<const ModuleSchema> empty = Schema({});
  auto known = [](IncomingTensor tensor, TensorKind kind, const char* rule) {
    tensor.kind = kind;
    tensor.kind_rule = rule;
    return tensor;
  };
  LoadOptions options;
  options.buffer_globs = {"pos_*"};
  IncomingTensor frozen =
      known(Incoming("frozen", {1}), TensorKind::kParameter, "pickled Parameter");
  frozen.requires_grad = false;
  absl::StatusOr<LoadPlan> plan =
      Plan(empty,
           {known(Incoming("pos_ours", {1}), TensorKind::kParameter, "checkpoint kind"),
            known(Incoming("pos_embed", {1}), TensorKind::kParameter, "pickled Parameter"), frozen,
            known(Incoming("a.running_mean", {1}), TensorKind::kParameter, "pickled Parameter"),
            Incoming("ids", {1}, DType::kI64), Incoming("mask", {1}, DType::kBool),
            Incoming("running_var", {1}), Incoming("bn.running_mean", {1}),
            Incoming("bn.running_mean.scale", {1}), Incoming("w", {1}, DType::kBF16)},
           options);
  ASSERT_TRUE(plan.ok()) << plan.status();
  std::string kinds;
  for (const TensorSpec& spec : plan->schema->specs()) {
    kinds += spec.kind == TensorKind::kParameter ? (spec.requires_grad ? 'P' : 'F') : 'B';
  }
  EXPECT_EQ(kinds, "PBFPBBBBPP");
  EXPECT_EQ(plan->schema->revision(), empty->revision() + 1);
  EXPECT_EQ(plan->schema->spec(9).dtype, DType::kBF16);
  std::string decisions;
  for (const LoadPlan::Decision& d : plan->decisions) {
    absl::StrAppend(&decisions, d.rule, "=", d.parameters, "/", d.buffers, "; ");
  }
  EXPECT_EQ(decisions,
            "checkpoint kind=1/0; buffers glob \"pos_*\"=0/1; pickled Parameter=2/0; "
            "dtype cannot require grad=0/2; name of a running statistic=0/2; default=2/0; ");
}

TEST(LoadPlanEmpty, FirstNameOfATieOwnsTheStorage) {
  // Names of a safetensors file are sorted, so the owner in the file may come later.
  IncomingTensor a = Incoming("a", {2});
  a.alias_of = "z";
  absl::StatusOr<LoadPlan> plan = Plan(Schema({}), {a, Incoming("m", {1}), Incoming("z", {2})});
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->schema->owner(2), 0u);
  EXPECT_EQ(plan->schema->spec(2).alias_of, "a");
  ASSERT_EQ(plan->items.size(), 2u);
  EXPECT_EQ(plan->items[0].target, 0u);
  EXPECT_EQ(plan->items[0].source, 2u) << "where the bytes are";
}

TEST(LoadPlanEmpty, CrepeTinyHas26ParametersAnd18Buffers) {
  std::ifstream file(MODELSTATE_SOURCE_DIR "/tests/data/crepe-tiny.pth.json");
  const nlohmann::json golden = nlohmann::json::parse(file);
  std::vector<IncomingTensor> incoming;
  for (const nlohmann::json& tensor : golden["tensors"]) {
    incoming.push_back(Incoming(tensor["name"], tensor["shape"].get<std::vector<int64_t>>(),
                                *ParseDType(tensor["dtype"].get<std::string>())));
  }
  absl::StatusOr<LoadPlan> plan = Plan(Schema({}), incoming);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->schema->parameter_count(), 26u);
  EXPECT_EQ(plan->schema->buffer_count(), 18u);
  EXPECT_EQ(plan->items.size(), 44u);
  for (const TensorSpec& spec : plan->schema->specs()) {
    const bool statistic = absl::StrContains(spec.name, "running_") ||
                           absl::EndsWith(spec.name, "num_batches_tracked");
    EXPECT_EQ(spec.kind == TensorKind::kBuffer, statistic) << spec.name;
  }
  // And again into the module that it made.
  absl::StatusOr<LoadPlan> again = Plan(plan->schema, incoming);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->schema, plan->schema);
  EXPECT_EQ(again->decisions.size(), 1u);
  EXPECT_THAT(again->missing_keys, IsEmpty());
}

TEST(LoadPlan, PlansAHundredThousandTensors) {
  std::vector<IncomingTensor> incoming;
  for (int i = 0; i < 100000; ++i) incoming.push_back(Incoming(absl::StrCat("p.", i), {3}));
  absl::StatusOr<LoadPlan> first = Plan(Schema({}), incoming);
  ASSERT_TRUE(first.ok()) << first.status();
  absl::StatusOr<LoadPlan> second = Plan(first->schema, incoming);
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_EQ(second->items.size(), 100000u);
  EXPECT_EQ(second->total_bytes, 1200000u);
}

}  // namespace
}  // namespace modelstate
