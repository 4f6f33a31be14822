#ifndef MODELSTATE_COMMON_FORMAT_MANIFEST_OBJECT_H_
#define MODELSTATE_COMMON_FORMAT_MANIFEST_OBJECT_H_

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "common/format/json_view.h"

namespace modelstate {

// DATA_LOSS CHECKPOINT_CORRUPT; `text` says what is wrong in the manifest.
absl::Status CorruptManifest(absl::string_view text);

// Reads the members of one JSON object of a manifest. The first that is missing, twice there, or of
// another type makes status() an error that names it; what is read after that is zero.
class ManifestObject {
 public:
  // `where` is for messages: "tensors[3].".
  ManifestObject(JsonView json, std::string where);

  const absl::Status& status() const { return status_; }

  const JsonView* Find(absl::string_view key) const;
  bool Has(absl::string_view key) const { return Find(key) != nullptr; }

  std::string String(const char* key);
  uint64_t Uint(const char* key, uint64_t max = std::numeric_limits<uint64_t>::max());
  bool Bool(const char* key);
  double Double(const char* key);  // a number, or the 16 hex digits of its bits
  uint64_t Hex(const char* key);
  // Has no items on failure.
  JsonView List(const char* key);
  ManifestObject Object(const char* key) const;

  // Gives each text of a list of at most `max` to `take`.
  void ForEachText(const char* key, size_t max, absl::FunctionRef<void(std::string text)> take);
  // A list that is short whatever the module is: of at most 100 texts and 1 MiB.
  std::vector<std::string> Texts(const char* key);

  void Fail(absl::string_view key, absl::string_view wanted);
  void Include(const absl::Status& status) { status_.Update(status); }

 private:
  template <typename T>
  T Get(const char* key, std::optional<T> (JsonView::*get)() const, absl::string_view wanted);

  const std::string where_;
  absl::InlinedVector<std::pair<std::string, JsonView>, 16> members_;
  absl::Status status_;
};

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_FORMAT_MANIFEST_OBJECT_H_
