// Client::Follow and FollowToFile against a real server in this process.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <filesystem>
#include <thread>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "client/client.h"
#include "client/files/follow_file.h"
#include "client/files/tensor_file.h"
#include "common/base/status.h"
#include "server/rpc/server.h"
#include "tests/fault/net/cutting_proxy.h"

namespace modelstate::client {
namespace {

constexpr size_t kFrozen = 90'000;
constexpr size_t kTrained = 10'000;

float First(absl::Span<const uint8_t> bytes) {
  float value = 0;
  std::memcpy(&value, bytes.data(), sizeof(value));
  return value;
}

bool AllEqual(absl::Span<const uint8_t> bytes) {
  return std::memcmp(bytes.data(), bytes.data() + sizeof(float), bytes.size() - sizeof(float)) == 0;
}

class FollowTest : public testing::Test {
 protected:
  FollowTest() {
    root_ = std::filesystem::path(testing::TempDir()) / absl::StrCat("follow_test_", getpid());
    std::filesystem::remove_all(root_);
    options_.listen = "localhost:0";
    options_.device = "cpu";
    options_.device_memory_bytes = uint64_t{1} << 30;
    options_.compute_threads = 1;
    options_.checkpoint_root = (root_ / "checkpoints").string();
    std::filesystem::create_directories(root_);
  }
  ~FollowTest() override {
    server_.reset();
    std::filesystem::remove_all(root_);
  }

  void SetUp() override {
    StartServer();
    CreateModel(DType::kF32);
  }

  void StartServer() {
    absl::StatusOr<std::unique_ptr<Server>> server = Server::Start(options_);
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    options_.listen = server_->address();
  }
  Client Connect() { return Connect(server_->address()); }
  static Client Connect(const std::string& address) {
    ClientOptions options;
    options.max_attempts = 100;
    options.initial_backoff = absl::Milliseconds(5);
    options.max_backoff = absl::Milliseconds(50);
    return *Client::Connect(address, options);
  }
  // A frozen backbone and a head that is trained: SGD with lr 1 and gradients of -1 make all of the
  // head's elements the count of steps.
  void CreateModel(DType dtype) {
    std::vector<TensorSpec> specs(2);
    specs[0].name = "backbone";
    specs[0].requires_grad = false;
    specs[0].shape = *Shape::Create({kFrozen});
    specs[1].name = "head";
    specs[1].shape = *Shape::Create({kTrained});
    for (TensorSpec& spec : specs) spec.dtype = dtype;
    ASSERT_TRUE(Connect().CreateModule("m", specs).ok());
    OptimizerConfig config;
    config.algorithm = Algorithm::kSgd;
    config.hyperparameters.lr = 1;
    ASSERT_TRUE(Connect().ConfigureOptimizer("m", config).ok());
  }
  static absl::Status Step(const Client& client) {
    static const std::vector<float> gradient(kTrained, -1);
    TensorRef ref;
    ref.spec.name = "head";
    ref.spec.kind = TensorKind::kGradient;
    ref.spec.shape = *Shape::Create({kTrained});
    ref.bytes = {reinterpret_cast<const uint8_t*>(gradient.data()), kTrained * sizeof(float)};
    return client.ApplyStep("m", absl::MakeConstSpan(&ref, 1), {}).status();
  }

  std::filesystem::path root_;
  ServerOptions options_;
  std::unique_ptr<Server> server_;
};

TEST_F(FollowTest, EachStateIsOneVersionAndOnlyWhatChangedIsSent) {
  // Counts what is on the wire: framing, tables and the watch too.
  const std::string& address = server_->address();
  int port = 0;
  ASSERT_TRUE(absl::SimpleAtoi(address.substr(address.rfind(':') + 1), &port));
  CuttingProxy wire(port, /*bytes_per_second=*/1e12);
  const Client client = Connect(wire.address());
  constexpr uint64_t kStates = 200;
  std::atomic<bool> done = false;
  std::thread trainer([&] {
    const Client own = Connect();
    while (!done) ASSERT_TRUE(Step(own).ok());
  });
  uint64_t states = 0;
  uint64_t received = 0;
  uint64_t last_step = 0;
  const absl::Status status = client.Follow(
      "m", {}, [&](const StateDict& state, const FollowUpdate& update) -> absl::StatusOr<bool> {
        EXPECT_EQ(update.whole, states == 0);
        EXPECT_TRUE(states == 0 || state.step() > last_step);
        last_step = state.step();
        EXPECT_EQ(First(state.bytes(0)), 0);
        EXPECT_EQ(First(state.bytes(1)), static_cast<float>(state.step()));
        EXPECT_TRUE(AllEqual(state.bytes(0)) && AllEqual(state.bytes(1))) << state.step();
        EXPECT_EQ(update.changed.size(), update.whole ? 2u : 1u);
        received += update.received_bytes;
        return ++states < kStates;
      });
  done = true;
  trainer.join();
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_EQ(states, kStates);
  const uint64_t copies = kStates * (kFrozen + kTrained) * sizeof(float);
  EXPECT_LE(received * 100, copies * 11);
  EXPECT_LE(wire.bytes_to_clients() * 100, copies * 11);
}

TEST_F(FollowTest, ACastAndARestartBringAWholeCopy) {
  const Client client = Connect();
  std::vector<std::string> seen;
  const absl::Status status = client.Follow(
      "m", {}, [&](const StateDict& state, const FollowUpdate& update) -> absl::StatusOr<bool> {
        seen.push_back(absl::StrCat(update.whole ? "whole " : "changes ",
                                    DTypeName(state.specs()[1].dtype), " ",
                                    state.data().size() / (kFrozen + kTrained)));
        if (seen.size() == 1) {
          EXPECT_TRUE(Step(client).ok());
        } else if (seen.size() == 2) {
          EXPECT_TRUE(client.MoveModule("m", {.dtype = DType::kBF16}).ok());
        } else if (seen.size() == 3) {
          server_.reset();
          StartServer();
          CreateModel(DType::kF64);
        }
        return seen.size() < 4;
      });
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_THAT(seen,
              testing::ElementsAre("whole F32 4", "changes F32 4", "whole BF16 2", "whole F64 8"));
}

TEST_F(FollowTest, EndsWhenTheModuleIsDeletedOrTheCallbackFails) {
  const Client client = Connect();
  absl::Status status =
      client.Follow("m", {}, [&](const StateDict&, const FollowUpdate&) -> absl::StatusOr<bool> {
        EXPECT_TRUE(client.DeleteModule("m").ok());
        return true;
      });
  EXPECT_EQ(GetReason(status), Reason::kModuleDeleted) << status;
  CreateModel(DType::kF32);
  status = client.Follow("m", {}, [&](const StateDict&, const FollowUpdate&) {
    return absl::StatusOr<bool>(absl::UnknownError("full"));
  });
  EXPECT_EQ(status, absl::UnknownError("full"));
}

TEST_F(FollowTest, AFileIsReplacedAndAFolderGetsOneForEachVersion) {
  const Client client = Connect();
  const std::string path = (root_ / "copy.safetensors").string();
  std::filesystem::create_directories(root_ / "all");
  for (const std::string& to : {path, (root_ / "all").string()}) {
    int files = 0;
    const absl::Status status = FollowToFile(client, "m", to, {}, [&](const FollowedFile& file) {
      absl::StatusOr<TensorFile> read = TensorFile::Read(file.path);
      EXPECT_TRUE(read.ok()) << read.status();
      EXPECT_TRUE(Step(client).ok());
      return ++files < 3;
    });
    EXPECT_TRUE(status.ok()) << status;
  }
  int in_folder = 0;
  for (const auto& entry : std::filesystem::directory_iterator(root_ / "all")) {
    EXPECT_THAT(entry.path().filename().string(), testing::MatchesRegex("m-v[0-9]+.safetensors"));
    ++in_folder;
  }
  EXPECT_EQ(in_folder, 3);
  int beside = 0;
  for (const auto& entry : std::filesystem::directory_iterator(root_))
    beside += entry.is_regular_file();
  EXPECT_EQ(beside, 1) << "nothing temporary is left";
}

}  // namespace
}  // namespace modelstate::client
