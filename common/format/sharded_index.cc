#include "common/format/sharded_index.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/format/text.h"

namespace modelstate {
namespace {

// As transformers prefers them.
constexpr const char* kUsualIndexes[] = {"model.safetensors.index.json",
                                         "pytorch_model.bin.index.json"};

// What is wrong with `name` as the name of a shard; empty: nothing.
absl::string_view ShardNameProblem(absl::string_view name) {
  if (name.empty()) return "is empty";
  const size_t slash = name.find('/');
  if (slash == 0 || absl::StartsWith(name, "../") || absl::StrContains(name, "/../")) {
    return "leads out of the folder";
  }
  if (slash != absl::string_view::npos) return "is in another folder";
  if (name == "." || name == "..") return "is a folder";
  if (name.find('\0') != absl::string_view::npos) return "has a NUL";
  if (name.size() > 255) return "is longer than 255 bytes";
  return "";
}

// Far more than any index has tied names. Each is a node of a map.
constexpr size_t kMaxMetadataTexts = size_t{1} << 16;
constexpr size_t kMaxMetadataBytes = size_t{4} << 20;

absl::Status Invalid(absl::string_view text) {
  return Corrupt(absl::StrCat("the index is invalid: ", text));
}

absl::string_view KindOf(const JsonView& json) {
  if (json.is_object()) return "an object";
  if (json.is_array()) return "an array";
  if (json.is_string()) return "a string";
  if (json.is_null()) return "null";
  return json.Bool() ? "a boolean" : "a number";
}

}  // namespace

bool LooksLikeShardedIndex(absl::string_view head) {
  // A safetensors file whose first byte is this too has the upper bytes of a length after it.
  return absl::StartsWith(head, "{") && (head.size() < 8 || head[7] != '\0');
}

absl::StatusOr<StoredShardedIndex> StoredShardedIndex::Parse(std::string text) {
  StoredShardedIndex index;
  index.text_ = std::make_unique<const std::string>(std::move(text));
  const absl::StatusOr<JsonView> json = JsonView::Parse(*index.text_);
  if (!json.ok()) return Invalid(json.status().message());
  if (!json->is_object()) return Invalid(absl::StrCat("it is ", KindOf(*json), ", not an object"));
  std::optional<JsonView> weight_map;
  std::optional<JsonView> metadata;
  for (const JsonView::Element member : *json) {
    const std::string key = *member.key.String();
    if (key != "weight_map" && key != "metadata") continue;
    std::optional<JsonView>& place = key == "metadata" ? metadata : weight_map;
    if (place) return Invalid(absl::StrCat("the member ", ShowName(key), " occurs twice"));
    place = member.value;
  }
  if (!weight_map) {
    return Unsupported(
        "the file is JSON without a \"weight_map\", so no index of a sharded checkpoint; give a "
        ".safetensors or PyTorch file, or an index such as model.safetensors.index.json");
  }
  index.weight_map_ = *weight_map;
  MS_RETURN_IF_ERROR(index.TakeMap());
  if (metadata) MS_RETURN_IF_ERROR(index.TakeMetadata(*metadata));
  return index;
}

absl::StatusOr<StoredShardedIndex> StoredShardedIndex::Read(const File& file) {
  MS_ASSIGN_OR_RETURN(const uint64_t size, file.Size());
  if (size > kMaxShardedIndexBytes) {
    return Unsupported(
        absl::StrCat("the index has ", size, " bytes, over the limit of ", kMaxShardedIndexBytes));
  }
  std::string text(size, '\0');
  MS_RETURN_IF_ERROR(
      file.ReadAt(0, absl::MakeSpan(reinterpret_cast<uint8_t*>(text.data()), text.size())));
  return Parse(std::move(text));
}

absl::Status StoredShardedIndex::TakeMap() {
  if (!weight_map_.is_object()) {
    return Invalid(absl::StrCat("\"weight_map\" is ", KindOf(weight_map_), ", not an object"));
  }
  for (const JsonView::Element member : weight_map_) {
    const std::string tensor = *member.key.String();
    absl::string_view problem = TensorNameProblem(tensor);
    if (!problem.empty()) {
      return Invalid(absl::StrCat("the tensor name ", ShowName(tensor), " ", problem));
    }
    std::optional<std::string> file = member.value.String();
    if (!file) {
      return Invalid(absl::StrCat("the file of ", ShowName(tensor), " is ", KindOf(member.value)));
    }
    problem = ShardNameProblem(*file);
    if (!problem.empty()) {
      return Invalid(absl::StrCat("the file ", ShowName(*file), " of ", ShowName(tensor), " ",
                                  problem, "; an index names files that lie beside it"));
    }
    if (!places_.emplace(*file, shards_.size()).second) continue;
    if (shards_.size() == kMaxShards) {
      return Unsupported(absl::StrCat("the index names more than ", kMaxShards,
                                      " files; write the checkpoint in larger shards"));
    }
    shards_.push_back(*std::move(file));
  }
  return absl::OkStatus();
}

absl::Status StoredShardedIndex::TakeMetadata(JsonView json) {
  if (!json.is_object()) return absl::OkStatus();  // it says nothing
  size_t bytes = 0;
  for (const JsonView::Element member : json) {
    std::optional<std::string> value = member.value.String();
    if (!value) continue;
    std::string key = *member.key.String();
    bytes += key.size() + value->size();
    if (metadata_.size() == kMaxMetadataTexts || bytes > kMaxMetadataBytes) {
      return Unsupported(absl::StrCat("the \"metadata\" of the index has more than ",
                                      kMaxMetadataTexts, " texts or ", kMaxMetadataBytes,
                                      " bytes of them; take out what names no tied tensor"));
    }
    metadata_[std::move(key)] = *std::move(value);
  }
  return absl::OkStatus();
}

absl::Status StoredShardedIndex::ForEachEntry(
    absl::FunctionRef<absl::Status(ShardedIndex::Entry entry)> take) const {
  for (const JsonView::Element member : weight_map_) {
    const auto place = places_.find(*member.value.String());
    MS_RETURN_IF_ERROR(take({*member.key.String(), place->second}));
  }
  return absl::OkStatus();
}

std::string ShardedIndexText(const ShardedIndex& index, uint64_t total_size) {
  nlohmann::ordered_json json;
  json["metadata"]["total_size"] = total_size;
  for (const auto& [key, value] : index.metadata) json["metadata"][key] = value;
  nlohmann::ordered_json& weight_map = json["weight_map"] = nlohmann::ordered_json::object();
  for (const ShardedIndex::Entry& entry : index.entries) {
    // Not []: an ordered object looks through all its keys for it.
    weight_map.get_ref<nlohmann::ordered_json::object_t&>().emplace_back(entry.name,
                                                                         index.shards[entry.shard]);
  }
  return absl::StrCat(json.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace),
                      "\n");
}

std::optional<std::string> FindShardedIndex(absl::Span<const std::string> names) {
  for (const char* usual : kUsualIndexes) {
    if (std::find(names.begin(), names.end(), usual) != names.end()) return usual;
  }
  std::optional<std::string> found;
  for (const std::string& name : names) {
    if (!absl::EndsWith(name, kIndexSuffix)) continue;
    if (found) return std::nullopt;
    found = name;
  }
  return found;
}

}  // namespace modelstate
