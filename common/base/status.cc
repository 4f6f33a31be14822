#include "common/base/status.h"

#include <cerrno>
#include <cstring>

#include "absl/strings/cord.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace modelstate {
namespace {

constexpr char kErrorPayload[] = "modelstate/error";
constexpr char kRetryPayload[] = "modelstate/retry_nanoseconds";
constexpr size_t kMaxMessageBytes = 1024;
constexpr size_t kMaxMetadataValueBytes = 256;

struct Row {
  Reason reason;
  absl::StatusCode code;
  const char* name;
};

constexpr Row kRows[] = {
    {Reason::kModuleNotFound, absl::StatusCode::kNotFound, "MODULE_NOT_FOUND"},
    {Reason::kTensorNotFound, absl::StatusCode::kNotFound, "TENSOR_NOT_FOUND"},
    {Reason::kCheckpointNotFound, absl::StatusCode::kNotFound, "CHECKPOINT_NOT_FOUND"},
    {Reason::kSnapshotNotFound, absl::StatusCode::kNotFound, "SNAPSHOT_NOT_FOUND"},
    {Reason::kStepNotSeen, absl::StatusCode::kNotFound, "STEP_NOT_SEEN"},
    {Reason::kModuleExists, absl::StatusCode::kAlreadyExists, "MODULE_EXISTS"},
    {Reason::kCheckpointExists, absl::StatusCode::kAlreadyExists, "CHECKPOINT_EXISTS"},
    {Reason::kInvalidField, absl::StatusCode::kInvalidArgument, "INVALID_FIELD"},
    {Reason::kUnknownKey, absl::StatusCode::kInvalidArgument, "UNKNOWN_KEY"},
    {Reason::kMissingKey, absl::StatusCode::kInvalidArgument, "MISSING_KEY"},
    {Reason::kNotAParameter, absl::StatusCode::kInvalidArgument, "NOT_A_PARAMETER"},
    {Reason::kShapeMismatch, absl::StatusCode::kInvalidArgument, "SHAPE_MISMATCH"},
    {Reason::kDTypeMismatch, absl::StatusCode::kInvalidArgument, "DTYPE_MISMATCH"},
    {Reason::kChunkInvalid, absl::StatusCode::kInvalidArgument, "CHUNK_INVALID"},
    {Reason::kLayoutMismatch, absl::StatusCode::kInvalidArgument, "LAYOUT_MISMATCH"},
    {Reason::kNotRepresentable, absl::StatusCode::kInvalidArgument, "NOT_REPRESENTABLE"},
    {Reason::kOverrideConflict, absl::StatusCode::kInvalidArgument, "OVERRIDE_CONFLICT"},
    {Reason::kCheckpointUnsupported, absl::StatusCode::kInvalidArgument, "CHECKPOINT_UNSUPPORTED"},
    {Reason::kParameterFrozen, absl::StatusCode::kFailedPrecondition, "PARAMETER_FROZEN"},
    {Reason::kNotInAGroup, absl::StatusCode::kFailedPrecondition, "NOT_IN_A_GROUP"},
    {Reason::kNoOptimizer, absl::StatusCode::kFailedPrecondition, "NO_OPTIMIZER"},
    {Reason::kModuleEmpty, absl::StatusCode::kFailedPrecondition, "MODULE_EMPTY"},
    {Reason::kModuleFailed, absl::StatusCode::kFailedPrecondition, "MODULE_FAILED"},
    {Reason::kStaleBase, absl::StatusCode::kAborted, "STALE_BASE"},
    {Reason::kIncarnationChanged, absl::StatusCode::kAborted, "INCARNATION_CHANGED"},
    {Reason::kSequenceReused, absl::StatusCode::kAborted, "SEQUENCE_REUSED"},
    {Reason::kAccumulationLost, absl::StatusCode::kAborted, "ACCUMULATION_LOST"},
    {Reason::kAlreadyContributed, absl::StatusCode::kAborted, "ALREADY_CONTRIBUTED"},
    {Reason::kRoundGivenUp, absl::StatusCode::kAborted, "ROUND_GIVEN_UP"},
    {Reason::kModuleDeleted, absl::StatusCode::kAborted, "MODULE_DELETED"},
    {Reason::kStreamStalled, absl::StatusCode::kAborted, "STREAM_STALLED"},
    {Reason::kRangeOutsideLayout, absl::StatusCode::kOutOfRange, "RANGE_OUTSIDE_LAYOUT"},
    {Reason::kDeviceMemory, absl::StatusCode::kResourceExhausted, "DEVICE_MEMORY"},
    {Reason::kSnapshotLimit, absl::StatusCode::kResourceExhausted, "SNAPSHOT_LIMIT"},
    {Reason::kPushMemory, absl::StatusCode::kResourceExhausted, "PUSH_MEMORY"},
    {Reason::kWorkerLimit, absl::StatusCode::kResourceExhausted, "WORKER_LIMIT"},
    {Reason::kStorageFull, absl::StatusCode::kResourceExhausted, "STORAGE_FULL"},
    {Reason::kCheckpointCorrupt, absl::StatusCode::kDataLoss, "CHECKPOINT_CORRUPT"},
    {Reason::kDigestMismatch, absl::StatusCode::kDataLoss, "DIGEST_MISMATCH"},
    {Reason::kDraining, absl::StatusCode::kUnavailable, "DRAINING"},
    {Reason::kStorageError, absl::StatusCode::kInternal, "STORAGE_ERROR"},
};

const Row& Find(Reason reason) { return kRows[static_cast<size_t>(reason)]; }

// Cuts at a UTF-8 boundary: gRPC percent-encodes a status message, JSON clients decode it as UTF-8.
std::string Truncate(absl::string_view text, size_t limit) {
  if (text.size() <= limit) return std::string(text);
  size_t end = limit - 3;
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) --end;
  return absl::StrCat(text.substr(0, end), "...");
}

}  // namespace

absl::string_view ReasonName(Reason reason) { return Find(reason).name; }

std::optional<Reason> ParseReason(absl::string_view name) {
  for (const Row& row : kRows) {
    if (name == row.name) return row.reason;
  }
  return std::nullopt;
}

absl::StatusCode ReasonCode(Reason reason) { return Find(reason).code; }

absl::Status MakeError(Reason reason, absl::string_view message, ErrorMetadata metadata) {
  absl::Status status(ReasonCode(reason), Truncate(message, kMaxMessageBytes));
  // Names may hold any byte but NUL, so NUL separates.
  std::string payload(ReasonName(reason));
  for (const auto& [key, value] : metadata) {
    payload.push_back('\0');
    absl::StrAppend(&payload, key);
    payload.push_back('\0');
    absl::StrAppend(&payload, Truncate(value, kMaxMetadataValueBytes));
  }
  status.SetPayload(kErrorPayload, absl::Cord(payload));
  return status;
}

absl::Status ErrnoError(int error_number, absl::string_view what) {
  bool full = false;
  const char* advice = "";
  switch (error_number) {
    case ENOSPC:
    case EDQUOT:
      full = true;
      advice = "; free space there and try again";
      break;
    case EIO:
      advice = "; the disk may be failing: see the kernel's log, and use another disk";
      break;
    case EMFILE:
    case ENFILE:
      advice = "; raise the limit of open files (ulimit -n) and try again";
      break;
    case EINVAL:
      advice = "; its file system refuses such a call: use another";
      break;
    case EINTR:
      advice = "; a signal came in between: try again";
      break;
    case EACCES:
    case EPERM:
      advice = "; give the user that this runs as the right to it, or use another directory";
      break;
    case EROFS:
      advice = "; that file system is read-only: use another";
      break;
    default:
      break;
  }
  return MakeError(full ? Reason::kStorageFull : Reason::kStorageError,
                   absl::StrCat("cannot ", what, ": ", std::strerror(error_number), advice));
}

std::optional<Reason> GetReason(const absl::Status& status) {
  absl::optional<absl::Cord> payload = status.GetPayload(kErrorPayload);
  if (!payload) return std::nullopt;
  const std::string text(*payload);
  return ParseReason(absl::string_view(text).substr(0, text.find('\0')));
}

ErrorMetadata GetErrorMetadata(const absl::Status& status) {
  ErrorMetadata metadata;
  absl::optional<absl::Cord> payload = status.GetPayload(kErrorPayload);
  if (!payload) return metadata;
  const std::string text(*payload);
  std::vector<std::string> parts = absl::StrSplit(text, '\0');
  for (size_t i = 1; i + 1 < parts.size(); i += 2) metadata[parts[i]] = parts[i + 1];
  return metadata;
}

absl::Status WithRetryAfter(absl::Status status, absl::Duration delay) {
  status.SetPayload(kRetryPayload, absl::Cord(absl::StrCat(absl::ToInt64Nanoseconds(delay))));
  return status;
}

std::optional<absl::Duration> GetRetryAfter(const absl::Status& status) {
  absl::optional<absl::Cord> payload = status.GetPayload(kRetryPayload);
  int64_t nanoseconds = 0;
  if (!payload || !absl::SimpleAtoi(std::string(*payload), &nanoseconds)) return std::nullopt;
  return absl::Nanoseconds(nanoseconds);
}

absl::Status Annotate(const absl::Status& status, absl::string_view prefix) {
  if (status.ok()) return status;
  absl::Status annotated(status.code(),
                         Truncate(absl::StrCat(prefix, ": ", status.message()), kMaxMessageBytes));
  status.ForEachPayload([&annotated](absl::string_view url, const absl::Cord& payload) {
    annotated.SetPayload(url, payload);
  });
  return annotated;
}

std::string QuotedList(absl::Span<const std::string> names) {
  constexpr size_t kShown = 10;
  std::string text;
  for (size_t i = 0; i < names.size() && i < kShown; ++i) {
    absl::StrAppend(&text, i == 0 ? "\"" : ", \"", Truncate(names[i], 80), "\"");
  }
  if (names.size() > kShown) absl::StrAppend(&text, " and ", names.size() - kShown, " more");
  return text;
}

}  // namespace modelstate
