// ListParameters, ListBuffers and GetTensor: views, pages, statistics and slices.
#include <cmath>
#include <limits>

#include "tests/server/rpc/server_fixture.h"

namespace modelstate {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using Stub = v1::ModelState::Stub;

class ListingRpcsTest : public ServerTest {
 protected:
  using Method = grpc::Status (Stub::*)(grpc::ClientContext*, const v1::ListTensorsRequest&,
                                        v1::ListTensorsResponse*);

  std::vector<std::string> Names(Method method, v1::ListView view) {
    v1::ListTensorsRequest request;
    request.set_module("tiny");
    request.set_view(view);
    request.set_page_size(1);
    std::vector<std::string> names;
    uint64_t total = 0;
    do {
      const auto page = Call(method, request);
      if (!page.ok()) return {page.status().ToString()};
      for (const v1::TensorInfo& tensor : page->tensors()) names.push_back(tensor.name());
      request.set_page_token(page->next_page_token());
      total = page->total_size();
    } while (!request.page_token().empty());
    EXPECT_EQ(total, names.size());
    return names;
  }

  absl::StatusOr<v1::GetTensorResponse> Part(const std::string& name, const std::string& slice,
                                             uint64_t first = 0, uint32_t count = 0) {
    v1::GetTensorRequest request;
    request.set_module("tiny");
    request.set_name(name);
    request.set_slice(slice);
    request.set_first(first);
    request.set_count(count);
    return Call(&Stub::GetTensor, request);
  }
};

TEST_F(ListingRpcsTest, ViewsAreThoseOfTorch) {
  v1::TensorInfo hidden = Tensor("bn.hidden", v1::BUFFER, {1});
  hidden.set_persistent(false);
  v1::TensorInfo tied;
  tied.set_name("head.weight");
  tied.set_alias_of("embed.weight");
  Create("tiny", {Tensor("embed.weight", v1::PARAMETER, {2}), Tensor("bn.mean", v1::BUFFER, {1}),
                  hidden, tied, Tensor("w", v1::PARAMETER, {1})});
  EXPECT_THAT(Names(&Stub::ListParameters, v1::NAMED), ElementsAre("embed.weight", "w"));
  EXPECT_THAT(Names(&Stub::ListParameters, v1::STATE_DICT),
              ElementsAre("embed.weight", "head.weight", "w"));
  EXPECT_THAT(Names(&Stub::ListParameters, v1::LIST_VIEW_UNSPECIFIED),
              ElementsAre("embed.weight", "head.weight", "w"));
  EXPECT_THAT(Names(&Stub::ListBuffers, v1::NAMED), ElementsAre("bn.mean", "bn.hidden"));
  EXPECT_THAT(Names(&Stub::ListBuffers, v1::STATE_DICT), ElementsAre("bn.mean"));
  EXPECT_THAT(Names(&Stub::ListBuffers, v1::LIST_VIEW_UNSPECIFIED),
              ElementsAre("bn.mean", "bn.hidden"));
  v1::ListTensorsRequest request;
  request.set_module("tiny");
  request.set_view(static_cast<v1::ListView>(9));
  EXPECT_THAT(Call(&Stub::ListParameters, request), FailsWith(Reason::kInvalidField));
}

TEST_F(ListingRpcsTest, PagesGoOnAcrossASteppedVersion) {
  CreateTiny();
  ASSERT_TRUE(Configure("tiny", v1::SGD, 1).ok());
  v1::ListTensorsRequest request;
  request.set_module("tiny");
  request.set_page_size(1);
  request.mutable_selection()->add_globs("*");
  auto page = Call(&Stub::ListParameters, request);
  ASSERT_TRUE(page.ok()) << page.status();
  EXPECT_EQ(page->version().number(), 2);
  ASSERT_TRUE(
      Push(StepParts("tiny", {{Tensor("bias", v1::GRADIENT, {2}), FloatBytes({1, 1})}})).ok());
  request.set_page_token(page->next_page_token());
  page = Call(&Stub::ListParameters, request);
  ASSERT_TRUE(page.ok()) << page.status();
  EXPECT_EQ(page->version().number(), 3) << "each page says which version it shows";
  EXPECT_EQ(page->tensors(0).name(), "bias");
  EXPECT_EQ(page->tensors(0).changed_version(), 3);
}

TEST_F(ListingRpcsTest, StatisticsOfEveryDType) {
  std::vector<v1::TensorInfo> tensors;
  for (DType dtype : kAllDTypes) {
    v1::TensorInfo info =
        Tensor(std::string(DTypeName(dtype)), v1::BUFFER, {4}, static_cast<v1::DType>(dtype));
    if (dtype == DType::kC64) {
      info = WithValues(info, {0, 1, 1, 0, 0, 0, 0, -2});
    } else {
      info = WithValues(info, {0, 1, 1, 0});
    }
    tensors.push_back(info);
  }
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const double inf = std::numeric_limits<double>::infinity();
  tensors.push_back(
      WithValues(Tensor("mixed", v1::BUFFER, {5}, v1::BF16), {nan, 3, -4, inf, -inf}));
  tensors.push_back(WithValues(Tensor("nothing", v1::BUFFER, {2}), {nan, nan}));
  tensors.push_back(Tensor("empty", v1::BUFFER, {0}));
  v1::TensorInfo large = Tensor("large", v1::BUFFER, {1}, v1::U64);
  large.mutable_values()->set_raw(std::string(8, '\xff'));
  tensors.push_back(large);
  Create("tiny", tensors);
  v1::ListTensorsRequest request;
  request.set_module("tiny");
  request.set_statistics(true);
  const auto list = Call(&Stub::ListBuffers, request);
  ASSERT_TRUE(list.ok()) << list.status();
  std::map<std::string, v1::TensorStatistics> of;
  for (const v1::TensorInfo& tensor : list->tensors()) {
    ASSERT_TRUE(tensor.has_statistics());
    of[tensor.name()] = tensor.statistics();
    // GetTensor says the same.
    EXPECT_EQ(Part(tensor.name(), "")->statistics().DebugString(),
              tensor.statistics().DebugString());
  }
  for (DType dtype : kAllDTypes) {
    const v1::TensorStatistics& s = of[std::string(DTypeName(dtype))];
    SCOPED_TRACE(DTypeName(dtype));
    const bool complex = dtype == DType::kC64;
    EXPECT_EQ(s.count(), complex ? 8 : 4);
    EXPECT_EQ(s.min(), complex ? -2 : 0);
    EXPECT_EQ(s.max(), 1);
    EXPECT_EQ(s.mean(), complex ? 0 : 0.5);
    EXPECT_DOUBLE_EQ(s.norm(), std::sqrt(complex ? 6.0 : 2.0));
    EXPECT_EQ(s.nonfinite(), 0);
  }
  EXPECT_EQ(of["mixed"].count(), 5);
  EXPECT_EQ(of["mixed"].nonfinite(), 3);
  EXPECT_EQ(of["mixed"].min(), -4);
  EXPECT_EQ(of["mixed"].max(), 3);
  EXPECT_EQ(of["mixed"].norm(), 5);
  EXPECT_EQ(of["nothing"].nonfinite(), 2);
  EXPECT_EQ(of["nothing"].norm(), 0);
  EXPECT_EQ(of["empty"].count(), 0);
  EXPECT_EQ(of["large"].max(), 0x1p64);
  request.set_statistics(false);
  EXPECT_FALSE(Call(&Stub::ListBuffers, request)->tensors(0).has_statistics());
}

TEST_F(ListingRpcsTest, PagesThatReadElementsEndEarly) {
  Create("tiny", {Tensor("a", v1::BUFFER, {200 << 20}, v1::U8),
                  Tensor("b", v1::BUFFER, {100 << 20}, v1::U8), Tensor("c", v1::BUFFER, {1}),
                  Tensor("d", v1::BUFFER, {1})});
  v1::ListTensorsRequest request;
  request.set_module("tiny");
  request.set_digests(true);
  auto page = Call(&Stub::ListBuffers, request);
  ASSERT_TRUE(page.ok()) << page.status();
  EXPECT_EQ(page->tensors_size(), 2);
  EXPECT_EQ(page->total_size(), 4);
  request.set_page_token(page->next_page_token());
  page = Call(&Stub::ListBuffers, request);
  ASSERT_TRUE(page.ok()) << page.status();
  EXPECT_EQ(page->tensors_size(), 2);
  EXPECT_EQ(page->next_page_token(), "");
  // Digests are kept: now nothing is read.
  request.clear_page_token();
  EXPECT_EQ(Call(&Stub::ListBuffers, request)->tensors_size(), 4);
  request.set_statistics(true);
  EXPECT_EQ(Call(&Stub::ListBuffers, request)->tensors_size(), 2);
}

TEST_F(ListingRpcsTest, GetTensorShowsSlices) {
  CreateTiny();  // weight [[1, 2, 3], [4, 5, 6]]
  const auto row = Part("weight", "-1");
  ASSERT_TRUE(row.ok()) << row.status();
  EXPECT_THAT(row->tensor().values().doubles().values(), ElementsAre(4, 5, 6));
  EXPECT_THAT(row->slice_shape(), ElementsAre(3));
  EXPECT_EQ(row->statistics().count(), 6) << "of the whole tensor";
  const auto columns = Part("weight", ":, ::2");
  ASSERT_TRUE(columns.ok()) << columns.status();
  EXPECT_THAT(columns->tensor().values().doubles().values(), ElementsAre(1, 3, 4, 6));
  EXPECT_THAT(columns->slice_shape(), ElementsAre(2, 2));
  const auto part = Part("weight", ":, ::2", 1, 2);
  ASSERT_TRUE(part.ok()) << part.status();
  EXPECT_THAT(part->tensor().values().doubles().values(), ElementsAre(3, 4));
  EXPECT_EQ(part->first(), 1);
  const auto one = Part("weight", "0, 1");
  EXPECT_THAT(one->tensor().values().doubles().values(), ElementsAre(2));
  EXPECT_EQ(one->slice_shape_size(), 0);
  EXPECT_EQ(Part("weight", "5:")->tensor().values().doubles().values_size(), 0);
  EXPECT_EQ(Part("weight", "")->slice_shape_size(), 0);

  const auto past = Part("weight", ":, ::2", 3, 2);
  EXPECT_THAT(past, FailsWith(Reason::kRangeOutsideLayout));
  EXPECT_THAT(std::string(past.status().message()), HasSubstr("the slice of tensor \"weight\""));
  const auto outside = Part("weight", "5");
  EXPECT_THAT(outside, FailsWith(Reason::kRangeOutsideLayout));
  EXPECT_THAT(std::string(outside.status().message()),
              HasSubstr("index 5 is out of bounds for dimension 0 with size 2"));
  EXPECT_THAT(Part("weight", "::-1"), FailsWith(Reason::kInvalidField));
}

}  // namespace
}  // namespace modelstate
