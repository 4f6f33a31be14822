#include "common/format/zip_writer.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "common/base/bytes.h"
#include "common/base/status.h"
#include "common/format/zip_directory.h"

namespace modelstate {
namespace {

constexpr uint64_t kAlignment = 64;
constexpr uint64_t kMax32 = 0xFFFFFFFF;
constexpr uint16_t kZip64Field = 1;
constexpr uint16_t kPaddingField = 0x4246;  // "FB", as torch calls it
constexpr uint16_t kUtf8Flag = 1 << 11;
constexpr uint16_t kVersion = 20;
constexpr uint16_t kZip64Version = 45;
constexpr size_t kLocalBytes = 30;
constexpr uint64_t kEnd64Bytes = 56;
// 1980-01-01: the same state makes the same file.
constexpr uint16_t kDate = 1 << 5 | 1;

template <typename T>
void Append(T value, std::string* out) {
  for (size_t i = 0; i < sizeof(T); ++i) {
    out->push_back(static_cast<char>(static_cast<uint64_t>(value) >> (8 * i)));
  }
}

uint32_t Saturated(uint64_t value) { return static_cast<uint32_t>(std::min(value, kMax32)); }

// The part that both headers of a record have, from the version to the length of the name.
void AppendCommon(bool zip64, uint32_t crc, uint64_t size, size_t name_size, std::string* out) {
  Append<uint16_t>(zip64 ? kZip64Version : kVersion, out);
  Append(kUtf8Flag, out);
  Append<uint16_t>(0, out);  // stored
  Append<uint16_t>(0, out);  // time
  Append(kDate, out);
  Append(crc, out);
  Append(Saturated(size), out);
  Append(Saturated(size), out);
  Append(static_cast<uint16_t>(name_size), out);
}

}  // namespace

absl::Status ZipWriter::Write(absl::Span<const uint8_t> bytes) {
  MS_RETURN_IF_ERROR(file_.WriteAt(offset_, bytes));
  offset_ += bytes.size();
  return absl::OkStatus();
}

absl::Status ZipWriter::Add(absl::string_view name, absl::Span<const uint8_t> bytes) {
  return AddStream(name, bytes.size(), [bytes](TakeBytes take) { return take(bytes); });
}

absl::Status ZipWriter::AddStream(absl::string_view name, uint64_t size,
                                  absl::FunctionRef<absl::Status(TakeBytes take)> content) {
  const bool zip64 = size >= kMax32;
  std::string extra;
  if (zip64) {
    Append(kZip64Field, &extra);
    Append<uint16_t>(16, &extra);
    Append(size, &extra);
    Append(size, &extra);
  }
  const uint64_t begin = offset_ + kLocalBytes + name.size() + extra.size() + 4;
  const uint64_t padding = (kAlignment - begin % kAlignment) % kAlignment;
  Append(kPaddingField, &extra);
  Append(static_cast<uint16_t>(padding), &extra);
  extra.append(padding, 'Z');

  // The header in front has the CRC of what follows it.
  const uint64_t header = offset_;
  offset_ = begin + padding;
  const uint64_t end = offset_ + size;
  uint32_t crc = 0;
  MS_RETURN_IF_ERROR(content([&](absl::Span<const uint8_t> bytes) {
    crc = UpdateCrc32(crc, bytes);
    return Write(bytes);
  }));
  if (offset_ != end) {
    return absl::InternalError(
        absl::StrCat("record ", name, " is ", size, " bytes long, not ", offset_ - (end - size)));
  }

  std::string local;
  Append<uint32_t>(0x04034b50, &local);
  AppendCommon(zip64, crc, size, name.size(), &local);
  Append(static_cast<uint16_t>(extra.size()), &local);
  absl::StrAppend(&local, name, extra);

  std::string wide;  // what does not fit into the directory's 32 bits
  if (zip64) {
    Append(size, &wide);
    Append(size, &wide);
  }
  if (header >= kMax32) Append(header, &wide);
  Append<uint32_t>(0x02014b50, &directory_);
  Append(wide.empty() ? kVersion : kZip64Version, &directory_);  // made by
  AppendCommon(!wide.empty(), crc, size, name.size(), &directory_);
  Append(static_cast<uint16_t>(wide.empty() ? 0 : 4 + wide.size()), &directory_);
  directory_.append(10, '\0');  // comment, disk, attributes
  Append(Saturated(header), &directory_);
  absl::StrAppend(&directory_, name);
  if (!wide.empty()) {
    Append(kZip64Field, &directory_);
    Append(static_cast<uint16_t>(wide.size()), &directory_);
    directory_ += wide;
  }
  ++records_;
  return file_.WriteAt(header, AsBytes(local));
}

absl::Status ZipWriter::Finish() {
  const uint64_t directory = offset_;
  const uint64_t end64 = offset_ + directory_.size();
  std::string out;
  out.swap(directory_);
  const uint64_t size = out.size();
  if (records_ >= 0xFFFF || size >= kMax32 || directory >= kMax32) {
    Append<uint32_t>(0x06064b50, &out);
    Append<uint64_t>(kEnd64Bytes - 12, &out);
    Append(kZip64Version, &out);
    Append(kZip64Version, &out);
    Append<uint64_t>(0, &out);  // disks
    Append(records_, &out);
    Append(records_, &out);
    Append(size, &out);
    Append(directory, &out);
    Append<uint32_t>(0x07064b50, &out);
    Append<uint32_t>(0, &out);
    Append(end64, &out);
    Append<uint32_t>(1, &out);
  }
  const uint16_t records = static_cast<uint16_t>(std::min<uint64_t>(records_, 0xFFFF));
  Append<uint32_t>(0x06054b50, &out);
  Append<uint32_t>(0, &out);  // disks
  Append(records, &out);
  Append(records, &out);
  Append(Saturated(size), &out);
  Append(Saturated(directory), &out);
  Append<uint16_t>(0, &out);  // comment
  return Write(AsBytes(out));
}

}  // namespace modelstate
