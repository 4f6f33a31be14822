// Each runtime call of a load, a step, a stream, a save and a move fails in turn, on a server whose
// modules are on the fake GPU: either nothing has changed, or the module is FAILED.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "grpc/health/v1/health.grpc.pb.h"
#include "tests/fake_cuda/fake_cuda.h"
#include "tests/server/rpc/checkpoint_calls.h"

namespace modelstate {
namespace {

using Contents = std::map<std::string, std::string>;

struct Flow {
  const char* name;
  // What a caller does; OK when it was done.
  std::function<absl::Status(class FlowFailureTest&)> run;
};

class FlowFailureTest : public CheckpointCalls, public ::testing::WithParamInterface<Flow> {
 protected:
  void SetUp() override {
    options_.compute_threads = 1;
    options_.io_threads = 1;
    options_.log = [](absl::LogSeverity, const std::string&) {};
  }
  void TearDown() override { FakeCudaFail(0, cudaSuccess, false); }

  // A module on a fresh server, stepped once, so that it has optimizer state, and saved.
  void Begin() {
    FakeCudaFail(0, cudaSuccess, false);
    server_.reset();
    std::filesystem::remove_all(root_);
    StartServer();
    CreateTiny();
    ASSERT_TRUE(Configure("tiny", v1::ADAMW, 0.5).ok());
    ASSERT_TRUE(Step().ok());
    ASSERT_TRUE(Save("before").ok());
    before_ = FetchAll("tiny").Bytes();
    ASSERT_EQ(before_.size(), 3U);
  }

 public:
  absl::Status Step() {
    std::vector<std::pair<v1::TensorInfo, std::string>> tensors = {
        {Tensor("weight", v1::GRADIENT, {2, 3}), FloatBytes({1, -2, 3, -4, 5, -6})},
        {Tensor("bias", v1::GRADIENT, {2}), FloatBytes({0.5, 0.25})}};
    return Push(StepParts("tiny", tensors)).status();
  }
  absl::Status Save(const std::string& path) {
    grpc::ClientContext context;
    v1::SaveCheckpointRequest request;
    request.set_module("tiny");
    request.set_path(path);
    auto reader = stub_->SaveCheckpoint(&context, request);
    v1::SaveCheckpointResponse event;
    while (reader->Read(&event)) {
    }
    return FromGrpcStatus(reader->Finish());
  }
  absl::Status Stream() {
    const Fetched fetched = FetchAll("tiny");
    EXPECT_TRUE(!fetched.status.ok() || fetched.Bytes() == before_);
    return fetched.status;
  }
  absl::Status StreamCast() {
    v1::StreamStateDictRequest request;
    request.set_module("tiny");
    request.mutable_selection()->set_float_dtype(v1::BF16);
    return Fetch(request).status;
  }
  absl::Status LoadFromCaller() {
    std::vector<v1::LoadPart> parts;
    for (const v1::StepPart& part : StepParts(
             "tiny", {{Tensor("weight", v1::PARAMETER, {2, 3}), FloatBytes({6, 5, 4, 3, 2, 1})},
                      {Tensor("bias", v1::PARAMETER, {2}, v1::F64), std::string(16, '\0')},
                      {Tensor("running_mean", v1::BUFFER, {2}), FloatBytes({1, 1})}})) {
      v1::LoadPart& load = parts.emplace_back();
      if (part.has_header()) {
        load.mutable_header()->set_module("tiny");
        load.mutable_header()->set_tensor_count(part.header().tensor_count());
        load.mutable_header()->set_total_bytes(part.header().total_bytes());
      }
      if (part.has_tensors()) *load.mutable_tensors() = part.tensors();
      if (part.has_chunk()) *load.mutable_chunk() = part.chunk();
      if (part.has_trailer()) *load.mutable_trailer() = part.trailer();
    }
    return Load(parts).status();
  }
  absl::Status LoadSaved() { return LoadFile("tiny", "before").status(); }
  absl::Status Cast() {
    v1::MoveModuleRequest request;
    request.set_module("tiny");
    request.set_dtype(v1::BF16);
    return Call(&v1::ModelState::Stub::MoveModule, request).status();
  }

 protected:
  std::vector<std::string> Checkpoints() {
    std::vector<std::string> paths;
    const auto list = Call(&v1::ModelState::Stub::ListCheckpoints, v1::ListCheckpointsRequest());
    EXPECT_TRUE(list.ok()) << list.status();
    for (const auto& info : list->checkpoints()) paths.push_back(info.path());
    return paths;
  }
  grpc::health::v1::HealthCheckResponse::ServingStatus Health(const std::string& service) {
    grpc::ClientContext context;
    grpc::health::v1::HealthCheckRequest request;
    grpc::health::v1::HealthCheckResponse response;
    request.set_service(service);
    const auto status =
        grpc::health::v1::Health::NewStub(NewChannel())->Check(&context, request, &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return response.status();
  }
  // It is told by another thread.
  bool WaitUntilNotServing(const std::string& service) {
    const absl::Time end = absl::Now() + absl::Seconds(30);
    while (Health(service) != grpc::health::v1::HealthCheckResponse::NOT_SERVING) {
      if (absl::Now() > end) return false;
      std::this_thread::yield();
    }
    return true;
  }

  Contents before_;
};

TEST_P(FlowFailureTest, WantOfMemoryAtAnyCallChangesNothing) {
  Begin();
  uint64_t failures = 0;
  for (uint64_t call = 1;; ++call) {
    SCOPED_TRACE(absl::StrCat("call ", call));
    FakeCudaFail(call, cudaErrorMemoryAllocation, false);
    const absl::Status status = GetParam().run(*this);
    ASSERT_TRUE(WaitUntilIdle());
    const uint64_t calls = FakeCudaCalls();
    FakeCudaFail(0, cudaSuccess, false);
    if (status.ok() && calls < call) break;  // it has no such call
    if (!status.ok()) {
      ++failures;
      if (server_->runtime().devices.front()->health().ok()) {
        EXPECT_THAT(status, FailsWith(Reason::kDeviceMemory));
        ASSERT_EQ(FetchAll("tiny").Bytes(), before_);
        continue;
      }
      // While the update itself was enqueued.
      EXPECT_THAT(FetchAll("tiny").status, FailsWith(Reason::kModuleFailed));
    }
    Begin();
  }
  EXPECT_GT(failures, 3U);
}

TEST_P(FlowFailureTest, AfterAnErrorOfTheDeviceTheModuleHasFailedAndNothingIsSaved) {
  for (const bool sticky : {false, true}) {
    uint64_t failures = 0;
    for (uint64_t call = 1;; ++call) {
      SCOPED_TRACE(absl::StrCat("call ", call, sticky ? ", sticky" : ""));
      Begin();
      FakeCudaFail(call, cudaErrorIllegalAddress, sticky);
      const absl::Status status = GetParam().run(*this);
      ASSERT_TRUE(WaitUntilIdle());
      const uint64_t calls = FakeCudaCalls();
      const Device& device = *server_->runtime().devices.front();
      if (!status.ok() && device.health().ok()) {
        // An allocation, which does not tell what it fails for: the next call does.
        EXPECT_THAT(status, FailsWith(Reason::kDeviceMemory));
        EXPECT_TRUE(!sticky || !Stream().ok());
      }
      FakeCudaFail(0, cudaSuccess, false);
      if (status.ok() && calls < call) break;
      if (device.health().ok()) {
        EXPECT_FALSE(sticky && !status.ok());
        continue;
      }
      ++failures;
      EXPECT_THAT(FetchAll("tiny").status, FailsWith(Reason::kModuleFailed));
      EXPECT_THAT(Step(), FailsWith(Reason::kModuleFailed));
      EXPECT_THAT(Save("after"), FailsWith(Reason::kModuleFailed));
      EXPECT_THAT(LoadSaved(), FailsWith(Reason::kModuleFailed));
      EXPECT_THAT(Checkpoints(), ::testing::Not(::testing::Contains("after")));
      EXPECT_TRUE(WaitUntilNotServing("tiny"));
      EXPECT_TRUE(WaitUntilNotServing("modelstate.v1.ModelState"));
      v1::GetModuleRequest request;
      request.set_module("tiny");
      EXPECT_EQ(Call(&v1::ModelState::Stub::GetModule, request)->state(), v1::FAILED);
    }
    EXPECT_GT(failures, 3U);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Flows, FlowFailureTest,
    ::testing::Values(
        Flow{"Step", [](FlowFailureTest& test) { return test.Step(); }},
        Flow{"Stream", [](FlowFailureTest& test) { return test.Stream(); }},
        Flow{"StreamCast", [](FlowFailureTest& test) { return test.StreamCast(); }},
        Flow{"LoadStateDict", [](FlowFailureTest& test) { return test.LoadFromCaller(); }},
        Flow{"LoadCheckpoint", [](FlowFailureTest& test) { return test.LoadSaved(); }},
        Flow{"SaveCheckpoint", [](FlowFailureTest& test) { return test.Save("after"); }},
        Flow{"MoveModule", [](FlowFailureTest& test) { return test.Cast(); }}),
    [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace modelstate
