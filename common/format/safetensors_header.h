#ifndef MODELSTATE_COMMON_FORMAT_SAFETENSORS_HEADER_H_
#define MODELSTATE_COMMON_FORMAT_SAFETENSORS_HEADER_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "common/format/checkpoint_reader.h"

// The JSON part of a safetensors file. Internal to the folder.
namespace modelstate {

inline constexpr uint64_t kMaxSafetensorsHeaderBytes = 100'000'000;

struct SafetensorsIndex {
  std::vector<StoredTensor> tensors;  // in the order of the text
  std::vector<uint64_t> begins;       // of each, in the data region
  std::map<std::string, std::string> metadata;
};

// Parses and checks everything that the JSON text alone shows: structure, names, dtypes, shapes,
// and that the tensors tile `data_bytes` without hole or overlap. Allocates about four times the
// text, and whatever the text at most ten times it, or 32 MiB for many pairs of metadata. Errors as
// those of CheckpointReader.
absl::StatusOr<SafetensorsIndex> ParseSafetensorsHeader(absl::string_view json, uint64_t data_bytes,
                                                        bool allow_opaque = false);

// Names of tied tensors that `metadata` records and `tensors` do not have, by the place of the
// tensor that has the elements.
using AliasRecords = std::map<size_t, std::vector<std::string>>;
AliasRecords FindAliasRecords(const std::map<std::string, std::string>& metadata,
                              absl::Span<const StoredTensor> tensors);

// Whether a pair of `__metadata__`, whose key is not an entry and whose value is one, stands for a
// tied tensor that the file holds under the name `value`. Foreign files have free text too.
bool IsAliasRecord(absl::string_view key, absl::string_view value);

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_FORMAT_SAFETENSORS_HEADER_H_
