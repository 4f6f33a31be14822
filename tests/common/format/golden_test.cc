// Reads every checkpoint of tests/data and compares it, tensor by tensor, with what the PyTorch
// that wrote it reads: the sidecar NAME.json.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "common/base/digest.h"
#include "common/base/status.h"
#include "common/format/checkpoint_reader.h"

namespace modelstate {
namespace {

using Json = nlohmann::json;

const std::string kData = std::string(MODELSTATE_SOURCE_DIR) + "/tests/data/";

std::vector<std::string> Goldens() {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(kData)) {
    const std::string path = entry.path().string();
    if (std::filesystem::exists(path + ".json")) names.push_back(path.substr(kData.size()));
  }
  std::sort(names.begin(), names.end());
  return names;
}

Json Sidecar(const std::string& name) {
  std::ifstream in(kData + name + ".json");
  return Json::parse(in);
}

absl::StatusOr<std::unique_ptr<CheckpointReader>> OpenGolden(const std::string& name,
                                                             const std::string& key = "") {
  absl::StatusOr<File> file = OpenForRead(kData + name);
  if (!file.ok()) return file.status();
  OpenOptions options;
  options.state_dict_key = key;
  options.open_sibling = [folder = kData + name.substr(0, name.rfind('/') + 1)](
                             const std::string& shard) { return OpenForRead(folder + shard); };
  return OpenCheckpoint(*std::move(file), options);
}

std::string ToHex(const std::vector<uint8_t>& bytes) {
  std::string hex;
  for (uint8_t byte : bytes) {
    hex.push_back("0123456789abcdef"[byte >> 4]);
    hex.push_back("0123456789abcdef"[byte & 15]);
  }
  return hex;
}

class GoldenTest : public testing::TestWithParam<std::string> {};

TEST_P(GoldenTest, ReadsWhatTorchReads) {
  const Json sidecar = Sidecar(GetParam());
  const auto reader = OpenGolden(GetParam(), sidecar.value("state_dict_key", ""));
  if (sidecar.contains("error")) {
    ASSERT_FALSE(reader.ok());
    ASSERT_TRUE(GetReason(reader.status()).has_value()) << reader.status();
    EXPECT_EQ(ReasonName(*GetReason(reader.status())), sidecar["error"].get<std::string>());
    EXPECT_THAT(std::string(reader.status().message()),
                testing::HasSubstr(sidecar["contains"].get<std::string>()));
    return;
  }
  ASSERT_TRUE(reader.ok()) << reader.status();
  const bool safetensors = (*reader)->format() == CheckpointFormat::kSafetensors;
  const Json& expected = sidecar["tensors"];
  ASSERT_EQ((*reader)->tensors().size(), expected.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    // PyTorch's order is kept; a safetensors sidecar has the order of a dict of another library.
    const Json* row = &expected[i];
    const StoredTensor& tensor = (*reader)->tensors()[i];
    if (safetensors) {
      const auto it = std::find_if(expected.begin(), expected.end(),
                                   [&](const Json& r) { return r["name"] == tensor.name; });
      ASSERT_NE(it, expected.end()) << tensor.name;
      row = &*it;
    }
    SCOPED_TRACE(tensor.name);
    EXPECT_EQ(tensor.name, (*row)["name"]);
    EXPECT_EQ(DTypeName(tensor.dtype), (*row)["dtype"].get<std::string>());
    EXPECT_EQ(std::vector<int64_t>(tensor.shape.dims().begin(), tensor.shape.dims().end()),
              (*row)["shape"].get<std::vector<int64_t>>());
    EXPECT_EQ(tensor.alias_of, row->value("alias_of", ""));
    if (row->contains("requires_grad")) {
      EXPECT_EQ(tensor.kind, TensorKind::kParameter);
      EXPECT_EQ(tensor.requires_grad, (*row)["requires_grad"].get<bool>());
    } else {
      EXPECT_EQ(tensor.kind, std::nullopt);
      EXPECT_EQ(tensor.requires_grad, std::nullopt);
    }
    std::vector<uint8_t> bytes(tensor.nbytes());
    ASSERT_EQ((*reader)->Read(i, absl::MakeSpan(bytes)), absl::OkStatus());
    EXPECT_EQ(DigestToHex(Xxh3(bytes)), (*row)["xxh3"].get<std::string>());
    if (row->contains("hex")) {
      EXPECT_EQ(ToHex(bytes), (*row)["hex"].get<std::string>());
    }
  }
  if (sidecar.contains("metadata")) {
    EXPECT_EQ((*reader)->metadata(),
              (sidecar["metadata"].get<std::map<std::string, std::string>>()));
  }
}

INSTANTIATE_TEST_SUITE_P(Files, GoldenTest, testing::ValuesIn(Goldens()), [](const auto& info) {
  std::string name = info.param;
  std::replace_if(
      name.begin(), name.end(), [](char c) { return !std::isalnum(c); }, '_');
  return name;
});

using Contents = std::map<std::string, std::vector<uint8_t>>;

Contents ReadAll(const CheckpointReader& reader) {
  Contents contents;
  for (size_t i = 0; i < reader.tensors().size(); ++i) {
    const StoredTensor& tensor = reader.tensors()[i];
    std::vector<uint8_t> bytes(tensor.nbytes());
    EXPECT_EQ(reader.Read(i, absl::MakeSpan(bytes)), absl::OkStatus()) << tensor.name;
    contents[tensor.name] = std::move(bytes);
  }
  return contents;
}

TEST(GoldenVersionsTest, FilesOfBothTorchVersionsLoadBitEqual) {
  size_t compared = 0;
  for (const std::string& name : Goldens()) {
    const std::string old = "torch-1.13.1/";
    if (name.rfind(old, 0) != 0) continue;
    const std::string twin = "torch-2.15.0/" + name.substr(old.size());
    const Json sidecar = Sidecar(name);
    if (sidecar.contains("error")) continue;
    SCOPED_TRACE(name);
    const std::string key = sidecar.value("state_dict_key", "");
    const auto first = OpenGolden(name, key);
    const auto second = OpenGolden(twin, key);
    ASSERT_TRUE(first.ok()) << first.status();
    ASSERT_TRUE(second.ok()) << second.status();
    const Contents newer = ReadAll(**second);
    for (const auto& [tensor, bytes] : ReadAll(**first)) {
      const auto it = newer.find(tensor);
      ASSERT_NE(it, newer.end()) << tensor;
      EXPECT_EQ(it->second, bytes) << tensor;
      ++compared;
    }
  }
  EXPECT_GT(compared, 80u);
}

TEST(GoldenVersionsTest, CrepeHasFortyFourTensorsInStateDictOrder) {
  const auto reader = OpenGolden("crepe-tiny.pth");
  ASSERT_TRUE(reader.ok()) << reader.status();
  const auto tensors = (*reader)->tensors();
  ASSERT_EQ(tensors.size(), 44u);
  EXPECT_EQ(tensors[0].name, "conv1.weight");
  EXPECT_EQ(tensors[4].name, "conv1_BN.running_mean");
  EXPECT_EQ(tensors[43].name, "classifier.bias");
}

}  // namespace
}  // namespace modelstate
