// What `modelstate verify` checks of a saved directory, held against a real save.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/base/status.h"
#include "common/format/manifest_text.h"
#include "common/format/open_path.h"
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

  // The manifest, the headers that it holds against its digests, and the tensors that those hold
  // against theirs.
  absl::Status Verify() {
    MS_RETURN_IF_ERROR(CheckManifestFiles((root_ / "c").string()).status());
    MS_ASSIGN_OR_RETURN(const auto reader, OpenCheckpointPath((root_ / "c").string(), "", false));
    for (size_t i = 0; i < reader->tensors().size(); ++i) {
      std::vector<uint8_t> bytes(reader->tensors()[i].nbytes());
      MS_RETURN_IF_ERROR(reader->Read(i, absl::MakeSpan(bytes)));
    }
    return absl::OkStatus();
  }

  void Expect(Reason reason, const std::string& text) {
    const absl::Status status = Verify();
    EXPECT_EQ(GetReason(status), reason) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(text));
  }

  std::shared_ptr<ModuleInstance> module_;
};

TEST_F(VerifyFilesTest, ASaveIsWhole) {
  EXPECT_EQ(Verify(), absl::OkStatus());
  const auto files = CheckManifestFiles((root_ / "c").string());
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
      ASSERT_FALSE(Verify().ok()) << name << " at " << at;
    }
    WriteWhole(root_ / "c" / name, good.substr(0, good.size() - 1));
    Expect(Reason::kCheckpointCorrupt, name);
    WriteWhole(root_ / "c" / name, good);
  }
  std::filesystem::remove(root_ / "c" / kModelFile);
  Expect(Reason::kCheckpointCorrupt, kModelFile);
}

}  // namespace
}  // namespace modelstate
