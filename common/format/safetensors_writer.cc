#include "common/format/safetensors_writer.h"

#include <nlohmann/json.hpp>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/digest.h"
#include "common/base/status.h"
#include "common/format/safetensors_header.h"
#include "common/format/text.h"

namespace modelstate {
namespace {

using Json = nlohmann::json;

// `text` is valid UTF-8.
std::string Quote(const std::string& text) {
  return Json(text).dump(-1, ' ', false, Json::error_handler_t::replace);
}

absl::Status NotRepresentable(absl::string_view text) {
  return MakeError(Reason::kNotRepresentable, text);
}

std::string NameArray(const std::vector<const std::string*>& names) {
  return absl::StrCat("[",
                      absl::StrJoin(names, ",",
                                    [](std::string* out, const std::string* name) {
                                      if (IsValidUtf8(*name)) out->append(Quote(*name));
                                    }),
                      "]");
}

}  // namespace

absl::StatusOr<std::string> SafetensorsHeader(absl::Span<const TensorSpec> specs,
                                              const StateLayout& layout,
                                              const std::map<std::string, std::string>& metadata,
                                              const OpaqueEntries& opaque, uint64_t alignment) {
  if (layout.size() != specs.size()) {
    return absl::InternalError("SafetensorsHeader: the layout is of another list");
  }
  // An owner's name, and the name under which the file holds its bytes: another one where only
  // aliases of it are in the list.
  absl::flat_hash_map<absl::string_view, absl::string_view> entry_of_owner;
  absl::flat_hash_map<absl::string_view, bool> is_entry;
  for (size_t i = 0; i < specs.size(); ++i) {
    const TensorSpec& spec = specs[i];
    const absl::string_view problem = TensorNameProblem(spec.name);
    if (!problem.empty()) {
      return NotRepresentable(absl::StrCat("the tensor name ", ShowName(spec.name), " ", problem,
                                           ", so no safetensors file can hold it; rename it"));
    }
    if (layout.owns_bytes(i)) {
      entry_of_owner.emplace(spec.is_alias() ? spec.alias_of : spec.name, spec.name);
    }
    if (!is_entry.emplace(spec.name, layout.owns_bytes(i)).second) {
      return NotRepresentable(absl::StrCat("the tensor name ", ShowName(spec.name),
                                           " occurs twice; a safetensors file needs unique names"));
    }
  }

  std::map<std::string, std::string> all = metadata;
  for (const auto& [key, value] : metadata) {
    if (!IsValidUtf8(key) || !IsValidUtf8(value)) {
      return NotRepresentable(absl::StrCat("the metadata ", ShowName(key), " is not valid UTF-8"));
    }
    const auto named = is_entry.find(value);
    if (named != is_entry.end() && named->second && IsAliasRecord(key, value) &&
        !is_entry.contains(key)) {
      return NotRepresentable(absl::StrCat("the metadata ", ShowName(key), " has a tensor's name, ",
                                           ShowName(value),
                                           ", as its value and would be read as a tied tensor; "
                                           "choose another text"));
    }
  }
  for (size_t i = 0; i < specs.size(); ++i) {
    if (layout.owns_bytes(i)) continue;
    const absl::string_view owner = specs[i].is_alias() ? specs[i].alias_of : specs[i].name;
    const std::string entry(entry_of_owner[owner]);
    if (!IsAliasRecord(specs[i].name, entry)) {
      return NotRepresentable(absl::StrCat("the tied name ", ShowName(specs[i].name),
                                           " has a meaning in safetensors metadata; rename it"));
    }
    if (!all.emplace(specs[i].name, entry).second) {
      return NotRepresentable(absl::StrCat("the metadata key ", ShowName(specs[i].name),
                                           " is also the name of a tied tensor; rename the key"));
    }
  }

  std::string json = "{";
  if (!all.empty()) {
    json += "\"__metadata__\":{";
    for (const auto& [key, value] : all) {
      absl::StrAppend(&json, json.back() == '{' ? "" : ",", Quote(key), ":", Quote(value));
    }
    json += "}";
  }
  for (size_t i = 0; i < specs.size(); ++i) {
    if (!layout.owns_bytes(i)) continue;
    const ByteRange range = layout.range(i);
    const auto bytes = opaque.find(i);
    const bool known = bytes == opaque.end();
    absl::StrAppend(&json, json.size() == 1 ? "" : ",", Quote(specs[i].name), ":{\"dtype\":\"",
                    known ? DTypeName(specs[i].dtype) : bytes->second.dtype, "\",\"shape\":[",
                    absl::StrJoin((known ? specs[i].shape : bytes->second.shape).dims(), ","),
                    "],\"data_offsets\":[");
    absl::StrAppend(&json, range.begin, ",", range.end, "]}");
  }
  json += "}";
  json.resize((8 + json.size() + alignment - 1) / alignment * alignment - 8, ' ');
  if (json.size() > kMaxSafetensorsHeaderBytes) {
    return NotRepresentable(
        absl::StrCat("the safetensors header takes ", json.size(), " bytes, and the format allows ",
                     kMaxSafetensorsHeaderBytes, "; save fewer tensors or shorter names"));
  }
  std::string header;
  header.reserve(8 + json.size());
  for (int shift = 0; shift < 64; shift += 8) {
    header.push_back(static_cast<char>(static_cast<uint64_t>(json.size()) >> shift));
  }
  header += json;
  return header;
}

std::string KindsMetadata(absl::Span<const TensorSpec> specs) {
  std::vector<const std::string*> buffers;
  std::vector<const std::string*> frozen;
  for (const TensorSpec& spec : specs) {
    if (spec.kind == TensorKind::kBuffer) buffers.push_back(&spec.name);
    if (spec.kind == TensorKind::kParameter && !spec.requires_grad) frozen.push_back(&spec.name);
  }
  return absl::StrCat("{\"buffers\":", NameArray(buffers), ",\"frozen\":", NameArray(frozen), "}");
}

std::string DigestsMetadata(absl::Span<const TensorSpec> specs,
                            absl::Span<const uint64_t> digests) {
  // An alias whose owner is not in the list is an entry, and its digest counts.
  const StateLayout layout(specs);
  std::string json = "{";
  for (size_t i = 0; i < specs.size() && i < digests.size(); ++i) {
    if (!layout.owns_bytes(i) || !IsValidUtf8(specs[i].name)) continue;
    absl::StrAppend(&json, json.size() == 1 ? "" : ",", Quote(specs[i].name), ":\"",
                    DigestToHex(digests[i]), "\"");
  }
  json += "}";
  return json;
}

std::map<std::string, std::string> StateDictMetadata(const std::string& module, Version version,
                                                     uint64_t step,
                                                     absl::Span<const TensorSpec> specs,
                                                     absl::Span<const uint64_t> digests) {
  return {{"format", "pt"},
          {"modelstate.module", module},
          {"modelstate.version", absl::StrCat(version.number)},
          {"modelstate.step", absl::StrCat(step)},
          {kKindsMetadataKey, KindsMetadata(specs)},
          {kDigestsMetadataKey, DigestsMetadata(specs, digests)}};
}

}  // namespace modelstate
