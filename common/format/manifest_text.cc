#include "common/format/manifest_text.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/bytes.h"
#include "common/base/digest.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/format/text.h"

namespace modelstate {
namespace {

using Json = nlohmann::json;

constexpr uint64_t kPieceBytes = uint64_t{4} << 20;

absl::Status CorruptManifest(absl::string_view text) {
  return Corrupt(absl::StrCat(kManifestFile, ": ", text, "; use another checkpoint"));
}

absl::StatusOr<uint64_t> DigestOf(const File& file, uint64_t size) {
  std::vector<uint8_t> piece(std::min(kPieceBytes, size));
  Xxh3Stream digest;
  for (uint64_t begin = 0; begin < size; begin += kPieceBytes) {
    const absl::Span<uint8_t> out =
        absl::MakeSpan(piece).subspan(0, std::min(kPieceBytes, size - begin));
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

absl::StatusOr<std::vector<ManifestFile>> ManifestFiles(absl::string_view text) {
  MS_RETURN_IF_ERROR(CheckManifestDigest(text));
  const Json json = Json::parse(text.begin(), text.end(), nullptr, /*allow_exceptions=*/false);
  const auto files = json.is_object() ? json.find("files") : json.end();
  if (!json.is_object() || files == json.end() || !files->is_array()) {
    return CorruptManifest("it has no list \"files\"");
  }
  std::vector<ManifestFile> found;
  for (const Json& item : *files) {
    const auto member = [&item](const char* key) {
      return item.is_object() ? item.value(key, Json()) : Json();
    };
    const Json name = member("name");
    const Json nbytes = member("nbytes");
    const Json xxh3 = member("xxh3");
    const std::optional<uint64_t> digest =
        xxh3.is_string() ? DigestFromHex(xxh3.get_ref<const std::string&>()) : std::nullopt;
    const bool known = name == kModelFile || name == kOptimizerFile;
    if (!known || !nbytes.is_number_unsigned() || !digest) {
      return CorruptManifest(
          absl::StrCat("\"files[", found.size(), "]\" is not a known name, bytes and a digest"));
    }
    found.push_back({name.get<std::string>(), nbytes.get<uint64_t>(), *digest});
  }
  const bool twice = found.size() == 2 && found[0].name == found[1].name;
  if (found.empty() || found.size() > 2 || twice) {
    return CorruptManifest("\"files\" does not list each file once");
  }
  return found;
}

absl::StatusOr<std::vector<ManifestFile>> VerifyManifestFiles(const std::string& folder) {
  MS_ASSIGN_OR_RETURN(const File manifest, OpenForRead(absl::StrCat(folder, "/", kManifestFile)));
  MS_ASSIGN_OR_RETURN(const uint64_t size, manifest.Size());
  if (size > kMaxManifestBytes) {
    return CorruptManifest(absl::StrCat("it has ", size, " bytes, more than ", kMaxManifestBytes));
  }
  std::string text(size, '\0');
  MS_RETURN_IF_ERROR(
      manifest.ReadAt(0, absl::MakeSpan(reinterpret_cast<uint8_t*>(text.data()), text.size())));
  MS_ASSIGN_OR_RETURN(std::vector<ManifestFile> files, ManifestFiles(text));
  for (const ManifestFile& entry : files) {
    MS_ASSIGN_OR_RETURN(const File file, OpenForRead(absl::StrCat(folder, "/", entry.name)));
    MS_ASSIGN_OR_RETURN(const uint64_t nbytes, file.Size());
    if (nbytes != entry.nbytes) {
      return Corrupt(absl::StrCat(entry.name, " has ", nbytes, " bytes, and the manifest records ",
                                  entry.nbytes, "; use another checkpoint"));
    }
    MS_ASSIGN_OR_RETURN(const uint64_t digest, DigestOf(file, nbytes));
    if (digest != entry.xxh3) {
      return MakeError(Reason::kDigestMismatch,
                       absl::StrCat(entry.name, " has the XXH3 ", DigestToHex(digest),
                                    ", and the manifest records ", DigestToHex(entry.xxh3),
                                    ": it changed after it was written; use another checkpoint"));
    }
  }
  return files;
}

}  // namespace modelstate
