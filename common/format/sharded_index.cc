#include "common/format/sharded_index.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/format/text.h"

namespace modelstate {
namespace {

using Json = nlohmann::json;

constexpr char kIndexSuffix[] = ".index.json";
// As transformers prefers them.
constexpr const char* kUsualIndexes[] = {"model.safetensors.index.json",
                                         "pytorch_model.bin.index.json"};

// What is wrong with `name` as the name of a shard; empty: nothing.
absl::string_view ShardNameProblem(absl::string_view name) {
  if (name.empty()) return "is empty";
  if (name.find('/') != absl::string_view::npos) return "leads out of the folder";
  if (name == "." || name == "..") return "is a folder";
  if (name.find('\0') != absl::string_view::npos) return "has a NUL";
  if (name.size() > 255) return "is longer than 255 bytes";
  return "";
}

// Receives the text token by token, so that it sees a key that comes twice. Each callback returns
// false to stop; then status() says why.
class IndexHandler : public nlohmann::json_sax<Json> {
 public:
  ShardedIndex& index() { return index_; }
  absl::Status status() const { return status_; }
  bool complete() const { return has_weight_map_ && depth_ == 0; }

  bool null() override { return Other("null"); }
  bool boolean(bool) override { return Other("a boolean"); }
  bool number_integer(number_integer_t) override { return Other("a number"); }
  bool number_unsigned(number_unsigned_t) override { return Other("a number"); }
  bool number_float(number_float_t, const string_t&) override { return Other("a number"); }
  bool binary(binary_t&) override { return Other("binary data"); }

  bool string(string_t& value) override {
    if (depth_ != 2 || section_ == Section::kOther) return Other("a string");
    if (section_ == Section::kMetadata) {
      index_.metadata[key_] = std::move(value);
      return true;
    }
    const absl::string_view problem = ShardNameProblem(value);
    if (!problem.empty()) {
      return Fail(absl::StrCat("the file ", ShowName(value), " of ", ShowName(key_), " ", problem,
                               "; an index names files that lie beside it"));
    }
    const auto [place, is_new] = shards_.emplace(value, index_.shards.size());
    if (is_new) index_.shards.push_back(std::move(value));
    if (index_.shards.size() > kMaxShards) {
      status_ = Unsupported(absl::StrCat("the index names more than ", kMaxShards,
                                         " files; write the checkpoint in larger shards"));
      return false;
    }
    index_.entries.push_back({key_, place->second});
    return true;
  }

  bool start_object(size_t) override { return Open("an object", /*is_object=*/true); }
  bool start_array(size_t) override { return Open("an array", /*is_object=*/false); }
  bool end_object() override { return Close(); }
  bool end_array() override { return Close(); }

  bool key(string_t& value) override {
    if (depth_ == 1) {
      section_ = value == "weight_map" ? Section::kWeightMap
                 : value == "metadata" ? Section::kMetadata
                                       : Section::kOther;
      if (!members_.insert(value).second) {
        return Fail(absl::StrCat("the member ", ShowName(value), " occurs twice"));
      }
    } else if (depth_ == 2 && section_ == Section::kWeightMap) {
      const absl::string_view problem = TensorNameProblem(value);
      if (!problem.empty()) {
        return Fail(absl::StrCat("the tensor name ", ShowName(value), " ", problem));
      }
      if (!names_.insert(value).second) {
        return Fail(absl::StrCat("the tensor ", ShowName(value), " occurs twice"));
      }
    }
    key_ = std::move(value);
    return true;
  }

  bool parse_error(size_t position, const std::string&, const Json::exception&) override {
    // The parser's own text quotes the input; the position is enough.
    return Fail(absl::StrCat("it is not JSON at byte ", position));
  }

 private:
  enum class Section { kOther, kMetadata, kWeightMap };

  bool Fail(absl::string_view text) {
    if (status_.ok()) status_ = Corrupt(absl::StrCat("the index is invalid: ", text));
    return false;
  }

  // A value that says nothing here: of metadata, or of a member that is not known.
  bool Other(absl::string_view what) {
    if (depth_ == 0) return Fail(absl::StrCat("it is ", what, ", not an object"));
    if (section_ != Section::kWeightMap) return true;
    if (depth_ == 1) return Fail(absl::StrCat("\"weight_map\" is ", what, ", not an object"));
    return Fail(absl::StrCat("the file of ", ShowName(key_), " is ", what));
  }

  bool Open(absl::string_view what, bool is_object) {
    const bool weight_map = depth_ == 1 && section_ == Section::kWeightMap && is_object;
    if (weight_map) has_weight_map_ = true;
    if (!weight_map && !(depth_ == 0 && is_object) && !Other(what)) return false;
    ++depth_;
    return true;
  }

  bool Close() {
    --depth_;
    return true;
  }

  ShardedIndex index_;
  absl::Status status_;
  size_t depth_ = 0;  // of what is open at the place at hand
  Section section_ = Section::kOther;
  bool has_weight_map_ = false;
  std::string key_;
  absl::flat_hash_set<std::string> members_;
  absl::flat_hash_set<std::string> names_;
  absl::flat_hash_map<std::string, size_t> shards_;
};

}  // namespace

bool LooksLikeShardedIndex(absl::string_view head) {
  // A safetensors file whose first byte is this too has the upper bytes of a length after it.
  return absl::StartsWith(head, "{") && (head.size() < 8 || head[7] != '\0');
}

absl::StatusOr<ShardedIndex> ParseShardedIndex(absl::string_view json) {
  IndexHandler handler;
  // The parser takes a NUL for the end of the text.
  if (json.find('\0') != absl::string_view::npos) {
    return Corrupt("the index is invalid: it has a NUL byte");
  }
  const bool parsed = Json::sax_parse(json.data(), json.data() + json.size(), &handler);
  MS_RETURN_IF_ERROR(handler.status());
  if (!parsed || !handler.complete()) {
    return Unsupported(
        "the file is JSON without a \"weight_map\", so no index of a sharded checkpoint; give a "
        ".safetensors or PyTorch file, or an index such as model.safetensors.index.json");
  }
  return std::move(handler.index());
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
