#include "client/target.h"

#include <netdb.h>
#include <sys/socket.h>

#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "common/base/status.h"

namespace modelstate::client {
namespace {

struct Free {
  void operator()(addrinfo* list) const { freeaddrinfo(list); }
};

absl::Status ServerError(absl::string_view text) {
  return MakeError(Reason::kInvalidField, text, {{"field", "server"}});
}

// The numeric addresses of HOST:PORT, as gRPC writes them; none where the name is not known.
absl::StatusOr<std::vector<std::string>> Resolve(absl::string_view address, int family) {
  const size_t colon = address.rfind(':');
  if (colon == absl::string_view::npos || colon == 0 || colon + 1 == address.size()) {
    return ServerError(absl::StrCat("\"", address, "\" is not HOST:PORT"));
  }
  absl::string_view host = address.substr(0, colon);
  if (absl::ConsumePrefix(&host, "[")) absl::ConsumeSuffix(&host, "]");
  const std::string port(address.substr(colon + 1));
  addrinfo hints{};
  hints.ai_family = family;
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (getaddrinfo(std::string(host).c_str(), port.c_str(), &hints, &found) != 0) {
    return std::vector<std::string>();
  }
  const std::unique_ptr<addrinfo, Free> list(found);
  std::vector<std::string> addresses;
  for (const addrinfo* entry = list.get(); entry != nullptr; entry = entry->ai_next) {
    char name[NI_MAXHOST];
    char service[NI_MAXSERV];
    if (getnameinfo(entry->ai_addr, entry->ai_addrlen, name, sizeof(name), service, sizeof(service),
                    NI_NUMERICHOST | NI_NUMERICSERV) != 0) {
      continue;
    }
    addresses.push_back(family == AF_INET6 ? absl::StrCat("[", name, "]:", service)
                                           : absl::StrCat(name, ":", service));
  }
  return addresses;
}

}  // namespace

absl::StatusOr<Target> ParseTarget(const std::string& text) {
  const bool is_uri = absl::StrContains(text, "://") || absl::StartsWith(text, "ipv4:") ||
                      absl::StartsWith(text, "ipv6:") || absl::StartsWith(text, "unix");
  if (is_uri || !absl::StrContains(text, ',')) return Target{text, text, ""};
  const std::vector<std::string> parts = absl::StrSplit(text, ',');
  // A list is of one family.
  for (const auto& [family, scheme] : {std::pair{AF_INET, "ipv4:"}, {AF_INET6, "ipv6:"}}) {
    std::vector<std::string> addresses;
    for (const std::string& part : parts) {
      MS_ASSIGN_OR_RETURN(const std::vector<std::string> more, Resolve(part, family));
      addresses.insert(addresses.end(), more.begin(), more.end());
    }
    if (addresses.empty()) continue;
    return Target{absl::StrCat(scheme, absl::StrJoin(addresses, ",")), addresses.front(), parts[0]};
  }
  return absl::UnavailableError(absl::StrCat("none of the hosts of \"", text, "\" has an address"));
}

}  // namespace modelstate::client
