#include "common/format/known_formats.h"

#include <algorithm>
#include <cstdint>

#include "absl/strings/match.h"
#include "common/base/status.h"
#include "common/format/text.h"

namespace modelstate {
namespace {

constexpr size_t kHeadBytes = 512;

constexpr char kDistributed[] =
    "it is of a PyTorch distributed checkpoint, whose tensors are spread over many files; make one "
    "file of them first: python -m torch.distributed.checkpoint.format_utils dcp_to_torch "
    "DIRECTORY "
    "OUT.pt";

struct KnownFormat {
  size_t offset;
  absl::string_view magic;
  const char* text;
};

// A literal with its NULs.
template <size_t kSize>
constexpr absl::string_view Magic(const char (&text)[kSize]) {
  return absl::string_view(text, kSize - 1);
}

const KnownFormat kKnown[] = {
    {0, Magic("GGUF"),
     "the file is GGUF, whose quantized blocks no module here holds; give the safetensors or "
     "PyTorch file that it was made from"},
    {0, Magic("\x93NUMPY"),
     "the file is a NumPy array; save a dict of arrays with safetensors.numpy.save_file"},
    {0, Magic("\x89HDF\r\n"),
     "the file is HDF5, perhaps of Keras; convert it to safetensors with its own framework"},
    {257, Magic("ustar"),
     "the file is a tar archive: of a torch.save before PyTorch 0.2 (load it with torch.load and "
     "save it again with torch.save), or of files (unpack it and give one of them)"},
    {0, Magic("version https://git-lfs"),
     "the file is a pointer of Git LFS, not the file itself; fetch it: git lfs pull"},
    {0, Magic("\x1f\x8b"), "the file is compressed with gzip; unpack it"},
    {0, Magic("\x28\xb5\x2f\xfd"), "the file is compressed with zstd; unpack it"},
    {0,
     Magic("\xfd"
           "7zXZ\0"),
     "the file is compressed with xz; unpack it"},
    {0, Magic("BZh"), "the file is compressed with bzip2; unpack it"},
    {0, Magic("<!DOCTYPE"), "the file is a web page, perhaps of a failed download; fetch it again"},
    {0, Magic("<html"), "the file is a web page, perhaps of a failed download; fetch it again"},
    {4, Magic("TFL3"),
     "the file is TensorFlow Lite; give the safetensors or PyTorch file that it was made from"},
};

// The name of the first record of a zip; empty: no zip.
absl::string_view FirstZipName(absl::string_view head) {
  constexpr size_t kLocalBytes = 30;
  if (!absl::StartsWith(head, "PK\x03\x04") || head.size() < kLocalBytes) return "";
  const size_t size = static_cast<unsigned char>(head[26]) |
                      static_cast<size_t>(static_cast<uint8_t>(head[27])) << 8;
  return head.substr(kLocalBytes, size);
}

}  // namespace

absl::StatusOr<std::string> ReadHead(const File& file) {
  MS_ASSIGN_OR_RETURN(const uint64_t size, file.Size());
  std::string head(std::min<uint64_t>(size, kHeadBytes), '\0');
  MS_RETURN_IF_ERROR(
      file.ReadAt(0, absl::MakeSpan(reinterpret_cast<uint8_t*>(head.data()), head.size())));
  return head;
}

absl::Status RefuseKnownFormat(absl::string_view name, absl::string_view head) {
  for (const KnownFormat& known : kKnown) {
    if (head.size() >= known.offset + known.magic.size() &&
        head.substr(known.offset, known.magic.size()) == known.magic) {
      return Unsupported(known.text);
    }
  }
  if (absl::EndsWith(FirstZipName(head), ".npy")) {
    return Unsupported(
        "the file is a NumPy archive (.npz); load it with numpy.load and save its arrays with "
        "safetensors.numpy.save_file");
  }
  // These look like any pickle and zip.
  if (absl::EndsWith(name, ".distcp") || absl::EndsWith(name, ".metadata")) {
    return Unsupported(kDistributed);
  }
  if (head.size() > 1 && head[0] == '\x80' && head[1] >= 2 && head[1] <= 5) {
    return Unsupported(
        "the file is a bare pickle, which is not read; save a state_dict with torch.save or as "
        "safetensors");
  }
  return absl::OkStatus();
}

absl::Status RefuseKnownFolder(absl::Span<const std::string> names) {
  for (const std::string& name : names) {
    if (absl::EndsWith(name, ".distcp")) return Unsupported(kDistributed);
  }
  return absl::OkStatus();
}

}  // namespace modelstate
