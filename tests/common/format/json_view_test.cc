#include "common/format/json_view.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace modelstate {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using Json = nlohmann::json;

std::string ProblemOf(const std::string& text) {
  return std::string(JsonView::Parse(text).status().message());
}

// The same value as a tree, by way of the view.
Json ToTree(JsonView view) {
  if (view.is_null()) return nullptr;
  if (const auto flag = view.Bool()) return *flag;
  if (const auto text = view.String()) return *text;
  if (const auto number = view.Uint()) return *number;
  if (const auto number = view.Double()) return *number;
  Json tree = view.is_object() ? Json::object() : Json::array();
  for (const JsonView::Element element : view) {
    if (view.is_object()) {
      tree[*element.key.String()] = ToTree(element.value);
    } else {
      tree.push_back(ToTree(element.value));
    }
  }
  return tree;
}

TEST(JsonViewTest, MembersAndItemsComeInOrder) {
  const auto view = JsonView::Parse(R"( { "b" : [ 1 , "x]" , [] , {} ] , "a":null,"b" :2} )");
  ASSERT_TRUE(view.ok()) << view.status();
  std::vector<std::string> keys;
  for (const JsonView::Element member : *view) keys.push_back(*member.key.String());
  EXPECT_THAT(keys, ElementsAre("b", "a", "b"));
  std::vector<Json> items;
  for (const JsonView::Element item : (*view->begin()).value) items.push_back(ToTree(item.value));
  EXPECT_THAT(items, ElementsAre(Json(1), Json("x]"), Json::array(), Json::object()));
  for (const char* empty : {"[ ]", "{}", "3", "\"\"", "null"}) {
    const auto none = JsonView::Parse(empty);
    EXPECT_FALSE(none->begin() != none->end()) << empty;
  }
}

TEST(JsonViewTest, AValueIsOfItsTypeOnly) {
  const auto value = [](const std::string& text) { return *JsonView::Parse(text); };
  const std::string max = "18446744073709551615";
  EXPECT_EQ(value(max).Uint(), UINT64_MAX);
  for (const std::string& text : {max + "0", std::string("-1"), std::string("1.0"),
                                  std::string("1e2"), std::string("\"1\""), std::string("null")}) {
    EXPECT_EQ(JsonView::Parse(text)->Uint(), std::nullopt) << text;
  }
  const std::string escaped = R"("\u00e9\ud83d\ude00\n\"")";
  EXPECT_EQ(value(escaped).String(), "\xc3\xa9\xf0\x9f\x98\x80\n\"");
  const std::string small = "5e-324";
  EXPECT_EQ(value(small).Double(), 5e-324);
  const std::string word = "true";
  EXPECT_EQ(value(word).Bool(), true);
  EXPECT_EQ(value(word).Double(), std::nullopt);
  EXPECT_EQ(value(word).String(), std::nullopt);
}

TEST(JsonViewTest, ATextIsJsonWhereTheLibrarySaysSo) {
  const std::string seeds[] = {
      R"({"a": [1, -2.5e-3, true, false, null, "x\u0041\ud83d\ude00\\"], "é": {"": {}}, "b": []})",
      "[[[\"\\n\"]], 0, 10, -0, 1e5, \"\xf0\x9f\x98\x80\"]",
      "\t{ }\r\n",
  };
  const std::string alphabet = "{}[]\",:\\/ \n\t0123456789eE+-.tfnuaxd8\x01\x7f\xc3\xa9\xff";
  std::mt19937 random(1);
  const auto below = [&random](size_t n) { return random() % n; };
  size_t good = 0;
  for (int i = 0; i < 200'000; ++i) {
    std::string text = seeds[below(std::size(seeds))];
    for (size_t change = below(4); change > 0 && !text.empty(); --change) {
      const size_t at = below(text.size());
      const char c = alphabet[below(alphabet.size())];
      switch (below(3)) {
        case 0:
          text[at] = c;
          break;
        case 1:
          text.insert(at, 1, c);
          break;
        default:
          text.erase(at, 1 + below(3));
          break;
      }
    }
    const auto view = JsonView::Parse(text);
    ASSERT_EQ(view.ok(), Json::accept(text)) << text;
    if (!view.ok()) continue;
    ++good;
    ASSERT_EQ(ToTree(*view), Json::parse(text)) << text;
  }
  EXPECT_GT(good, 10'000u);
}

TEST(JsonViewTest, WhatIsRefusedIsSaidWithItsPlace) {
  EXPECT_EQ(ProblemOf(""), "it is not JSON at byte 0");
  EXPECT_EQ(ProblemOf("[1, 2"), "it is not JSON at byte 5");
  EXPECT_EQ(ProblemOf("{\"a\": nul}"), "it is not JSON at byte 6");
  EXPECT_EQ(ProblemOf("\xEF\xBB\xBF{}"), "it is not JSON at byte 0");
  EXPECT_EQ(ProblemOf(std::string("{}\0", 3)), "it is not JSON at byte 2");
  const std::string deep(JsonView::kMaxDepth, '[');
  EXPECT_EQ(ProblemOf(deep + std::string(JsonView::kMaxDepth, ']')), "");
  EXPECT_THAT(ProblemOf(deep + "["), HasSubstr("brackets within brackets at byte 100"));
  const std::string text(JsonView::kMaxScalarBytes - 2, 'x');
  EXPECT_EQ(ProblemOf("\"" + text + "\""), "");
  EXPECT_THAT(ProblemOf("\"" + text + "x\""), HasSubstr("over the limit"));
}

}  // namespace
}  // namespace modelstate
