// Plays what real torch did (tests/data/make_load_goldens.py) on a server: the same modules, the
// same state_dicts, and the same errors, key lists and elements afterwards. Where the two versions
// of torch differ, the newer one is followed.
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "tests/server/rpc/server_fixture.h"

namespace modelstate {
namespace {

using Json = nlohmann::json;

v1::DType DTypeNamed(const std::string& name) {
  v1::DType dtype = v1::DTYPE_UNSPECIFIED;
  EXPECT_TRUE(v1::DType_Parse(name, &dtype)) << name;
  return dtype;
}

v1::TensorInfo InfoOf(const Json& row) {
  v1::TensorInfo info = Tensor(row["name"], v1::TENSOR_KIND_UNSPECIFIED,
                               row["shape"].get<std::vector<int64_t>>(), DTypeNamed(row["dtype"]));
  const bool parameter = row.value("kind", "") == "PARAMETER";
  if (row.contains("kind")) info.set_kind(parameter ? v1::PARAMETER : v1::BUFFER);
  if (row.contains("requires_grad")) info.set_requires_grad(row["requires_grad"].get<bool>());
  if (row.contains("persistent")) info.set_persistent(row["persistent"].get<bool>());
  if (row.contains("alias_of")) {
    info.set_alias_of(row["alias_of"].get<std::string>());
  } else {
    info.mutable_values()->set_raw(absl::HexStringToBytes(row["hex"].get<std::string>()));
  }
  return info;
}

// In hex, every NaN the same: torch's vector code gives the casts of a NaN payloads of its own.
std::string Elements(const std::string& bytes, v1::DType dtype) {
  uint64_t infinity = 0;
  size_t width = 2;
  if (dtype == v1::F16) infinity = 0x7c00;
  if (dtype == v1::BF16) infinity = 0x7f80;
  if (dtype == v1::F32) infinity = 0x7f800000, width = 4;
  if (dtype == v1::F64) infinity = 0x7ff0000000000000, width = 8;
  if (infinity == 0) return absl::BytesToHexString(bytes);
  std::string text;
  for (size_t i = 0; i + width <= bytes.size(); i += width) {
    uint64_t value = 0;
    std::memcpy(&value, bytes.data() + i, width);
    const uint64_t magnitude = value & ((uint64_t{1} << (8 * width - 1)) - 1);
    absl::StrAppend(&text, " ",
                    magnitude > infinity ? "NaN" : absl::BytesToHexString(bytes.substr(i, width)));
  }
  return text;
}

class LoadSemanticsTest : public ServerTest {
 protected:
  absl::StatusOr<v1::LoadResult> Play(const std::string& module, const Json& golden) {
    std::vector<v1::LoadPart> parts(golden["state_dict"].empty() ? 1 : 2);
    v1::LoadHeader* header = parts[0].mutable_header();
    header->set_module(module);
    header->set_tensor_count(golden["state_dict"].size());
    if (golden.contains("strict")) header->mutable_options()->set_strict(golden["strict"]);
    if (golden.contains("assign")) header->mutable_options()->set_assign(golden["assign"]);
    for (const Json& row : golden["state_dict"]) {
      *parts[1].mutable_tensors()->add_tensors() = InfoOf(row);
    }
    parts.emplace_back().mutable_trailer();
    return Load(parts);
  }

  void ExpectTensors(const std::string& module, const Json& rows) {
    v1::StreamStateDictRequest request;
    request.set_module(module);
    request.mutable_selection()->set_include_non_persistent(true);
    Fetched fetched = Fetch(request);
    ASSERT_TRUE(fetched.status.ok()) << fetched.status;
    std::map<std::string, std::string> bytes = fetched.Bytes();
    ASSERT_EQ(fetched.tensors.size(), rows.size());
    for (size_t i = 0; i < rows.size(); ++i) {
      const Json& row = rows[i];
      const v1::TensorInfo& tensor = fetched.tensors[i];
      SCOPED_TRACE(tensor.name());
      EXPECT_EQ(tensor.name(), row["name"].get<std::string>());
      EXPECT_EQ(v1::DType_Name(tensor.dtype()), row["dtype"].get<std::string>());
      const std::string& owner = tensor.alias_of().empty() ? tensor.name() : tensor.alias_of();
      EXPECT_EQ(Elements(bytes[owner], tensor.dtype()),
                Elements(absl::HexStringToBytes(row["hex"].get<std::string>()), tensor.dtype()));
      if (row.contains("requires_grad")) {
        EXPECT_EQ(tensor.requires_grad(), row["requires_grad"].get<bool>());
      }
    }
  }

  // Returns how many were compared.
  int PlayAll(const std::string& version, const std::set<std::string>& except) {
    std::ifstream file(absl::StrCat(DataFolder(), "load_torch_", version, ".json"));
    const Json goldens = Json::parse(file);
    int compared = 0;
    for (const Json& golden : goldens) {
      const std::string name = golden["case"];
      if (except.count(name) > 0) continue;
      SCOPED_TRACE(absl::StrCat(version, " ", name));
      ++compared;
      std::vector<v1::TensorInfo> tensors;
      for (const Json& row : golden["module"]) tensors.push_back(InfoOf(row));
      // Torch's text begins with the name of the class.
      const v1::Module module = Create("M", tensors);
      const auto result = Play("M", golden);
      if (golden.contains("error")) {
        const std::string error = golden["error"];
        const std::string text(result.status().message());
        EXPECT_EQ(text.substr(0, error.size()), error);
        const std::string more = text.substr(std::min(error.size(), text.size()));
        EXPECT_TRUE(more.empty() || absl::StartsWith(more, "\n\t(")) << more;
        EXPECT_EQ(FetchAll("M").header.version().number(), module.version().number());
        ExpectTensors("M", golden["module"]);  // torch has loaded by now what it could
      } else if (!result.ok()) {
        ADD_FAILURE() << result.status();
      } else {
        EXPECT_EQ(
            std::vector<std::string>(result->missing_keys().begin(), result->missing_keys().end()),
            golden["missing"].get<std::vector<std::string>>());
        EXPECT_EQ(std::vector<std::string>(result->unexpected_keys().begin(),
                                           result->unexpected_keys().end()),
                  golden["unexpected"].get<std::vector<std::string>>());
        ExpectTensors("M", golden["after"]);
      }
      v1::DeleteModuleRequest erase;
      erase.set_module("M");
      EXPECT_TRUE(Call(&v1::ModelState::Stub::DeleteModule, erase).ok());
    }
    return compared;
  }
};

TEST_F(LoadSemanticsTest, DoesWhatTorch2Does) { EXPECT_GT(PlayAll("2.15.0", {}), 80); }

TEST_F(LoadSemanticsTest, DoesWhatTorch1DoesButForWhatChangedSince) {
  const std::set<std::string> changed = {
      "unexpected_order",             // a key below a parameter was passed over
      "count_of_old_files",           // a missing count became 0
      "empty_state_dict_not_strict",  // the same
      "scalar_from_longer",           // the first element of any length was taken
      "scalar_from_none",             // ... and of none was an IndexError
  };
  EXPECT_GT(PlayAll("1.13.1", changed), 75);
}

}  // namespace
}  // namespace modelstate
