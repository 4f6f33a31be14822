#include "client/files/transfer_record.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <random>
#include <string>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace modelstate::client {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

TEST(TransferRecord, RangesAreMergedInAnyOrder) {
  for (uint64_t seed = 1; seed <= 100; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    std::mt19937_64 random(seed);
    std::vector<bool> covered(64);
    std::vector<ByteRange> done;
    for (int i = 0; i < 10; ++i) {
      const uint64_t begin = random() % 60;
      const uint64_t end = begin + 1 + random() % 4;
      AddRange({begin, end}, &done);
      for (uint64_t k = begin; k < end; ++k) covered[k] = true;
      std::vector<bool> listed(64);
      uint64_t last = UINT64_MAX;
      for (const ByteRange& range : done) {
        EXPECT_NE(range.begin, last) << "neighbours are joined";
        last = range.end;
        for (uint64_t k = range.begin; k < range.end; ++k) listed[k] = true;
      }
      EXPECT_EQ(listed, covered);
      for (const ByteRange& range : MissingRanges(done, {0, 64})) {
        for (uint64_t k = range.begin; k < range.end; ++k) listed[k] = !listed[k];
      }
      EXPECT_EQ(listed, std::vector<bool>(64, true));
    }
  }
}

TEST(TransferRecord, WhatIsTakenOutIsMissing) {
  for (uint64_t seed = 1; seed <= 100; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    std::mt19937_64 random(seed);
    std::vector<ByteRange> done = {{0, 64}};
    std::vector<bool> covered(64, true);
    for (int i = 0; i < 10; ++i) {
      const uint64_t begin = random() % 60;
      const uint64_t end = begin + 1 + random() % 4;
      RemoveRange({begin, end}, &done);
      for (uint64_t k = begin; k < end; ++k) covered[k] = false;
      const ByteRange part{random() % 32, 32 + random() % 33};
      std::vector<bool> missing(64);
      for (const ByteRange& range : MissingRanges(done, part)) {
        for (uint64_t k = range.begin; k < range.end; ++k) missing[k] = true;
      }
      for (uint64_t k = 0; k < 64; ++k) {
        EXPECT_EQ(missing[k], !covered[k] && k >= part.begin && k < part.end) << k;
      }
    }
  }
}

class TransferJournalTest : public ::testing::Test {
 protected:
  TransferJournalTest() {
    record_.module = "m";
    record_.selection = SelectionKey(Selection());
    record_.snapshot_id = "pin";
    record_.version = {UINT64_MAX, 7};
    record_.layout_digest = "d";
    record_.header_bytes = 10;
    record_.total_bytes = 100'000'000;
  }
  ~TransferJournalTest() override { std::remove(path_.c_str()); }

  std::string Text() const {
    std::ifstream file(path_);
    return std::string(std::istreambuf_iterator<char>(file), {});
  }

  const std::string path_ =
      ::testing::TempDir() + ::testing::UnitTest::GetInstance()->current_test_info()->name();
  TransferRecord record_;
};

TEST_F(TransferJournalTest, ReadsWhatWasWrittenAndAdded) {
  EXPECT_TRUE(absl::IsNotFound(TransferJournal::Read(path_).status()));
  record_.done = {{20, 30}};
  TransferJournal journal(path_, TransferRecord());
  ASSERT_TRUE(journal.Write(record_).ok());
  ASSERT_TRUE(journal.Add({40, 50}).ok());
  ASSERT_TRUE(journal.Add({0, 10}).ok());
  ASSERT_TRUE(journal.Add({30, 40}).ok());
  const absl::StatusOr<TransferRecord> back = TransferJournal::Read(path_);
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(back->version, record_.version);
  EXPECT_EQ(back->layout_digest, "d");
  EXPECT_THAT(back->done, ElementsAre(ByteRange{0, 10}, ByteRange{20, 50}));
  EXPECT_EQ(back->done, journal.record().done);
}

// Whoever is killed in the middle of a line has lost that line and no other.
TEST_F(TransferJournalTest, ALineThatWasCutShortIsLeftOut) {
  TransferJournal journal(path_, TransferRecord());
  ASSERT_TRUE(journal.Write(record_).ok());
  ASSERT_TRUE(journal.Add({100, 200}).ok());
  const size_t before = Text().size();
  ASSERT_TRUE(journal.Add({300, 400}).ok());
  const std::string text = Text();
  for (size_t size = before; size < text.size(); ++size) {
    std::ofstream(path_) << text.substr(0, size);
    const absl::StatusOr<TransferRecord> back = TransferJournal::Read(path_);
    ASSERT_TRUE(back.ok()) << back.status();
    EXPECT_THAT(back->done, ElementsAre(ByteRange{100, 200})) << size;
  }
}

TEST_F(TransferJournalTest, StaysSmallHoweverMuchIsAdded) {
  TransferJournal journal(path_, TransferRecord());
  ASSERT_TRUE(journal.Write(record_).ok());
  for (uint64_t i = 0; i < 100'000; ++i) ASSERT_TRUE(journal.Add({i * 1000, i * 1000 + 1000}).ok());
  EXPECT_LT(Text().size(), size_t{1} << 20);
  EXPECT_THAT(TransferJournal::Read(path_)->done, ElementsAre(ByteRange{0, 100'000'000}));
}

TEST_F(TransferJournalTest, NonsenseIsNoRecord) {
  TransferJournal journal(path_, TransferRecord());
  ASSERT_TRUE(journal.Write(record_).ok());
  const std::string head = Text();
  std::vector<std::string> texts = {
      "", "\n", "{", "{\n", "[]\n", "{\"format\": 2}\n", "{\"format\": \"x\"}\n", "\xFF\n"};
  for (const char* line : {"", "1", "1 ", "a b", "5 5", "6 5", "-1 5", "0 100000001", "1 2 3"}) {
    texts.push_back(absl::StrCat(head, line, "\n"));
  }
  for (const std::string& text : texts) {
    std::ofstream(path_) << text;
    EXPECT_EQ(GetReason(TransferJournal::Read(path_).status()), Reason::kCheckpointCorrupt) << text;
  }
}

TEST(TransferRecord, SelectionsThatDifferHaveOtherKeys) {
  Selection names;
  names.names = {"a"};
  Selection prefixes;
  prefixes.prefixes = {"a"};
  EXPECT_NE(SelectionKey(names), SelectionKey(prefixes));
  EXPECT_THAT(MissingRanges({}, {0, 0}), IsEmpty());
}

}  // namespace
}  // namespace modelstate::client
