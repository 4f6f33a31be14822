#include "common/format/json_view.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/format/text.h"

namespace modelstate {
namespace {

using Json = nlohmann::json;

bool IsSpace(char c) { return c == ' ' || c == '\n' || c == '\r' || c == '\t'; }

bool IsDigits(absl::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return absl::ascii_isdigit(c); });
}

void SkipSpace(absl::string_view* text) {
  size_t n = 0;
  while (n < text->size() && IsSpace((*text)[n])) ++n;
  text->remove_prefix(n);
}

// The bytes of the string that `text` begins with, quotes included; more than `text`: it has no
// end.
size_t StringBytes(absl::string_view text) {
  size_t n = 1;
  while (n < text.size() && text[n] != '"') n += text[n] == '\\' ? 2 : 1;
  return n + 1;
}

// The bytes of a number or a word.
size_t WordBytes(absl::string_view text) {
  size_t n = 0;
  while (n < text.size() && (absl::ascii_isalnum(text[n]) || absl::StrContains("+-.", text[n]))) {
    ++n;
  }
  return n;
}

// The bytes of the value that valid JSON begins with.
size_t ValueBytes(absl::string_view text) {
  if (text[0] == '"') return StringBytes(text);
  if (text[0] != '{' && text[0] != '[') return WordBytes(text);
  size_t depth = 0;
  size_t n = 0;
  do {
    const char c = text[n];
    if (c == '{' || c == '[') ++depth;
    if (c == '}' || c == ']') --depth;
    n += c == '"' ? StringBytes(text.substr(n)) : 1;
  } while (depth > 0);
  return n;
}

// Goes over a text once and finds whether it is JSON.
class Checker {
 public:
  explicit Checker(absl::string_view text) : text_(text), rest_(text) {}

  absl::Status Check() {
    std::vector<char> open;  // the brackets that are to be closed
    while (true) {
      SkipSpace(&rest_);
      const char first = rest_.empty() ? '\0' : rest_[0];
      if (first == '{' || first == '[') {
        if (open.size() == kMaxDepth) {
          return Problem(absl::StrCat("it has more than ", kMaxDepth, " brackets within brackets"));
        }
        open.push_back(first == '{' ? '}' : ']');
        rest_.remove_prefix(1);
        SkipSpace(&rest_);
        if (rest_.empty() || rest_[0] != open.back()) {
          if (first == '{') MS_RETURN_IF_ERROR(Key());
          continue;
        }
      } else {
        MS_RETURN_IF_ERROR(Scalar());
      }
      SkipSpace(&rest_);
      while (!open.empty() && Take(open.back())) {
        open.pop_back();
        SkipSpace(&rest_);
      }
      if (open.empty()) return rest_.empty() ? absl::OkStatus() : NotJson();
      if (!Take(',')) return NotJson();
      if (open.back() == '}') MS_RETURN_IF_ERROR(Key());
    }
  }

 private:
  static constexpr size_t kMaxDepth = JsonView::kMaxDepth;

  absl::Status Problem(absl::string_view what) const {
    return absl::InvalidArgumentError(absl::StrCat(what, " at byte ", text_.size() - rest_.size()));
  }
  absl::Status NotJson() const { return Problem("it is not JSON"); }

  bool Take(char c) {
    if (rest_.empty() || rest_[0] != c) return false;
    rest_.remove_prefix(1);
    return true;
  }

  absl::Status Key() {
    SkipSpace(&rest_);
    if (rest_.empty() || rest_[0] != '"') return NotJson();
    MS_RETURN_IF_ERROR(Scalar());
    SkipSpace(&rest_);
    return Take(':') ? absl::OkStatus() : NotJson();
  }

  absl::Status Scalar() {
    const bool is_string = absl::StartsWith(rest_, "\"");
    const size_t size = is_string ? StringBytes(rest_) : WordBytes(rest_);
    if (size > rest_.size()) return NotJson();
    // So that the parser, which copies what it reads, has little to copy.
    if (size > JsonView::kMaxScalarBytes) {
      return Problem(absl::StrCat("it has a text or number of ", size, " bytes, over the limit of ",
                                  JsonView::kMaxScalarBytes));
    }
    const absl::string_view token = rest_.substr(0, size);
    if (!(is_string ? IsString(token) : IsWord(token))) return NotJson();
    rest_.remove_prefix(size);
    return absl::OkStatus();
  }

  static bool IsString(absl::string_view token) {
    const bool control =
        std::any_of(token.begin(), token.end(), [](unsigned char c) { return c < 0x20; });
    if (control || !IsValidUtf8(token)) return false;
    return !absl::StrContains(token, '\\') || Json::accept(token.begin(), token.end());
  }

  static bool IsWord(absl::string_view token) {
    if (token.empty()) return false;
    const bool usual = token.size() < 20 && IsDigits(token) && (token[0] != '0' || token == "0");
    return usual || Json::accept(token.begin(), token.end());
  }

  const absl::string_view text_;
  absl::string_view rest_;
};

}  // namespace

absl::StatusOr<JsonView> JsonView::Parse(absl::string_view text) {
  MS_RETURN_IF_ERROR(Checker(text).Check());
  SkipSpace(&text);
  return JsonView(text.substr(0, ValueBytes(text)));
}

std::optional<bool> JsonView::Bool() const {
  if (text_ == "true") return true;
  if (text_ == "false") return false;
  return std::nullopt;
}

std::optional<uint64_t> JsonView::Uint() const {
  uint64_t value = 0;
  if (!IsDigits(text_) || !absl::SimpleAtoi(text_, &value)) return std::nullopt;
  return value;
}

std::optional<double> JsonView::Double() const {
  if (!absl::ascii_isdigit(text_[0]) && text_[0] != '-') return std::nullopt;
  return Json::parse(text_.begin(), text_.end()).get<double>();
}

std::optional<std::string> JsonView::String() const {
  if (!is_string()) return std::nullopt;
  if (!absl::StrContains(text_, '\\')) return std::string(text_.substr(1, text_.size() - 2));
  return Json::parse(text_.begin(), text_.end()).get<std::string>();
}

JsonView::Iterator JsonView::begin() const {
  if (!is_object() && !is_array()) return end();
  return Iterator(text_.substr(1), is_object());
}

JsonView::Iterator JsonView::end() const { return Iterator(absl::string_view(), false); }

JsonView::Iterator::Iterator(absl::string_view rest, bool object) : rest_(rest), object_(object) {
  if (rest_.data() == nullptr) return;
  SkipSpace(&rest_);
  Read();
}

JsonView::Iterator& JsonView::Iterator::operator++() {
  SkipSpace(&rest_);
  if (rest_[0] == ',') rest_.remove_prefix(1);
  SkipSpace(&rest_);
  Read();
  return *this;
}

void JsonView::Iterator::Read() {
  if (rest_[0] == ']' || rest_[0] == '}') {
    rest_ = absl::string_view();
    return;
  }
  const auto take = [this] {
    const absl::string_view value = rest_.substr(0, ValueBytes(rest_));
    rest_.remove_prefix(value.size());
    return JsonView(value);
  };
  if (object_) {
    element_.key = take();
    SkipSpace(&rest_);
    rest_.remove_prefix(1);  // the colon
    SkipSpace(&rest_);
  }
  element_.value = take();
}

}  // namespace modelstate
