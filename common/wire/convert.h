#ifndef MODELSTATE_COMMON_WIRE_CONVERT_H_
#define MODELSTATE_COMMON_WIRE_CONVERT_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "common/base/selection.h"
#include "common/base/state_layout.h"
#include "common/base/tensor_spec.h"
#include "google/protobuf/duration.pb.h"
#include "google/protobuf/timestamp.pb.h"
#include "modelstate/v1/types.pb.h"

// The wire's messages <-> the types of common/base, in both directions. What comes from the wire is
// checked here: every error is INVALID_ARGUMENT INVALID_FIELD and names the tensor or field.
namespace modelstate {

// Of the globs, and of the prefixes, of one request. Every tensor of a module is held against each
// of them, so without a bound one small request keeps a thread busy for minutes.
inline constexpr int kMaxPatterns = 64;
inline constexpr size_t kMaxPatternBytes = 1024;
inline constexpr int kMaxSelectedNames = 1000000;  // looked up in a hash table

// `what` names the tensor or field in an error: "tensor \"conv1.weight\"".
absl::StatusOr<DType> DTypeFromProto(v1::DType dtype, absl::string_view what);
v1::DType DTypeToProto(DType dtype);

absl::StatusOr<TensorKind> TensorKindFromProto(v1::TensorKind kind, absl::string_view what);
v1::TensorKind TensorKindToProto(TensorKind kind);

// Not empty, valid UTF-8, no NUL, at most kMaxTensorNameBytes.
absl::Status ValidateTensorName(absl::string_view name);

// Name, kind, dtype, shape, requires_grad, persistent, alias_of and slot of `info`; its places,
// digests and values are the caller's. `default_kind` stands for a kind that is not set; without
// one that is an error. requires_grad and persistent default to true. nbytes, where set, must be
// right.
absl::StatusOr<TensorSpec> TensorSpecFromProto(const v1::TensorInfo& info,
                                               std::optional<TensorKind> default_kind);

// The tensors of a ModuleSpec: as above, and names are unique, a tied tensor names one that comes
// earlier and is not tied itself (else UNKNOWN_KEY). It may leave out kind, dtype and shape; where
// it has them they must be its owner's.
absl::StatusOr<std::vector<TensorSpec>> TensorSpecsFromProto(
    const google::protobuf::RepeatedPtrField<v1::TensorInfo>& infos);

// Sets the same fields, and nbytes. requires_grad is set for parameters only, persistent for
// buffers only.
void TensorSpecToProto(const TensorSpec& spec, v1::TensorInfo* info);

Version VersionFromProto(const v1::Version& version);
void VersionToProto(const Version& version, v1::Version* proto);

// Whether the globs or prefixes in `field` keep the bounds above.
absl::Status CheckPatterns(const google::protobuf::RepeatedPtrField<std::string>& patterns,
                           absl::string_view field);

absl::StatusOr<Selection> SelectionFromProto(const v1::Selection& selection);
void SelectionToProto(const Selection& selection, v1::Selection* proto);

// Ascending, disjoint and each with begin <= end; empty ranges are left out, neighbours joined.
// Whether they lie inside a layout is the caller's check.
absl::StatusOr<std::vector<ByteRange>> ByteRangesFromProto(
    const google::protobuf::RepeatedPtrField<v1::ByteRange>& ranges);
void ByteRangeToProto(const ByteRange& range, v1::ByteRange* proto);

// Negative and malformed durations are errors that name `field`.
absl::StatusOr<absl::Duration> DurationFromProto(const google::protobuf::Duration& duration,
                                                 absl::string_view field);
void DurationToProto(absl::Duration duration, google::protobuf::Duration* proto);
absl::Time TimeFromProto(const google::protobuf::Timestamp& time);
void TimeToProto(absl::Time time, google::protobuf::Timestamp* proto);

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_WIRE_CONVERT_H_
