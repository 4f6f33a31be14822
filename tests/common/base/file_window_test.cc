#include "common/base/file_window.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace modelstate {
namespace {

constexpr uint32_t kSeed = 20261127;

// In /dev/shm, which has no O_DIRECT before Linux 6.6, and where tests keep files, which mostly
// has.
class FileWindowTest : public testing::TestWithParam<std::string> {
 protected:
  FileWindowTest() {
    std::string pattern =
        absl::StrCat(GetParam() == "disk" ? testing::TempDir() : "/dev/shm", "/window-XXXXXX");
    EXPECT_NE(mkdtemp(pattern.data()), nullptr);
    directory_ = pattern;
  }
  ~FileWindowTest() override { std::filesystem::remove_all(directory_); }

  File Make(uint64_t size) {
    content_.resize(size);
    std::mt19937_64 random(kSeed + size);
    for (uint8_t& byte : content_) byte = static_cast<uint8_t>(random());
    const std::string path = (directory_ / "file").string();
    absl::StatusOr<File> file = CreateForWrite(path);
    EXPECT_TRUE(file.ok() && file->WriteAt(0, content_).ok());
    EXPECT_EQ(file->SyncData(), absl::OkStatus());
    return *OpenForRead(path);
  }

  // Takes the file out of the page cache, where that is possible.
  static void Cool(const File& file) {
    EXPECT_EQ(posix_fadvise(file.fd(), 0, 0, POSIX_FADV_DONTNEED), 0);
  }

  void ExpectRead(FileWindow& window, const File& file, uint64_t offset, uint64_t size,
                  uint64_t end) {
    std::vector<uint8_t> out(size);
    ASSERT_EQ(window.ReadAt(file, offset, absl::MakeSpan(out), end), absl::OkStatus());
    EXPECT_EQ(std::memcmp(out.data(), content_.data() + offset, size), 0)
        << size << " bytes at " << offset << " up to " << end << ", seed " << kSeed;
  }

  std::filesystem::path directory_;
  std::vector<uint8_t> content_;
};

TEST_P(FileWindowTest, AnyRangeReadsAsItIsColdWarmAndHalfWarm) {
  const File file = Make((uint64_t{9} << 20) + 777);
  std::mt19937_64 random(kSeed);
  FileWindow window(uint64_t{1} << 20);
  for (int i = 0; i < 300; ++i) {
    if (i % 3 == 0) Cool(file);
    uint64_t offset = random() % content_.size();
    const uint64_t end = offset + random() % (content_.size() - offset) + 1;
    // On and on, as tensors are read.
    for (int piece = 0; piece < 4 && offset < end; ++piece) {
      const uint64_t size = 1 + random() % std::min<uint64_t>(end - offset, 700'000);
      ASSERT_NO_FATAL_FAILURE(ExpectRead(window, file, offset, size, end));
      offset += size;
    }
  }
}

TEST_P(FileWindowTest, TwoFilesInTurnDoNotMix) {
  const uint64_t size = uint64_t{3} << 20;
  const File one = Make(size);
  std::filesystem::rename(directory_ / "file", directory_ / "first");
  const std::vector<uint8_t> first = content_;
  const File second = Make(size + 4096);
  FileWindow window;
  std::vector<uint8_t> out(500'000);
  for (int i = 0; i < 4; ++i) {
    Cool(one);
    Cool(second);
    ASSERT_EQ(window.ReadAt(one, 1000, absl::MakeSpan(out), size), absl::OkStatus());
    EXPECT_EQ(std::memcmp(out.data(), first.data() + 1000, out.size()), 0);
    ExpectRead(window, second, 4000, 500'000, size);
  }
}

TEST_P(FileWindowTest, WhatTheFileDoesNotHaveIsCorrupt) {
  const File file = Make((uint64_t{1} << 20) + 10);
  FileWindow window;
  std::vector<uint8_t> out(uint64_t{1} << 20);
  for (const uint64_t offset : {uint64_t{11}, uint64_t{1} << 20, uint64_t{5} << 20}) {
    Cool(file);
    EXPECT_EQ(GetReason(window.ReadAt(file, offset, absl::MakeSpan(out), offset + out.size())),
              Reason::kCheckpointCorrupt);
  }
}

// Pages of the file that are in the page cache.
ptrdiff_t CachedPages(const File& file) {
  const size_t size = *file.Size();
  void* map = mmap(nullptr, size, PROT_READ, MAP_SHARED, file.fd(), 0);
  EXPECT_NE(map, MAP_FAILED);
  std::vector<unsigned char> pages((size + 4095) / 4096);
  EXPECT_EQ(mincore(map, size, pages.data()), 0);
  munmap(map, size);
  return std::count_if(pages.begin(), pages.end(), [](unsigned char p) { return (p & 1) != 0; });
}

TEST(FileWindow, ColdReadsLeaveThePageCacheAlone) {
  const std::string path = testing::TempDir() + "/cold-window";
  {
    absl::StatusOr<File> file = CreateForWrite(path);
    ASSERT_TRUE(file.ok());
    ASSERT_EQ(file->WriteAt(0, std::vector<uint8_t>(uint64_t{8} << 20, 7)), absl::OkStatus());
    ASSERT_EQ(file->SyncData(), absl::OkStatus());
  }
  const File file = *OpenForRead(path);
  const int direct = open(path.c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC);
  std::filesystem::remove(path);
  if (direct < 0) GTEST_SKIP() << "no O_DIRECT where tests keep files";
  close(direct);
  ASSERT_EQ(posix_fadvise(file.fd(), 0, 0, POSIX_FADV_DONTNEED), 0);
  if (CachedPages(file) != 0) GTEST_SKIP() << "the file stays cached";
  FileWindow window;
  std::vector<uint8_t> out(uint64_t{8} << 20);
  ASSERT_EQ(window.ReadAt(file, 0, absl::MakeSpan(out), out.size()), absl::OkStatus());
  EXPECT_EQ(out, std::vector<uint8_t>(out.size(), 7));
  EXPECT_EQ(CachedPages(file), 0) << "it was read through the cache";
  // Once it is in the cache it comes from there, and stays.
  ASSERT_EQ(file.ReadAt(0, absl::MakeSpan(out)), absl::OkStatus());
  const auto cached = CachedPages(file);
  ASSERT_EQ(window.ReadAt(file, 0, absl::MakeSpan(out), out.size()), absl::OkStatus());
  EXPECT_EQ(CachedPages(file), cached);
}

INSTANTIATE_TEST_SUITE_P(Roots, FileWindowTest, testing::Values("disk", "memory"),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace modelstate
