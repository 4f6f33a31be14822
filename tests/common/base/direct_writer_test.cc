#include "common/base/direct_writer.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace modelstate {
namespace {

constexpr uint64_t kHead = DirectWriter::kAlignment;

// Bytes that tell their place.
std::vector<uint8_t> Pattern(uint64_t size, uint64_t seed) {
  std::vector<uint8_t> bytes(size);
  uint64_t state = seed;
  for (uint8_t& byte : bytes) {
    state = state * 6364136223846793005U + 1442695040888963407U;
    byte = static_cast<uint8_t>(state >> 56);
  }
  return bytes;
}

// In /dev/shm, which has no O_DIRECT before Linux 6.6, and where tests keep files, which mostly
// has.
class DirectWriterTest : public testing::TestWithParam<std::string> {
 protected:
  DirectWriterTest() {
    std::string pattern =
        absl::StrCat(GetParam() == "disk" ? testing::TempDir() : "/dev/shm", "/direct-XXXXXX");
    EXPECT_NE(mkdtemp(pattern.data()), nullptr);
    directory_ = pattern;
  }
  ~DirectWriterTest() override { std::filesystem::remove_all(directory_); }

  File Create() {
    absl::StatusOr<File> file = CreateForWrite((directory_ / "file").string());
    EXPECT_TRUE(file.ok()) << file.status();
    return *std::move(file);
  }

  std::vector<uint8_t> ReadBack() {
    absl::StatusOr<File> file = OpenForRead((directory_ / "file").string());
    EXPECT_TRUE(file.ok()) << file.status();
    std::vector<uint8_t> bytes(*file->Size());
    EXPECT_EQ(file->ReadAt(0, absl::MakeSpan(bytes)), absl::OkStatus());
    return bytes;
  }

  std::filesystem::path directory_;
};

TEST_P(DirectWriterTest, AFileHoldsWhatWasAppendedBehindItsHead) {
  constexpr uint64_t kBlock = DirectWriter::kBlockBytes;
  for (const uint64_t size : {uint64_t{0}, uint64_t{1}, uint64_t{4096}, uint64_t{4097}, kBlock - 1,
                              kBlock, kBlock + 1, 3 * kBlock, 5 * kBlock + 12345}) {
    SCOPED_TRACE(size);
    const std::vector<uint8_t> data = Pattern(size, size + 1);
    const std::vector<uint8_t> head = Pattern(kHead, 7);
    auto writer = DirectWriter::Start(Create(), kHead, kHead + size);
    ASSERT_TRUE(writer.ok()) << writer.status();
    // In pieces that fit no block.
    for (uint64_t at = 0; at < size; at += 1'000'003) {
      ASSERT_EQ((*writer)->Append(absl::MakeConstSpan(data).subspan(at, 1'000'003)),
                absl::OkStatus());
    }
    EXPECT_EQ((*writer)->offset(), kHead + size);
    ASSERT_EQ((*writer)->Finish(head), absl::OkStatus());
    std::vector<uint8_t> expected = head;
    expected.insert(expected.end(), data.begin(), data.end());
    EXPECT_TRUE(ReadBack() == expected);
  }
}

TEST_P(DirectWriterTest, RoomForTheFileIsTakenBeforeItIsWritten) {
  auto writer = DirectWriter::Start(Create(), kHead, kHead + (uint64_t{8} << 20));
  ASSERT_TRUE(writer.ok()) << writer.status();
  struct stat info;
  ASSERT_EQ(stat((directory_ / "file").c_str(), &info), 0);
  EXPECT_GE(static_cast<uint64_t>(info.st_blocks) * 512, uint64_t{8} << 20);
  const auto huge = DirectWriter::Start(Create(), kHead, uint64_t{1} << 60);
  EXPECT_FALSE(huge.ok());
  EXPECT_TRUE(GetReason(huge.status()) == Reason::kStorageFull ||
              GetReason(huge.status()) == Reason::kStorageError)
      << huge.status();
}

TEST_P(DirectWriterTest, AFailedWriteOfAnotherThreadIsToldAndNothingHangs) {
  // Writes to what is open for reading fail.
  Create();
  const int fd = open((directory_ / "file").c_str(), O_RDONLY | O_CLOEXEC);
  ASSERT_GE(fd, 0);
  auto writer = DirectWriter::Start(File(fd, "file"), kHead, 0);
  ASSERT_TRUE(writer.ok()) << writer.status();
  const std::vector<uint8_t> block = Pattern(DirectWriter::kBlockBytes, 1);
  absl::Status status;
  for (int i = 0; i < 2 * DirectWriter::kBlocks && status.ok(); ++i) {
    status = (*writer)->Append(block);
  }
  EXPECT_EQ(GetReason(status), Reason::kStorageError) << status;
  EXPECT_EQ(GetReason((*writer)->Finish({})), Reason::kStorageError);
}

TEST_P(DirectWriterTest, AThreadThatCannotBeMadeIsAnErrorOfTheFile) {
  if (geteuid() != 0) GTEST_SKIP() << "needs root, to become a user whose processes are limited";
  File file = Create();
  const pid_t child = fork();
  if (child == 0) {
    const rlimit none = {0, 0};
    if (setrlimit(RLIMIT_NPROC, &none) != 0 || setuid(65534) != 0) _exit(2);
    auto writer = DirectWriter::Start(std::move(file), kHead, kHead);
    if (!writer.ok()) _exit(3);
    const std::vector<uint8_t> two = Pattern(2 * DirectWriter::kBlockBytes, 1);
    const absl::Status appended = (*writer)->Append(two);
    const absl::Status finished = (*writer)->Finish({});
    const absl::Status& status = appended.ok() ? finished : appended;
    const bool told = status.message().find("limit of threads") != absl::string_view::npos;
    _exit(GetReason(status) == Reason::kStorageError && told ? 0 : 4);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 0);
}

TEST_P(DirectWriterTest, OneThatIsGivenUpEndsItsThread) {
  for (int blocks = 0; blocks < 2 * DirectWriter::kBlocks; ++blocks) {
    const std::vector<uint8_t> data = Pattern(blocks * DirectWriter::kBlockBytes + 1, 3);
    auto writer = DirectWriter::Start(Create(), kHead, kHead + data.size());
    ASSERT_TRUE(writer.ok()) << writer.status();
    EXPECT_EQ((*writer)->Append(data), absl::OkStatus());
  }
}

INSTANTIATE_TEST_SUITE_P(Roots, DirectWriterTest, testing::Values("disk", "memory"),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace modelstate
