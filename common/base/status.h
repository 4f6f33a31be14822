#ifndef MODELSTATE_COMMON_BASE_STATUS_H_
#define MODELSTATE_COMMON_BASE_STATUS_H_

#include <initializer_list>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"

namespace modelstate {

// Why a call failed, as a machine reads it: `google.rpc.ErrorInfo.reason` on the wire. A reason has
// one status code, always the same.
enum class Reason {
  // NOT_FOUND
  kModuleNotFound,
  kTensorNotFound,
  kCheckpointNotFound,
  kSnapshotNotFound,
  kStepNotSeen,  // a header alone asks for the answer to it
  // ALREADY_EXISTS
  kModuleExists,
  kCheckpointExists,
  // INVALID_ARGUMENT
  kInvalidField,  // a request field that is missing, malformed or contradicts another
  kUnknownKey,
  kMissingKey,
  kNotAParameter,
  kShapeMismatch,
  kDTypeMismatch,
  kChunkInvalid,
  kLayoutMismatch,
  kNotRepresentable,
  kOverrideConflict,
  kCheckpointUnsupported,  // a well-formed file of a kind, or with a content, that is refused
  // FAILED_PRECONDITION
  kParameterFrozen,
  kNotInAGroup,
  kNoOptimizer,
  kModuleEmpty,
  kModuleFailed,
  // ABORTED
  kStaleBase,
  kIncarnationChanged,
  kSequenceReused,
  kAccumulationLost,
  kAlreadyContributed,
  kRoundGivenUp,
  kModuleDeleted,
  kStreamStalled,
  // OUT_OF_RANGE
  kRangeOutsideLayout,
  // RESOURCE_EXHAUSTED
  kDeviceMemory,
  kSnapshotLimit,
  kPushMemory,
  kWorkerLimit,
  kStorageFull,
  // DATA_LOSS
  kCheckpointCorrupt,
  kDigestMismatch,
  // UNAVAILABLE
  kDraining,
  // UNIMPLEMENTED
  // INTERNAL
  kStorageError,  // the file system failed: EIO and the like
};

// "NOT_A_PARAMETER".
absl::string_view ReasonName(Reason reason);
std::optional<Reason> ParseReason(absl::string_view name);
absl::StatusCode ReasonCode(Reason reason);

using ErrorMetadata = std::map<std::string, std::string>;

// A status that carries `reason` and `metadata` as a payload. `message` says which tensor or field,
// the rule and the way out; it is cut to 1 KiB, because a gRPC channel with default settings
// replaces an error whose trailers are longer by RESOURCE_EXHAUSTED.
absl::Status MakeError(Reason reason, absl::string_view message, ErrorMetadata metadata = {});

// The same for failures of the file system; picks kStorageFull for ENOSPC and EDQUOT, else
// kStorageError. `what` names the act and the path below the root: "write model.safetensors".
absl::Status ErrnoError(int error_number, absl::string_view what);

// nullopt when `status` was not made by MakeError.
std::optional<Reason> GetReason(const absl::Status& status);
ErrorMetadata GetErrorMetadata(const absl::Status& status);

// Adds how long a caller should wait before it tries again (`google.rpc.RetryInfo` on the wire).
absl::Status WithRetryAfter(absl::Status status, absl::Duration delay);
std::optional<absl::Duration> GetRetryAfter(const absl::Status& status);

// The same status with `prefix` and ": " before its message; payloads stay.
absl::Status Annotate(const absl::Status& status, absl::string_view prefix);

// `"a", "b", "c" and 12 more`: the first ten, quoted, and a count of the rest.
std::string QuotedList(absl::Span<const std::string> names);

}  // namespace modelstate

#define MS_CONCAT_INNER(a, b) a##b
#define MS_CONCAT(a, b) MS_CONCAT_INNER(a, b)

#define MS_RETURN_IF_ERROR(expr)                            \
  do {                                                      \
    if (absl::Status ms_status = (expr); !ms_status.ok()) { \
      return ms_status;                                     \
    }                                                       \
  } while (false)

#define MS_ASSIGN_OR_RETURN(lhs, expr) \
  MS_ASSIGN_OR_RETURN_IMPL(MS_CONCAT(ms_statusor_, __LINE__), lhs, expr)
#define MS_ASSIGN_OR_RETURN_IMPL(var, lhs, expr) \
  auto var = (expr);                             \
  if (!var.ok()) return std::move(var).status(); \
  lhs = *std::move(var)

#endif  // MODELSTATE_COMMON_BASE_STATUS_H_
