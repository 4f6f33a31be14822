// Directories that are checkpoints and that no save made, or that are not whole.

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/fsuid.h>
#include <unistd.h>

#include "common/base/status.h"
#include "common/format/convert_checkpoint.h"
#include "common/format/open_path.h"
#include "tests/common/allocation_meter.h"
#include "tests/server/checkpoint/checkpoint_fixture.h"

namespace modelstate {
namespace {

namespace fs = std::filesystem;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

class FolderCheckpointTest : public CheckpointFixture {
 protected:
  FolderCheckpointTest() {
    module_ = MakeModule({Parameter("weight", {40, 30})});
    EXPECT_TRUE(Configure(*module_, AdamW()).ok());
    EXPECT_TRUE(Push(*module_, {{"weight", 1}}).ok());
    EXPECT_TRUE(Save(*module_, "saved").ok());
  }

  // The tensors of "saved" as another program has them.
  void Convert(const std::string& to, bool torch = false, uint64_t shard_bytes = 0) {
    const auto reader = OpenCheckpointPath((root_ / "saved").string());
    ASSERT_TRUE(reader.ok()) << reader.status();
    ConvertOptions options;
    options.to_torch = torch;
    options.max_shard_bytes = shard_bytes;
    const auto converted = ConvertCheckpoint(**reader, (root_ / to).string(), options);
    ASSERT_TRUE(converted.ok()) << converted.status();
  }
  std::vector<std::string> Recursively() {
    std::vector<std::string> paths;
    const auto list = store_->List("", {.recursive = true});
    EXPECT_TRUE(list.ok()) << list.status();
    for (const CheckpointInfo& info : *list) paths.push_back(info.path);
    return paths;
  }

  std::shared_ptr<ModuleInstance> module_;
};

TEST_F(FolderCheckpointTest, ADirectoryWithOneModelFileLoadsAsThatFile) {
  fs::create_directories(root_ / "hub/a");
  fs::create_directories(root_ / "hub/b");
  Convert("hub/a/model.safetensors");
  Convert("hub/b/pytorch_model.bin", /*torch=*/true);
  WriteWhole(root_ / "hub/a/config.json", "{}");
  for (const char* path : {"hub/a", "hub/b"}) {
    auto empty = MakeModule({});
    const auto loaded = Load(*empty, path);
    ASSERT_TRUE(loaded.ok()) << loaded.status();
    EXPECT_EQ(empty->Current()->schema->size(), 1u);
  }
  // As one checkpoint each, with the format of its file.
  EXPECT_THAT(Recursively(), ElementsAre("hub/a", "hub/b", "saved"));
  const auto list = store_->List("hub", {.verify = true});
  EXPECT_EQ(list->at(0).format, "safetensors");
  EXPECT_EQ(list->at(1).format, "torch zip");
  for (const CheckpointInfo& info : *list) {
    EXPECT_EQ(info.problem, "");
    EXPECT_EQ(info.files.size(), 1u);
  }
  // It may hold more than the checkpoint.
  EXPECT_EQ(GetReason(store_->Delete("hub/a")), Reason::kCheckpointUnsupported);
}

TEST_F(FolderCheckpointTest, ASavedDirectoryWithoutItsManifestIsNotTakenForAnother) {
  fs::remove(root_ / "saved/manifest.json");
  auto empty = MakeModule({});
  for (const bool with_moments : {true, false}) {
    if (!with_moments) fs::remove(root_ / "saved/optimizer.safetensors");
    const auto loaded = Load(*empty, "saved");
    EXPECT_EQ(GetReason(loaded.status()), Reason::kCheckpointCorrupt) << loaded.status();
    EXPECT_THAT(std::string(loaded.status().message()), HasSubstr("manifest.json is not there"));
    const auto offline = OpenCheckpointPath((root_ / "saved").string());
    EXPECT_EQ(GetReason(offline.status()), Reason::kCheckpointCorrupt) << offline.status();
    const CheckpointInfo info = store_->List("", {})->at(0);
    EXPECT_EQ(info.format, kDirectoryFormat);
    EXPECT_THAT(info.problem, HasSubstr("manifest.json"));
  }
  // The file alone can be meant.
  EXPECT_TRUE(Load(*empty, "saved/model.safetensors").ok());
  fs::create_directories(root_ / "half");
  WriteWhole(root_ / "half/optimizer.safetensors", "x");
  EXPECT_EQ(GetReason(Load(*empty, "half").status()), Reason::kCheckpointCorrupt);
  EXPECT_TRUE(store_->Delete("saved").ok());
}

TEST_F(FolderCheckpointTest, APartOfACheckpointIsNotDeletedAlone) {
  Convert("shards", /*torch=*/false, /*shard_bytes=*/1 << 20);
  const auto reader = OpenCheckpointPath((root_ / "saved").string());
  fs::create_directories(root_ / "hub");
  fs::copy(std::string(MODELSTATE_SOURCE_DIR) + "/tests/data/sharded-safetensors",
           root_ / "hub/sharded", fs::copy_options::recursive);
  for (const char* path : {"saved/model.safetensors", "saved/optimizer.safetensors",
                           "hub/sharded/model-00002-of-00004.safetensors"}) {
    const absl::Status status = store_->Delete(path);
    EXPECT_EQ(GetReason(status), Reason::kCheckpointUnsupported) << path;
    EXPECT_THAT(std::string(status.message()), HasSubstr("is a part of")) << path;
    EXPECT_TRUE(fs::exists(root_ / path));
  }
  // Also where another file is what the directory loads as.
  fs::copy(root_ / "saved/model.safetensors", root_ / "hub/sharded/model.safetensors");
  EXPECT_EQ(GetReason(store_->Delete("hub/sharded/model-00001-of-00004.safetensors")),
            Reason::kCheckpointUnsupported);
  EXPECT_THAT(Recursively(), ElementsAre("hub/sharded", "saved", "shards"));
  // A file of its own beside them is none.
  fs::copy(root_ / "saved/model.safetensors", root_ / "hub/sharded/other.safetensors");
  EXPECT_TRUE(store_->Delete("hub/sharded/other.safetensors").ok());
  EXPECT_TRUE(store_->Delete("shards/model.safetensors").ok());
}

// Whatever has a manifest.json: what no save made would be gone with it.
TEST_F(FolderCheckpointTest, NoDeletionOrSaveTakesFilesAlongThatNoSaveMade) {
  fs::create_directories(root_ / "webapp");
  WriteWhole(root_ / "webapp/manifest.json", "{\"name\": \"My web app\"}");
  WriteWhole(root_ / "webapp/thesis.txt", "x");
  WriteWhole(root_ / "saved/notes.txt", "x");
  fs::create_directories(root_ / "runs/manifest.json");  // a directory is no manifest
  ASSERT_TRUE(Save(*module_, "runs/1").ok());
  for (const char* path : {"webapp", "saved", "runs"}) {
    EXPECT_EQ(GetReason(store_->Delete(path)), Reason::kCheckpointUnsupported) << path;
    EXPECT_FALSE(Save(*module_, path, {.overwrite = true}).ok()) << path;
  }
  EXPECT_TRUE(fs::exists(root_ / "webapp/thesis.txt"));
  EXPECT_TRUE(fs::exists(root_ / "saved/notes.txt"));
  EXPECT_THAT(Recursively(), ElementsAre("runs/1", "saved", "webapp"));
  fs::remove(root_ / "saved/notes.txt");
  EXPECT_TRUE(Save(*module_, "saved", {.overwrite = true}).ok());
  EXPECT_TRUE(store_->Delete("saved").ok());
}

TEST_F(FolderCheckpointTest, ADamagedCheckpointStillSaysWhoseItIs) {
  fs::resize_file(root_ / "saved/model.safetensors", 100);
  const CheckpointInfo info = store_->List("", {})->at(0);
  EXPECT_EQ(info.module, module_->name());
  EXPECT_EQ(info.step, 1u);
  EXPECT_THAT(info.problem, HasSubstr("100 bytes"));
}

// A file of a few bytes can say that it has a tensor of many.
TEST_F(FolderCheckpointTest, VerifyingTakesNoMemoryOfTheTensors) {
  constexpr uint64_t kBytes = uint64_t{512} << 20;
  const std::string header =
      "{\"w\":{\"dtype\":\"U8\",\"shape\":[536870912],\"data_offsets\":[0,536870912]}}";
  std::string prefix(8, '\0');
  prefix[0] = static_cast<char>(header.size());
  WriteWhole(root_ / "sparse.safetensors", prefix + header);
  fs::resize_file(root_ / "sparse.safetensors", prefix.size() + header.size() + kBytes);
  ResetPeakAllocation();
  const auto list = store_->List("", {.after = "saved", .verify = true});
  EXPECT_LT(PeakAllocation(), size_t{16} << 20);
  ASSERT_EQ(list->size(), 1u);
  EXPECT_EQ(list->at(0).verified, true);
  EXPECT_EQ(list->at(0).unverifiable_tensors, 1u);
  EXPECT_EQ(store_->List("", {.limit = 1, .verify = true})->at(0).unverifiable_tensors, 0u);
}

// What is in them may be checkpoints: nobody is to learn of that when they are missed.
TEST_F(FolderCheckpointTest, DirectoriesThatCannotBeReadAndLinksToOutsideAreListedAsProblems) {
  const fs::path outside = fs::path(root_).concat("-outside");
  fs::create_directories(outside);
  fs::create_directories(root_ / "runs/inner");
  ASSERT_TRUE(Save(*module_, "runs/inner/1").ok());
  fs::create_directory_symlink(outside, root_ / "mounted");
  fs::create_directory_symlink("../..", root_ / "runs/up");
  // What is inside has a name of its own, and what is nowhere is nothing.
  fs::create_directory_symlink("inner/1", root_ / "runs/last");
  fs::create_directory_symlink("../saved", root_ / "runs/best");
  fs::create_directory_symlink("nowhere", root_ / "runs/gone");
  EXPECT_THAT(Recursively(), ElementsAre("mounted", "runs/inner/1", "runs/up", "saved"));
  const CheckpointInfo link = store_->List("", {.verify = true})->at(0);
  EXPECT_THAT(link.problem, HasSubstr("symbolic link to outside"));
  EXPECT_EQ(link.verified, false);
  EXPECT_EQ(*store_->Resolve("latest"), "runs/inner/1");
  fs::create_directories(root_ / "lost+found");
  for (const fs::path& path : {root_, root_ / "runs"}) fs::permissions(path, fs::perms(0755));
  for (const char* path : {"runs/inner", "lost+found"}) {
    fs::permissions(root_ / path, fs::perms::none);
  }
  const bool is_root = geteuid() == 0;
  if (is_root) setfsuid(65534);  // root may read every directory
  EXPECT_THAT(Recursively(), ElementsAre("mounted", "runs/inner", "runs/up", "saved"));
  EXPECT_THAT(store_->List("runs", {})->at(0).problem, HasSubstr("ermission"));
  if (is_root) setfsuid(0);
  for (const char* path : {"runs/inner", "lost+found"}) {
    fs::permissions(root_ / path, fs::perms::owner_all);
  }
  fs::remove(outside);
}

}  // namespace
}  // namespace modelstate
