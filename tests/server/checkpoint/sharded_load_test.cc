#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/base/status.h"
#include "tests/server/checkpoint/checkpoint_fixture.h"

namespace modelstate {
namespace {

using testing::HasSubstr;

class ShardedLoadTest : public CheckpointFixture {
 protected:
  // The published sharded checkpoint of tests/data in `folder` of the root.
  void Copy(const std::string& folder) {
    std::filesystem::create_directories(root_ / folder);
    std::filesystem::copy(std::string(MODELSTATE_SOURCE_DIR) + "/tests/data/sharded-safetensors",
                          root_ / folder);
  }

  absl::Status OpenStatus(const std::string& path) {
    return CheckpointSource::Open(store_->root(), path, "").status();
  }
};

TEST_F(ShardedLoadTest, AnIndexOrItsDirectoryLoads) {
  Copy("hub/model");
  for (const std::string path : {"hub/model", "hub/model/model.safetensors.index.json"}) {
    const auto source = CheckpointSource::Open(store_->root(), path, "");
    ASSERT_TRUE(source.ok()) << source.status();
    EXPECT_EQ((*source)->format(), "sharded safetensors");
    EXPECT_EQ((*source)->incoming().size(), 12u);
  }
}

TEST_F(ShardedLoadTest, NoShardLeadsOutOfTheRoot) {
  Copy("model");
  const auto shard = root_ / "model" / "model-00001-of-00004.safetensors";
  ASSERT_TRUE(std::filesystem::exists(shard));
  const std::filesystem::path outside = root_.string() + "-outside";
  std::filesystem::rename(shard, outside);
  std::filesystem::create_symlink(outside, shard);
  const absl::Status status = OpenStatus("model");
  EXPECT_EQ(GetReason(status), Reason::kInvalidField) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("symbolic link"));
  std::filesystem::remove(outside);
}

TEST_F(ShardedLoadTest, ADistributedCheckpointIsNamed) {
  std::filesystem::create_directories(root_ / "dcp");
  WriteWhole(root_ / "dcp" / ".metadata", "\x80\x04x");
  WriteWhole(root_ / "dcp" / "__0_0.distcp", "PK");
  const absl::Status status = OpenStatus("dcp");
  EXPECT_EQ(GetReason(status), Reason::kCheckpointUnsupported) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("dcp_to_torch"));
  EXPECT_THAT(std::string(OpenStatus("dcp/.metadata").message()), HasSubstr("dcp_to_torch"));
}

TEST_F(ShardedLoadTest, ADirectoryOfNeitherIsNoCheckpoint) {
  std::filesystem::create_directories(root_ / "empty");
  EXPECT_EQ(GetReason(OpenStatus("empty")), Reason::kCheckpointNotFound);
}

}  // namespace
}  // namespace modelstate
