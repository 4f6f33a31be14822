// A fetch to a file that is cut over and over: by kill -9 of the client, by a reset of the server's
// stream, and by a network that drops the connection. What was written once is not sent again, and
// the file is right.
//
// MODELSTATE_FULL: 1 GiB and 50 cuts. MODELSTATE_SEED: where they are.

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

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "client/client.h"
#include "common/base/status.h"
#include "tests/fault/net/cutting_proxy.h"
#include "tests/fault/net/server_process.h"

namespace modelstate {
namespace {

using ::testing::HasSubstr;

constexpr uint64_t kChunkBytes = uint64_t{1} << 20;  // as the server chooses
constexpr int kTensors = 16;
uint64_t Seed() {
  uint64_t seed = 20261126;
  if (const char* text = std::getenv("MODELSTATE_SEED")) {
    EXPECT_TRUE(absl::SimpleAtoi(text, &seed));
  }
  return seed;
}

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
    auto client = Client::Connect(server_->address());
    ASSERT_TRUE(client.ok()) << client.status();
    client_ = std::make_unique<Client>(*std::move(client));
    CreateModule(*client_);
    const absl::Time start = absl::Now();
    ASSERT_EQ(Wait(StartFetch(server_->address(), whole_)), 0);
    // A link that the tool keeps up with: what waits in its buffers is lost with it.
    const double rate = static_cast<double>(payload_) / absl::ToDoubleSeconds(absl::Now() - start);
    link_bytes_per_second_ = std::min(200e6, rate / 4);
    proxy_ = std::make_unique<CuttingProxy>(server_->port(), link_bytes_per_second_);
  }

  void CreateModule(const Client& client) {
    client::ModuleSpec spec;
    spec.seed = 7;
    for (int i = 0; i < kTensors; ++i) {
      client::Registration& tensor = spec.tensors.emplace_back();
      tensor.spec.name = absl::StrCat("layer", i, ".weight");
      tensor.spec.shape =
          *Shape::Create({rows(), 2048 + i});  // ends of chunks lie anywhere in them
      tensor.initializer.emplace().kind = client::Initializer::Kind::kNormal;
    }
    const auto module = client.CreateModule("big", spec);
    ASSERT_TRUE(module.ok()) << module.status();
    payload_ = module->total_bytes;
  }

  int64_t rows() const { return full_ ? 8192 : 1024; }

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
  // kill -9, and until it is gone; it is still to be waited for.
  static void Kill(pid_t pid) {
    kill(pid, SIGKILL);
    siginfo_t gone;
    waitid(P_PID, static_cast<id_t>(pid), &gone, WEXITED | WNOWAIT);
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
  const std::string whole_ = (folder_ / "whole.safetensors").string();  // fetched without a cut
  double link_bytes_per_second_ = 0;
  std::unique_ptr<ServerProcess> server_;
  std::unique_ptr<CuttingProxy> proxy_;
  std::unique_ptr<Client> client_;
  uint64_t payload_ = 0;
};

TEST_P(ResumeTest, ManyCutsSendAlmostNothingTwice) {
  const int cuts = full_ ? 50 : 6;
  const uint64_t seed = Seed();
  SCOPED_TRACE(absl::StrCat("seed ", seed));
  std::mt19937_64 random(seed);
  const std::string out = (folder_ / "cut.safetensors").string();
  const std::vector<std::string> streams = {"--parallel", absl::StrCat(GetParam())};

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
                       if (kind == 0) ++kills, Kill(fetch);
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
  std::printf(
      "seed %llu, %.0f MB/s, %d streams, %d cuts, %d kills: %.1f MiB of %.1f sent twice, %.2f "
      "chunks a "
      "cut\n",
      static_cast<unsigned long long>(seed), link_bytes_per_second_ / 1e6, GetParam(), cuts, kills,
      static_cast<double>(sent - payload_) / (1 << 20), static_cast<double>(payload_) / (1 << 20),
      static_cast<double>(sent - payload_) / static_cast<double>(kChunkBytes) / cuts);
  EXPECT_LE(sent, payload_ + static_cast<uint64_t>(cuts) * kChunkBytes);
  EXPECT_TRUE(Text(whole_) == Text(out)) << "the files differ";
  EXPECT_THAT(Text(out + ".log"), HasSubstr("\"digests_verified\": 16"));
}

TEST_P(ResumeTest, AnotherAddressOfTheServerTakesOver) {
  CuttingProxy second(server_->port(), link_bytes_per_second_);
  const std::string out = (folder_ / "over.safetensors").string();
  proxy_->CutAfter(payload_ / 2, CuttingProxy::Cut::kBothSides, [this] { proxy_->Refuse(); });
  const std::string servers = absl::StrCat(proxy_->address(), ",", second.address());
  EXPECT_EQ(Wait(StartFetch(servers, out, {"--parallel", absl::StrCat(GetParam())})), 0)
      << Text(out + ".log");
  const uint64_t sent = proxy_->bytes_to_clients() + second.bytes_to_clients();
  EXPECT_GT(second.bytes_to_clients(), 0u);
  EXPECT_LE(sent, payload_ + 4 * kChunkBytes) << "and nothing twice";
  EXPECT_THAT(Text(out + ".log"), HasSubstr("\"digests_verified\": 16"));
}

INSTANTIATE_TEST_SUITE_P(Streams, ResumeTest, ::testing::Values(1, 4));

using OneStreamTest = ResumeTest;

// Whose version of the same number may have other bytes.
TEST_P(OneStreamTest, AfterKillNineOfTheServerAnotherOneBeginsAnewAndSaysSo) {
  auto other = ServerProcess::Start((folder_ / "other").string());
  ASSERT_TRUE(other.ok()) << other.status();
  auto client = Client::Connect((*other)->address());
  ASSERT_TRUE(client.ok()) << client.status();
  CreateModule(*client);
  const std::string out = (folder_ / "anew.safetensors").string();
  proxy_->CutAfter(payload_ / 2, CuttingProxy::Cut::kNothing, [this] { server_->Kill(); });
  const std::string servers = absl::StrCat(proxy_->address(), ",", (*other)->address());
  EXPECT_EQ(Wait(StartFetch(servers, out)), 0) << Text(out + ".log");
  EXPECT_THAT(Text(out + ".log"), HasSubstr("began anew"));
  EXPECT_THAT(Text(out + ".log"), HasSubstr("\"digests_verified\": 16"));
}

TEST_P(OneStreamTest, AVersionThatWasAskedForIsNotTakenFromAnotherServer) {
  auto other = ServerProcess::Start((folder_ / "other").string());
  ASSERT_TRUE(other.ok()) << other.status();
  auto client = Client::Connect((*other)->address());
  ASSERT_TRUE(client.ok()) << client.status();
  CreateModule(*client);
  const std::string out = (folder_ / "asked.safetensors").string();
  proxy_->CutAfter(payload_ / 2, CuttingProxy::Cut::kNothing, [this] { server_->Kill(); });
  const std::string servers = absl::StrCat(proxy_->address(), ",", (*other)->address());
  const std::optional<int> exit = Wait(StartFetch(servers, out, {"--version", "1"}));
  ASSERT_TRUE(exit);
  EXPECT_NE(*exit, 0);
  EXPECT_THAT(Text(out + ".log"), HasSubstr("SNAPSHOT_NOT_FOUND"));
  EXPECT_THAT(Text(out + ".log"), HasSubstr("version 1 of module"));
  EXPECT_FALSE(std::filesystem::exists(out));
}

// Digests are those of the cast, the version that was begun is an older one by then, and the disk
// has lost what the record says is there.
TEST_P(OneStreamTest, ACastOfAnOlderVersionIsVerifiedAfterAPowerLoss) {
  const std::string out = (folder_ / "cast.safetensors").string();
  const std::string whole = (folder_ / "whole_cast.safetensors").string();
  const std::vector<std::string> cast = {"--float-dtype", "BF16"};
  ASSERT_EQ(Wait(StartFetch(server_->address(), whole, cast)), 0);
  std::atomic<pid_t> fetch{0};
  proxy_->CutAfter(payload_ / 4, CuttingProxy::Cut::kNothing, [&] { Kill(fetch); });
  fetch = StartFetch(proxy_->address(), out, cast);
  ASSERT_EQ(Wait(fetch), std::nullopt);

  std::fstream partial(out + ".partial", std::ios::in | std::ios::out | std::ios::binary);
  partial.seekp(static_cast<std::streamoff>(payload_ / 8));
  partial << std::string(4096, '\0');
  partial.close();
  client::TensorRef changed;
  changed.spec.name = "layer1.weight";
  changed.spec.shape = *Shape::Create({rows(), 2049});
  const std::vector<uint8_t> zeros(changed.spec.nbytes());
  changed.bytes = zeros;
  client::LoadOptions some;
  some.strict = false;
  ASSERT_TRUE(client_->LoadStateDict("big", {changed}, some).ok());

  ASSERT_EQ(Wait(StartFetch(server_->address(), out, cast)), 0) << Text(out + ".log");
  EXPECT_THAT(Text(out + ".log"), HasSubstr("\"resumed\": true"));
  EXPECT_THAT(Text(out + ".log"), HasSubstr("\"digests_verified\": 16"));
  EXPECT_TRUE(Text(whole) == Text(out)) << "the files differ";
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
