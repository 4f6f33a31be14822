#include "common/format/convert_checkpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <set>

#include "common/base/status.h"
#include "common/format/open_path.h"
#include "tests/common/allocation_meter.h"
#include "tests/common/format/test_files.h"

namespace modelstate {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::UnorderedElementsAre;

namespace fs = std::filesystem;

class ConvertTest : public testing::Test {
 protected:
  ConvertTest() {
    std::string pattern = (fs::path(testing::TempDir()) / "convert-XXXXXX").string();
    EXPECT_NE(mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
  }
  ~ConvertTest() override { fs::remove_all(folder_); }

  std::string Path(const std::string& name) const { return folder_ + "/" + name; }

  std::set<std::string> Names(const std::string& folder = "") const {
    std::set<std::string> names;
    for (const auto& entry : fs::directory_iterator(Path(folder))) {
      names.insert(entry.path().filename().string());
    }
    return names;
  }

  void Write(const std::string& name, const std::string& content) {
    std::ofstream(Path(name), std::ios::binary) << content;
  }

  absl::Status Convert(const std::string& in, const std::string& out, ConvertOptions options = {},
                       const std::string& key = "") {
    const auto reader = OpenCheckpointPath(in, key);
    if (!reader.ok()) return reader.status();
    options.in = in;
    return ConvertCheckpoint(**reader, Path(out), options).status();
  }

  std::string folder_;
};

struct Content {
  DType dtype;
  Shape shape;
  std::string alias_of;
  std::vector<uint8_t> bytes;

  bool operator==(const Content& other) const {
    return dtype == other.dtype && shape == other.shape && alias_of == other.alias_of &&
           bytes == other.bytes;
  }
};

std::map<std::string, Content> ReadAll(const CheckpointReader& reader) {
  std::map<std::string, Content> contents;
  for (size_t i = 0; i < reader.tensors().size(); ++i) {
    const StoredTensor& tensor = reader.tensors()[i];
    Content& content = contents[tensor.name];
    content = {tensor.dtype, tensor.shape, tensor.alias_of, {}};
    content.bytes.resize(tensor.nbytes());
    EXPECT_EQ(reader.Read(i, absl::MakeSpan(content.bytes)), absl::OkStatus()) << tensor.name;
  }
  return contents;
}

std::vector<std::string> Order(const CheckpointReader& reader) {
  std::vector<std::string> names;
  for (const StoredTensor& tensor : reader.tensors()) names.push_back(tensor.name);
  return names;
}

TEST_F(ConvertTest, WhatTheGateEndsLeavesNothing) {
  const std::string in = std::string(MODELSTATE_SOURCE_DIR) + "/tests/data/crepe-tiny.pth";
  for (const bool sharded : {false, true}) {
    for (const bool to_torch : {false, true}) {
      if (sharded && to_torch) continue;
      int asked = 0;
      ConvertOptions options;
      options.to_torch = to_torch;
      options.max_shard_bytes = sharded ? 100'000 : 0;
      options.gate = [&asked] {
        return ++asked == 9 ? absl::CancelledError("enough") : absl::OkStatus();
      };
      EXPECT_EQ(Convert(in, "out", options).code(), absl::StatusCode::kCancelled);
      EXPECT_EQ(asked, 9);
      EXPECT_EQ(Names(), std::set<std::string>());
    }
  }
}

TEST_F(ConvertTest, EveryReadableFileSurvivesEveryFormat) {
  size_t converted = 0;
  ConvertOptions to_torch;
  to_torch.to_torch = true;
  ConvertOptions to_shards;
  to_shards.max_shard_bytes = 1000;
  for (const auto& entry : fs::recursive_directory_iterator(DataPath(""))) {
    const std::string path = entry.path().string();
    if (!fs::exists(path + ".json") || path.find("conj_neg") != std::string::npos) continue;
    const auto reader = OpenCheckpointPath(path);
    if (!reader.ok() || (*reader)->tensors().empty()) continue;
    SCOPED_TRACE(path);
    const auto expected = ReadAll(**reader);
    const std::string name = std::to_string(converted++);
    ASSERT_EQ(Convert(path, name + ".safetensors"), absl::OkStatus());
    ASSERT_EQ(Convert(path, name + ".pt", to_torch), absl::OkStatus());
    ASSERT_EQ(Convert(path, name, to_shards), absl::OkStatus());
    for (const std::string& out : {name + ".safetensors", name + ".pt", name}) {
      const auto written = OpenCheckpointPath(Path(out));
      ASSERT_TRUE(written.ok()) << written.status();
      EXPECT_TRUE(ReadAll(**written) == expected) << out;
      for (const StoredTensor& tensor : (*written)->tensors()) {
        EXPECT_TRUE(tensor.xxh3 || tensor.has_crc) << tensor.name;
      }
    }
    const auto torch = OpenCheckpointPath(Path(name + ".pt"));
    EXPECT_EQ(Order(**torch), Order(**reader));
    EXPECT_EQ((*torch)->module_versions(), (*reader)->module_versions());
    ASSERT_EQ(Convert(Path(name), name + "-again.pt", to_torch), absl::OkStatus());
    EXPECT_TRUE(ReadAll(**OpenCheckpointPath(Path(name + "-again.pt"))) == expected);
  }
  EXPECT_GT(converted, 40u);
}

TEST_F(ConvertTest, ConjugateAndNegativeViewsAreResolved) {
  ConvertOptions to_torch;
  to_torch.to_torch = true;
  const std::string path = DataPath("torch-2.15.0/conj_neg.pt");
  ASSERT_EQ(Convert(path, "a.pt", to_torch), absl::OkStatus());
  EXPECT_TRUE(ReadAll(**OpenCheckpointPath(Path("a.pt"))) == ReadAll(**OpenCheckpointPath(path)));
}

TEST_F(ConvertTest, AStateDictIsTakenOutOfANestedFile) {
  ASSERT_EQ(Convert(DataPath("torch-2.15.0/nested.pt"), "a.safetensors", {}, "ema.state_dict"),
            absl::OkStatus());
}

TEST_F(ConvertTest, ShardsKeepToTheirSize) {
  ConvertOptions options;
  options.max_shard_bytes = 300;
  ASSERT_EQ(Convert(DataPath("torch-2.15.0/batchnorm.pt"), "shards/", options), absl::OkStatus());
  EXPECT_THAT(
      Names("shards"),
      UnorderedElementsAre("model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors",
                           "model-00003-of-00004.safetensors", "model-00004-of-00004.safetensors",
                           "model.safetensors.index.json"));
  const auto reader = OpenCheckpointPath(Path("shards"));
  EXPECT_EQ(Order(**reader), Order(**OpenCheckpointPath(DataPath("torch-2.15.0/batchnorm.pt"))));
  options.max_shard_bytes = 1'000'000;
  ASSERT_EQ(Convert(DataPath("torch-2.15.0/batchnorm.pt"), "one", options), absl::OkStatus());
  EXPECT_THAT(Names("one"), UnorderedElementsAre("model.safetensors"));
  options.to_torch = true;
  EXPECT_EQ(GetReason(Convert(DataPath("torch-2.15.0/batchnorm.pt"), "x", options)),
            Reason::kInvalidField);
}

TEST_F(ConvertTest, KindsAndMetadataOfASafetensorsFileStay) {
  Write("in.safetensors",
        Safetensors(R"({"__metadata__":{"note":"text","tied":"w","modelstate.kinds":)"
                    R"("{\"buffers\":[\"b\"],\"frozen\":[\"w\",\"tied\"]}"},)"
                    R"("w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                    R"("b":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
                    "xy"));
  ASSERT_EQ(Convert(Path("in.safetensors"), "out.safetensors"), absl::OkStatus());
  const auto reader = OpenCheckpointPath(Path("out.safetensors"));
  ASSERT_TRUE(reader.ok()) << reader.status();
  EXPECT_EQ((*reader)->metadata().at("note"), "text");
  const auto tensors = (*reader)->tensors();
  ASSERT_EQ(tensors.size(), 3u);
  EXPECT_EQ(tensors[0].requires_grad, false);
  EXPECT_EQ(tensors[1].alias_of, "w");
  EXPECT_EQ(tensors[2].kind, TensorKind::kBuffer);
}

TEST_F(ConvertTest, DTypesOfNoModuleAreCarriedBetweenSafetensorsFiles) {
  const auto entry = [](const char* dtype, int bytes) {
    return absl::StrCat(R"({"w":{"dtype":")", dtype, R"(","shape":[2,4],"data_offsets":[0,)", bytes,
                        "]}}");
  };
  const std::pair<const char*, int> dtypes[] = {{"F4", 4},          {"F6_E2M3", 6},
                                                {"F6_E3M2", 6},     {"F8_E8M0", 8},
                                                {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}};
  ConvertOptions force;
  force.force = true;
  for (const auto& [dtype, bytes] : dtypes) {
    Write("in.safetensors", Safetensors(entry(dtype, bytes), std::string(bytes, 'q')));
    EXPECT_EQ(GetReason(OpenCheckpointPath(Path("in.safetensors")).status()),
              Reason::kCheckpointUnsupported);
    const auto in = OpenCheckpointPath(Path("in.safetensors"), "", /*allow_opaque=*/true);
    ASSERT_TRUE(in.ok()) << in.status();
    ASSERT_TRUE(ConvertCheckpoint(**in, Path("out.safetensors"), force).ok());
    const auto out = OpenCheckpointPath(Path("out.safetensors"), "", /*allow_opaque=*/true);
    ASSERT_TRUE(out.ok()) << out.status();
    EXPECT_EQ((*out)->tensors()[0].dtype_name(), dtype);
    EXPECT_EQ((*out)->tensors()[0].shape.ToString(), "[2, 4]");
    EXPECT_EQ(ReadAll(**out).at("w").bytes, ReadAll(**in).at("w").bytes);
    force.to_torch = true;
    EXPECT_EQ(GetReason(ConvertCheckpoint(**in, Path("out.pt"), force).status()),
              Reason::kNotRepresentable);
    force.to_torch = false;
  }
  Write("in.safetensors",
        Safetensors(R"({"w":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}})", "x"));
  EXPECT_THAT(std::string(OpenCheckpointPath(Path("in.safetensors"), "", true).status().message()),
              HasSubstr("no whole number of bytes"));
}

TEST_F(ConvertTest, WhatIsThereIsReplacedByForceOnly) {
  const std::string in = DataPath("torch-2.15.0/batchnorm.pt");
  Write("out.safetensors", "old");
  EXPECT_EQ(GetReason(Convert(in, "out.safetensors")), Reason::kCheckpointExists);
  EXPECT_EQ(ReadWholeFile(Path("out.safetensors")), "old");
  ConvertOptions force;
  force.force = true;
  EXPECT_EQ(Convert(in, "out.safetensors", force), absl::OkStatus());
  EXPECT_EQ(Convert(Path("out.safetensors"), "out.safetensors", force), absl::OkStatus())
      << "in its own place";
  EXPECT_TRUE(OpenCheckpointPath(Path("out.safetensors")).ok());

  force.max_shard_bytes = 300;
  ASSERT_EQ(Convert(in, "shards", force), absl::OkStatus());
  ASSERT_EQ(Convert(Path("shards"), "shards", force), absl::OkStatus());
  EXPECT_EQ(GetReason(Convert(in, "out.safetensors", force)), Reason::kInvalidField);
  Write("shards/config.json", "{}");
  const absl::Status status = Convert(in, "shards", force);
  EXPECT_EQ(GetReason(status), Reason::kInvalidField) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("\"config.json\""));
  force.max_shard_bytes = 0;
  EXPECT_EQ(GetReason(Convert(in, "shards", force)), Reason::kInvalidField);
  EXPECT_THAT(Names(), UnorderedElementsAre("out.safetensors", "shards"));
}

TEST_F(ConvertTest, WhatIsReadOrOfASavedCheckpointIsNotReplaced) {
  const std::string sharded =
      std::string(MODELSTATE_SOURCE_DIR) + "/tests/data/sharded-safetensors";
  fs::copy(sharded, Path("model"));
  fs::create_directories(Path("saved"));
  Write("saved/manifest.json", "{}");
  fs::copy(DataPath("torch-2.15.0/batchnorm.pt"), Path("nested.pt"));
  ASSERT_EQ(Convert(Path("nested.pt"), "saved/model.safetensors"), absl::OkStatus());
  fs::create_directories(Path("hub/base"));
  fs::copy(Path("saved/model.safetensors"), Path("hub/lora.safetensors"));
  ConvertOptions force;
  force.force = true;
  ConvertOptions shards = force;
  shards.max_shard_bytes = 300;
  ConvertOptions torch = force;
  torch.to_torch = true;
  const auto refuses = [this](const std::string& in, const std::string& out,
                              const ConvertOptions& options) {
    const absl::Status status = Convert(Path(in), out, options);
    EXPECT_EQ(GetReason(status), Reason::kInvalidField) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("give another name"));
  };
  refuses("model", "model/model-00001-of-00004.safetensors", force);
  refuses("model/model.safetensors.index.json", "model/model-00002-of-00004.safetensors", force);
  refuses("hub/lora.safetensors", "hub", shards);
  fs::create_directories(Path("fin"));
  fs::copy(Path("saved/model.safetensors"), Path("fin/llama.safetensors"));
  refuses("nested.pt", "fin", shards);
  refuses("nested.pt", "nested.pt", torch);
  refuses("nested.pt", "saved/model.safetensors", force);
  EXPECT_TRUE(OpenCheckpointPath(Path("model")).ok());
  EXPECT_TRUE(fs::exists(Path("hub/lora.safetensors")));
}

// A file of a few bytes can say that it has a tensor of many.
TEST_F(ConvertTest, NoTensorIsHeldWhole) {
  constexpr uint64_t kBytes = uint64_t{48} << 20;
  Write("in.safetensors", Safetensors(absl::StrCat(R"({"w":{"dtype":"U8","shape":[)", kBytes,
                                                   R"(],"data_offsets":[0,)", kBytes, "]}}"),
                                      ""));
  fs::resize_file(Path("in.safetensors"), fs::file_size(Path("in.safetensors")) + kBytes);
  ConvertOptions torch;
  torch.to_torch = true;
  ConvertOptions shards;
  shards.max_shard_bytes = 1000;
  ResetPeakAllocation();
  EXPECT_EQ(Convert(Path("in.safetensors"), "out.safetensors"), absl::OkStatus());
  EXPECT_EQ(Convert(Path("in.safetensors"), "out.pt", torch), absl::OkStatus());
  EXPECT_EQ(Convert(Path("out.pt"), "out", shards), absl::OkStatus());
  EXPECT_LT(PeakAllocation(), size_t{8} << 20);
  EXPECT_EQ((*OpenCheckpointPath(Path("out")))->tensors()[0].nbytes(), kBytes);
}

TEST_F(ConvertTest, ACorruptFileLeavesNothing) {
  std::string bad = TorchZip(PickledStateDict({}));
  bad[bad.find(std::string(16, '\x3f'))] ^= 1;
  Write("bad.pt", bad);
  ConvertOptions options;
  for (const uint64_t shard : {0, 8}) {
    options.max_shard_bytes = shard;
    const absl::Status status = Convert(Path("bad.pt"), "out", options);
    EXPECT_EQ(GetReason(status), Reason::kCheckpointCorrupt) << status;
    EXPECT_THAT(Names(), UnorderedElementsAre("bad.pt"));
  }
}

TEST_F(ConvertTest, FoldersThatAreNoCheckpointAreNamed) {
  EXPECT_EQ(GetReason(OpenCheckpointPath(folder_).status()), Reason::kCheckpointNotFound);
  Write("__0_0.distcp", "PK");
  EXPECT_THAT(std::string(OpenCheckpointPath(folder_).status().message()),
              HasSubstr("dcp_to_torch"));
  fs::remove(Path("__0_0.distcp"));
  Write("base.safetensors.index.json", "{}");
  Write("ema.safetensors.index.json", "{}");
  EXPECT_THAT(std::string(OpenCheckpointPath(folder_).status().message()),
              AllOf(HasSubstr(folder_), HasSubstr("\"base.safetensors.index.json\", \"ema.")));
}

}  // namespace
}  // namespace modelstate
