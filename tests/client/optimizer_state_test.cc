// The client's calls about optimizer state, against a real server in this process.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "client/client.h"
#include "common/base/status.h"
#include "server/rpc/server.h"

namespace modelstate::client {
namespace {

class OptimizerStateTest : public testing::Test {
 protected:
  OptimizerStateTest() {
    root_ = std::filesystem::path(testing::TempDir()) / absl::StrCat("optimizer_state_", getpid());
    std::filesystem::remove_all(root_);
    ServerOptions options;
    options.listen = "localhost:0";
    options.device = "cpu";
    options.device_memory_bytes = uint64_t{1} << 30;
    options.compute_threads = 1;
    options.checkpoint_root = root_.string();
    absl::StatusOr<std::unique_ptr<Server>> server = Server::Start(options);
    EXPECT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    client_.emplace(*Client::Connect(server_->address()));
  }
  ~OptimizerStateTest() override {
    server_.reset();
    std::filesystem::remove_all(root_);
  }

  static TensorSpec Spec(const std::string& name, TensorKind kind) {
    TensorSpec spec;
    spec.name = name;
    spec.kind = kind;
    spec.shape = *Shape::Create({4});
    return spec;
  }
  void Create(const std::string& module) {
    const TensorSpec specs[] = {Spec("w", TensorKind::kParameter), Spec("b", TensorKind::kBuffer)};
    ASSERT_TRUE(client_->CreateModule(module, specs).ok());
  }
  void Step(const std::string& module, float value) {
    const std::vector<float> gradient(4, value);
    const TensorRef tensor{Spec("w", TensorKind::kGradient),
                           {reinterpret_cast<const uint8_t*>(gradient.data()), 16}};
    const auto step = client_->ApplyStep(module, absl::MakeConstSpan(&tensor, 1), {});
    ASSERT_TRUE(step.ok()) << step.status();
  }
  static OptimizerConfig NAdam() {
    OptimizerConfig config;
    config.algorithm = Algorithm::kNAdam;
    return config;
  }
  StateDict FetchWithState(const std::string& module, const std::string& snapshot_id = "") {
    FetchOptions options;
    options.optimizer_state = true;
    options.snapshot_id = snapshot_id;
    absl::StatusOr<StateDict> state = client_->Fetch(module, options);
    EXPECT_TRUE(state.ok()) << state.status();
    return state.ok() ? *std::move(state) : StateDict();
  }
  static std::string Bytes(const StateDict& state, absl::string_view name, absl::string_view slot) {
    const std::optional<size_t> index = state.Find(name, slot);
    if (!index) return "missing";
    const absl::Span<const uint8_t> bytes = state.bytes(*index);
    return std::string(bytes.begin(), bytes.end());
  }

  std::filesystem::path root_;
  std::unique_ptr<Server> server_;
  std::optional<Client> client_;
};

TEST_F(OptimizerStateTest, WhatIsFetchedIsLoadedElsewhere) {
  Create("from");
  ASSERT_TRUE(client_->ConfigureOptimizer("from", NAdam()).ok());
  Step("from", 1);
  Step("from", -2);
  const StateDict state = FetchWithState("from");
  EXPECT_EQ(state.specs()[*state.Find("w")].slot, "") << "the parameter itself";
  const std::vector<std::string> slots = {"step", "exp_avg", "exp_avg_sq", "mu_product"};
  std::vector<std::string> sent;
  std::vector<TensorRef> tensors;
  for (size_t i = 0; i < state.size(); ++i) {
    if (state.specs()[i].kind != TensorKind::kOptimizerState) continue;
    sent.push_back(state.specs()[i].slot);
    tensors.push_back({state.specs()[i], state.bytes(i)});
  }
  EXPECT_EQ(sent, slots);
  EXPECT_EQ(state.verified_digests(), state.size());

  Create("to");
  EXPECT_EQ(GetReason(client_->LoadOptimizerState("to", tensors).status()), Reason::kNoOptimizer);
  LoadOptimizerStateOptions options;
  options.optimizer = NAdam();
  options.step = state.step();
  options.base = client_->GetModule("to")->version;
  const absl::StatusOr<OptimizerInfo> optimizer =
      client_->LoadOptimizerState("to", tensors, options);
  ASSERT_TRUE(optimizer.ok()) << optimizer.status();
  EXPECT_EQ(optimizer->config.algorithm, Algorithm::kNAdam);
  EXPECT_EQ(optimizer->step, 2u);
  EXPECT_EQ(optimizer->version.number, options.base->number + 1);
  EXPECT_EQ(GetReason(client_->LoadOptimizerState("to", tensors, options).status()),
            Reason::kStaleBase);
  const StateDict loaded = FetchWithState("to");
  for (const std::string& slot : slots) {
    EXPECT_EQ(Bytes(loaded, "w", slot), Bytes(state, "w", slot)) << slot;
  }
}

TEST_F(OptimizerStateTest, PinHoldsItUntilItIsFetched) {
  Create("m");
  ASSERT_TRUE(client_->ConfigureOptimizer("m", NAdam()).ok());
  Step("m", 1);
  const StateDict before = FetchWithState("m");
  const absl::StatusOr<SnapshotInfo> with =
      client_->PinSnapshot("m", absl::Seconds(60), /*optimizer_state=*/true);
  ASSERT_TRUE(with.ok()) << with.status();
  EXPECT_TRUE(with->optimizer_state);
  Step("m", 1);
  const StateDict pinned = FetchWithState("m", with->snapshot_id);
  EXPECT_EQ(pinned.layout_digest(), before.layout_digest());
  EXPECT_EQ(pinned.data(), before.data());
  EXPECT_NE(FetchWithState("m").data(), before.data());
  EXPECT_TRUE(client_->RenewSnapshot("m", with->snapshot_id)->optimizer_state);
  EXPECT_FALSE(client_->PinSnapshot("m")->optimizer_state);
}

}  // namespace
}  // namespace modelstate::client
