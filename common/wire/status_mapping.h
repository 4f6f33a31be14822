#ifndef MODELSTATE_COMMON_WIRE_STATUS_MAPPING_H_
#define MODELSTATE_COMMON_WIRE_STATUS_MAPPING_H_

#include <grpcpp/support/status.h>

#include "absl/status/status.h"

namespace modelstate {

// The one place where statuses cross gRPC. The reason and its metadata travel as
// google.rpc.ErrorInfo (domain "modelstate"), the retry hint as google.rpc.RetryInfo, both in a
// google.rpc.Status in the trailer `grpc-status-details-bin`. A round trip keeps code, message,
// reason, metadata and hint.
//
// Message and details stay below 7 KiB together, also percent-encoded and in base64: a channel with
// default settings takes 8 KiB of trailers and replaces an error with longer ones. Metadata that
// does not fit is left out, longest first; a message that does not fit is cut.
grpc::Status ToGrpcStatus(const absl::Status& status);

// As the field of a message may hold it, which must be UTF-8: '?' for each byte that is not. Names
// may come from a file or a path.
std::string ToUtf8(absl::string_view text);

// A reason that this build does not know keeps its code and text and loses the rest.
absl::Status FromGrpcStatus(const grpc::Status& status);

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_WIRE_STATUS_MAPPING_H_
