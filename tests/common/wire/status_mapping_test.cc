#include "common/wire/status_mapping.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "google/rpc/status.pb.h"

namespace modelstate {
namespace {

TEST(StatusMapping, RoundTripKeepsReasonMetadataAndHint) {
  const absl::Status status =
      WithRetryAfter(MakeError(Reason::kPushMemory, "no room for \"m\"; try later",
                               {{"module", "m"}, {"needed", "12"}}),
                     absl::Milliseconds(1500));
  const grpc::Status wire = ToGrpcStatus(status);
  EXPECT_EQ(wire.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_EQ(wire.error_message(), "no room for \"m\"; try later");
  const absl::Status back = FromGrpcStatus(wire);
  EXPECT_EQ(back, status) << back;
  EXPECT_EQ(GetReason(back), Reason::kPushMemory);
  EXPECT_EQ(GetErrorMetadata(back), GetErrorMetadata(status));
  EXPECT_EQ(GetRetryAfter(back), absl::Milliseconds(1500));
}

TEST(StatusMapping, EveryReasonSurvives) {
  for (int i = 0; i <= static_cast<int>(Reason::kStorageError); ++i) {
    const auto reason = static_cast<Reason>(i);
    EXPECT_EQ(GetReason(FromGrpcStatus(ToGrpcStatus(MakeError(reason, "text")))), reason);
  }
}

TEST(StatusMapping, PlainStatusesKeepCodeAndText) {
  EXPECT_TRUE(ToGrpcStatus(absl::OkStatus()).ok());
  EXPECT_TRUE(FromGrpcStatus(grpc::Status::OK).ok());
  const absl::Status status = absl::UnimplementedError("MoveModule is not built yet");
  EXPECT_EQ(FromGrpcStatus(ToGrpcStatus(status)), status);
}

size_t PercentEncoded(const std::string& text) {
  size_t size = 0;
  for (unsigned char c : text) size += c >= 0x20 && c <= 0x7E && c != '%' ? 1 : 3;
  return size;
}

TEST(StatusMapping, TrailersStayFarBelow8KiB) {
  ErrorMetadata metadata;
  for (int i = 0; i < 100; ++i) metadata[absl::StrCat("key", i)] = std::string(250, '\xC3');
  metadata["short"] = "kept";
  std::string message;
  while (message.size() < 1000) message += "\xC3\xA9";  // é: 6 bytes when encoded
  const grpc::Status wire = ToGrpcStatus(MakeError(Reason::kUnknownKey, message, metadata));
  const size_t base64 = (wire.error_details().size() + 2) / 3 * 4;
  EXPECT_LE(PercentEncoded(wire.error_message()) + base64, 7168u);
  google::rpc::Status details;
  EXPECT_TRUE(details.ParseFromString(wire.error_details()));
  const absl::Status back = FromGrpcStatus(wire);
  EXPECT_EQ(GetReason(back), Reason::kUnknownKey);
  EXPECT_EQ(GetErrorMetadata(back)["short"], "kept");
}

TEST(StatusMapping, PeersThatLieOrSpeakNonsenseAreHarmless) {
  EXPECT_EQ(FromGrpcStatus(grpc::Status(grpc::StatusCode::ABORTED, "x", "\xFF\xFF")).code(),
            absl::StatusCode::kAborted);
  const grpc::Status wire = ToGrpcStatus(MakeError(Reason::kUnknownKey, "x"));
  const absl::Status other =
      FromGrpcStatus(grpc::Status(grpc::StatusCode::ABORTED, "x", wire.error_details()));
  EXPECT_EQ(other.code(), absl::StatusCode::kAborted);
  EXPECT_FALSE(GetReason(other).has_value());
}

}  // namespace
}  // namespace modelstate
