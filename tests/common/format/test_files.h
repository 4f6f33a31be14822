#ifndef MODELSTATE_TESTS_COMMON_FORMAT_TEST_FILES_H_
#define MODELSTATE_TESTS_COMMON_FORMAT_TEST_FILES_H_

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <libdeflate.h>
#include <sys/mman.h>

#include <cstdint>
#include <fstream>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/bytes.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/format/checkpoint_reader.h"

// Files made by hand, right or wrong, for the tests of this folder.
namespace modelstate {

inline File MemoryFile(const std::string& content) {
  File file(memfd_create("test", MFD_CLOEXEC), "test");
  EXPECT_EQ(file.WriteAt(0, AsBytes(content)), absl::OkStatus());
  return file;
}

inline absl::StatusOr<std::unique_ptr<CheckpointReader>> OpenBytes(const std::string& content,
                                                                   const std::string& key = "") {
  OpenOptions options;
  options.state_dict_key = key;
  return OpenCheckpoint(MemoryFile(content), options);
}

// The first error of opening and reading everything; OK when there is none.
inline absl::Status OpenAndReadAll(const std::string& content, const std::string& key = "") {
  auto reader = OpenBytes(content, key);
  if (!reader.ok()) return reader.status();
  for (size_t i = 0; i < (*reader)->tensors().size(); ++i) {
    std::vector<uint8_t> bytes((*reader)->tensors()[i].nbytes());
    const absl::Status status = (*reader)->Read(i, absl::MakeSpan(bytes));
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

// The file is refused for this reason, with this text in the message.
inline void ExpectError(const std::string& content, Reason reason, const std::string& text,
                        const std::string& key = "") {
  const absl::Status status = OpenAndReadAll(content, key);
  EXPECT_EQ(GetReason(status), reason) << status;
  EXPECT_THAT(std::string(status.message()), testing::HasSubstr(text));
}

inline std::vector<float> ReadFloats(const CheckpointReader& reader, size_t index) {
  std::vector<float> values(static_cast<size_t>(reader.tensors()[index].shape.num_elements()));
  const absl::Span<uint8_t> out(reinterpret_cast<uint8_t*>(values.data()), values.size() * 4);
  EXPECT_EQ(reader.Read(index, out), absl::OkStatus());
  return values;
}

inline std::string DataPath(const std::string& name) {
  return std::string(MODELSTATE_SOURCE_DIR) + "/tests/data/" + name;
}

inline std::string ReadWholeFile(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  EXPECT_TRUE(in.good()) << path;
  std::ostringstream out;
  out << in.rdbuf();
  return out.str();
}

inline std::string LittleEndian(uint64_t value, int width) {
  std::string text;
  for (int i = 0; i < width; ++i) text.push_back(i < 8 ? static_cast<char>(value >> (8 * i)) : 0);
  return text;
}

inline std::string Safetensors(const std::string& json, const std::string& data) {
  return LittleEndian(json.size(), 8) + json + data;
}

// One record of a zip archive, and what to falsify.
struct ZipEntry {
  ZipEntry(std::string entry_name, std::string entry_data)
      : name(entry_name), local_name(std::move(entry_name)), data(std::move(entry_data)) {
    crc = libdeflate_crc32(0, data.data(), data.size());
    size = stored_size = data.size();
  }
  std::string name;
  std::string local_name;
  std::string data;
  uint32_t crc;
  uint64_t size;
  uint64_t stored_size;
  uint16_t flags = 0x0808;
  uint16_t method = 0;
  int64_t header_shift = 0;  // added to the header offset in the directory
};

// An archive as torch.save lays it out: data descriptors, zip64 end record and locator.
inline std::string Zip(const std::vector<ZipEntry>& entries) {
  std::string out;
  std::string directory;
  for (const ZipEntry& entry : entries) {
    const uint64_t header = out.size() + static_cast<uint64_t>(entry.header_shift);
    out += "PK\x03\x04" + LittleEndian(0, 2) + LittleEndian(entry.flags, 2) +
           LittleEndian(entry.method, 2) + LittleEndian(0, 4 + 12) +
           LittleEndian(entry.local_name.size(), 2) + LittleEndian(0, 2) + entry.local_name;
    out += entry.data;
    out += "PK\x07\x08" + LittleEndian(entry.crc, 4) + LittleEndian(entry.stored_size, 4) +
           LittleEndian(entry.size, 4);
    directory += "PK\x01\x02" + LittleEndian(0, 4) + LittleEndian(entry.flags, 2) +
                 LittleEndian(entry.method, 2) + LittleEndian(0, 4) + LittleEndian(entry.crc, 4) +
                 LittleEndian(entry.stored_size, 4) + LittleEndian(entry.size, 4) +
                 LittleEndian(entry.name.size(), 2) + LittleEndian(0, 12) +
                 LittleEndian(header, 4) + entry.name;
  }
  const uint64_t offset = out.size();
  const uint64_t count = entries.size();
  out += directory;
  const uint64_t end64 = out.size();
  out += "PK\x06\x06" + LittleEndian(44, 8) + LittleEndian(0, 4) + LittleEndian(0, 8) +
         LittleEndian(count, 8) + LittleEndian(count, 8) + LittleEndian(directory.size(), 8) +
         LittleEndian(offset, 8);
  out += "PK\x06\x07" + LittleEndian(0, 4) + LittleEndian(end64, 8) + LittleEndian(1, 4);
  out += "PK\x05\x06" + LittleEndian(0, 4) + LittleEndian(count, 2) + LittleEndian(count, 2) +
         LittleEndian(directory.size(), 4) + LittleEndian(offset, 4) + LittleEndian(0, 2);
  return out;
}

inline std::string PickleString(const std::string& text) {
  // Not "X" + ...: gcc 12 takes that for an overlapping copy.
  return absl::StrCat("X", LittleEndian(text.size(), 4), text);
}

inline std::string PickleInt(int64_t value) {
  return "\x8a\x08" + LittleEndian(static_cast<uint64_t>(value), 8);
}

inline std::string PickleTuple(const std::vector<int64_t>& values) {
  std::string text = "(";
  for (int64_t value : values) text += PickleInt(value);
  return text + "t";
}

struct PickledTensor {
  std::string storage_class = "torch\nFloatStorage\n";
  std::string key = "0";
  int64_t count = 4;
  int64_t offset = 0;
  std::vector<int64_t> size = {4};
  std::vector<int64_t> stride = {1};
  std::string more;  // opcodes of a seventh argument
  std::string part;  // of the sixth item of the persistent id, in the legacy stream
};

inline std::string Pickle(const PickledTensor& t) {
  return "ctorch._utils\n_rebuild_tensor_v2\n((" + PickleString("storage") + "c" + t.storage_class +
         PickleString(t.key) + PickleString("cpu") + PickleInt(t.count) + t.part + "tQ" +
         PickleInt(t.offset) + PickleTuple(t.size) + PickleTuple(t.stride) + "\x89}" + t.more +
         "tR";
}

// {"w": tensor}, the text of a data.pkl.
inline std::string PickledStateDict(const PickledTensor& tensor) {
  return "\x80\x02}(" + PickleString("w") + Pickle(tensor) + "u.";
}

inline std::vector<ZipEntry> TorchEntries(const std::string& pickle, const std::string& data) {
  return {{"archive/data.pkl", pickle}, {"archive/data/0", data}, {"archive/version", "3\n"}};
}

inline std::string TorchZip(const std::string& pickle,
                            const std::string& data = std::string(16, '\x3f')) {
  return Zip(TorchEntries(pickle, data));
}

// The parts of a stream as torch.save wrote it before 1.6, and what to falsify.
struct LegacyStream {
  std::string magic = std::string("\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.", 15);
  std::string protocol = "\x80\x02M\xe9\x03.";
  std::string machine = "\x80\x02}.";
  std::string object;
  std::string keys = "\x80\x02]" + PickleString("0") + "a.";
  std::string storages = LittleEndian(4, 8) + std::string(16, '\x3f');

  std::string Text() const { return magic + protocol + machine + object + keys + storages; }
};

inline LegacyStream Legacy(PickledTensor tensor = {}) {
  if (tensor.part.empty()) tensor.part = "N";
  LegacyStream stream;
  stream.object = PickledStateDict(tensor);
  return stream;
}

}  // namespace modelstate

#endif  // MODELSTATE_TESTS_COMMON_FORMAT_TEST_FILES_H_
