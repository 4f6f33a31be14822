#ifndef MODELSTATE_COMMON_FORMAT_ZIP_DIRECTORY_H_
#define MODELSTATE_COMMON_FORMAT_ZIP_DIRECTORY_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "common/base/file.h"

namespace modelstate {

// One stored (not compressed) record of a zip archive.
struct ZipRecord {
  std::string name;
  uint64_t offset = 0;  // of its bytes in the file
  uint64_t size = 0;
  uint32_t crc32 = 0;
};

// The records of a zip archive as PyTorch writes it: from the central directory, checked against
// the local headers. What it refuses is what PyTorch never writes and attacks are made of:
// compressed, encrypted or duplicate records, overlapping ranges, names that differ between the two
// headers, several roots. Opening allocates in proportion to the central directory, which lies in
// the file. Immutable after Open; thread-safe.
class ZipDirectory {
 public:
  // `file` is borrowed during the call only.
  static absl::StatusOr<ZipDirectory> Open(const File& file);

  absl::Span<const ZipRecord> records() const { return records_; }
  // The folder that holds all records, without a slash: "archive".
  const std::string& root() const { return root_; }
  // Some writers record no CRC at all: then all are zero.
  bool has_crc() const { return has_crc_; }

  // The record root()/name; nullptr when there is none.
  const ZipRecord* Find(absl::string_view name) const;

 private:
  std::vector<ZipRecord> records_;
  absl::flat_hash_map<std::string, size_t> index_;  // by name below the root
  std::string root_;
  bool has_crc_ = false;
};

// Updates a CRC-32 (that of zip and zlib) that began as 0.
uint32_t UpdateCrc32(uint32_t crc, absl::Span<const uint8_t> bytes);

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_FORMAT_ZIP_DIRECTORY_H_
