// CreateModule's registration rules and initializers, and GetModuleSpec, which is its inverse.
#include "common/base/digest.h"
#include "tests/server/rpc/server_fixture.h"

namespace modelstate {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using Stub = v1::ModelState::Stub;

v1::TensorInfo Alias(const std::string& name, const std::string& of) {
  v1::TensorInfo info;
  info.set_name(name);
  info.set_alias_of(of);
  return info;
}

class CreationRpcsTest : public ServerTest {
 protected:
  absl::StatusOr<v1::Module> Make(const v1::ModuleSpec& spec, const std::string& name = "made") {
    v1::CreateModuleRequest request;
    request.set_name(name);
    *request.mutable_spec() = spec;
    return Call(&Stub::CreateModule, request);
  }
  absl::StatusOr<v1::Module> Make(const std::vector<v1::TensorInfo>& tensors) {
    v1::ModuleSpec spec;
    for (const v1::TensorInfo& tensor : tensors) *spec.add_tensors() = tensor;
    return Make(spec);
  }

  // Digest by name.
  std::map<std::string, std::string> Digests(const std::string& module) {
    std::map<std::string, std::string> digests;
    v1::ListTensorsRequest request;
    request.set_module(module);
    request.set_digests(true);
    const auto list = Call(&Stub::ListParameters, request);
    EXPECT_TRUE(list.ok()) << list.status();
    for (const v1::TensorInfo& tensor : list->tensors()) digests[tensor.name()] = tensor.xxh3();
    return digests;
  }

  // All pages together.
  absl::StatusOr<v1::ModuleSpec> SpecOf(const std::string& module, int page_size, int* pages) {
    v1::ModuleSpec spec;
    v1::GetModuleSpecRequest request;
    request.set_module(module);
    request.set_page_size(page_size);
    *pages = 0;
    do {
      absl::StatusOr<v1::GetModuleSpecResponse> page = Call(&Stub::GetModuleSpec, request);
      if (!page.ok()) return page.status();
      spec.MergeFrom(page->spec());
      EXPECT_EQ(page->version().number(), 1);
      EXPECT_EQ(page->spec().metadata().empty(), *pages > 0) << "on the first page";
      request.set_page_token(page->next_page_token());
      ++*pages;
    } while (!request.page_token().empty());
    return spec;
  }
};

TEST_F(CreationRpcsTest, RegistrationRulesHaveTorchsWords) {
  const auto parameter = [](const std::string& name, v1::DType dtype = v1::F32) {
    return Tensor(name, v1::PARAMETER, {2}, dtype);
  };
  const auto buffer = [](const std::string& name) { return Tensor(name, v1::BUFFER, {2}); };
  struct Case {
    std::vector<v1::TensorInfo> tensors;
    std::string text;
  };
  const Case cases[] = {
      {{parameter("")}, "parameter name can't be empty string \"\""},
      {{buffer("")}, "buffer name can't be empty string \"\""},
      {{buffer("a..x")}, "module name can't be empty string \"\""},
      {{parameter("conv"), parameter("conv.weight")}, "attribute 'conv' already exists"},
      {{parameter("a.x"), buffer("a.x")}, "attribute 'x' already exists"},
      {{parameter("x"), Alias("x.y", "x")}, "attribute 'x' already exists"},
      {{parameter("ids", v1::I64)},
       "Only Tensors of floating point and complex dtype can require gradients"},
  };
  for (const Case& c : cases) {
    const auto made = Make(c.tensors);
    EXPECT_THAT(made, FailsWith(Reason::kInvalidField));
    EXPECT_THAT(std::string(made.status().message()), HasSubstr(c.text));
  }
  v1::ModuleSpec spec;
  (*spec.mutable_metadata())["tokenizer"] = std::string(300 << 10, 'x');
  EXPECT_THAT(Make(spec), FailsWith(Reason::kInvalidField));
  EXPECT_EQ(Info().module_count(), 0);

  v1::TensorInfo ids = parameter("ids", v1::I64);
  ids.set_requires_grad(false);
  EXPECT_TRUE(Make({ids, parameter("a.w"), Alias("b.w", "a.w")}).ok());
}

TEST_F(CreationRpcsTest, RandomInitializersFollowSeedAndName) {
  v1::TensorInfo weight = Tensor("conv.weight", v1::PARAMETER, {4, 3, 3, 3});
  weight.mutable_initializer()->mutable_kaiming_uniform()->set_nonlinearity("relu");
  v1::TensorInfo other = weight;
  other.set_name("conv2.weight");
  v1::TensorInfo own = weight;
  own.set_name("conv3.weight");
  own.mutable_initializer()->set_seed(99);
  v1::TensorInfo bias = Tensor("conv.bias", v1::PARAMETER, {4}, v1::BF16);
  bias.mutable_initializer()->mutable_normal()->set_std(0.02);
  v1::ModuleSpec spec;
  for (const v1::TensorInfo& tensor : {weight, other, own, bias}) *spec.add_tensors() = tensor;
  spec.set_seed(7);
  ASSERT_TRUE(Make(spec, "a").ok());
  ASSERT_TRUE(Make(spec, "b").ok());
  auto a = Digests("a");
  EXPECT_EQ(a, Digests("b")) << "nothing but seed, name and position counts";
  EXPECT_NE(a["conv.weight"], a["conv2.weight"]);
  spec.set_seed(8);
  ASSERT_TRUE(Make(spec, "c").ok());
  auto c = Digests("c");
  EXPECT_NE(c["conv.weight"], a["conv.weight"]);
  EXPECT_NE(c["conv.bias"], a["conv.bias"]);
  EXPECT_EQ(c["conv3.weight"], a["conv3.weight"]) << "it has a seed of its own";

  // The bounds are torch's: sqrt(2) * sqrt(3 / 27).
  v1::GetTensorRequest get;
  get.set_module("a");
  get.set_name("conv.weight");
  const auto shown = Call(&Stub::GetTensor, get);
  ASSERT_TRUE(shown.ok()) << shown.status();
  EXPECT_LE(shown->statistics().max(), std::sqrt(2.0 / 9));
  EXPECT_GT(shown->statistics().max(), 0.4);
  EXPECT_LT(shown->statistics().min(), -0.4);
}

TEST_F(CreationRpcsTest, WrongInitializersMakeNothing) {
  v1::TensorInfo good = Tensor("w", v1::PARAMETER, {100, 100});
  v1::TensorInfo bias = Tensor("bias", v1::PARAMETER, {4});
  bias.mutable_initializer()->mutable_xavier_uniform();
  const auto fans = Make({good, bias});
  EXPECT_THAT(fans, FailsWith(Reason::kInvalidField));
  EXPECT_THAT(std::string(fans.status().message()),
              HasSubstr("\"bias\", initializer: Fan in and fan out can not be computed for tensor "
                        "with fewer than 2 dimensions"));
  v1::TensorInfo counter = Tensor("n", v1::BUFFER, {}, v1::I64);
  counter.mutable_initializer()->mutable_uniform();
  EXPECT_THAT(Make({good, counter}), FailsWith(Reason::kInvalidField));
  v1::TensorInfo both = WithValues(Tensor("w", v1::PARAMETER, {1}), {1});
  both.mutable_initializer()->set_ones(true);
  EXPECT_THAT(Make({both}), FailsWith(Reason::kInvalidField));
  v1::TensorInfo tied = Alias("tied", "w");
  tied.mutable_initializer()->mutable_normal();
  EXPECT_THAT(Make({good, tied}), FailsWith(Reason::kInvalidField));
  EXPECT_EQ(Info().module_count(), 0);
  EXPECT_EQ(Info().devices(0).memory_used_bytes(), 0);
}

TEST_F(CreationRpcsTest, ConstantsFillEveryDType) {
  std::vector<v1::TensorInfo> tensors;
  for (DType dtype : kAllDTypes) {
    v1::TensorInfo info =
        Tensor(std::string(DTypeName(dtype)), v1::BUFFER, {3}, static_cast<v1::DType>(dtype));
    info.mutable_initializer()->set_ones(true);
    tensors.push_back(info);
  }
  v1::TensorInfo negative = Tensor("minus_zero", v1::BUFFER, {2});
  negative.mutable_initializer()->set_constant(-0.0);
  tensors.push_back(negative);
  ASSERT_TRUE(Make(tensors).ok());
  v1::GetTensorRequest get;
  get.set_module("made");
  for (DType dtype : kAllDTypes) {
    get.set_name(std::string(DTypeName(dtype)));
    const auto shown = Call(&Stub::GetTensor, get);
    ASSERT_TRUE(shown.ok()) << shown.status();
    EXPECT_EQ(shown->statistics().max(), 1) << get.name();
    EXPECT_EQ(shown->statistics().mean(), dtype == DType::kC64 ? 0.5 : 1) << get.name();
  }
  get.set_name("minus_zero");
  EXPECT_TRUE(std::signbit(Call(&Stub::GetTensor, get)->tensor().values().doubles().values(0)));
}

TEST_F(CreationRpcsTest, GetModuleSpecIsTheInverse) {
  v1::TensorInfo frozen = Tensor("backbone.weight", v1::PARAMETER, {2, 3}, v1::BF16);
  frozen.set_requires_grad(false);
  v1::TensorInfo hidden = Tensor("backbone.mask", v1::BUFFER, {2}, v1::BOOL);
  hidden.set_persistent(false);
  v1::ModuleSpec spec;
  for (const v1::TensorInfo& tensor :
       {Tensor("embed.weight", v1::PARAMETER, {5, 2}), frozen, hidden,
        Tensor("bn.num_batches_tracked", v1::BUFFER, {}, v1::I64),
        Alias("head.weight", "embed.weight"), Tensor("z", v1::PARAMETER, {0, 3}, v1::C64)}) {
    *spec.add_tensors() = tensor;
  }
  (*spec.mutable_metadata())["architecture"] = "tiny";
  (*spec.mutable_metadata())["git"] = "abc";
  const auto first = Make(spec, "first");
  ASSERT_TRUE(first.ok()) << first.status();
  for (int page_size : {0, 1, 4}) {
    SCOPED_TRACE(page_size);
    int pages = 0;
    const auto dumped = SpecOf("first", page_size, &pages);
    ASSERT_TRUE(dumped.ok()) << dumped.status();
    EXPECT_EQ(pages, page_size == 0 ? 1 : (6 + page_size - 1) / page_size);
    ASSERT_EQ(dumped->tensors_size(), 6);
    for (int i = 0; i < 6; ++i) {
      EXPECT_EQ(dumped->tensors(i).name(), spec.tensors(i).name()) << "the same order";
      EXPECT_FALSE(dumped->tensors(i).has_values());
    }
    EXPECT_FALSE(dumped->tensors(1).requires_grad());
    EXPECT_FALSE(dumped->tensors(2).persistent());
    EXPECT_EQ(dumped->tensors(4).alias_of(), "embed.weight");
    const std::string name = absl::StrCat("again", page_size);
    const auto again = Make(*dumped, name);
    ASSERT_TRUE(again.ok()) << again.status();
    EXPECT_EQ(again->layout_digest(), first->layout_digest());
    EXPECT_EQ(again->parameter_count(), first->parameter_count());
    EXPECT_EQ(again->buffer_count(), first->buffer_count());
    EXPECT_EQ(again->metadata_size(), 2);
    const auto second = SpecOf(name, 0, &pages);
    ASSERT_TRUE(second.ok());
    EXPECT_EQ(second->SerializeAsString().size(), dumped->SerializeAsString().size());
    EXPECT_EQ(second->DebugString(), dumped->DebugString());
  }
}

TEST_F(CreationRpcsTest, SpecPagesOfAnotherSchemaAreRefused) {
  CreateTiny();
  v1::GetModuleSpecRequest request;
  request.set_module("tiny");
  request.set_page_size(1);
  auto page = Call(&Stub::GetModuleSpec, request);
  ASSERT_TRUE(page.ok()) << page.status();
  EXPECT_EQ(page->total_size(), 3);
  request.set_page_token(page->next_page_token());
  EXPECT_TRUE(Call(&Stub::GetModuleSpec, request).ok());
  v1::SetRequiresGradRequest freeze;
  freeze.set_module("tiny");
  freeze.mutable_selection()->add_names("bias");
  freeze.set_requires_grad(false);
  ASSERT_TRUE(Call(&Stub::SetRequiresGrad, freeze).ok());
  EXPECT_THAT(Call(&Stub::GetModuleSpec, request), FailsWith(Reason::kInvalidField));

  Create("empty", {});
  request.set_module("empty");
  EXPECT_THAT(Call(&Stub::GetModuleSpec, request), FailsWith(Reason::kInvalidField));
  request.clear_page_token();
  page = Call(&Stub::GetModuleSpec, request);
  ASSERT_TRUE(page.ok()) << page.status();
  EXPECT_EQ(page->spec().tensors_size(), 0);
  EXPECT_EQ(page->next_page_token(), "");
}

}  // namespace
}  // namespace modelstate
