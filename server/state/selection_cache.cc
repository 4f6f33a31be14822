#include "server/state/selection_cache.h"

#include "absl/strings/str_cat.h"

namespace modelstate {
namespace {

constexpr size_t kMaxKeyBytes = size_t{64} << 10;

}  // namespace

std::string SelectionKey(const Selection& selection, absl::string_view scope) {
  size_t bytes = 0;
  for (const auto* texts : {&selection.names, &selection.prefixes, &selection.globs}) {
    for (const std::string& text : *texts) bytes += text.size() + 8;
    if (bytes > kMaxKeyBytes) return std::string();
  }
  std::string key(scope);
  // Each text with its length before it, so that no two lists look alike.
  for (const auto* texts : {&selection.names, &selection.prefixes, &selection.globs}) {
    absl::StrAppend(&key, "|", texts->size());
    for (const std::string& text : *texts) absl::StrAppend(&key, ",", text.size(), ":", text);
  }
  absl::StrAppend(&key, "|", selection.kinds.size());
  for (TensorKind kind : selection.kinds) absl::StrAppend(&key, ",", static_cast<int>(kind));
  absl::StrAppend(&key, "|", selection.float_dtype ? static_cast<int>(*selection.float_dtype) : 0,
                  "|", selection.include_non_persistent ? 1 : 0);
  return key;
}

}  // namespace modelstate
