#include "common/wire/status_mapping.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "common/base/status.h"
#include "common/wire/convert.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"

namespace modelstate {
namespace {

constexpr char kDomain[] = "modelstate";
// Of grpc-message, percent-encoded: three bytes for one where it is not printable ASCII.
constexpr size_t kMaxEncodedMessageBytes = 2048;
// Of grpc-status-details-bin, before base64 adds a third.
constexpr size_t kMaxDetailBytes = 3072;

size_t PercentEncodedSize(unsigned char c) { return c >= 0x20 && c <= 0x7E && c != '%' ? 1 : 3; }

// The longest prefix at a UTF-8 boundary that fits when percent-encoded.
absl::string_view FitMessage(absl::string_view message) {
  size_t size = 0;
  for (size_t i = 0; i < message.size(); ++i) {
    size += PercentEncodedSize(static_cast<unsigned char>(message[i]));
    if (size > kMaxEncodedMessageBytes) {
      while (i > 0 && (static_cast<unsigned char>(message[i]) & 0xC0) == 0x80) --i;
      return message.substr(0, i);
    }
  }
  return message;
}

}  // namespace

std::string ToUtf8(absl::string_view text) {
  std::string result(text);
  size_t i = 0;
  while (i < result.size()) {
    const unsigned char lead = static_cast<unsigned char>(result[i]);
    const size_t length = lead < 0x80             ? 1
                          : (lead & 0xE0) == 0xC0 ? 2
                          : (lead & 0xF0) == 0xE0 ? 3
                          : (lead & 0xF8) == 0xF0 ? 4
                                                  : 0;
    bool valid = length != 0 && i + length <= result.size();
    for (size_t k = 1; valid && k < length; ++k) {
      valid = (static_cast<unsigned char>(result[i + k]) & 0xC0) == 0x80;
    }
    if (!valid) result[i] = '?';
    i += valid ? length : 1;
  }
  return result;
}

grpc::Status ToGrpcStatus(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  const std::string message = ToUtf8(FitMessage(status.message()));
  const auto code = static_cast<grpc::StatusCode>(status.code());

  google::rpc::Status details;
  details.set_code(static_cast<int>(status.code()));
  details.set_message(message);
  if (std::optional<absl::Duration> delay = GetRetryAfter(status)) {
    google::rpc::RetryInfo retry;
    DurationToProto(std::max(*delay, absl::ZeroDuration()), retry.mutable_retry_delay());
    details.add_details()->PackFrom(retry);
  }
  if (std::optional<Reason> reason = GetReason(status)) {
    google::rpc::ErrorInfo info;
    info.set_reason(std::string(ReasonName(*reason)));
    info.set_domain(kDomain);
    const ErrorMetadata metadata = GetErrorMetadata(status);
    std::vector<std::pair<std::string, std::string>> entries;
    for (const auto& [key, value] : metadata) entries.emplace_back(ToUtf8(key), ToUtf8(value));
    std::stable_sort(entries.begin(), entries.end(), [](const auto& a, const auto& b) {
      return a.first.size() + a.second.size() < b.first.size() + b.second.size();
    });
    constexpr size_t kEntryOverhead = 8;
    size_t size = details.ByteSizeLong() + 128;
    for (auto& [key, value] : entries) {
      size += key.size() + value.size() + kEntryOverhead;
      if (size > kMaxDetailBytes) break;
      (*info.mutable_metadata())[key] = std::move(value);
    }
    details.add_details()->PackFrom(info);
  }
  if (details.details_size() == 0) return grpc::Status(code, message);
  return grpc::Status(code, message, details.SerializeAsString());
}

absl::Status FromGrpcStatus(const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  const auto code = static_cast<absl::StatusCode>(status.error_code());
  absl::Status result(code, status.error_message());
  google::rpc::Status details;
  if (status.error_details().empty() || !details.ParseFromString(status.error_details())) {
    return result;
  }
  std::optional<absl::Duration> delay;
  for (const google::protobuf::Any& any : details.details()) {
    google::rpc::ErrorInfo info;
    google::rpc::RetryInfo retry;
    if (any.Is<google::rpc::ErrorInfo>() && any.UnpackTo(&info) && info.domain() == kDomain) {
      const std::optional<Reason> reason = ParseReason(info.reason());
      // The code is what gRPC said, so a peer whose reasons have other codes is not believed.
      if (reason && ReasonCode(*reason) == code) {
        result = MakeError(*reason, status.error_message(),
                           ErrorMetadata(info.metadata().begin(), info.metadata().end()));
      }
    } else if (any.Is<google::rpc::RetryInfo>() && any.UnpackTo(&retry)) {
      absl::StatusOr<absl::Duration> parsed = DurationFromProto(retry.retry_delay(), "retry_delay");
      if (parsed.ok()) delay = *parsed;
    }
  }
  if (delay) result = WithRetryAfter(std::move(result), *delay);
  return result;
}

}  // namespace modelstate
