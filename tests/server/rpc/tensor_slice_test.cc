#include "server/rpc/tensor_slice.h"

#include <gmock/gmock.h>

#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <random>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/status.h"
#include "tests/server/test_environment.h"

namespace modelstate {
namespace {

using ::testing::ElementsAreArray;
using ::testing::HasSubstr;
using Json = nlohmann::json;

// Elements that say where they are.
std::vector<uint8_t> Tensor(const Shape& shape) {
  std::vector<int64_t> elements(static_cast<size_t>(shape.num_elements()));
  std::iota(elements.begin(), elements.end(), 0);
  std::vector<uint8_t> bytes(elements.size() * sizeof(int64_t));
  std::memcpy(bytes.data(), elements.data(), bytes.size());
  return bytes;
}

std::vector<int64_t> Gather(const TensorSlice& slice, const std::vector<uint8_t>& tensor,
                            uint64_t first, uint64_t count) {
  const std::vector<uint8_t> bytes = slice.Gather(tensor, sizeof(int64_t), first, count);
  std::vector<int64_t> elements(count);
  std::memcpy(elements.data(), bytes.data(), bytes.size());
  return elements;
}

TEST(TensorSlice, SelectsAndRefusesWhatTorchDoes) {
  std::ifstream in(DataFolder() + "slices.json");
  const Json goldens = Json::parse(in);
  ASSERT_GT(goldens.size(), 60u);
  for (const Json& item : goldens) {
    SCOPED_TRACE(item.dump());
    const Shape shape = *Shape::Create(item["shape"].get<std::vector<int64_t>>());
    const absl::StatusOr<TensorSlice> slice =
        TensorSlice::Parse(item["slice"].get<std::string>(), shape);
    if (item.contains("error")) {
      ASSERT_FALSE(slice.ok());
      const std::string text = item["error"];
      const bool outside = text.find("out of bounds") != std::string::npos;
      EXPECT_EQ(GetReason(slice.status()),
                outside ? Reason::kRangeOutsideLayout : Reason::kInvalidField);
      // Of the 0-dim text the first sentence: the rest names Python's functions. After "..." torch
      // counts dimensions from there; here they are the tensor's.
      EXPECT_THAT(std::string(slice.status().message()),
                  HasSubstr(text.substr(0, item["slice"].get<std::string>().find("...") == 0
                                               ? text.find("dimension ")
                                               : text.find(". Use"))));
      continue;
    }
    ASSERT_TRUE(slice.ok()) << slice.status();
    EXPECT_THAT(slice->shape(), ElementsAreArray(item["slice_shape"].get<std::vector<int64_t>>()));
    const auto expected = item["elements"].get<std::vector<int64_t>>();
    ASSERT_EQ(slice->elements(), expected.size());
    EXPECT_EQ(Gather(*slice, Tensor(shape), 0, expected.size()), expected);
  }
}

TEST(TensorSlice, RefusesWhatIsNoIndex) {
  const Shape shape = *Shape::Create({3, 4});
  for (const char* text : {"x", "0 1", "1.5", ",", "0,,1", "[0]", "1:2:3:4", "None", "0;1", "..",
                           "....", "9223372036854775808", "1:x", " "}) {
    const absl::Status status = TensorSlice::Parse(text, shape).status();
    EXPECT_EQ(GetReason(status), Reason::kInvalidField) << text << ": " << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("as between the brackets in Python"));
  }
  const absl::Status dots = TensorSlice::Parse("..., ...", shape).status();
  EXPECT_THAT(std::string(dots.message()), HasSubstr("only have a single ellipsis"));
  const absl::Status step = TensorSlice::Parse("::0", shape).status();
  EXPECT_THAT(std::string(step.message()), HasSubstr("step must be greater than zero"));
  const std::string many(100000, ',');
  EXPECT_EQ(GetReason(TensorSlice::Parse(many, shape).status()), Reason::kInvalidField);
  EXPECT_LT(TensorSlice::Parse(many, shape).status().message().size(), 500u);
}

// Against nested loops over a list of indices per dimension.
TEST(TensorSlice, AgreesWithNestedLoops) {
  for (uint32_t seed = 1; seed <= 2000; ++seed) {
    std::mt19937 random(seed);
    const auto below = [&](int n) {
      return static_cast<int64_t>(random() % static_cast<uint32_t>(n));
    };
    std::vector<int64_t> dims(1 + random() % 4);
    for (int64_t& dim : dims) dim = below(10) == 0 ? 0 : 1 + below(5);
    const Shape shape = *Shape::Create(dims);
    const size_t given = random() % (dims.size() + 1);
    // The `...` stands before item `dots`.
    const size_t dots = random() % 2 == 0 ? given : random() % (given + 1);
    std::vector<std::string> items;
    std::vector<std::vector<int64_t>> picked(dims.size());
    std::vector<bool> kept(dims.size(), true);
    for (size_t d = 0; d < dims.size(); ++d) {
      for (int64_t i = 0; i < dims[d]; ++i) picked[d].push_back(i);
    }
    bool possible = true;
    for (size_t item = 0; item < given; ++item) {
      if (item == dots) items.push_back("...");
      const size_t d = item < dots ? item : item + dims.size() - given;
      if (random() % 2 == 0) {
        possible = possible && dims[d] > 0;
        if (!possible) break;
        const int64_t index = below(static_cast<int>(2 * dims[d])) - dims[d];
        items.push_back(absl::StrCat(index));
        picked[d] = {(index + dims[d]) % dims[d]};
        kept[d] = false;
        continue;
      }
      std::optional<int64_t> start, stop, step;
      if (random() % 4 != 0) start = below(15) - 7;
      if (random() % 4 != 0) stop = below(15) - 7;
      if (random() % 2 != 0) step = 1 + below(4);
      const auto text = [](const std::optional<int64_t>& n) {
        return n ? absl::StrCat(*n) : std::string();
      };
      items.push_back(absl::StrCat(text(start), ":", text(stop),
                                   step ? absl::StrCat(":", *step) : std::string()));
      picked[d].clear();
      // By the definition, one index after the other.
      const int64_t from = !start ? 0 : *start < 0 ? *start + dims[d] : *start;
      const int64_t to = !stop ? dims[d] : *stop < 0 ? *stop + dims[d] : *stop;
      for (int64_t i = std::max<int64_t>(from, 0); i < to && i < dims[d]; i += step.value_or(1)) {
        picked[d].push_back(i);
      }
    }
    if (!possible) continue;
    if (items.empty()) items.push_back("...");
    const std::string text = absl::StrJoin(items, ", ");
    SCOPED_TRACE(absl::StrCat("seed ", seed, " shape ", shape.ToString(), " slice ", text));
    std::vector<int64_t> expected = {0};
    std::vector<int64_t> expected_shape;
    for (size_t d = 0; d < dims.size(); ++d) {
      std::vector<int64_t> next;
      for (int64_t base : expected) {
        for (int64_t i : picked[d]) next.push_back(base * dims[d] + i);
      }
      expected = std::move(next);
      if (kept[d]) expected_shape.push_back(static_cast<int64_t>(picked[d].size()));
    }
    const absl::StatusOr<TensorSlice> slice = TensorSlice::Parse(text, shape);
    ASSERT_TRUE(slice.ok()) << slice.status();
    ASSERT_THAT(slice->shape(), ElementsAreArray(expected_shape));
    ASSERT_EQ(slice->elements(), expected.size());
    const std::vector<uint8_t> tensor = Tensor(shape);
    ASSERT_EQ(Gather(*slice, tensor, 0, expected.size()), expected);
    const uint64_t first = expected.empty() ? 0 : random() % expected.size();
    const std::vector<int64_t> tail(expected.begin() + static_cast<int64_t>(first), expected.end());
    ASSERT_EQ(Gather(*slice, tensor, first, tail.size()), tail);
  }
}

TEST(TensorSlice, HugeShapesDoNotOverflow) {
  const Shape huge = *Shape::Create({int64_t{1} << 29, int64_t{1} << 29});
  const absl::StatusOr<TensorSlice> slice = TensorSlice::Parse("-1, ::9223372036854775807", huge);
  ASSERT_TRUE(slice.ok());
  EXPECT_EQ(slice->elements(), 1u);
  const Shape empty = *Shape::Create({0, int64_t{1} << 58});
  EXPECT_EQ(TensorSlice::Parse(":, -1", empty)->elements(), 0u);
  EXPECT_EQ(TensorSlice::Parse("::3, ::1000", empty)->elements(), 0u);
}

}  // namespace
}  // namespace modelstate
