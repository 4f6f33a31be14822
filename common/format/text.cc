#include "common/format/text.h"

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace modelstate {

bool IsValidUtf8(absl::string_view text) {
  const auto* p = reinterpret_cast<const unsigned char*>(text.data());
  const auto* end = p + text.size();
  while (p < end) {
    const unsigned char lead = *p++;
    if (lead < 0x80) continue;
    int more = 0;
    unsigned char low = 0x80;
    unsigned char high = 0xBF;
    if (lead >= 0xC2 && lead <= 0xDF) {
      more = 1;
    } else if (lead >= 0xE0 && lead <= 0xEF) {
      more = 2;
      if (lead == 0xE0) low = 0xA0;
      if (lead == 0xED) high = 0x9F;
    } else if (lead >= 0xF0 && lead <= 0xF4) {
      more = 3;
      if (lead == 0xF0) low = 0x90;
      if (lead == 0xF4) high = 0x8F;
    } else {
      return false;
    }
    if (end - p < more) return false;
    if (*p < low || *p > high) return false;
    for (int i = 1; i < more; ++i) {
      if ((p[i] & 0xC0) != 0x80) return false;
    }
    p += more;
  }
  return true;
}

std::string ShowName(absl::string_view name) {
  constexpr size_t kShown = 120;
  const bool cut = name.size() > kShown;
  const bool utf8 = IsValidUtf8(name);
  size_t end = cut ? kShown : name.size();
  while (utf8 && cut && end > 0 && (static_cast<unsigned char>(name[end]) & 0xC0) == 0x80) --end;
  name = name.substr(0, end);
  return absl::StrCat("\"", utf8 ? absl::Utf8SafeCHexEscape(name) : absl::CHexEscape(name),
                      cut ? "..." : "", "\"");
}

absl::string_view TensorNameProblem(absl::string_view name) {
  if (name.empty()) return "is empty";
  if (name.find('\0') != absl::string_view::npos) return "has a NUL";
  if (name == "__metadata__") return "is reserved by the safetensors format";
  if (!IsValidUtf8(name)) return "is not valid UTF-8";
  return "";
}

absl::Status Corrupt(absl::string_view text) { return MakeError(Reason::kCheckpointCorrupt, text); }

absl::Status Unsupported(absl::string_view text) {
  return MakeError(Reason::kCheckpointUnsupported, text);
}

}  // namespace modelstate
