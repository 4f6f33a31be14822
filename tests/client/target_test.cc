#include "client/target.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/base/status.h"

namespace modelstate::client {
namespace {

TEST(ParseTarget, OneAddressAndUrisAreForGrpcToResolve) {
  for (const char* text :
       {"localhost:50051", "10.0.0.1:1", "[::1]:50051", "dns:///a:1,b:2",
        "ipv4:10.0.0.1:1,10.0.0.2:2", "unix:/tmp/socket,x", "unix-abstract:name,x"}) {
    const absl::StatusOr<Target> target = ParseTarget(text);
    ASSERT_TRUE(target.ok()) << target.status();
    EXPECT_EQ(target->uri, text);
    EXPECT_EQ(target->authority, "");
  }
}

TEST(ParseTarget, SeveralAddressesAreAListInTheirOrder) {
  absl::StatusOr<Target> target = ParseTarget("10.0.0.2:7,10.0.0.1:8");
  ASSERT_TRUE(target.ok()) << target.status();
  EXPECT_EQ(target->uri, "ipv4:10.0.0.2:7,10.0.0.1:8");
  EXPECT_EQ(target->first, "10.0.0.2:7");
  EXPECT_EQ(target->authority, "10.0.0.2:7");
  target = ParseTarget("[::1]:7,[::2]:8");
  ASSERT_TRUE(target.ok()) << target.status();
  EXPECT_EQ(target->uri, "ipv6:[::1]:7,[::2]:8");
}

TEST(ParseTarget, OneListHasAddressesOfBothFamilies) {
  const absl::StatusOr<Target> target = ParseTarget("[::1]:7,127.0.0.2:8");
  ASSERT_TRUE(target.ok()) << target.status();
  EXPECT_EQ(target->uri, "ipv6:[::1]:7,[::ffff:127.0.0.2]:8");
}

TEST(ParseTarget, NamesInAListAreLookedUp) {
  const absl::StatusOr<Target> target = ParseTarget("localhost:7,127.0.0.2:8");
  ASSERT_TRUE(target.ok()) << target.status();
  EXPECT_EQ(target->uri, "ipv4:127.0.0.1:7,127.0.0.2:8");
  EXPECT_EQ(target->authority, "localhost:7");
}

TEST(ParseTarget, WhatIsNoListIsToldInWords) {
  for (const char* text : {"localhost:7,", ",localhost:7", "localhost:7,localhost",
                           "a:1,b:", "unixhost,localhost:7"}) {
    EXPECT_EQ(GetReason(ParseTarget(text).status()), Reason::kInvalidField) << text;
  }
}

}  // namespace
}  // namespace modelstate::client
