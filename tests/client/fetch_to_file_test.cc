#include "client/files/fetch_to_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "client/files/compare.h"
#include "client/files/tensor_file.h"
#include "common/format/checkpoint_reader.h"
#include "tests/client/fake_server.h"

namespace modelstate::client {
namespace {

using ::testing::HasSubstr;
using ::testing::Property;

class FetchToFileTest : public ::testing::Test {
 protected:
  FetchToFileTest() {
    std::filesystem::remove_all(folder_);
    std::filesystem::create_directories(folder_);
  }
  ~FetchToFileTest() override { std::filesystem::remove_all(folder_); }

  // The file is read as any safetensors file is, and equals the server's state.
  void ExpectWholeFile() {
    absl::StatusOr<File> file = OpenForRead(path_);
    ASSERT_TRUE(file.ok()) << file.status();
    absl::StatusOr<std::unique_ptr<CheckpointReader>> reader = OpenCheckpoint(*std::move(file));
    ASSERT_TRUE(reader.ok()) << reader.status();
    size_t found = 0;
    for (size_t k = 0; k < (*reader)->tensors().size(); ++k) {
      const StoredTensor& tensor = (*reader)->tensors()[k];
      for (size_t i = 0; i < server_.specs.size(); ++i) {
        const TensorSpec& spec = server_.specs[i];
        if ((spec.slot.empty() ? spec.name : spec.slot + "/" + spec.name) != tensor.name) continue;
        ++found;
        // The file's metadata name buffers; what a slot is, its name tells.
        EXPECT_EQ(tensor.kind, spec.slot.empty() ? spec.kind : TensorKind::kParameter)
            << tensor.name;
        std::vector<uint8_t> bytes(tensor.nbytes());
        // Read checks the digests that the header carries.
        ASSERT_TRUE((*reader)->Read(k, absl::MakeSpan(bytes)).ok());
        EXPECT_EQ(absl::MakeConstSpan(bytes), server_.bytes(i)) << tensor.name;
      }
    }
    EXPECT_EQ(found, server_.specs.size());
    EXPECT_FALSE(std::filesystem::exists(path_ + ".partial"));
    EXPECT_FALSE(std::filesystem::exists(path_ + ".partial.record"));
  }

  FakeServer server_;
  Client client_ = server_.Connect();
  const std::filesystem::path folder_ =
      std::filesystem::path(::testing::TempDir()) /
      ::testing::UnitTest::GetInstance()->current_test_info()->name();
  const std::string path_ = (folder_ / "m.safetensors").string();
};

TEST_F(FetchToFileTest, WritesAWholeFile) {
  const absl::StatusOr<FetchToFileResult> result = FetchToFile(client_, "m", path_);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->verified_digests, 40u);
  EXPECT_EQ(result->tensors_with_bytes, 40u);
  EXPECT_EQ(result->version, (Version{77, 5}));
  EXPECT_EQ(result->file_bytes, std::filesystem::file_size(path_));
  EXPECT_EQ(server_.releases, 1);
  ExpectWholeFile();
}

TEST_F(FetchToFileTest, AfterABreakOnlyTheMissingBytesAreSent) {
  server_.break_after = {43000, 5000, 12345};
  const absl::StatusOr<FetchToFileResult> result = FetchToFile(client_, "m", path_);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(server_.streams, 5u) << "the last one for digests";
  EXPECT_LE(server_.sent_bytes, server_.layout.total_bytes() + 40) << "no byte twice";
  EXPECT_EQ(result->received_bytes, server_.layout.total_bytes());
  EXPECT_EQ(result->verified_digests, 40u) << "those of broken streams were asked for";
  EXPECT_EQ(server_.pins, 1);
  ExpectWholeFile();
}

TEST_F(FetchToFileTest, ResumesInAnotherCallWhileThePinIsHeld) {
  server_.break_after = std::vector<uint64_t>(20, 0);
  server_.break_after[0] = 50000;
  EXPECT_TRUE(absl::IsUnavailable(FetchToFile(client_, "m", path_).status()));
  EXPECT_TRUE(std::filesystem::exists(path_ + ".partial"));
  EXPECT_FALSE(std::filesystem::exists(path_));
  server_.break_after.clear();
  FetchToFileOptions options;
  options.resume = true;
  const absl::StatusOr<FetchToFileResult> result = FetchToFile(client_, "m", path_, options);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_TRUE(result->resumed);
  EXPECT_EQ(result->received_bytes, server_.layout.total_bytes() - 50000);
  EXPECT_EQ(result->verified_digests, 40u);
  EXPECT_EQ(server_.pins, 1);
  ExpectWholeFile();
}

TEST_F(FetchToFileTest, BeginsAnewAndSaysSoWhenThePinIsGone) {
  server_.break_after = std::vector<uint64_t>(20, 0);
  server_.break_after[0] = 50000;
  EXPECT_FALSE(FetchToFile(client_, "m", path_).ok());
  server_.break_after.clear();
  server_.held = "another";
  FetchToFileOptions options;
  options.resume = true;
  const absl::StatusOr<FetchToFileResult> result = FetchToFile(client_, "m", path_, options);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_FALSE(result->resumed);
  EXPECT_THAT(result->note, HasSubstr("version 5 is no longer held"));
  EXPECT_EQ(result->received_bytes, server_.layout.total_bytes());
  ExpectWholeFile();
}

TEST_F(FetchToFileTest, AnotherSelectionBeginsAnew) {
  server_.break_after = std::vector<uint64_t>(20, 0);
  EXPECT_FALSE(FetchToFile(client_, "m", path_).ok());
  server_.break_after.clear();
  FetchToFileOptions options;
  options.resume = true;
  options.selection.prefixes = {"layer"};
  const absl::StatusOr<FetchToFileResult> result = FetchToFile(client_, "m", path_, options);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_THAT(result->note, HasSubstr("another module or selection"));
}

TEST_F(FetchToFileTest, OptimizerStateIsNamedBySlotAndResumedWithIt) {
  server_.AddOptimizerState();
  // It breaks in a slot, at one of the fake's chunks of 5,000 bytes.
  const size_t slot = server_.specs.size() - 2;
  const uint64_t sent = (server_.layout.range(slot).begin + 7000) / 5000 * 5000;
  ASSERT_GT(sent, server_.layout.range(slot).begin);
  ASSERT_LT(sent, server_.layout.range(slot).end);
  server_.break_after = std::vector<uint64_t>(20, 0);
  server_.break_after[0] = sent;
  FetchToFileOptions options;
  options.optimizer_state = true;
  EXPECT_TRUE(absl::IsUnavailable(FetchToFile(client_, "m", path_, options).status()));
  server_.break_after.clear();
  options.resume = true;
  const absl::StatusOr<FetchToFileResult> result = FetchToFile(client_, "m", path_, options);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_TRUE(result->resumed) << result->note;
  EXPECT_EQ(result->received_bytes, server_.layout.total_bytes() - sent);
  EXPECT_EQ(result->verified_digests, 42u);
  ExpectWholeFile();
}

TEST_F(FetchToFileTest, APartialFileWithoutOptimizerStateIsNoneWithIt) {
  server_.break_after = std::vector<uint64_t>(20, 0);
  EXPECT_FALSE(FetchToFile(client_, "m", path_).ok());
  server_.break_after.clear();
  server_.AddOptimizerState();
  FetchToFileOptions options;
  options.optimizer_state = true;
  options.resume = true;
  const absl::StatusOr<FetchToFileResult> result = FetchToFile(client_, "m", path_, options);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_FALSE(result->resumed);
  EXPECT_THAT(result->note, HasSubstr("another module or selection"));
  ExpectWholeFile();
}

TEST_F(FetchToFileTest, ASlotThatHasTheNameOfATensorIsRefused) {
  server_.specs[3].name = "exp_avg/layer37.weight";
  server_.AddOptimizerState();
  FetchToFileOptions options;
  options.optimizer_state = true;
  EXPECT_EQ(GetReason(FetchToFile(client_, "m", path_, options).status()),
            Reason::kNotRepresentable);
  EXPECT_TRUE(std::filesystem::is_empty(folder_));
}

TEST_F(FetchToFileTest, WrongBytesLeaveNothingBehind) {
  server_.wrong_digest = true;
  EXPECT_EQ(GetReason(FetchToFile(client_, "m", path_).status()), Reason::kDigestMismatch);
  EXPECT_TRUE(std::filesystem::is_empty(folder_));
}

// As after a power loss, whose record has more than the disk.
TEST_F(FetchToFileTest, WhatIsWrongOnTheDiskIsFetchedAgain) {
  server_.break_after = std::vector<uint64_t>(20, 0);
  server_.break_after[0] = 50000;
  EXPECT_FALSE(FetchToFile(client_, "m", path_).ok());
  server_.break_after.clear();
  {
    const absl::StatusOr<File> check = OpenForRead(path_ + ".partial");
    const uint64_t size = *check->Size();
    std::filesystem::resize_file(path_ + ".partial", size - 10000);  // a part of the end is missing
    FILE* file = std::fopen((path_ + ".partial").c_str(), "r+");
    std::fseek(file, static_cast<long>(size - 30000), SEEK_SET);  // and a hole before it
    for (int i = 0; i < 2000; ++i) std::fputc(0, file);
    std::fclose(file);
  }
  FetchToFileOptions options;
  options.resume = true;
  const absl::StatusOr<FetchToFileResult> result = FetchToFile(client_, "m", path_, options);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_TRUE(result->resumed);
  EXPECT_LT(result->received_bytes, server_.layout.total_bytes());
  EXPECT_EQ(result->verified_digests, 40u);
  ExpectWholeFile();
}

TEST_F(FetchToFileTest, StreamsSideBySideDivideTheFile) {
  server_.AddLargeTensor(100'000'000);
  FetchToFileOptions options;
  options.streams = 3;
  server_.break_after = {UINT64_MAX, 7'000'000, 1'000'000, UINT64_MAX, 0};
  const absl::StatusOr<FetchToFileResult> result = FetchToFile(client_, "m", path_, options);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->received_bytes, server_.layout.total_bytes()) << "no byte twice";
  EXPECT_EQ(result->verified_digests, 41u);
  EXPECT_GT(server_.streams, 20u) << "a table, many parts, digests";
  ExpectWholeFile();
}

TEST_F(FetchToFileTest, OneOfSeveralStreamsThatFailsEndsThemAllAndKeepsWhatIsThere) {
  server_.AddLargeTensor(100'000'000);
  FetchToFileOptions options;
  options.streams = 3;
  server_.break_after = std::vector<uint64_t>(40, 5'000'000);
  server_.refuse_streams_from = 12;
  const absl::Status failed = FetchToFile(client_, "m", path_, options).status();
  EXPECT_EQ(GetReason(failed), Reason::kDeviceMemory) << failed;
  server_.break_after.clear();
  server_.refuse_streams_from = SIZE_MAX;
  options.resume = true;
  options.streams = 2;
  const absl::StatusOr<FetchToFileResult> result = FetchToFile(client_, "m", path_, options);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_TRUE(result->resumed);
  EXPECT_LT(result->received_bytes, 70'000'000u);
  ExpectWholeFile();
}

// The first address has begun to answer after the fetch has found the second one.
TEST_F(FetchToFileTest, StreamsThatFindAnotherServerAreGivenUpForTheOneWithThePin) {
  server_.AddLargeTensor(20'000'000);
  auto other = std::make_unique<FakeServer>();
  const int port = other->port();
  other.reset();
  const Client client =
      FakeServer::Connect(absl::StrCat("127.0.0.1:", port, ",127.0.0.1:", server_.port()));
  ASSERT_TRUE(client.GetModule("m").ok());
  other = std::make_unique<FakeServer>(port);
  other->held = "another";
  FetchToFileOptions options;
  options.streams = 3;
  const absl::StatusOr<FetchToFileResult> result = FetchToFile(client, "m", path_, options);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_GT(other->refused_pins, 0u) << "the streams have not found it";
  EXPECT_EQ(result->note, "");
  EXPECT_EQ(result->received_bytes, server_.layout.total_bytes());
  ExpectWholeFile();
}

TEST_F(FetchToFileTest, AVersionOfAnotherLifeIsNotJoined) {
  FetchToFileOptions options;
  options.version = 3;
  server_.break_after = std::vector<uint64_t>(20, 0);
  server_.break_after[0] = 50000;
  EXPECT_FALSE(FetchToFile(client_, "m", path_, options).ok());
  server_.break_after.clear();
  server_.incarnation = 78;
  options.resume = true;
  EXPECT_EQ(GetReason(FetchToFile(client_, "m", path_, options).status()),
            Reason::kIncarnationChanged);
  options.resume = false;
  EXPECT_EQ(FetchToFile(client_, "m", path_, options)->version, (Version{78, 3}));
  ExpectWholeFile();
}

TEST_F(FetchToFileTest, AVersionThatIsNoLongerHeldIsToldWithItsNumber) {
  FetchToFileOptions options;
  options.version = 5;
  options.progress = [this](const Progress&) { server_.held = "another"; };
  server_.break_after = {50000};
  const absl::Status lost = FetchToFile(client_, "m", path_, options).status();
  EXPECT_EQ(GetReason(lost), Reason::kSnapshotNotFound);
  EXPECT_THAT(lost, Property(&absl::Status::message, HasSubstr("version 5 of module \"m\"")));
}

TEST_F(FetchToFileTest, AStalledStreamGoesOnWhereItWas) {
  server_.refusals = {Reason::kStreamStalled, Reason::kStreamStalled};
  ASSERT_TRUE(FetchToFile(client_, "m", path_).ok());
  ExpectWholeFile();
}

TEST_F(FetchToFileTest, TwoAtOnceForOnePathDoNotMix) {
  absl::Status other;
  FetchToFileOptions options;
  options.progress = [&](const Progress&) {
    if (other.ok()) other = FetchToFile(server_.Connect(), "m", path_).status();
  };
  ASSERT_TRUE(FetchToFile(client_, "m", path_, options).ok());
  EXPECT_THAT(other, Property(&absl::Status::message, HasSubstr("another fetch is writing")));
  ExpectWholeFile();
}

TEST_F(FetchToFileTest, FilesAreReadBackAndCompared) {
  ASSERT_TRUE(FetchToFile(client_, "m", path_).ok());
  const absl::StatusOr<TensorFile> file = TensorFile::Read(path_);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(file->refs(TensorKind::kGradient).size(), server_.specs.size());
  const std::string other = (folder_ / "other.safetensors").string();
  server_.region[server_.layout.range(4).begin] ^= 1;
  ASSERT_TRUE(FetchToFile(client_, "m", other).ok());
  const absl::StatusOr<std::unique_ptr<TensorSource>> a = OpenFileSource(path_);
  const absl::StatusOr<std::unique_ptr<TensorSource>> b = OpenFileSource(other);
  ASSERT_TRUE(a.ok() && b.ok());
  EXPECT_EQ(CompareTensors(**a, **a)->equal, server_.specs.size());
  const absl::StatusOr<Comparison> comparison = CompareTensors(**a, **b);
  ASSERT_TRUE(comparison.ok());
  EXPECT_EQ(comparison->equal, server_.specs.size() - 1);
  for (const TensorComparison& tensor : comparison->tensors) {
    EXPECT_EQ(tensor.equal, tensor.name != "layer4.weight") << tensor.name;
    EXPECT_EQ(tensor.different, tensor.equal ? 0u : 1u) << tensor.name;
  }
}

// The pin is its owner's: neither renewed, which could shorten it, nor released.
TEST_F(FetchToFileTest, APinOfTheCallersIsLeftAlone) {
  FetchToFileOptions options;
  options.snapshot_id = "pin-1";
  const absl::StatusOr<FetchToFileResult> result = FetchToFile(client_, "m", path_, options);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->version, (Version{77, 5}));
  EXPECT_EQ(server_.pin_calls, 0);
  EXPECT_EQ(server_.releases, 0);
  ExpectWholeFile();
  options.snapshot_id = "gone";
  EXPECT_EQ(GetReason(FetchToFile(client_, "m", path_, options).status()),
            Reason::kSnapshotNotFound);
}

TEST_F(FetchToFileTest, AnOlderVersionIsAskedForByNumber) {
  FetchToFileOptions options;
  options.version = 3;
  const absl::StatusOr<FetchToFileResult> result = FetchToFile(client_, "m", path_, options);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->version, (Version{77, 3}));
  EXPECT_EQ(server_.pins, server_.releases);
  // The current one is held by a pin of its own meanwhile.
  options.version = 5;
  ASSERT_TRUE(FetchToFile(client_, "m", path_, options).ok());
  EXPECT_EQ(server_.stream_snapshot_id, "pin-1");
}

TEST_F(FetchToFileTest, ReplacesRegularFilesOnlyAndFollowsLinks) {
  EXPECT_EQ(GetReason(FetchToFile(client_, "m", "/dev/null", {}).status()), Reason::kInvalidField);
  EXPECT_TRUE(std::filesystem::is_character_file("/dev/null"));
  const std::string folder = path_ + ".folder";
  std::filesystem::create_directory(folder);
  EXPECT_EQ(GetReason(FetchToFile(client_, "m", folder, {}).status()), Reason::kInvalidField);
  EXPECT_EQ(server_.pins, server_.releases);

  const std::string target = folder + "/target";
  std::ofstream(target) << "old";
  const std::string link = folder + "/link";
  std::filesystem::create_symlink(target, link);
  ASSERT_TRUE(FetchToFile(client_, "m", link, {}).ok());
  EXPECT_TRUE(std::filesystem::is_symlink(link));
  EXPECT_GT(std::filesystem::file_size(target), 100u);
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace modelstate::client
