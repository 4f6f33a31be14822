// What `modelstate verify` checks of a saved directory, held against a real save.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/base/status.h"
#include "common/format/manifest_text.h"
#include "tests/server/checkpoint/checkpoint_fixture.h"

namespace modelstate {
namespace {

using testing::HasSubstr;

class VerifyFilesTest : public CheckpointFixture {
 protected:
  VerifyFilesTest() {
    TensorSpec weight;
    weight.name = "weight";
    weight.shape = *Shape::Create({3});
    module_ = MakeModule({weight});
    EXPECT_TRUE(Save(*module_, "c").ok());
  }

  void Expect(Reason reason, const std::string& text) {
    const absl::Status status = VerifyManifest((root_ / "c").string()).status();
    EXPECT_EQ(GetReason(status), reason) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(text));
  }

  std::shared_ptr<ModuleInstance> module_;
};

TEST_F(VerifyFilesTest, ASaveIsWhole) {
  const auto files = VerifyManifest((root_ / "c").string());
  ASSERT_TRUE(files.ok()) << files.status();
  ASSERT_EQ(files->size(), 1u);
  EXPECT_EQ((*files)[0].name, kModelFile);
}

TEST_F(VerifyFilesTest, AnyChangedByteIsFound) {
  for (const char* name : {kModelFile, kManifestFile}) {
    const std::string good = ReadWhole(root_ / "c" / name);
    for (size_t at = 0; at < good.size(); at += 7) {
      std::string bad = good;
      bad[at] ^= 1;
      WriteWhole(root_ / "c" / name, bad);
      ASSERT_FALSE(VerifyManifest((root_ / "c").string()).ok()) << name << " at " << at;
    }
    WriteWhole(root_ / "c" / name, good.substr(0, good.size() - 1));
    Expect(Reason::kCheckpointCorrupt, name);
    WriteWhole(root_ / "c" / name, good);
  }
  std::filesystem::remove(root_ / "c" / kModelFile);
  Expect(Reason::kCheckpointNotFound, kModelFile);
}

}  // namespace
}  // namespace modelstate
