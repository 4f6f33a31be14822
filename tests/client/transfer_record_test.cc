#include "client/files/transfer_record.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <fstream>
#include <random>

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
      for (const ByteRange& range : MissingRanges(done, 64)) {
        for (uint64_t k = range.begin; k < range.end; ++k) listed[k] = !listed[k];
      }
      EXPECT_EQ(listed, std::vector<bool>(64, true));
    }
  }
}

TEST(TransferRecord, RoundTripAndNonsense) {
  const std::string path = ::testing::TempDir() + "/record.json";
  TransferRecord record;
  record.module = "m";
  record.selection = SelectionKey(Selection());
  record.snapshot_id = "pin";
  record.version = {UINT64_MAX, 7};
  record.layout_digest = "d";
  record.header_bytes = 10;
  record.total_bytes = 100;
  record.done = {{0, 10}, {20, 30}};
  ASSERT_TRUE(WriteTransferRecord(record, path).ok());
  const absl::StatusOr<TransferRecord> back = ReadTransferRecord(path);
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(back->version, record.version);
  EXPECT_THAT(back->done, ElementsAre(ByteRange{0, 10}, ByteRange{20, 30}));
  record.done = {{20, 30}, {0, 10}};
  ASSERT_TRUE(WriteTransferRecord(record, path).ok());
  EXPECT_EQ(GetReason(ReadTransferRecord(path).status()), Reason::kCheckpointCorrupt);
  for (const char* text : {"", "{", "[]", "{\"format\": 1}", "{\"format\": \"x\"}", "\xFF"}) {
    std::ofstream(path) << text;
    EXPECT_EQ(GetReason(ReadTransferRecord(path).status()), Reason::kCheckpointCorrupt) << text;
  }
  std::remove(path.c_str());
  EXPECT_TRUE(absl::IsNotFound(ReadTransferRecord(path).status()));
}

TEST(TransferRecord, SelectionsThatDifferHaveOtherKeys) {
  Selection names;
  names.names = {"a"};
  Selection prefixes;
  prefixes.prefixes = {"a"};
  EXPECT_NE(SelectionKey(names), SelectionKey(prefixes));
  EXPECT_THAT(MissingRanges({}, 0), IsEmpty());
}

}  // namespace
}  // namespace modelstate::client
