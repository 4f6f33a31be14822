#include "common/base/selection.h"

#include <algorithm>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/match.h"

namespace modelstate {
namespace {

// Matches one character against the set that starts after `[` at pattern[*pos]; leaves *pos after
// the closing bracket. A set that is not closed is the literal "[": then *pos stays.
// `last_close` is the last `]` of the pattern, so that none is looked for in vain again and again.
bool MatchSet(absl::string_view pattern, size_t last_close, size_t* pos, char c, bool* is_set) {
  size_t i = *pos;
  const bool negate = i < pattern.size() && pattern[i] == '!';
  if (negate) ++i;
  // A bracket right at the start is a member.
  *is_set = last_close != absl::string_view::npos && last_close > i;
  if (!*is_set) return c == '[';
  const size_t close = pattern.find(']', i + 1);
  bool found = false;
  while (i < close) {
    if (i + 2 < close && pattern[i + 1] == '-') {
      found |= pattern[i] <= c && c <= pattern[i + 2];
      i += 3;
    } else {
      found |= pattern[i] == c;
      ++i;
    }
  }
  *pos = close + 1;
  return found != negate;
}

bool GlobMatch(absl::string_view pattern, absl::string_view name, uint64_t& steps) {
  const size_t last_close = pattern.rfind(']');
  size_t p = 0;
  size_t n = 0;
  size_t star = absl::string_view::npos;
  size_t star_name = 0;
  while (n < name.size()) {
    ++steps;
    if (p < pattern.size() && pattern[p] == '*') {
      star = ++p;
      star_name = n;
      continue;
    }
    if (p < pattern.size()) {
      if (pattern[p] == '?') {
        ++p;
        ++n;
        continue;
      }
      if (pattern[p] == '[') {
        size_t after = p + 1;
        bool is_set = false;
        const bool matches = MatchSet(pattern, last_close, &after, name[n], &is_set);
        steps += after - p;
        if (matches) {
          p = is_set ? after : p + 1;
          ++n;
          continue;
        }
      } else if (pattern[p] == name[n]) {
        ++p;
        ++n;
        continue;
      }
    }
    if (star == absl::string_view::npos) return false;
    p = star;
    n = ++star_name;
  }
  while (p < pattern.size() && pattern[p] == '*') ++p;
  return p == pattern.size();
}

}  // namespace

bool GlobMatch(absl::string_view pattern, absl::string_view name, uint64_t* steps) {
  uint64_t looked_at = 8 + pattern.size() / 16;  // what a match takes that fails at once
  const bool matches = GlobMatch(pattern, name, looked_at);
  if (steps != nullptr) *steps += looked_at;
  return matches;
}

bool MatchesPattern(const Selection& selection, absl::string_view name, uint64_t* steps) {
  if (selection.names.empty() && selection.prefixes.empty() && selection.globs.empty()) return true;
  if (steps != nullptr) *steps += 2 * selection.prefixes.size();
  for (const std::string& prefix : selection.prefixes) {
    if (absl::StartsWith(name, prefix)) return true;
  }
  for (const std::string& glob : selection.globs) {
    if (GlobMatch(glob, name, steps)) return true;
  }
  return false;
}

std::vector<uint32_t> Select(const Selection& selection, absl::Span<const TensorSpec> specs,
                             std::vector<std::string>* unknown) {
  absl::flat_hash_set<absl::string_view> names(selection.names.begin(), selection.names.end());
  absl::flat_hash_set<absl::string_view> seen;
  std::vector<uint32_t> selected;
  for (uint32_t i = 0; i < specs.size(); ++i) {
    const TensorSpec& spec = specs[i];
    const bool named = names.contains(spec.name);
    if (named) seen.insert(spec.name);
    const bool matches = named || MatchesPattern(selection, spec.name);
    const bool kind = selection.kinds.empty() ||
                      std::find(selection.kinds.begin(), selection.kinds.end(), spec.kind) !=
                          selection.kinds.end();
    const bool hidden = !spec.persistent && !named && !selection.include_non_persistent;
    if (matches && kind && !hidden) selected.push_back(i);
  }
  for (const std::string& name : selection.names) {
    if (!seen.contains(name)) unknown->push_back(name);
  }
  return selected;
}

}  // namespace modelstate
