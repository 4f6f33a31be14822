#ifndef MODELSTATE_SERVER_RPC_PAGE_TOKEN_H_
#define MODELSTATE_SERVER_RPC_PAGE_TOKEN_H_

#include <google/protobuf/message_lite.h>

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace modelstate {

// A page ends early at this many bytes, so that it stays below what a default client accepts.
inline constexpr size_t kMaxPageBytes = size_t{2} << 20;

// What a page token belongs to: the request without its page fields, and `state`, which changes
// when the listing's order does. `request` has page_size and page_token cleared.
std::string PageScope(const google::protobuf::MessageLite& request, absl::string_view state);

// A token for the listing `scope` that goes on after `position`.
std::string EncodePageToken(absl::string_view scope, absl::string_view position);

// The position; empty for an empty token. INVALID_FIELD for a token of another scope.
absl::StatusOr<std::string> DecodePageToken(absl::string_view scope, absl::string_view token);

// The same for positions that are numbers: 0 for an empty token.
absl::StatusOr<uint64_t> DecodePageIndex(absl::string_view scope, absl::string_view token);

// INVALID_FIELD for a negative or too large page size; 0 is `default_size`.
absl::StatusOr<size_t> PageSize(int32_t requested, size_t default_size, size_t max_size);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RPC_PAGE_TOKEN_H_
