#include "client/key_lists.h"

#include <algorithm>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "common/base/status.h"

namespace modelstate::client {
namespace {

// Adds to `list` what `part`, which begins at `skip`, has beyond its end.
void Append(uint64_t skip, std::vector<std::string> part, std::vector<std::string>* list) {
  const uint64_t known = list->size() - skip;
  if (part.size() <= known) return;
  list->insert(list->end(), std::make_move_iterator(part.begin() + static_cast<int64_t>(known)),
               std::make_move_iterator(part.end()));
}

// Lowers `skip` to where an incomplete list ends.
void Lower(uint64_t count, const std::vector<std::string>& list, uint64_t* skip) {
  if (list.size() < count) *skip = std::min<uint64_t>(*skip, list.size());
}

absl::Status Changed() {
  return absl::AbortedError("the module changed during the dry run; run it again");
}

}  // namespace

absl::Status CompleteKeyLists(
    const std::function<absl::StatusOr<LoadResult>(uint64_t skip_keys)>& ask, LoadResult* result) {
  while (true) {
    uint64_t skip = UINT64_MAX;
    Lower(result->missing_count, result->missing_keys, &skip);
    Lower(result->unexpected_count, result->unexpected_keys, &skip);
    Lower(result->size_mismatch_count, result->size_mismatches, &skip);
    if (skip == UINT64_MAX) return absl::OkStatus();
    MS_ASSIGN_OR_RETURN(LoadResult more, ask(skip));
    if (more.missing_count != result->missing_count ||
        more.unexpected_count != result->unexpected_count ||
        more.size_mismatch_count != result->size_mismatch_count) {
      return Changed();
    }
    const size_t before = result->missing_keys.size() + result->unexpected_keys.size() +
                          result->size_mismatches.size();
    // A list that is complete may end before `skip`.
    const auto append = [skip](std::vector<std::string> part, std::vector<std::string>* list) {
      if (list->size() >= skip) Append(skip, std::move(part), list);
    };
    append(std::move(more.missing_keys), &result->missing_keys);
    append(std::move(more.unexpected_keys), &result->unexpected_keys);
    append(std::move(more.size_mismatches), &result->size_mismatches);
    const size_t after = result->missing_keys.size() + result->unexpected_keys.size() +
                         result->size_mismatches.size();
    if (after == before) return absl::InternalError("the server leaves keys out of its lists");
  }
}

}  // namespace modelstate::client
