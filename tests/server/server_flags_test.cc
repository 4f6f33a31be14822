#include "server/server_flags.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "absl/flags/reflection.h"
#include "server/byte_size.h"

namespace modelstate {
namespace {

using testing::HasSubstr;

absl::StatusOr<ServerFlags> Parse(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), "modelstate-server");
  std::vector<char*> pointers;
  for (std::string& argument : arguments) pointers.push_back(argument.data());
  return ParseServerFlags(pointers);
}

class ServerFlagsTest : public testing::Test {
 protected:
  ~ServerFlagsTest() override { unsetenv("MODELSTATE_MAX_CHUNK_BYTES"); }

  absl::FlagSaver saver_;
};

TEST_F(ServerFlagsTest, SizesArePlainBytesOrHaveABinaryUnit) {
  const std::pair<const char*, uint64_t> sizes[] = {
      {"0", 0}, {"4096", 4096}, {"3KiB", 3072}, {"4MiB", 4 << 20}, {"2GiB", uint64_t{2} << 30}};
  for (const auto& [text, bytes] : sizes) {
    ByteSize size;
    std::string error;
    EXPECT_TRUE(AbslParseFlag(text, &size, &error)) << text << ": " << error;
    EXPECT_EQ(size.bytes, bytes) << text;
  }
  for (const char* text : {"", "MiB", "4MB", "4 MiB", "-1", "+1", "1.5GiB", "0x10",
                           "17179869184GiB", "18446744073709551616"}) {
    ByteSize size;
    std::string error;
    EXPECT_FALSE(AbslParseFlag(text, &size, &error)) << text;
  }
  EXPECT_EQ(AbslUnparseFlag(ByteSize{4 << 20}), "4MiB");
  EXPECT_EQ(AbslUnparseFlag(ByteSize{4097}), "4097");
}

TEST_F(ServerFlagsTest, CommandLineWinsOverEnvironmentOverDefault) {
  EXPECT_EQ(Parse({})->options.max_chunk_bytes, 2 << 20);
  setenv("MODELSTATE_MAX_CHUNK_BYTES", "512KiB", 1);
  EXPECT_EQ(Parse({})->options.max_chunk_bytes, 512 << 10);
  EXPECT_EQ(Parse({"--max_chunk_bytes=1MiB"})->options.max_chunk_bytes, 1 << 20);
}

TEST_F(ServerFlagsTest, ReadsBothWaysToGiveAValue) {
  const auto flags = Parse({"--listen", "0.0.0.0:0", "--max_lease=10m", "--log_format=json"});
  ASSERT_TRUE(flags.ok()) << flags.status();
  EXPECT_EQ(flags->options.listen, "0.0.0.0:0");
  EXPECT_EQ(flags->options.max_lease, absl::Minutes(10));
  EXPECT_TRUE(flags->log_json);
}

TEST_F(ServerFlagsTest, ReadsWhenToSaveAndWhatToKeep) {
  auto flags = Parse({});
  EXPECT_FALSE(flags->options.save_every.enabled());
  EXPECT_FALSE(flags->options.restore_latest);
  flags =
      Parse({"--save-every=100steps", "--keep_last=3", "--keep-every", "1000", "--restore=latest"});
  ASSERT_TRUE(flags.ok()) << flags.status();
  EXPECT_EQ(flags->options.save_every.steps, 100);
  EXPECT_EQ(flags->options.retention.keep_last, 3);
  EXPECT_EQ(flags->options.retention.keep_every, 1000);
  EXPECT_TRUE(flags->options.restore_latest);
  flags = Parse({"--save_every=10m"});
  EXPECT_EQ(flags->options.save_every.steps, 0);
  EXPECT_EQ(flags->options.save_every.interval, absl::Minutes(10));
}

TEST_F(ServerFlagsTest, ErrorsNameTheFlagOrVariable) {
  const std::pair<std::vector<std::string>, const char*> wrong[] = {
      {{"--no_such=1"}, "--no_such"},
      {{"listen"}, "listen"},
      {{"--listen"}, "--listen"},
      {{"--listen=nowhere"}, "--listen"},
      {{"--listen=localhost:70000"}, "--listen"},
      {{"--io_threads=0"}, "--io_threads"},
      {{"--io_threads=many"}, "--io_threads"},
      {{"--max_lease=soon"}, "--max_lease"},
      {{"--log_level=loud"}, "--log_level"},
      {{"--log_format=xml"}, "--log_format"},
      {{"--restore=newest"}, "--restore"},
      {{"--save_every=100"}, "--save_every"},
      {{"--save_every=0steps"}, "--save_every"},
      {{"--save_every=-5steps"}, "--save_every"},
      {{"--save_every=10ms"}, "--save_every"},
      {{"--save_every=10m", "--keep_last=many"}, "--keep_last"},
      {{"--keep_every=10"}, "--keep_every"},
      {{"--push_memory_bytes=1GB"}, "--push_memory_bytes"}};
  for (const auto& [arguments, says] : wrong) {
    absl::FlagSaver saver;
    const auto flags = Parse(arguments);
    EXPECT_EQ(flags.status().code(), absl::StatusCode::kInvalidArgument) << arguments[0];
    EXPECT_THAT(std::string(flags.status().message()), HasSubstr(says));
  }
  setenv("MODELSTATE_MAX_CHUNK_BYTES", "lots", 1);
  EXPECT_THAT(std::string(Parse({}).status().message()), HasSubstr("MODELSTATE_MAX_CHUNK_BYTES"));
}

TEST_F(ServerFlagsTest, HelpShowsEachFlagWithItsDefault) {
  EXPECT_TRUE(Parse({"--help"})->help);
  EXPECT_THAT(ServerFlagsHelp(), HasSubstr("--max_message_bytes=4MiB"));
  EXPECT_THAT(ServerFlagsHelp(), HasSubstr("--stream_stall_timeout=1m"));
}

}  // namespace
}  // namespace modelstate
