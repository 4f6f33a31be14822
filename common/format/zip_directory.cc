#include "common/format/zip_directory.h"

#include <libdeflate.h>

#include <algorithm>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/format/text.h"

namespace modelstate {
namespace {

constexpr size_t kEndBytes = 22;
constexpr size_t kEnd64Bytes = 56;
constexpr size_t kLocator64Bytes = 20;
constexpr size_t kCentralBytes = 46;
constexpr size_t kLocalBytes = 30;
constexpr size_t kMaxCommentBytes = 65535;

constexpr uint32_t kEndMagic = 0x06054b50;
constexpr uint32_t kEnd64Magic = 0x06064b50;
constexpr uint32_t kLocator64Magic = 0x07064b50;
constexpr uint32_t kCentralMagic = 0x02014b50;
constexpr uint32_t kLocalMagic = 0x04034b50;

constexpr uint16_t kFlagDescriptor = 1 << 3;
// Encrypted, patched, strongly encrypted, with masked headers.
constexpr uint16_t kRefusedFlags = 1 << 0 | 1 << 5 | 1 << 6 | 1 << 13;

template <typename T>
T Load(const uint8_t* p) {
  T value = 0;
  for (size_t i = sizeof(T); i > 0; --i) value = static_cast<T>(value << 8 | p[i - 1]);
  return value;
}
uint16_t Load16(const uint8_t* p) { return Load<uint16_t>(p); }
uint32_t Load32(const uint8_t* p) { return Load<uint32_t>(p); }
uint64_t Load64(const uint8_t* p) { return Load<uint64_t>(p); }

struct CentralDirectory {
  uint64_t offset = 0;
  uint64_t size = 0;
  uint64_t entries = 0;
};

absl::StatusOr<CentralDirectory> Locate(const File& file, uint64_t file_size) {
  const uint64_t tail_size =
      std::min<uint64_t>(file_size, kEndBytes + kMaxCommentBytes + kLocator64Bytes);
  const uint64_t tail_offset = file_size - tail_size;
  std::vector<uint8_t> tail(tail_size);
  MS_RETURN_IF_ERROR(file.ReadAt(tail_offset, absl::MakeSpan(tail)));
  // The comment, of which PyTorch writes none, must fill the rest of the file exactly.
  const uint8_t* end = nullptr;
  for (size_t i = tail_size >= kEndBytes ? tail_size - kEndBytes + 1 : 0; i-- > 0;) {
    if (Load32(&tail[i]) == kEndMagic && Load16(&tail[i + 20]) == tail_size - i - kEndBytes) {
      end = &tail[i];
      break;
    }
  }
  if (end == nullptr) {
    return Corrupt("the zip archive has no end record: it is truncated; copy it again");
  }
  const uint64_t end_offset = tail_offset + static_cast<uint64_t>(end - tail.data());
  CentralDirectory directory;
  const uint16_t entries16 = Load16(end + 10);
  const uint32_t size32 = Load32(end + 12);
  const uint32_t offset32 = Load32(end + 16);
  if (Load16(end + 4) != 0 || Load16(end + 6) != 0 || Load16(end + 8) != entries16) {
    return Unsupported("the zip archive is split over several files; join them");
  }
  directory = {offset32, size32, entries16};
  uint64_t directory_end = end_offset;

  const bool saturated = entries16 == 0xFFFF || size32 == 0xFFFFFFFF || offset32 == 0xFFFFFFFF;
  const uint8_t* locator = end - kLocator64Bytes;
  if (end - tail.data() >= static_cast<ptrdiff_t>(kLocator64Bytes) &&
      Load32(locator) == kLocator64Magic) {
    const uint64_t end64_offset = Load64(locator + 8);
    const uint64_t locator_offset = end_offset - kLocator64Bytes;
    if (locator_offset < kEnd64Bytes || end64_offset != locator_offset - kEnd64Bytes) {
      return Corrupt("the zip64 locator does not point at the zip64 end record before it");
    }
    uint8_t end64[kEnd64Bytes];
    MS_RETURN_IF_ERROR(file.ReadAt(end64_offset, absl::MakeSpan(end64)));
    if (Load32(end64) != kEnd64Magic || Load64(end64 + 4) != kEnd64Bytes - 12 ||
        Load32(end64 + 16) != 0 || Load32(end64 + 20) != 0 ||
        Load64(end64 + 24) != Load64(end64 + 32)) {
      return Corrupt("the zip64 end record is malformed");
    }
    directory = {Load64(end64 + 48), Load64(end64 + 40), Load64(end64 + 32)};
    if ((entries16 != 0xFFFF && entries16 != directory.entries) ||
        (size32 != 0xFFFFFFFF && size32 != directory.size) ||
        (offset32 != 0xFFFFFFFF && offset32 != directory.offset)) {
      return Corrupt("the two end records of the zip archive contradict each other");
    }
    directory_end = end64_offset;
  } else if (saturated) {
    return Corrupt("the zip archive needs a zip64 end record and has none");
  }
  if (directory.offset > directory_end || directory.size != directory_end - directory.offset ||
      directory.entries > directory.size / kCentralBytes) {
    return Corrupt(absl::StrCat("the zip central directory (", directory.entries, " entries, ",
                                directory.size, " bytes at ", directory.offset,
                                ") does not end where the end record begins, at ", directory_end));
  }
  return directory;
}

struct Central {
  ZipRecord record;
  uint64_t header = 0;
};

// Replaces each saturated 32-bit field by its 64-bit value from the extra field.
absl::Status ApplyZip64(const uint8_t* extra, size_t extra_size, uint64_t* size,
                        uint64_t* stored_size, uint64_t* header, absl::string_view name) {
  const bool needed = *size == 0xFFFFFFFF || *stored_size == 0xFFFFFFFF || *header == 0xFFFFFFFF;
  while (needed && extra_size >= 4) {
    const size_t length = Load16(extra + 2);
    if (length > extra_size - 4) break;
    if (Load16(extra) == 1) {
      const uint8_t* p = extra + 4;
      size_t left = length;
      for (uint64_t* field : {size, stored_size, header}) {
        if (*field != 0xFFFFFFFF) continue;
        if (left < 8) break;
        *field = Load64(p);
        p += 8;
        left -= 8;
      }
      break;
    }
    extra += 4 + length;
    extra_size -= 4 + length;
  }
  if (*stored_size != *size) {
    return Corrupt(absl::StrCat("zip record ", ShowName(name), " has two sizes, ", *size, " and ",
                                *stored_size, ", though it is not compressed"));
  }
  return absl::OkStatus();
}

absl::Status CheckStored(uint16_t flags, uint16_t method, absl::string_view name) {
  if ((flags & kRefusedFlags) != 0) {
    return Unsupported(absl::StrCat("zip record ", ShowName(name),
                                    " is encrypted; save the checkpoint again with torch.save"));
  }
  if (method != 0) {
    return Unsupported(absl::StrCat(
        "zip record ", ShowName(name), " is compressed (method ", method,
        "), which torch.save never does; load the file where it was made (a TorchScript archive "
        "with torch.jit.load) and save the state_dict with torch.save"));
  }
  return absl::OkStatus();
}

// Sets where the bytes of `central.record` begin.
absl::Status ReadLocalHeader(const File& file, uint64_t directory_offset, Central* central,
                             std::vector<uint8_t>* buffer) {
  ZipRecord& record = central->record;
  const size_t size = kLocalBytes + record.name.size();
  if (central->header > directory_offset || directory_offset - central->header < size) {
    return Corrupt(absl::StrCat("zip record ", ShowName(record.name), " begins at ",
                                central->header, ", outside of the archive's data"));
  }
  buffer->resize(size);
  MS_RETURN_IF_ERROR(file.ReadAt(central->header, absl::MakeSpan(*buffer)));
  const uint8_t* local = buffer->data();
  const absl::string_view name(reinterpret_cast<const char*>(local + kLocalBytes),
                               record.name.size());
  if (Load32(local) != kLocalMagic || Load16(local + 26) != name.size() || name != record.name) {
    return Corrupt(absl::StrCat("the local header of zip record ", ShowName(record.name),
                                " is missing or has another name"));
  }
  const uint16_t flags = Load16(local + 6);
  MS_RETURN_IF_ERROR(CheckStored(flags, Load16(local + 8), name));
  if ((flags & kFlagDescriptor) == 0) {
    const uint64_t sizes[] = {Load32(local + 18), Load32(local + 22)};
    for (uint64_t local_size : sizes) {
      if (local_size != record.size && local_size != 0xFFFFFFFF) {
        return Corrupt(absl::StrCat("zip record ", ShowName(name), " has ", record.size,
                                    " bytes in the directory and ", local_size,
                                    " in its local header"));
      }
    }
    if (Load32(local + 14) != record.crc32) {
      return Corrupt(absl::StrCat("zip record ", ShowName(name), " has two different CRCs"));
    }
  }
  record.offset = central->header + size + Load16(local + 28);
  if (record.offset > directory_offset || record.size > directory_offset - record.offset) {
    return Corrupt(absl::StrCat("zip record ", ShowName(record.name), " of ", record.size,
                                " bytes reaches past the archive's data"));
  }
  return absl::OkStatus();
}

}  // namespace

uint32_t UpdateCrc32(uint32_t crc, absl::Span<const uint8_t> bytes) {
  return libdeflate_crc32(crc, bytes.data(), bytes.size());
}

absl::StatusOr<ZipDirectory> ZipDirectory::Open(const File& file) {
  MS_ASSIGN_OR_RETURN(const uint64_t file_size, file.Size());
  MS_ASSIGN_OR_RETURN(const CentralDirectory location, Locate(file, file_size));
  std::vector<uint8_t> bytes(location.size);
  MS_RETURN_IF_ERROR(file.ReadAt(location.offset, absl::MakeSpan(bytes)));

  std::vector<Central> centrals;
  centrals.reserve(location.entries);
  size_t at = 0;
  for (uint64_t i = 0; i < location.entries; ++i) {
    const uint8_t* p = bytes.data() + at;
    if (bytes.size() - at < kCentralBytes || Load32(p) != kCentralMagic) {
      return Corrupt(absl::StrCat("entry ", i, " of the zip central directory is malformed"));
    }
    const size_t name_size = Load16(p + 28);
    const size_t extra_size = Load16(p + 30);
    const size_t entry_size = kCentralBytes + name_size + extra_size + Load16(p + 32);
    if (bytes.size() - at < entry_size) {
      return Corrupt(absl::StrCat("entry ", i, " of the zip central directory is cut off"));
    }
    Central central;
    central.record.name.assign(reinterpret_cast<const char*>(p + kCentralBytes), name_size);
    const std::string& name = central.record.name;
    if (name.empty() || !IsValidUtf8(name) || name.find('\0') != std::string::npos) {
      return Corrupt(absl::StrCat("the zip record name ", ShowName(name),
                                  " is empty, not UTF-8 or has a NUL"));
    }
    MS_RETURN_IF_ERROR(CheckStored(Load16(p + 8), Load16(p + 10), name));
    if (Load16(p + 34) != 0) return Unsupported("the zip archive is split over several files");
    central.record.crc32 = Load32(p + 16);
    uint64_t stored_size = Load32(p + 20);
    central.record.size = Load32(p + 24);
    central.header = Load32(p + 42);
    MS_RETURN_IF_ERROR(ApplyZip64(p + kCentralBytes + name_size, extra_size, &central.record.size,
                                  &stored_size, &central.header, name));
    centrals.push_back(std::move(central));
    at += entry_size;
  }
  if (at != bytes.size()) return Corrupt("the zip central directory has trailing bytes");

  std::vector<uint8_t> buffer;
  for (Central& central : centrals) {
    MS_RETURN_IF_ERROR(ReadLocalHeader(file, location.offset, &central, &buffer));
  }
  std::sort(centrals.begin(), centrals.end(),
            [](const Central& a, const Central& b) { return a.header < b.header; });
  ZipDirectory directory;
  directory.records_.reserve(centrals.size());
  for (size_t i = 0; i < centrals.size(); ++i) {
    ZipRecord& record = centrals[i].record;
    if (i + 1 < centrals.size() && record.offset + record.size > centrals[i + 1].header) {
      return Corrupt(absl::StrCat("zip records ", ShowName(record.name), " and ",
                                  ShowName(centrals[i + 1].record.name), " overlap"));
    }
    const size_t slash = record.name.find('/');
    if (slash == std::string::npos || slash == 0) {
      return Unsupported(absl::StrCat("zip record ", ShowName(record.name),
                                      " lies in no folder: the archive was not written by "
                                      "torch.save"));
    }
    const std::string root = record.name.substr(0, slash);
    if (i == 0) directory.root_ = root;
    if (root != directory.root_) {
      return Unsupported(absl::StrCat("the zip archive has several top folders, ",
                                      ShowName(directory.root_), " and ", ShowName(root),
                                      "; torch.save writes one"));
    }
    if (!directory.index_.emplace(record.name.substr(slash + 1), i).second) {
      return Corrupt(
          absl::StrCat("the zip archive has the record ", ShowName(record.name), " twice"));
    }
    directory.has_crc_ |= record.crc32 != 0;
    directory.records_.push_back(std::move(record));
  }
  return directory;
}

const ZipRecord* ZipDirectory::Find(absl::string_view name) const {
  const auto it = index_.find(name);
  return it == index_.end() ? nullptr : &records_[it->second];
}

}  // namespace modelstate
