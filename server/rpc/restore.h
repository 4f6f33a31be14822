#ifndef MODELSTATE_SERVER_RPC_RESTORE_H_
#define MODELSTATE_SERVER_RPC_RESTORE_H_

#include "absl/status/status.h"
#include "server/rpc/runtime.h"

namespace modelstate {

// Brings every module of which there are checkpoints back from its newest one that loads whole,
// with every digest compared; those saved with weights only come after all others. Logs what came
// back from where and each checkpoint that was passed over, with why. A module of which none loads
// is left out, which is logged as an error. Fails only where the root cannot be read. Blocks on
// files; before the first call.
absl::Status RestoreModules(Runtime& runtime);

// Logs a warning where there are checkpoints whose names periodic saves of modules that are made
// anew would use again. Blocks on files.
void WarnOfFormerCheckpoints(Runtime& runtime);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RPC_RESTORE_H_
