#ifndef MODELSTATE_COMMON_FORMAT_SAFETENSORS_WRITER_H_
#define MODELSTATE_COMMON_FORMAT_SAFETENSORS_WRITER_H_

#include <cstdint>
#include <map>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "common/base/file.h"
#include "common/base/state_layout.h"
#include "common/base/tensor_spec.h"

namespace modelstate {

// Of a tensor whose dtype is no DType: its spec is of bytes, and this is what the header says.
struct OpaqueEntry {
  absl::string_view dtype;
  Shape shape;
};
using OpaqueEntries = std::map<size_t, OpaqueEntry>;  // by place in the list

// The bytes of a safetensors file before its data region: u64 length and JSON, padded with spaces
// so that the data region begins at a multiple of `alignment` bytes, itself one of 8. Entries are
// in the order of `specs` (state_dict order), their offsets are the layout's, so the rest of the
// file is the layout's data region as it is streamed. An alias is left out as an entry, as the
// format wants, and recorded in
// `__metadata__` as {alias: owner}, as the reference implementation does. `metadata` is free text.
// Keys of ours begin with "modelstate."; see kKindsMetadataKey. INVALID_ARGUMENT NOT_REPRESENTABLE
// when a name is not valid UTF-8 or the header exceeds 100,000,000 bytes.
absl::StatusOr<std::string> SafetensorsHeader(absl::Span<const TensorSpec> specs,
                                              const StateLayout& layout,
                                              const std::map<std::string, std::string>& metadata,
                                              const OpaqueEntries& opaque = {},
                                              uint64_t alignment = 8);

// `__metadata__` keys that carry what the format itself has no place for, each a compact JSON text
// that CheckpointReader understands: the kinds ({"buffers": [names], "frozen": [names]}), and the
// digests ({name: 16 hex digits}).
inline constexpr char kKindsMetadataKey[] = "modelstate.kinds";
inline constexpr char kDigestsMetadataKey[] = "modelstate.xxh3";
// Of the files of a saved directory only: the name of the manifest without which it is not whole.
inline constexpr char kManifestMetadataKey[] = "modelstate.manifest";

std::string KindsMetadata(absl::Span<const TensorSpec> specs);
// `digests` has one entry per spec; those of aliases are ignored.
std::string DigestsMetadata(absl::Span<const TensorSpec> specs, absl::Span<const uint64_t> digests);

// All that a file of a module's state_dict at one version says of itself.
std::map<std::string, std::string> StateDictMetadata(const std::string& module, Version version,
                                                     uint64_t step,
                                                     absl::Span<const TensorSpec> specs,
                                                     absl::Span<const uint64_t> digests);

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_FORMAT_SAFETENSORS_WRITER_H_
