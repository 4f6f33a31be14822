// ModuleSchema's listings and views: what they show, and that they are not made twice.
#include <gmock/gmock.h>

#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "server/state/module_schema.h"

namespace modelstate {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

constexpr TensorKind kParameter = TensorKind::kParameter;
constexpr TensorKind kBuffer = TensorKind::kBuffer;

TensorSpec Spec(std::string name, TensorKind kind) {
  TensorSpec spec;
  spec.name = std::move(name);
  spec.kind = kind;
  spec.shape = *Shape::Create({2});
  spec.requires_grad = kind == kParameter;
  return spec;
}

class ListingTest : public ::testing::Test {
 protected:
  ListingTest() {
    TensorSpec hidden = Spec("bn.hidden", kBuffer);
    hidden.persistent = false;
    TensorSpec head = Spec("head.weight", kParameter);
    head.alias_of = "embed.weight";
    TensorSpec twin = Spec("bn.twin", kBuffer);
    twin.alias_of = "bn.mean";
    schema_ = *ModuleSchema::Create({Spec("embed.weight", kParameter), Spec("bn.mean", kBuffer),
                                     hidden, head, twin, Spec("w", kParameter)},
                                    1);
  }

  std::vector<std::string> Names(TensorKind kind, ListView view, const Selection& selection = {}) {
    absl::StatusOr<ModuleSchema::Listing> listing = schema_->List(kind, view, selection);
    if (!listing.ok()) return {listing.status().ToString()};
    std::vector<std::string> names;
    for (uint32_t index : **listing) names.push_back(schema_->spec(index).name);
    return names;
  }

  std::shared_ptr<const ModuleSchema> schema_;
};

TEST_F(ListingTest, ViewsShowWhatTorchsMethodsShow) {
  EXPECT_THAT(Names(kParameter, ListView::kAll), ElementsAre("embed.weight", "head.weight", "w"));
  EXPECT_THAT(Names(kParameter, ListView::kNamed), ElementsAre("embed.weight", "w"));
  EXPECT_THAT(Names(kParameter, ListView::kStateDict),
              ElementsAre("embed.weight", "head.weight", "w"));
  EXPECT_THAT(Names(kBuffer, ListView::kAll), ElementsAre("bn.mean", "bn.hidden", "bn.twin"));
  EXPECT_THAT(Names(kBuffer, ListView::kNamed), ElementsAre("bn.mean", "bn.hidden"));
  EXPECT_THAT(Names(kBuffer, ListView::kStateDict), ElementsAre("bn.mean", "bn.twin"));
}

TEST_F(ListingTest, SelectionsNarrowAView) {
  Selection selection;
  selection.globs = {"*.*"};
  EXPECT_THAT(Names(kParameter, ListView::kAll, selection),
              ElementsAre("embed.weight", "head.weight"));
  EXPECT_THAT(Names(kParameter, ListView::kNamed, selection), ElementsAre("embed.weight"));
  EXPECT_THAT(Names(kBuffer, ListView::kNamed, selection), ElementsAre("bn.mean", "bn.hidden"));
  selection = {};
  selection.kinds = {kBuffer};
  EXPECT_THAT(Names(kParameter, ListView::kAll, selection), IsEmpty());
  selection = {};
  selection.names = {"bn.hidden"};
  EXPECT_THAT(Names(kBuffer, ListView::kStateDict, selection), IsEmpty());
  EXPECT_THAT(Names(kBuffer, ListView::kAll, selection), ElementsAre("bn.hidden"));
  selection.names = {"nope"};
  EXPECT_EQ(GetReason(schema_->List(kBuffer, ListView::kAll, selection).status()),
            Reason::kTensorNotFound);
}

TEST_F(ListingTest, AreMadeOnce) {
  Selection selection;
  selection.prefixes = {"bn."};
  for (const Selection& wanted : {Selection(), selection}) {
    const ModuleSchema::Listing first = *schema_->List(kBuffer, ListView::kNamed, wanted);
    EXPECT_EQ(*schema_->List(kBuffer, ListView::kNamed, wanted), first);
    // A freeze keeps them: they do not depend on it.
    EXPECT_EQ(*schema_->WithRequiresGrad({0}, false)->List(kBuffer, ListView::kNamed, wanted),
              first);
  }
  EXPECT_EQ(*schema_->View(selection), *schema_->View(selection));
}

TEST_F(ListingTest, ViewsAfterAFreezeHaveTheNewFlags) {
  Selection selection;
  selection.globs = {"embed.*"};
  EXPECT_TRUE((*schema_->View(selection))->specs[0].requires_grad);
  const std::shared_ptr<const ModuleSchema> frozen = schema_->WithRequiresGrad({0}, false);
  EXPECT_FALSE((*frozen->View(selection))->specs[0].requires_grad);
  EXPECT_TRUE((*schema_->View(selection))->specs[0].requires_grad);
}

TEST_F(ListingTest, RecentSelectionsDoNotMixAndAreBounded) {
  // Lists that would look alike without their lengths.
  Selection a;
  a.prefixes = {"bn.", "w,x"};
  Selection b;
  b.prefixes = {"bn.,w", "x"};
  Selection c;
  c.globs = a.prefixes;
  EXPECT_THAT(Names(kBuffer, ListView::kNamed, a), ElementsAre("bn.mean", "bn.hidden"));
  EXPECT_THAT(Names(kBuffer, ListView::kNamed, b), IsEmpty());
  EXPECT_THAT(Names(kBuffer, ListView::kNamed, c), IsEmpty());
  EXPECT_THAT(Names(kParameter, ListView::kNamed, a), IsEmpty());

  const ModuleSchema::Listing first = *schema_->List(kBuffer, ListView::kNamed, a);
  for (int i = 0; i < 100; ++i) {
    Selection other;
    other.globs = {absl::StrCat("bn.m*", i)};
    ASSERT_TRUE(schema_->List(kBuffer, ListView::kNamed, other).ok());
  }
  EXPECT_EQ(first.use_count(), 1) << "the schema has dropped it";
  EXPECT_THAT(Names(kBuffer, ListView::kNamed, a), ElementsAre("bn.mean", "bn.hidden"));
}

TEST_F(ListingTest, SelectionsTooLargeToKeepAreAnswered) {
  Selection selection;
  selection.globs = {"w", std::string(100 << 10, 'x')};
  EXPECT_TRUE(SelectionKey(selection, "").empty());
  EXPECT_THAT(Names(kParameter, ListView::kAll, selection), ElementsAre("w"));
}

TEST_F(ListingTest, ManyThreadsMayAsk) {
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([this, t] {
      for (int i = 0; i < 500; ++i) {
        Selection selection;
        selection.prefixes = {absl::StrCat("bn.", (i + t) % 20 == 0 ? "" : "m")};
        selection.globs = {absl::StrCat("none", i % 30)};
        const auto listing = schema_->List(kBuffer, ListView::kNamed, selection);
        ASSERT_TRUE(listing.ok());
        EXPECT_EQ((*listing)->size(), (i + t) % 20 == 0 ? 2u : 1u);
        EXPECT_TRUE(schema_->View(selection).ok());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace modelstate
