#ifndef MODELSTATE_CLIENT_KEY_LISTS_H_
#define MODELSTATE_CLIENT_KEY_LISTS_H_

#include <cstdint>
#include <functional>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/types.h"

namespace modelstate::client {

// Completes the lists of a dry run, of which one message holds a part. `ask(skip_keys)` repeats the
// call with its lists from there on. ABORTED when the module changes meanwhile, so that the lists
// would not fit together. Internal to the library.
absl::Status CompleteKeyLists(
    const std::function<absl::StatusOr<LoadResult>(uint64_t skip_keys)>& ask, LoadResult* result);

}  // namespace modelstate::client

#endif  // MODELSTATE_CLIENT_KEY_LISTS_H_
