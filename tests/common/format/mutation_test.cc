// Flips bytes of good checkpoints: the readers must neither crash nor take memory out of
// proportion, whatever comes.

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <random>
#include <string>
#include <vector>

#include "common/base/status.h"
#include "tests/common/allocation_meter.h"
#include "tests/common/format/test_files.h"

namespace modelstate {
namespace {

// Held at once while a file is opened.
constexpr size_t kMaxOpenAllocation = size_t{4} << 20;

struct Counts {
  size_t refused = 0;
  size_t accepted = 0;
};

// What a caller does with a file: opens it, and reads the tensors that it would accept.
void Try(const std::string& content, Counts* counts) {
  ResetPeakAllocation();
  auto reader = OpenBytes(content);
  ASSERT_LT(PeakAllocation(), kMaxOpenAllocation);
  if (!reader.ok()) {
    ASSERT_TRUE(GetReason(reader.status()).has_value()) << reader.status();
    ASSERT_FALSE(reader.status().message().empty());
    ++counts->refused;
    return;
  }
  ++counts->accepted;
  for (size_t i = 0; i < (*reader)->tensors().size(); ++i) {
    const StoredTensor& tensor = (*reader)->tensors()[i];
    // Expanded views may legally be larger than the file; nobody needs them here.
    if (tensor.nbytes() > (size_t{1} << 20)) continue;
    std::vector<uint8_t> bytes(tensor.nbytes());
    const absl::Status status = (*reader)->Read(i, absl::MakeSpan(bytes));
    if (!status.ok()) {
      ASSERT_TRUE(GetReason(status).has_value()) << status;
    }
  }
}

// Makes the CRC of the pickle right again, so that a mutation reaches the parser behind it.
void RepairPickleCrc(std::string* zip, size_t pickle_at, size_t pickle_size, uint32_t old_crc) {
  const uint32_t crc = libdeflate_crc32(0, zip->data() + pickle_at, pickle_size);
  const std::string from = LittleEndian(old_crc, 4);
  for (size_t at = zip->find(from); at != std::string::npos; at = zip->find(from, at + 4)) {
    zip->replace(at, 4, LittleEndian(crc, 4));
  }
}

std::vector<std::string> SmallGoldens() {
  std::vector<std::string> paths;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(DataPath(""))) {
    const std::string path = entry.path().string();
    if (std::filesystem::exists(path + ".json") && entry.file_size() < 12'000)
      paths.push_back(path);
  }
  std::sort(paths.begin(), paths.end());
  return paths;
}

TEST(MutationTest, FlippedBytesNeverCrashAReader) {
  constexpr uint32_t kSeed = 20240607;
  std::mt19937 random(kSeed);
  Counts counts;
  for (const std::string& path : SmallGoldens()) {
    const std::string good = ReadWholeFile(path);
    for (int round = 0; round < 100; ++round) {
      std::string bad = good;
      for (uint32_t flips = 1 + random() % 4; flips > 0; --flips) {
        bad[random() % bad.size()] = static_cast<char>(random());
      }
      Try(bad, &counts);
      if (HasFatalFailure()) {
        FAIL() << path << ", seed " << kSeed << ", round " << round;
      }
    }
  }
  EXPECT_GT(counts.refused, 1000u);
}

TEST(MutationTest, FlippedPicklesNeverCrashTheParser) {
  constexpr uint32_t kSeed = 7;
  std::mt19937 random(kSeed);
  Counts counts;
  for (const std::string& path : SmallGoldens()) {
    const std::string good = ReadWholeFile(path);
    const size_t begin = good.find("\x80\x02");
    const size_t end = good.find("PK\x07\x08", begin);
    if (good.substr(0, 2) != "PK" || begin == std::string::npos || end == std::string::npos)
      continue;
    const uint32_t crc = libdeflate_crc32(0, good.data() + begin, end - begin);
    if (good.substr(end + 4, 4) != LittleEndian(crc, 4)) continue;
    for (int round = 0; round < 150; ++round) {
      std::string bad = good;
      for (uint32_t flips = 1 + random() % 3; flips > 0; --flips) {
        // Half of the new bytes are opcodes that do something.
        static constexpr char kOpcodes[] = "(RbQNtaesuqh}])X\x81\x85\x86\x87\x88K";
        bad[begin + random() % (end - begin)] = random() % 2 == 0
                                                    ? static_cast<char>(random())
                                                    : kOpcodes[random() % (sizeof(kOpcodes) - 1)];
      }
      RepairPickleCrc(&bad, begin, end - begin, crc);
      Try(bad, &counts);
      if (HasFatalFailure()) {
        FAIL() << path << ", seed " << kSeed << ", round " << round;
      }
    }
  }
  // Both kinds must occur, or the mutations do not reach the parser.
  EXPECT_GT(counts.refused, 1000u);
  EXPECT_GT(counts.accepted, 50u);
}

}  // namespace
}  // namespace modelstate
