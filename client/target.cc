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

// The numeric addresses of HOST:PORT, without brackets, and its port; none where the name is not
// known.
struct Resolved {
  int family = AF_INET;
  std::vector<std::string> hosts;
  std::string port;
};

absl::StatusOr<Resolved> Resolve(absl::string_view address) {
  const size_t colon = address.rfind(':');
  if (colon == absl::string_view::npos || colon == 0 || colon + 1 == address.size()) {
    return ServerError(absl::StrCat("\"", address, "\" is not HOST:PORT"));
  }
  absl::string_view host = address.substr(0, colon);
  if (absl::ConsumePrefix(&host, "[")) absl::ConsumeSuffix(&host, "]");
  Resolved resolved;
  resolved.port = std::string(address.substr(colon + 1));
  for (const int family : {AF_INET, AF_INET6}) {
    addrinfo hints{};
    hints.ai_family = family;
    hints.ai_socktype = SOCK_STREAM;
    addrinfo* found = nullptr;
    if (getaddrinfo(std::string(host).c_str(), resolved.port.c_str(), &hints, &found) != 0) {
      continue;
    }
    const std::unique_ptr<addrinfo, Free> list(found);
    for (const addrinfo* entry = list.get(); entry != nullptr; entry = entry->ai_next) {
      char name[NI_MAXHOST];
      char service[NI_MAXSERV];
      if (getnameinfo(entry->ai_addr, entry->ai_addrlen, name, sizeof(name), service,
                      sizeof(service), NI_NUMERICHOST | NI_NUMERICSERV) != 0) {
        continue;
      }
      resolved.hosts.emplace_back(name);
      resolved.port = service;
    }
    resolved.family = family;
    if (!resolved.hosts.empty()) break;
  }
  return resolved;
}

}  // namespace

absl::StatusOr<Target> ParseTarget(const std::string& text) {
  const bool is_uri = absl::StrContains(text, "://") || absl::StartsWith(text, "ipv4:") ||
                      absl::StartsWith(text, "ipv6:") || absl::StartsWith(text, "unix:") ||
                      absl::StartsWith(text, "unix-abstract:");
  if (is_uri || !absl::StrContains(text, ',')) return Target{text, text, ""};
  const std::vector<std::string> parts = absl::StrSplit(text, ',');
  std::vector<Resolved> all;
  bool all_v4 = true;
  for (const std::string& part : parts) {
    MS_ASSIGN_OR_RETURN(Resolved resolved, Resolve(part));
    all_v4 &= resolved.hosts.empty() || resolved.family == AF_INET;
    all.push_back(std::move(resolved));
  }
  // A list is of one family, whose sixth version has places for the addresses of the fourth.
  std::vector<std::string> addresses;
  for (const Resolved& resolved : all) {
    const bool v4 = resolved.family == AF_INET;
    for (const std::string& host : resolved.hosts) {
      addresses.push_back(all_v4 ? absl::StrCat(host, ":", resolved.port)
                                 : absl::StrCat(v4 ? "[::ffff:" : "[", host, "]:", resolved.port));
    }
  }
  if (!addresses.empty()) {
    return Target{absl::StrCat(all_v4 ? "ipv4:" : "ipv6:", absl::StrJoin(addresses, ",")),
                  addresses.front(), parts[0]};
  }
  return absl::UnavailableError(absl::StrCat("none of the hosts of \"", text, "\" has an address"));
}

}  // namespace modelstate::client
