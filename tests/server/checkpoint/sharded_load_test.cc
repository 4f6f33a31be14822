#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdio.h>

#include <atomic>
#include <set>
#include <thread>

#include "common/base/status.h"
#include "common/format/sharded_index.h"
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

  // 20 tensors of `value`, each in a shard of its own.
  void MakeSharded(const std::string& folder, float value) {
    std::filesystem::create_directories(root_ / folder);
    ShardedIndex index;
    for (size_t i = 0; i < 20; ++i) {
      index.shards.push_back(absl::StrCat(i, ".safetensors"));
      index.entries.push_back({absl::StrCat("w", i), i});
      const std::string header =
          absl::StrCat("{\"w", i, "\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}");
      std::string file(8, '\0');
      file[0] = static_cast<char>(header.size());
      file += header;
      file.append(reinterpret_cast<const char*>(&value), 4);
      WriteWhole(root_ / folder / index.shards[i], file);
    }
    WriteWhole(root_ / folder / "model.safetensors.index.json", ShardedIndexText(index, 80));
  }

  void Exchange(const std::string& a, const std::string& b) {
    ASSERT_EQ(
        renameat2(AT_FDCWD, (root_ / a).c_str(), AT_FDCWD, (root_ / b).c_str(), RENAME_EXCHANGE),
        0);
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

// A load opens an index and its shards; those that it opens lie in one directory, whatever is put
// in its place meanwhile, or removed after that.
TEST_F(ShardedLoadTest, LoadsBesideAWriterSeeOneWholeDirectory) {
  MakeSharded("next", 1);
  MakeSharded("model", 2);
  std::atomic<bool> done{false};
  std::thread writer([&] {
    for (float value = 1; !done; value = 3 - value) {
      Exchange("next", "model");
      std::filesystem::remove_all(root_ / "next");
      MakeSharded("next", 3 - value);
    }
  });
  std::set<std::string> seen;
  for (int i = 0; i < 1000; ++i) {
    auto module = MakeModule({});
    const auto loaded = Load(*module, i % 2 == 0 ? "model" : "model/model.safetensors.index.json");
    if (!loaded.ok()) {
      ADD_FAILURE() << i << ": " << loaded.status();
      break;
    }
    std::set<std::string> values;
    for (const auto& [name, bytes] : Contents(**loaded)) values.insert(bytes);
    EXPECT_EQ(values.size(), 1u) << i;
    seen.merge(values);
  }
  done = true;
  writer.join();
  EXPECT_EQ(seen.size(), 2u);
}

TEST_F(ShardedLoadTest, AShardedDirectoryIsListedAsOne) {
  Copy("hub/model");
  Copy("hub/broken");
  std::filesystem::remove(root_ / "hub/broken/model-00002-of-00004.safetensors");
  std::filesystem::create_directories(root_ / "hub/other");
  WriteWhole(root_ / "hub/other/config.json", "{}");
  for (const bool recursive : {false, true}) {
    const auto list =
        store_->List(recursive ? "" : "hub", {.verify = true, .recursive = recursive});
    ASSERT_TRUE(list.ok()) << list.status();
    ASSERT_EQ(list->size(), 2u);
    EXPECT_EQ((*list)[0].path, "hub/broken");
    EXPECT_EQ((*list)[0].verified, false);
    EXPECT_THAT((*list)[0].problem, HasSubstr("model-00002-of-00004.safetensors"));
    const CheckpointInfo& whole = (*list)[1];
    EXPECT_EQ(whole.path, "hub/model");
    EXPECT_EQ(whole.format, "sharded safetensors");
    EXPECT_EQ(whole.verified, true);
    EXPECT_EQ(whole.problem, "");
    ASSERT_EQ(whole.files.size(), 5u);
    uint64_t bytes = 0;
    for (const auto& file : whole.files) {
      EXPECT_EQ(file.nbytes, std::filesystem::file_size(root_ / "hub/model" / file.name));
      bytes += file.nbytes;
    }
    EXPECT_EQ(whole.nbytes, bytes);
  }
  EXPECT_EQ(store_->List("hub", {})->at(1).verified, std::nullopt);
}

TEST_F(ShardedLoadTest, CheckpointsBelowAShardedDirectoryAreFound) {
  Copy("model");
  TensorSpec weight;
  weight.name = "weight";
  ASSERT_TRUE(Save(*MakeModule({weight}), "model/step-00000001").ok());
  const auto list = store_->List("", {.recursive = true});
  ASSERT_TRUE(list.ok()) << list.status();
  ASSERT_EQ(list->size(), 2u);
  EXPECT_EQ((*list)[0].path, "model");
  EXPECT_EQ((*list)[1].path, "model/step-00000001");
  EXPECT_EQ(*store_->Resolve("model/latest"), "model/step-00000001");
  const auto page = store_->List("", {.after = "model", .limit = 1, .recursive = true});
  ASSERT_EQ(page->size(), 1u);
  EXPECT_EQ((*page)[0].path, "model/step-00000001");
}

TEST_F(ShardedLoadTest, AShardedDirectoryIsNotDeleted) {
  Copy("model");
  const absl::Status status = store_->Delete("model");
  EXPECT_EQ(GetReason(status), Reason::kCheckpointUnsupported) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("remove it by hand"));
  EXPECT_TRUE(OpenStatus("model").ok());
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
