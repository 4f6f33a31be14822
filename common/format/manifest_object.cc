#include "common/format/manifest_object.h"

#include <bit>

#include "absl/strings/str_cat.h"
#include "common/base/digest.h"
#include "common/format/manifest_text.h"
#include "common/format/text.h"

namespace modelstate {
namespace {

constexpr size_t kMaxMembers = 64;
constexpr size_t kMaxKeyBytes = 64;
constexpr size_t kMaxTexts = 100;
constexpr size_t kMaxTextBytes = size_t{1} << 20;

std::optional<uint64_t> HexOf(const JsonView* value) {
  if (value == nullptr || !value->is_string()) return std::nullopt;
  return DigestFromHex(*value->String());
}

}  // namespace

absl::Status CorruptManifest(absl::string_view text) {
  return Corrupt(absl::StrCat(kManifestFile, ": ", text, "; use another checkpoint"));
}

ManifestObject::ManifestObject(JsonView json, std::string where) : where_(std::move(where)) {
  if (!json.is_object()) {
    Fail("", "an object");
    return;  // the items of a list have no keys
  }
  for (const JsonView::Element member : json) {
    if (members_.size() == kMaxMembers) {
      Fail("", absl::StrCat("an object of at most ", kMaxMembers, " members"));
      break;
    }
    std::string key = *member.key.String();
    if (key.size() > kMaxKeyBytes) continue;  // nothing that is asked for
    if (Has(key)) Fail(key, "there only once");
    members_.emplace_back(std::move(key), member.value);
  }
}

const JsonView* ManifestObject::Find(absl::string_view key) const {
  for (const auto& [name, value] : members_) {
    if (name == key) return &value;
  }
  return nullptr;
}

template <typename T>
T ManifestObject::Get(const char* key, std::optional<T> (JsonView::*get)() const,
                      absl::string_view wanted) {
  const JsonView* found = Find(key);
  std::optional<T> value;
  if (found != nullptr) value = (found->*get)();
  if (!value) Fail(key, wanted);
  return std::move(value).value_or(T());
}

std::string ManifestObject::String(const char* key) {
  return Get<std::string>(key, &JsonView::String, "text");
}

uint64_t ManifestObject::Uint(const char* key, uint64_t max) {
  constexpr char kWanted[] = "a whole number in its range";
  const uint64_t value = Get<uint64_t>(key, &JsonView::Uint, kWanted);
  if (value <= max) return value;
  Fail(key, kWanted);
  return 0;
}

bool ManifestObject::Bool(const char* key) {
  return Get<bool>(key, &JsonView::Bool, "true or false");
}

double ManifestObject::Double(const char* key) {
  if (const auto bits = HexOf(Find(key))) return std::bit_cast<double>(*bits);
  return Get<double>(key, &JsonView::Double, "a number, or 16 hex digits of one");
}

uint64_t ManifestObject::Hex(const char* key) {
  if (const auto bits = HexOf(Find(key))) return *bits;
  Fail(key, "16 hex digits");
  return 0;
}

JsonView ManifestObject::List(const char* key) {
  const JsonView* value = Find(key);
  if (value != nullptr && value->is_array()) return *value;
  Fail(key, "a list");
  return JsonView();
}

ManifestObject ManifestObject::Object(const char* key) const {
  const JsonView* value = Find(key);
  return ManifestObject(value == nullptr ? JsonView() : *value, absl::StrCat(where_, key, "."));
}

void ManifestObject::ForEachText(const char* key, size_t max,
                                 absl::FunctionRef<void(std::string text)> take) {
  size_t count = 0;
  for (const JsonView::Element item : List(key)) {
    std::optional<std::string> text = item.value.String();
    if (!text) return Fail(key, "a list of texts");
    if (++count > max) return Fail(key, absl::StrCat("a list of at most ", max, " texts"));
    take(*std::move(text));
  }
}

std::vector<std::string> ManifestObject::Texts(const char* key) {
  std::vector<std::string> texts;
  size_t bytes = 0;
  ForEachText(key, kMaxTexts, [&](std::string text) {
    bytes += text.size();
    if (bytes <= kMaxTextBytes) texts.push_back(std::move(text));
  });
  if (bytes > kMaxTextBytes) Fail(key, absl::StrCat("of at most ", kMaxTextBytes, " bytes"));
  return texts;
}

void ManifestObject::Fail(absl::string_view key, absl::string_view wanted) {
  if (!status_.ok()) return;
  status_ = CorruptManifest(absl::StrCat("\"", where_, key, "\" is not ", wanted));
}

}  // namespace modelstate
