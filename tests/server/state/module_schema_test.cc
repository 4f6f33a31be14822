#include "server/state/module_schema.h"

#include <gmock/gmock.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace modelstate {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

TensorSpec Parameter(std::string name, std::vector<int64_t> dims, DType dtype = DType::kF32) {
  TensorSpec spec;
  spec.name = std::move(name);
  spec.shape = *Shape::Create(dims);
  spec.dtype = dtype;
  return spec;
}

TensorSpec Buffer(std::string name, std::vector<int64_t> dims, DType dtype = DType::kF32) {
  TensorSpec spec = Parameter(std::move(name), std::move(dims), dtype);
  spec.kind = TensorKind::kBuffer;
  spec.requires_grad = false;
  return spec;
}

TensorSpec Alias(TensorSpec spec, std::string name) {
  spec.alias_of = spec.name;
  spec.name = std::move(name);
  return spec;
}

TEST(ModuleSchema, CountsWithoutAliases) {
  const TensorSpec embed = Parameter("embed", {4, 2});
  TensorSpec hidden = Buffer("hidden", {3}, DType::kI64);
  hidden.persistent = false;
  absl::StatusOr<std::shared_ptr<const ModuleSchema>> schema =
      ModuleSchema::Create({embed, Buffer("mean", {2}), hidden, Alias(embed, "head")}, 5);
  ASSERT_TRUE(schema.ok()) << schema.status();
  const ModuleSchema& s = **schema;
  EXPECT_EQ(s.revision(), 5u);
  EXPECT_EQ(s.parameter_count(), 1u);
  EXPECT_EQ(s.buffer_count(), 2u);
  EXPECT_EQ(s.parameter_elements(), 8u);
  EXPECT_EQ(s.storage_bytes(), 32u + 8u + 24u);
  EXPECT_EQ(s.owner(3), 0u);
  EXPECT_EQ(s.Find("head"), std::optional<uint32_t>(3));
  EXPECT_EQ(s.Find("nope"), std::nullopt);
  EXPECT_THAT(s.state_dict()->indices, ElementsAre(0, 1, 3));
  EXPECT_EQ(s.state_dict()->layout.total_bytes(), 40u);
}

TEST(ModuleSchema, RefusesWhatTorchCannotRegister) {
  const TensorSpec w = Parameter("w", {2});
  TensorSpec gradient = w;
  gradient.kind = TensorKind::kGradient;
  TensorSpec hidden = w;
  hidden.persistent = false;
  const TensorSpec huge = Parameter("huge", {int64_t{1} << 58}, DType::kF64);
  TensorSpec huge2 = huge;
  huge2.name = "huge2";
  TensorSpec huge3 = huge;
  huge3.name = "huge3";
  struct Case {
    std::vector<TensorSpec> specs;
    Reason reason;
    std::string text;
  };
  std::vector<Case> cases = {
      {{Parameter("", {1})}, Reason::kInvalidField, "name is empty"},
      {{w, w}, Reason::kInvalidField, "two tensors are named \"w\""},
      {{w, Buffer("w", {1})}, Reason::kInvalidField, "two tensors are named \"w\""},
      {{gradient}, Reason::kInvalidField, "is a gradient"},
      {{Parameter("i", {1}, DType::kI64)}, Reason::kInvalidField, "requires_grad to false"},
      {{hidden}, Reason::kInvalidField, "not persistent"},
      {{Parameter("__metadata__", {1})}, Reason::kInvalidField, "cannot hold this name"},
      {{Parameter(std::string("a\0b", 3), {1})}, Reason::kInvalidField, "cannot hold this name"},
      {{Alias(w, "v")}, Reason::kUnknownKey, "alias of \"w\""},
      {{Alias(w, "v"), w}, Reason::kUnknownKey, "earlier tensor"},
      {{w, Alias(w, "w")}, Reason::kInvalidField, "two tensors are named"},
      {{w, Alias(w, "v"),
        [&] {
          TensorSpec chained = Alias(w, "u");
          chained.alias_of = "v";
          return chained;
        }()},
       Reason::kUnknownKey,
       "no alias itself"},
      {{w,
        [&] {
          TensorSpec other = Alias(w, "v");
          other.dtype = DType::kF16;
          return other;
        }()},
       Reason::kUnknownKey,
       "same kind, dtype and shape"},
      {{huge, huge2, huge3, Parameter("more", {int64_t{1} << 58}, DType::kF64)},
       Reason::kInvalidField,
       "overflows"},
  };
  // As many as one push may have; a file's header of 100 MB could name more.
  cases.push_back({std::vector<TensorSpec>(1'000'001, w), Reason::kInvalidField,
                   "at most 1000000 tensors, and this would have 1000001"});
  for (const Case& c : cases) {
    SCOPED_TRACE(c.text);
    const absl::Status error = ModuleSchema::Create(c.specs, 1).status();
    EXPECT_EQ(GetReason(error), c.reason) << error;
    EXPECT_THAT(std::string(error.message()), HasSubstr(c.text));
  }
}

TEST(ModuleSchema, FrozenIntegerParameterIsAllowed) {
  TensorSpec ids = Parameter("ids", {1}, DType::kI64);
  ids.requires_grad = false;
  std::shared_ptr<const ModuleSchema> schema = *ModuleSchema::Create({ids}, 1);
  EXPECT_FALSE(schema->WithRequiresGrad({0}, true)->spec(0).requires_grad);
}

TEST(ModuleSchema, ViewSelectsInStateDictOrder) {
  TensorSpec hidden = Buffer("hidden", {3});
  hidden.persistent = false;
  std::shared_ptr<const ModuleSchema> schema = *ModuleSchema::Create(
      {Parameter("a.w", {2}), Buffer("a.n", {}, DType::kI64), hidden, Parameter("b.w", {2})}, 1);
  Selection selection;
  EXPECT_EQ(*schema->View(selection), schema->state_dict()) << "the cached one";
  selection.include_non_persistent = true;
  EXPECT_THAT((*schema->View(selection))->indices, ElementsAre(0, 1, 2, 3));
  selection = {};
  selection.kinds = {TensorKind::kParameter};
  EXPECT_THAT((*schema->View(selection))->indices, ElementsAre(0, 3));
  selection = {};
  selection.names = {"b.w", "a.n"};
  selection.float_dtype = DType::kBF16;
  std::shared_ptr<const StateView> view = *schema->View(selection);
  EXPECT_THAT(view->indices, ElementsAre(1, 3));
  EXPECT_EQ(view->specs[0].dtype, DType::kI64);
  EXPECT_EQ(view->specs[1].dtype, DType::kBF16);
  EXPECT_EQ(view->layout.total_bytes(), 12u);
  selection.names = {"nope"};
  const absl::Status error = schema->View(selection).status();
  EXPECT_EQ(GetReason(error), Reason::kTensorNotFound);
  EXPECT_THAT(std::string(error.message()), HasSubstr("\"nope\""));
}

TEST(ModuleSchema, FreezingFreezesAllNamesOfATie) {
  const TensorSpec embed = Parameter("embed", {4});
  std::shared_ptr<const ModuleSchema> schema = *ModuleSchema::Create(
      {embed, Alias(embed, "head"), Parameter("w", {1}), Buffer("n", {1})}, 3);
  std::shared_ptr<const ModuleSchema> frozen = schema->WithRequiresGrad({1, 3}, false);
  EXPECT_EQ(frozen->revision(), 4u);
  EXPECT_FALSE(frozen->spec(0).requires_grad);
  EXPECT_FALSE(frozen->spec(1).requires_grad);
  EXPECT_TRUE(frozen->spec(2).requires_grad);
  EXPECT_FALSE(frozen->state_dict()->specs[0].requires_grad);
  EXPECT_EQ(frozen->state_dict()->layout.digest(), schema->state_dict()->layout.digest());
  EXPECT_TRUE(schema->spec(0).requires_grad) << "the old schema is as before";
  schema.reset();
  EXPECT_EQ(frozen->Find("head"), std::optional<uint32_t>(1)) << "owns its names";
}

TEST(ModuleSchema, HoldsAHundredThousandTensors) {
  constexpr uint32_t kCount = 100000;
  std::vector<TensorSpec> specs;
  for (uint32_t i = 0; i < kCount; ++i) {
    specs.push_back(i % 3 == 2 ? Buffer(absl::StrCat("layers.", i / 3, ".running_mean"), {8})
                               : Parameter(absl::StrCat("layers.", i / 3, ".w", i % 3), {8, 2}));
  }
  absl::StatusOr<std::shared_ptr<const ModuleSchema>> schema =
      ModuleSchema::Create(std::move(specs), 1);
  ASSERT_TRUE(schema.ok()) << schema.status();
  EXPECT_EQ((*schema)->size(), kCount);
  for (uint32_t i = 0; i < kCount; ++i) EXPECT_EQ((*schema)->Find((*schema)->spec(i).name), i);
  Selection buffers;
  buffers.globs = {"*.running_*"};
  std::shared_ptr<const StateView> view = *(*schema)->View(buffers);
  EXPECT_EQ(view->indices.size(), kCount / 3);
  EXPECT_EQ(view->layout.total_bytes(), kCount / 3 * 32);
  EXPECT_EQ((*schema)->WithRequiresGrad({0}, false)->state_dict()->specs.size(), kCount);
}

}  // namespace
}  // namespace modelstate
