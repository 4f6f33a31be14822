#include "client/cli/context.h"

#include <cstdio>
#include <iostream>
#include <optional>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "client/cli/output.h"
#include "common/base/status.h"

namespace modelstate::cli {

ExitCode ExitCodeOf(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return kSuccess;
    case absl::StatusCode::kNotFound:
      return kNotFound;
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kDeadlineExceeded:
      return kUnavailable;
    case absl::StatusCode::kDataLoss:
      return kCorrupt;
    case absl::StatusCode::kCancelled:
      return kInterrupted;
    default:
      return kRefused;
  }
}

namespace {

// A server's texts name its calls: what a person can do about them here.
std::string Message(const absl::Status& status) {
  // gRPC's own text for a call that was ended here is its code.
  if (absl::IsCancelled(status) && status.message() == "CANCELLED") {
    return "interrupted; what a server had done by then stays: look before you run it again";
  }
  if (GetReason(status) != Reason::kNoOptimizer) return std::string(status.message());
  return absl::StrCat(status.message(),
                      " (on the command line: modelstate optim set MODULE --ALGORITHM)");
}

}  // namespace

absl::Status Context::CheckNotInterrupted() const {
  return interrupt->cancelled() ? absl::CancelledError("interrupted") : absl::OkStatus();
}

absl::StatusOr<Client> Context::Connect() const {
  ClientOptions options;
  options.timeout = absl::Minutes(10);  // listings with digests and verifying read every byte
  options.transport_profile = *ParseTransportProfile(transport_profile);
  return Client::Connect(server, options);
}

void Context::Finish(const absl::Status& status) {
  if (status.ok()) return;
  exit_code = ExitCodeOf(status);
  const std::optional<Reason> reason = GetReason(status);
  if (json) {
    Json error = {{"code", absl::StatusCodeToString(status.code())}, {"message", Message(status)}};
    if (reason) error["reason"] = std::string(ReasonName(*reason));
    if (reason) error["metadata"] = GetErrorMetadata(status);
    if (const std::optional<absl::Duration> delay = GetRetryAfter(status)) {
      error["retry_after_seconds"] = absl::ToDoubleSeconds(*delay);
    }
    Print({{"error", error}});
    return;
  }
  std::cerr << "modelstate: " << absl::StatusCodeToString(status.code())
            << (reason ? absl::StrCat(" ", ReasonName(*reason)) : "") << ": "
            << Printable(Message(status)) << "\n";
}

void Context::Print(const Json& document) {
  std::cout << document.dump(2, ' ', false, Json::error_handler_t::replace) << std::endl;
}

}  // namespace modelstate::cli
