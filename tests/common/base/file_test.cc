#include "common/base/file.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "common/base/status.h"

namespace modelstate {
namespace {

namespace fs = std::filesystem;

absl::Span<const uint8_t> Bytes(absl::string_view text) {
  return {reinterpret_cast<const uint8_t*>(text.data()), text.size()};
}

class RootDirectoryTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "modelstate-file-XXXXXX").string();
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    base_ = pattern;
    fs::create_directories(base_ / "root/inside");
    fs::create_directories(base_ / "outside");
    Write(base_ / "outside/secret", "secret");
    Write(base_ / "root/inside/file", "hello");
    absl::StatusOr<RootDirectory> root = RootDirectory::Open((base_ / "root").string());
    ASSERT_TRUE(root.ok()) << root.status();
    root_.emplace(*std::move(root));
  }
  void TearDown() override { fs::remove_all(base_); }

  static void Write(const fs::path& path, absl::string_view text) {
    absl::StatusOr<File> file = CreateForWrite(path.string());
    ASSERT_TRUE(file.ok()) << file.status();
    ASSERT_TRUE(file->WriteAt(0, Bytes(text)).ok());
  }

  std::optional<Reason> OpenReason(const std::string& path) {
    return GetReason(root_->OpenFile(path).status());
  }

  fs::path base_;
  std::optional<RootDirectory> root_;
};

TEST_F(RootDirectoryTest, ReadsWhatIsInside) {
  absl::StatusOr<File> file = root_->OpenFile("inside/file");
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(file->name(), "inside/file");
  EXPECT_EQ(*file->Size(), 5u);
  std::vector<uint8_t> bytes(3);
  EXPECT_EQ(file->ReadAt(1, absl::MakeSpan(bytes)), absl::OkStatus());
  EXPECT_EQ(std::string(bytes.begin(), bytes.end()), "ell");
}

TEST_F(RootDirectoryTest, RefusesPathsThatLeaveTheRoot) {
  fs::create_symlink("../outside", base_ / "root/link_out");
  fs::create_symlink(base_ / "outside/secret", base_ / "root/link_absolute");
  fs::create_symlink("/proc/self/root", base_ / "root/link_magic");
  for (const std::string path :
       {"../outside/secret", "inside/../../outside/secret", "/etc/passwd", "..", "", "inside//file",
        "./inside/file", "link_out/secret", "link_absolute", "link_magic/etc/passwd"}) {
    EXPECT_EQ(OpenReason(path), Reason::kInvalidField) << path;
    EXPECT_FALSE(root_->CreateFile(path + "/new").ok()) << path;
    EXPECT_FALSE(root_->MakeDirectory(path + "/new").ok()) << path;
    EXPECT_FALSE(root_->List(path).ok()) << path;
    EXPECT_FALSE(root_->Rename("inside/file", path + "/new", false).ok()) << path;
  }
  EXPECT_EQ(OpenReason(std::string("inside/file\0x", 13)), Reason::kInvalidField);
  EXPECT_EQ(OpenReason(std::string(256, 'a')), Reason::kInvalidField);
  EXPECT_TRUE(fs::exists(base_ / "outside/secret"));
  EXPECT_EQ(std::distance(fs::directory_iterator(base_ / "outside"), {}), 1);
}

TEST_F(RootDirectoryTest, RefusesLinksThatStayInside) {
  fs::create_symlink("inside/file", base_ / "root/link");
  fs::create_symlink("inside", base_ / "root/link_directory");
  for (const char* path : {"link", "link_directory", "link_directory/file"}) {
    EXPECT_EQ(OpenReason(path), Reason::kInvalidField) << path;
    EXPECT_EQ(GetReason(root_->Stat(path).status()), Reason::kInvalidField) << path;
    EXPECT_FALSE(root_->OpenDirectory(path).ok()) << path;
    EXPECT_FALSE(root_->RemoveRecursively(absl::StrCat(path, "/file")).ok()) << path;
  }
  // The root itself is the operator's own choice.
  fs::create_symlink("root", base_ / "link_to_root");
  EXPECT_TRUE(RootDirectory::Open((base_ / "link_to_root").string()).ok());
}

// Every spelling of a way out: no call gets through, and no answer tells what is outside.
TEST_F(RootDirectoryTest, NothingIsOpenedOutsideAndErrorsDoNotTellWhatIsThere) {
  fs::create_symlink(base_ / "outside", base_ / "root/inside/absolute");
  fs::create_symlink("../../outside", base_ / "root/inside/relative");
  fs::create_symlink("/proc/self/fd", base_ / "root/inside/proc");
  fs::create_symlink("loop", base_ / "root/inside/loop");
  ASSERT_EQ(mkfifo((base_ / "root/inside/fifo").c_str(), 0600), 0);
  std::vector<std::string> paths = {"..",
                                    "../",
                                    "../outside/secret",
                                    "../root/inside/file",
                                    "inside/../../outside/secret",
                                    "inside/..",
                                    "./..",
                                    "inside/./../..",
                                    "..//outside/secret",
                                    "inside//..//..",
                                    "/",
                                    "//",
                                    "/etc/passwd",
                                    "//etc/passwd",
                                    "/proc/self/environ",
                                    "/proc/self/root/etc/passwd",
                                    "/proc/self/fd/0",
                                    "inside/absolute",
                                    "inside/absolute/secret",
                                    "inside/relative/secret",
                                    "inside/proc/0",
                                    "inside/loop",
                                    "inside/fifo",
                                    "inside/fifo/..",
                                    "inside/file/..",
                                    std::string("..\0", 3),
                                    std::string("inside/file\0/../../outside/secret", 34),
                                    std::string("\0", 1),
                                    "",
                                    " /../outside/secret",
                                    "inside/.. /../outside/secret",
                                    "%2e%2e/outside/secret",
                                    "..%2foutside%2fsecret",
                                    "..\\outside\\secret",
                                    "\xc0\xae\xc0\xae/outside/secret",
                                    "\xe2\x80\xa5/outside/secret",
                                    ".../outside/secret",
                                    "~/secret",
                                    "$HOME",
                                    "inside/" + std::string(4096, 'a'),
                                    absl::StrCat("../outside/", std::string(300, '.'))};
  for (const char* name : {"secret", "none"}) {
    for (const char* way : {"inside/absolute/", "../outside/", "inside/relative/"}) {
      paths.push_back(absl::StrCat(way, name));
    }
  }
  std::map<std::string, std::string> texts;
  for (const std::string& path : paths) {
    const std::vector<absl::Status> answers = {
        root_->OpenFile(path).status(),
        root_->CreateFile(path).status(),
        root_->List(path).status(),
        root_->Stat(path).status(),
        root_->MakeDirectories(path + "/x/y"),
        root_->Rename("inside/file", path + "/x", false),
        root_->OpenDirectory(path).status(),
        root_->Rename(path + "/secret", "inside/moved", false)};
    for (size_t i = 0; i < answers.size(); ++i) {
      // What is only an odd name may be made inside; it is nothing outside.
      if (answers[i].ok()) continue;
      const std::string text(answers[i].message());
      EXPECT_THAT(text, testing::Not(testing::HasSubstr(base_.string()))) << path;
      EXPECT_THAT(text, testing::Not(testing::HasSubstr("/proc/self/fd\""))) << path;
    }
    EXPECT_FALSE(answers[0].ok()) << path;
    texts[path] = std::string(answers[0].message());
  }
  // Whether there is something behind a way out cannot be told by asking.
  for (const char* way : {"inside/absolute/", "../outside/", "inside/relative/"}) {
    std::string there = texts[absl::StrCat(way, "secret")];
    const std::string none = texts[absl::StrCat(way, "none")];
    EXPECT_EQ(absl::StrReplaceAll(there, {{"secret", "none"}}), none);
  }
  std::vector<std::string> outside;
  for (const auto& entry : fs::recursive_directory_iterator(base_ / "outside")) {
    outside.push_back(entry.path().filename());
  }
  EXPECT_THAT(outside, testing::ElementsAre("secret"));
  EXPECT_EQ(std::distance(fs::directory_iterator(base_), {}), 2);
  EXPECT_TRUE(fs::exists(base_ / "root/inside/file"));
}

// Whoever can make a hard link can write below the root and read the file: it is as good as a copy.
TEST_F(RootDirectoryTest, HardLinksAreFilesLikeOthers) {
  fs::create_hard_link(base_ / "outside/secret", base_ / "root/hard");
  EXPECT_TRUE(root_->OpenFile("hard").ok());
  EXPECT_EQ(GetReason(root_->CreateFile("hard").status()), Reason::kCheckpointExists);
  EXPECT_EQ(root_->RemoveRecursively("hard"), absl::OkStatus());
  EXPECT_TRUE(fs::exists(base_ / "outside/secret"));
}

TEST_F(RootDirectoryTest, OpenedDirectoryStaysWhereItIs) {
  fs::create_directories(base_ / "root/other");
  const auto inside = root_->OpenDirectory("inside");
  ASSERT_TRUE(inside.ok()) << inside.status();
  EXPECT_TRUE(inside->IsAt(*root_, "inside"));
  EXPECT_FALSE(inside->IsAt(*root_, "other"));
  ASSERT_EQ(root_->Rename("inside", "other", true), absl::OkStatus());
  EXPECT_FALSE(inside->IsAt(*root_, "inside"));
  EXPECT_TRUE(inside->OpenFile("file").ok());
  EXPECT_EQ(OpenReason("inside/file"), Reason::kCheckpointNotFound);
  EXPECT_EQ(GetReason(inside->OpenFile("../inside/file").status()), Reason::kInvalidField);
  EXPECT_FALSE(root_->OpenDirectory("other/file").ok());
}

TEST_F(RootDirectoryTest, RefusesFifosAndDirectoriesWithoutBlocking) {
  ASSERT_EQ(mkfifo((base_ / "root/fifo").c_str(), 0600), 0);
  EXPECT_EQ(OpenReason("fifo"), Reason::kInvalidField);
  EXPECT_EQ(OpenReason("inside"), Reason::kInvalidField);
  EXPECT_EQ(GetReason(root_->Stat("fifo").status()), Reason::kInvalidField);
  EXPECT_EQ(GetReason(OpenForRead((base_ / "root/fifo").string()).status()), Reason::kInvalidField);
  EXPECT_EQ(GetReason(OpenForRead("/dev/zero").status()), Reason::kInvalidField);
}

TEST_F(RootDirectoryTest, NamesWhatIsMissing) {
  const absl::Status status = root_->OpenFile("inside/none").status();
  EXPECT_EQ(GetReason(status), Reason::kCheckpointNotFound);
  EXPECT_THAT(std::string(status.message()), testing::HasSubstr("\"inside/none\""));
  EXPECT_THAT(std::string(status.message()), testing::Not(testing::HasSubstr(base_.string())));
  EXPECT_EQ(OpenReason("inside/file/below"), Reason::kCheckpointNotFound);
}

TEST_F(RootDirectoryTest, ListsFilesAndDirectoriesButNoLinks) {
  fs::create_symlink("inside/file", base_ / "root/link");
  ASSERT_EQ(mkfifo((base_ / "root/fifo").c_str(), 0600), 0);
  Write(base_ / "root/a", "12");
  const auto entries = root_->List(".");
  ASSERT_TRUE(entries.ok()) << entries.status();
  ASSERT_EQ(entries->size(), 2u);
  EXPECT_EQ((*entries)[0].name, "a");
  EXPECT_EQ((*entries)[0].size, 2u);
  EXPECT_GT((*entries)[0].modified, absl::FromUnixSeconds(1'600'000'000));
  EXPECT_EQ((*entries)[1].name, "inside");
  EXPECT_TRUE((*entries)[1].is_directory);
}

TEST_F(RootDirectoryTest, CreateFileRefusesWhatExists) {
  absl::StatusOr<File> file = root_->CreateFile("new");
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(file->WriteAt(3, Bytes("abc")), absl::OkStatus());
  EXPECT_EQ(file->SyncData(), absl::OkStatus());
  EXPECT_EQ(*file->Size(), 6u);
  EXPECT_EQ(file->Truncate(2), absl::OkStatus());
  EXPECT_EQ(*file->Size(), 2u);
  EXPECT_EQ(GetReason(root_->CreateFile("new").status()), Reason::kCheckpointExists);
}

TEST_F(RootDirectoryTest, MakesDirectoriesAndParents) {
  EXPECT_EQ(root_->MakeDirectories("x/y/z"), absl::OkStatus());
  EXPECT_EQ(root_->MakeDirectories("x/y/z"), absl::OkStatus());
  EXPECT_TRUE(root_->Stat("x/y/z")->is_directory);
  EXPECT_EQ(GetReason(root_->MakeDirectory("x")), Reason::kCheckpointExists);
  EXPECT_EQ(GetReason(root_->MakeDirectory("none/y")), Reason::kCheckpointNotFound);
  EXPECT_EQ(GetReason(root_->MakeDirectories("inside/file/y")), Reason::kInvalidField);
  EXPECT_EQ(root_->SyncDirectory("x"), absl::OkStatus());
}

TEST_F(RootDirectoryTest, RenameNeverReplacesUnlessItExchanges) {
  Write(base_ / "root/one", "1");
  Write(base_ / "root/two", "22");
  EXPECT_EQ(GetReason(root_->Rename("one", "two", false)), Reason::kCheckpointExists);
  EXPECT_EQ(root_->Rename("one", "two", true), absl::OkStatus());
  EXPECT_EQ(root_->Stat("one")->size, 2u);
  EXPECT_EQ(root_->Rename("one", "inside/three", false), absl::OkStatus());
  EXPECT_EQ(GetReason(root_->Rename("one", "four", false)), Reason::kCheckpointNotFound);
}

TEST_F(RootDirectoryTest, RemoveDoesNotFollowLinks) {
  fs::create_directories(base_ / "root/tree/deep");
  fs::create_symlink(base_ / "outside", base_ / "root/tree/deep/link");
  Write(base_ / "root/tree/file", "x");
  EXPECT_EQ(root_->RemoveRecursively("tree"), absl::OkStatus());
  EXPECT_FALSE(fs::exists(base_ / "root/tree"));
  EXPECT_TRUE(fs::exists(base_ / "outside/secret"));
  EXPECT_EQ(GetReason(root_->RemoveRecursively(".")), Reason::kInvalidField);
  EXPECT_EQ(GetReason(root_->RemoveRecursively("tree")), Reason::kCheckpointNotFound);
}

TEST_F(RootDirectoryTest, ReadPastTheEndIsCorruption) {
  absl::StatusOr<File> file = root_->OpenFile("inside/file");
  ASSERT_TRUE(file.ok());
  std::vector<uint8_t> bytes(4);
  EXPECT_EQ(GetReason(file->ReadAt(2, absl::MakeSpan(bytes))), Reason::kCheckpointCorrupt);
  EXPECT_EQ(GetReason(file->ReadAt(~uint64_t{0}, absl::MakeSpan(bytes))),
            Reason::kCheckpointCorrupt);
}

TEST(FileTest, MoveHandsOverTheDescriptor) {
  int fds[2];
  ASSERT_EQ(pipe(fds), 0);
  {
    File first(fds[0], "first");
    File second = std::move(first);
    EXPECT_FALSE(first.is_open());
    EXPECT_EQ(second.fd(), fds[0]);
  }
  EXPECT_EQ(fcntl(fds[0], F_GETFD), -1);
  close(fds[1]);
}

}  // namespace
}  // namespace modelstate
