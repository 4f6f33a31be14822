#include "server/rpc/page_token.h"

#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "common/base/digest.h"
#include "common/base/status.h"

namespace modelstate {
namespace {

constexpr size_t kScopeBytes = 16;

}  // namespace

std::string PageScope(const google::protobuf::MessageLite& request, absl::string_view state) {
  return Xxh3Hex128(absl::StrCat(request.SerializeAsString(), "\n", state)).substr(0, kScopeBytes);
}

std::string EncodePageToken(absl::string_view scope, absl::string_view position) {
  return absl::WebSafeBase64Escape(absl::StrCat(scope, position));
}

absl::StatusOr<std::string> DecodePageToken(absl::string_view scope, absl::string_view token) {
  if (token.empty()) return std::string();
  std::string text;
  if (!absl::WebSafeBase64Unescape(token, &text) || text.size() <= kScopeBytes ||
      text.compare(0, kScopeBytes, std::string(scope)) != 0) {
    return MakeError(Reason::kInvalidField,
                     "page_token is not of this listing: it belongs to another request, or what is "
                     "listed has changed since; start again without one",
                     {{"field", "page_token"}});
  }
  return text.substr(kScopeBytes);
}

absl::StatusOr<uint64_t> DecodePageIndex(absl::string_view scope, absl::string_view token) {
  MS_ASSIGN_OR_RETURN(const std::string position, DecodePageToken(scope, token));
  uint64_t index = 0;
  if (!position.empty() && !absl::SimpleAtoi(position, &index)) {
    return MakeError(Reason::kInvalidField, "page_token is malformed; start again without one",
                     {{"field", "page_token"}});
  }
  return index;
}

absl::StatusOr<size_t> PageSize(int32_t requested, size_t default_size, size_t max_size) {
  if (requested < 0 || static_cast<size_t>(requested) > max_size) {
    return MakeError(Reason::kInvalidField,
                     absl::StrCat("page_size is ", requested, "; it is at most ", max_size,
                                  ", and 0 lets the server choose"),
                     {{"field", "page_size"}});
  }
  return requested == 0 ? default_size : static_cast<size_t>(requested);
}

}  // namespace modelstate
