#include "common/format/manifest_text.h"

#include <algorithm>
#include <optional>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/bytes.h"
#include "common/base/digest.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/format/manifest_object.h"
#include "common/format/text.h"

namespace modelstate {
namespace {

constexpr uint64_t kPieceBytes = uint64_t{1} << 20;

// XXH3 of the length and the header of a safetensors file; nullopt where there is no room for what
// the length says.
absl::StatusOr<std::optional<uint64_t>> DigestHeader(const File& file, uint64_t size) {
  uint8_t prefix[8];
  if (size < sizeof(prefix)) return std::nullopt;
  MS_RETURN_IF_ERROR(file.ReadAt(0, absl::MakeSpan(prefix)));
  uint64_t bytes = 0;
  for (int i = 7; i >= 0; --i) bytes = bytes << 8 | prefix[i];
  if (bytes > size - sizeof(prefix)) return std::nullopt;
  const uint64_t end = sizeof(prefix) + bytes;
  std::vector<uint8_t> piece(std::min(kPieceBytes, end));
  Xxh3Stream digest;
  for (uint64_t begin = 0; begin < end; begin += kPieceBytes) {
    const absl::Span<uint8_t> out =
        absl::MakeSpan(piece).subspan(0, std::min(kPieceBytes, end - begin));
    MS_RETURN_IF_ERROR(file.ReadAt(begin, out));
    digest.Update(out);
  }
  return digest.Digest();
}

}  // namespace

absl::Status CheckManifestDigest(absl::string_view text) {
  const absl::string_view begin = kManifestTailBegin;
  const absl::string_view end = kManifestTailEnd;
  const size_t tail = begin.size() + 16 + end.size();
  if (text.size() < tail || !absl::EndsWith(text, end) ||
      text.substr(text.size() - tail, begin.size()) != begin) {
    return CorruptManifest(
        "its last member is not \"manifest_xxh3\": it is truncated, or was edited");
  }
  const absl::string_view content = text.substr(0, text.size() - tail);
  const std::optional<uint64_t> recorded =
      DigestFromHex(text.substr(text.size() - tail + begin.size(), 16));
  const uint64_t digest = Xxh3(AsBytes(content));
  if (recorded == digest) return absl::OkStatus();
  return MakeError(Reason::kDigestMismatch,
                   absl::StrCat(kManifestFile, " has the XXH3 ", DigestToHex(digest),
                                " and does not record it: it changed after it was written; use "
                                "another checkpoint"));
}

absl::StatusOr<std::string> ReadManifestText(const File& file) {
  MS_ASSIGN_OR_RETURN(const uint64_t size, file.Size());
  if (size > kMaxManifestBytes) {
    return CorruptManifest(absl::StrCat("it has ", size, " bytes, more than ", kMaxManifestBytes));
  }
  std::string text(size, '\0');
  MS_RETURN_IF_ERROR(
      file.ReadAt(0, absl::MakeSpan(reinterpret_cast<uint8_t*>(text.data()), text.size())));
  return text;
}

absl::StatusOr<std::vector<ManifestFile>> ManifestFiles(JsonView list) {
  std::vector<ManifestFile> files;
  for (const JsonView::Element item : list) {
    ManifestObject object(item.value, absl::StrCat("files[", files.size(), "]."));
    ManifestFile file{object.String("name"), object.Uint("nbytes"), std::nullopt};
    if (object.Has("header_xxh3")) file.header_xxh3 = object.Hex("header_xxh3");
    // Only these two names, so that no manifest leads to another file.
    if (file.name != kModelFile && file.name != kOptimizerFile) {
      object.Fail("name", absl::StrCat(kModelFile, " or ", kOptimizerFile));
    } else if (!files.empty() && (files.size() == 2 || files[0].name == file.name)) {
      object.Fail("name", "unique");
    }
    MS_RETURN_IF_ERROR(object.status());
    files.push_back(std::move(file));
  }
  if (files.empty() || (files.size() == 1 && files[0].name != kModelFile)) {
    return CorruptManifest(absl::StrCat("\"files\" lacks ", kModelFile));
  }
  return files;
}

absl::Status CheckManifestFile(const File& file, const ManifestFile& entry) {
  MS_ASSIGN_OR_RETURN(const uint64_t size, file.Size());
  if (size != entry.nbytes) {
    return Corrupt(absl::StrCat(file.name(), " has ", size, " bytes, and the manifest records ",
                                entry.nbytes, "; use another checkpoint"));
  }
  if (!entry.header_xxh3) return absl::OkStatus();
  MS_ASSIGN_OR_RETURN(const std::optional<uint64_t> digest, DigestHeader(file, size));
  if (digest == entry.header_xxh3) return absl::OkStatus();
  return MakeError(
      Reason::kDigestMismatch,
      absl::StrCat(file.name(), " has a header with ",
                   digest ? absl::StrCat("the XXH3 ", DigestToHex(*digest)) : "an impossible size",
                   ", and the manifest records ", DigestToHex(*entry.header_xxh3),
                   ": it changed after it was written; use another checkpoint"),
      {{"file", entry.name}});
}

absl::StatusOr<std::vector<ManifestFile>> CheckManifestFiles(const std::string& folder) {
  MS_ASSIGN_OR_RETURN(const File manifest, OpenForRead(absl::StrCat(folder, "/", kManifestFile)));
  MS_ASSIGN_OR_RETURN(const std::string text, ReadManifestText(manifest));
  MS_RETURN_IF_ERROR(CheckManifestDigest(text));
  const absl::StatusOr<JsonView> json = JsonView::Parse(text);
  if (!json.ok()) return CorruptManifest(json.status().message());
  ManifestObject object(*json, "");
  const JsonView list = object.List("files");
  MS_RETURN_IF_ERROR(object.status());
  MS_ASSIGN_OR_RETURN(std::vector<ManifestFile> files, ManifestFiles(list));
  for (const ManifestFile& entry : files) {
    const absl::StatusOr<File> file = OpenForRead(absl::StrCat(folder, "/", entry.name));
    if (GetReason(file.status()) == Reason::kCheckpointNotFound) {
      return Corrupt(absl::StrCat("there is no ", entry.name, ", which ", kManifestFile,
                                  " records: copy the checkpoint whole, or use another"));
    }
    if (!file.ok()) return file.status();
    MS_RETURN_IF_ERROR(CheckManifestFile(*file, entry));
  }
  return files;
}

}  // namespace modelstate
