#ifndef MODELSTATE_CLIENT_FILES_FETCH_TO_FILE_H_
#define MODELSTATE_CLIENT_FILES_FETCH_TO_FILE_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "client/client.h"

namespace modelstate::client {

struct FetchToFileOptions {
  Selection selection;
  // The optimizer state of the selected parameters too, each tensor named "<slot>/<parameter>" as
  // in a saved optimizer.safetensors, the step counts as well ("step/fc.weight"). A selection of
  // kind kOptimizerState alone is empty without this. A `snapshot_id` must be of a pin that was
  // made with it, and a `version` the newest.
  bool optimizer_state = false;
  // Which version: one that a pin of the caller holds (its lease is left alone), or a number that
  // is current or held by anybody; neither: the newest, under a pin of its own. At most one of
  // them.
  std::string snapshot_id;
  uint64_t version = 0;
  // Go on with what an earlier, broken-off call left for the same path, when its version is still
  // held; else begin anew.
  bool resume = false;
  // Of the pin that holds the version; renewed while the transfer runs, and how long after a
  // failure a resume finds it.
  absl::Duration lease = absl::Seconds(60);
  uint32_t chunk_bytes = 0;  // 0: the server chooses, or for several streams a smaller size
  // Over so many connections at once, each a part of the file: for links that one does not fill.
  int streams = 1;
  ProgressCallback progress;  // called by one thread at a time
};

struct FetchToFileResult {
  Version version;
  uint64_t step = 0;
  uint64_t tensors = 0;
  uint64_t tensors_with_bytes = 0;  // not tied to another
  uint64_t data_bytes = 0;
  uint64_t file_bytes = 0;
  uint64_t received_bytes = 0;  // by this call
  // Of tensors_with_bytes: whose XXH3 the server confirmed. All, but with a server that does not
  // state the digests of tensors of which only a part is asked for.
  uint64_t verified_digests = 0;
  bool resumed = false;
  std::string note;  // why a resume began anew; empty: nothing to say
};

// A snapshot into a safetensors file. One version is pinned, its bytes are written to
// `path`.partial at their places, a transfer that breaks goes on with what is missing, and when all
// digests agree the file is synced and renamed to `path`; nothing is ever seen there that is not
// whole. On failure, also by kill -9, `path`.partial and the record `path`.partial.record stay for
// a resume: what was written is not sent again. Two calls at once for one path: INVALID_FIELD.
// Errors: those of Fetch; ABORTED INCARNATION_CHANGED where the version that was begun is of
// another life of the module by now (or of another server, of several addresses); INVALID_ARGUMENT
// NOT_REPRESENTABLE where "<slot>/<parameter>" is also the name of a tensor; RESOURCE_EXHAUSTED
// STORAGE_FULL, INTERNAL STORAGE_ERROR of the local disk.
absl::StatusOr<FetchToFileResult> FetchToFile(const Client& client, const std::string& module,
                                              const std::string& path,
                                              const FetchToFileOptions& options = {},
                                              Cancellation* cancellation = nullptr);

}  // namespace modelstate::client

#endif  // MODELSTATE_CLIENT_FILES_FETCH_TO_FILE_H_
