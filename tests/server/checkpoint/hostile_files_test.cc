// Files that were made to do harm (tests/data/make_hostile_files.py), and what each is answered
// with.

#include "tests/server/checkpoint/hostile_files.h"

#include <cstdlib>
#include <set>

#include "tests/common/allocation_meter.h"
#include "tests/server/checkpoint/checkpoint_fixture.h"

namespace modelstate {
namespace {

class HostileFilesTest : public CheckpointFixture {
 protected:
  void SetUp() override {
    const std::string command =
        absl::StrCat("python3 '", MODELSTATE_SOURCE_DIR, "/tests/data/make_hostile_files.py' '",
                     root_.string(), "'");
    if (std::system("python3 -c ''") != 0) GTEST_SKIP() << "python3 is not installed";
    ASSERT_EQ(std::system(command.c_str()), 0);
    auto store = CheckpointStore::Open((root_ / "root").string());
    ASSERT_TRUE(store.ok()) << store.status();
    store_ = *std::move(store);
  }
};

TEST_F(HostileFilesTest, EachIsRefusedForItsReasonAndChangesNothing) {
  auto module = MakeModule({});
  const VersionRef before = module->Current();
  std::set<std::string> unlisted;
  for (const auto& entry : std::filesystem::directory_iterator(root_ / "root")) {
    unlisted.insert(entry.path().filename().string());
  }
  for (const HostileFile& expected : hostile::kFiles) {
    SCOPED_TRACE(expected.path);
    unlisted.erase(expected.path);
    ResetPeakAllocation();
    const auto loaded = Load(*module, expected.path);
    EXPECT_LT(PeakAllocation(), size_t{17} << 20);  // none has 1 MiB
    EXPECT_EQ(GetReason(loaded.status()), expected.reason) << loaded.status();
    EXPECT_THAT(std::string(loaded.status().message()), testing::HasSubstr(expected.text));
    EXPECT_THAT(std::string(loaded.status().message()),
                testing::Not(testing::HasSubstr(root_.string())));
    EXPECT_EQ(&*module->Current(), &*before);
  }
  EXPECT_FALSE(std::filesystem::exists("hostile-was-here"));  // what their commands would make
  for (const std::string& path : unlisted) {
    if (path.rfind("good", 0) == 0) continue;
    ADD_FAILURE() << path << " is not in the table";
  }
}

TEST_F(HostileFilesTest, TheGoodOnesBesideThemLoad) {
  for (const char* path : {"good.safetensors", "good.pt", "good-legacy.pt"}) {
    const auto loaded = Load(*MakeModule({}), path);
    EXPECT_TRUE(loaded.ok()) << loaded.status();
  }
}

}  // namespace
}  // namespace modelstate
