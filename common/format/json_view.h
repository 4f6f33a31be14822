#ifndef MODELSTATE_COMMON_FORMAT_JSON_VIEW_H_
#define MODELSTATE_COMMON_FORMAT_JSON_VIEW_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace modelstate {

// A value of a JSON text, read where it lies: no tree is built, so a hostile text takes no memory
// beyond its own but for what is asked of it. Borrows the text. Value type.
class JsonView {
 public:
  // Of one text or number, and of brackets within brackets; what has more is refused.
  static constexpr size_t kMaxScalarBytes = size_t{1} << 20;
  static constexpr size_t kMaxDepth = 100;

  // The value that `text` is, all of which is checked. INVALID_ARGUMENT without a reason: what is
  // wrong, and at which byte.
  static absl::StatusOr<JsonView> Parse(absl::string_view text);

  JsonView() = default;  // null

  bool is_null() const { return text_[0] == 'n'; }
  bool is_object() const { return text_[0] == '{'; }
  bool is_array() const { return text_[0] == '['; }
  bool is_string() const { return text_[0] == '"'; }

  // nullopt for a value of another type; Uint also for a number that is not one of uint64_t, or is
  // written with a fraction or exponent.
  std::optional<bool> Bool() const;
  std::optional<uint64_t> Uint() const;
  std::optional<double> Double() const;
  std::optional<std::string> String() const;

  // The members of an object or the items of an array, in order; others have none. Keys that are
  // there twice come twice.
  class Iterator;
  struct Element;
  Iterator begin() const;
  Iterator end() const;

 private:
  friend class Iterator;
  explicit JsonView(absl::string_view text) : text_(text) {}

  absl::string_view text_ = "null";  // valid JSON, without space around it
};

struct JsonView::Element {
  JsonView key;  // null in an array
  JsonView value;
};

class JsonView::Iterator {
 public:
  Element operator*() const { return element_; }
  Iterator& operator++();
  friend bool operator!=(const Iterator& a, const Iterator& b) {
    return a.rest_.data() != b.rest_.data();
  }

 private:
  friend class JsonView;
  // `rest` begins after the opening bracket; null: the end.
  Iterator(absl::string_view rest, bool object);
  void Read();

  absl::string_view rest_;  // behind the element
  bool object_ = false;
  Element element_;
};

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_FORMAT_JSON_VIEW_H_
