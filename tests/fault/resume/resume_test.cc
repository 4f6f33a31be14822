// A fetch to a file that is cut over and over: by kill -9 of the client, by a reset of the server's
// stream, and by a network that drops the connection. What was written once is not sent again, and
// the file is right.
//
// MODELSTATE_FULL: 1 GiB and 50 cuts.

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "client/client.h"
#include "common/base/status.h"
#include "tests/fault/net/cutting_proxy.h"
#include "tests/fault/net/server_process.h"

namespace modelstate {
namespace {

constexpr uint64_t kChunkBytes = uint64_t{1} << 20;  // as the server chooses
constexpr int kTensors = 16;
// A fast link, but slower than the tool: what waits in buffers of a tool that cannot keep up is
// lost with it.
constexpr double kLinkBytesPerSecond = 200e6;

class ResumeTest : public ::testing::TestWithParam<int> {
 protected:
  ResumeTest() : full_(std::getenv("MODELSTATE_FULL") != nullptr) {
    std::filesystem::create_directories(folder_);
  }
  ~ResumeTest() override {
    proxy_.reset();
    server_.reset();
    std::filesystem::remove_all(folder_);
  }

  void SetUp() override {
    auto server = ServerProcess::Start((folder_ / "root").string());
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    proxy_ = std::make_unique<CuttingProxy>(server_->port(), kLinkBytesPerSecond);
    auto client = Client::Connect(server_->address());
    ASSERT_TRUE(client.ok()) << client.status();
    client_ = std::make_unique<Client>(*std::move(client));
    CreateModule(*client_);
  }

  void CreateModule(const Client& client) {
    client::ModuleSpec spec;
    spec.seed = 7;
    const int64_t rows = full_ ? 8192 : 1024;
    for (int i = 0; i < kTensors; ++i) {
      client::Registration& tensor = spec.tensors.emplace_back();
      tensor.spec.name = absl::StrCat("layer", i, ".weight");
      tensor.spec.shape = *Shape::Create({rows, 2048 + i});  // ends of chunks lie anywhere in them
      tensor.initializer.emplace().kind = client::Initializer::Kind::kNormal;
    }
    const auto module = client.CreateModule("big", spec);
    ASSERT_TRUE(module.ok()) << module.status();
    payload_ = module->total_bytes;
  }

  // The tool in a process of its own.
  pid_t StartFetch(const std::string& server, const std::string& out,
                   const std::vector<std::string>& more = {}) {
    std::vector<std::string> arguments = {
        MODELSTATE_TOOL_BINARY, "--server", server, "fetch", "big", out, "--resume", "--json"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    std::vector<char*> argv;
    for (std::string& argument : arguments) argv.push_back(argument.data());
    argv.push_back(nullptr);
    const std::string log = out + ".log";
    const pid_t pid = fork();
    if (pid == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (std::freopen(log.c_str(), "w", stdout) == nullptr) _exit(126);
      execv(argv[0], argv.data());
      _exit(127);
    }
    return pid;
  }
  // nullopt: killed.
  static std::optional<int> Wait(pid_t pid) {
    int status = 0;
    waitpid(pid, &status, 0);
    if (!WIFEXITED(status)) return std::nullopt;
    return WEXITSTATUS(status);
  }
  static std::string Text(const std::string& path) {
    std::ifstream file(path);
    return std::string(std::istreambuf_iterator<char>(file), {});
  }

  const bool full_;
  const std::filesystem::path folder_ =
      std::filesystem::path(::testing::TempDir()) / absl::StrCat("resume_test_", getpid());
  std::unique_ptr<ServerProcess> server_;
  std::unique_ptr<CuttingProxy> proxy_;
  std::unique_ptr<Client> client_;
  uint64_t payload_ = 0;
};

TEST_P(ResumeTest, ManyCutsSendAlmostNothingTwice) {
  const int cuts = full_ ? 50 : 6;
  const uint64_t seed = 20261126;
  SCOPED_TRACE(absl::StrCat("seed ", seed));
  std::mt19937_64 random(seed);
  const std::string out = (folder_ / "cut.safetensors").string();
  const std::string whole = (folder_ / "whole.safetensors").string();
  const std::vector<std::string> streams = {"--parallel", absl::StrCat(GetParam())};
  ASSERT_EQ(Wait(StartFetch(server_->address(), whole)), 0);

  std::vector<uint64_t> offsets(static_cast<size_t>(cuts));
  for (uint64_t& offset : offsets) offset = random() % payload_;
  std::sort(offsets.begin(), offsets.end());
  std::atomic<pid_t> fetch{0};
  size_t next = 0;
  int kills = 0;
  // Each cut arms the next one.
  std::function<void()> arm = [&] {
    if (next == offsets.size()) return;
    const uint64_t sent = proxy_->bytes_to_clients();
    const uint64_t after = offsets[next] > sent ? offsets[next] - sent : 1 + random() % kChunkBytes;
    const size_t kind = next++ % 3;
    proxy_->CutAfter(after,
                     kind == 0   ? CuttingProxy::Cut::kNothing
                     : kind == 1 ? CuttingProxy::Cut::kServerSide
                                 : CuttingProxy::Cut::kBothSides,
                     [&, kind] {
                       if (kind == 0) ++kills, kill(fetch, SIGKILL);
                       arm();
                     });
  };
  arm();
  int runs = 0;
  std::optional<int> exit;
  do {
    ASSERT_LE(++runs, cuts + 1);
    fetch = StartFetch(proxy_->address(), out, streams);
    exit = Wait(fetch);
  } while (!exit);
  EXPECT_EQ(exit, 0) << Text(out + ".log");
  EXPECT_EQ(next, offsets.size());
  EXPECT_EQ(runs, kills + 1) << "other cuts are survived";

  const uint64_t sent = proxy_->bytes_to_clients();
  std::printf("%d streams, %d cuts, %d kills: %.1f MiB of %.1f sent twice, %.2f chunks a cut\n",
              GetParam(), cuts, kills, (static_cast<double>(sent - payload_)) / (1 << 20),
              static_cast<double>(payload_) / (1 << 20),
              static_cast<double>(sent - payload_) / static_cast<double>(kChunkBytes) / cuts);
  EXPECT_LE(sent, payload_ + static_cast<uint64_t>(cuts * GetParam()) * kChunkBytes);
  EXPECT_EQ(Text(whole) == Text(out), true) << "the files differ";
  EXPECT_THAT(Text(out + ".log"), ::testing::HasSubstr("\"digests_verified\": 16"));
}

INSTANTIATE_TEST_SUITE_P(Streams, ResumeTest, ::testing::Values(1, 4));

using OneStreamTest = ResumeTest;

TEST_P(OneStreamTest, AnotherAddressOfTheServerTakesOver) {
  CuttingProxy second(server_->port(), kLinkBytesPerSecond);
  const std::string out = (folder_ / "over.safetensors").string();
  proxy_->CutAfter(payload_ / 2, CuttingProxy::Cut::kBothSides, [this] { proxy_->Refuse(); });
  const std::string servers = absl::StrCat(proxy_->address(), ",", second.address());
  EXPECT_EQ(Wait(StartFetch(servers, out)), 0) << Text(out + ".log");
  EXPECT_GT(second.bytes_to_clients(), payload_ / 2 - 4 * kChunkBytes);
  EXPECT_LE(second.bytes_to_clients(), payload_ / 2 + 2 * kChunkBytes) << "and nothing twice";
  EXPECT_THAT(Text(out + ".log"), ::testing::HasSubstr("\"digests_verified\": 16"));
}

// Whose version of the same number may have other bytes.
TEST_P(OneStreamTest, AnotherServerBeginsAnewAndSaysSo) {
  auto other = ServerProcess::Start((folder_ / "other").string());
  ASSERT_TRUE(other.ok()) << other.status();
  auto client = Client::Connect((*other)->address());
  ASSERT_TRUE(client.ok()) << client.status();
  CreateModule(*client);
  const std::string out = (folder_ / "anew.safetensors").string();
  proxy_->CutAfter(payload_ / 2, CuttingProxy::Cut::kBothSides, [this] { proxy_->Refuse(); });
  const std::string servers = absl::StrCat(proxy_->address(), ",", (*other)->address());
  EXPECT_EQ(Wait(StartFetch(servers, out)), 0) << Text(out + ".log");
  EXPECT_THAT(Text(out + ".log"), ::testing::HasSubstr("began anew"));
  EXPECT_THAT(Text(out + ".log"), ::testing::HasSubstr("\"digests_verified\": 16"));
}

// What was begun with one layout is not continued with another, under whatever pin.
TEST_P(OneStreamTest, AnotherSelectionOrCastUnderOnePinIsAMismatch) {
  const auto pin = client_->PinSnapshot("big", absl::Seconds(60));
  ASSERT_TRUE(pin.ok()) << pin.status();
  client::FetchOptions options;
  options.snapshot_id = pin->snapshot_id;
  options.selection.names = {"layer0.weight"};
  const auto part = client_->Fetch("big", options);
  ASSERT_TRUE(part.ok()) << part.status();
  options.layout_digest = part->layout_digest();
  EXPECT_TRUE(client_->Fetch("big", options).ok());
  client::FetchOptions other = options;
  other.selection.names = {"layer1.weight"};
  EXPECT_EQ(GetReason(client_->Fetch("big", other).status()), Reason::kLayoutMismatch);
  other = options;
  other.selection.float_dtype = DType::kBF16;
  EXPECT_EQ(GetReason(client_->Fetch("big", other).status()), Reason::kLayoutMismatch);
}

INSTANTIATE_TEST_SUITE_P(One, OneStreamTest, ::testing::Values(1));

}  // namespace
}  // namespace modelstate
