#ifndef MODELSTATE_TESTS_SERVER_RPC_SERVER_FIXTURE_H_
#define MODELSTATE_TESTS_SERVER_RPC_SERVER_FIXTURE_H_

#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/wire/status_mapping.h"
#include "modelstate/v1/service.grpc.pb.h"
#include "server/rpc/server.h"
#include "tests/server/test_environment.h"

namespace modelstate {

inline std::string FloatBytes(const std::vector<float>& values) {
  std::string bytes(values.size() * sizeof(float), '\0');
  std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

inline std::vector<float> FloatsOf(const std::string& bytes) {
  std::vector<float> values(bytes.size() / sizeof(float));
  std::memcpy(values.data(), bytes.data(), values.size() * sizeof(float));
  return values;
}

inline v1::TensorInfo Tensor(const std::string& name, v1::TensorKind kind,
                             const std::vector<int64_t>& shape, v1::DType dtype = v1::F32) {
  v1::TensorInfo info;
  info.set_name(name);
  info.set_kind(kind);
  info.set_dtype(dtype);
  for (int64_t dim : shape) info.add_shape(dim);
  return info;
}

inline v1::TensorInfo WithValues(v1::TensorInfo info, const std::vector<double>& values) {
  for (double value : values) info.mutable_values()->mutable_doubles()->add_values(value);
  return info;
}

// What a StreamStateDict call brought.
struct Fetched {
  absl::Status status;
  v1::Header header;
  std::vector<v1::TensorInfo> tensors;
  std::vector<v1::Chunk> chunks;
  bool has_trailer = false;
  v1::Trailer trailer;

  // The data region; bytes that did not come are zero.
  std::string Region() const {
    std::string region(header.total_bytes(), '\0');
    for (const v1::Chunk& chunk : chunks) {
      region.replace(chunk.offset(), chunk.data().size(), chunk.data());
    }
    return region;
  }
  std::map<std::string, std::string> Bytes() const {
    const std::string region = Region();
    std::map<std::string, std::string> bytes;
    for (const v1::TensorInfo& tensor : tensors) {
      bytes[tensor.name()] = region.substr(tensor.offset(), tensor.nbytes());
    }
    return bytes;
  }
};

// A server in this process on a port of its own, and a real channel to it.
class ServerTest : public testing::Test {
 protected:
  ServerTest() {
    options_.listen = "localhost:0";
    options_.device = TestDevice();
    options_.device_memory_bytes = uint64_t{1} << 30;
    options_.push_memory_bytes = uint64_t{256} << 20;
    options_.snapshot_memory_bytes = uint64_t{256} << 20;
    options_.compute_threads = 2;
    root_ = std::filesystem::path(testing::TempDir()) /
            absl::StrCat("rpc_test_", getpid(), "_", counter_++);
    options_.checkpoint_root = root_.string();
  }
  ~ServerTest() override {
    server_.reset();
    std::filesystem::remove_all(root_);
  }

  void SetUp() override { StartServer(); }

  void StartServer() {
    absl::StatusOr<std::unique_ptr<Server>> server = Server::Start(options_);
    if (absl::IsFailedPrecondition(server.status()) && TestDevice() != "cpu") {
      GTEST_SKIP() << server.status().message();
    }
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    stub_ = v1::ModelState::NewStub(NewChannel());
  }

  std::shared_ptr<grpc::Channel> NewChannel() {
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    return grpc::CreateCustomChannel(server_->address(), grpc::InsecureChannelCredentials(),
                                     arguments);
  }

  // Calls a unary method of the stub.
  template <typename Request, typename Response>
  absl::StatusOr<Response> Call(grpc::Status (v1::ModelState::Stub::*method)(grpc::ClientContext*,
                                                                             const Request&,
                                                                             Response*),
                                const Request& request) {
    grpc::ClientContext context;
    Response response;
    const grpc::Status status = (stub_.get()->*method)(&context, request, &response);
    if (!status.ok()) return FromGrpcStatus(status);
    return response;
  }

  v1::Module Create(const std::string& name, const std::vector<v1::TensorInfo>& tensors) {
    v1::CreateModuleRequest request;
    request.set_name(name);
    for (const v1::TensorInfo& tensor : tensors) *request.mutable_spec()->add_tensors() = tensor;
    absl::StatusOr<v1::Module> module = Call(&v1::ModelState::Stub::CreateModule, request);
    EXPECT_TRUE(module.ok()) << module.status();
    return module.value_or(v1::Module());
  }

  // Two parameters and a buffer.
  v1::Module CreateTiny(const std::string& name = "tiny") {
    return Create(name, {WithValues(Tensor("weight", v1::PARAMETER, {2, 3}), {1, 2, 3, 4, 5, 6}),
                         WithValues(Tensor("bias", v1::PARAMETER, {2}), {0.5, -0.5}),
                         WithValues(Tensor("running_mean", v1::BUFFER, {2}), {7, 8})});
  }

  absl::StatusOr<v1::Optimizer> Configure(const std::string& module, v1::Algorithm algorithm,
                                          double lr) {
    v1::ConfigureOptimizerRequest request;
    request.set_module(module);
    request.mutable_optimizer()->set_algorithm(algorithm);
    request.mutable_optimizer()->mutable_hyperparameters()->set_lr(lr);
    return Call(&v1::ModelState::Stub::ConfigureOptimizer, request);
  }

  Fetched Fetch(const v1::StreamStateDictRequest& request) {
    Fetched result;
    grpc::ClientContext context;
    auto reader = stub_->StreamStateDict(&context, request);
    v1::StatePart part;
    while (reader->Read(&part)) {
      switch (part.part_case()) {
        case v1::StatePart::kHeader:
          result.header = part.header();
          break;
        case v1::StatePart::kTensors:
          for (v1::TensorInfo& tensor : *part.mutable_tensors()->mutable_tensors()) {
            result.tensors.push_back(std::move(tensor));
          }
          break;
        case v1::StatePart::kChunk:
          result.chunks.push_back(std::move(*part.mutable_chunk()));
          break;
        case v1::StatePart::kTrailer:
          result.has_trailer = true;
          result.trailer = part.trailer();
          break;
        default:
          ADD_FAILURE() << "a part without content";
      }
    }
    result.status = FromGrpcStatus(reader->Finish());
    return result;
  }
  Fetched FetchAll(const std::string& module) {
    v1::StreamStateDictRequest request;
    request.set_module(module);
    return Fetch(request);
  }

  // Sends these parts and closes.
  absl::StatusOr<v1::ApplyStepResponse> Push(const std::vector<v1::StepPart>& parts) {
    grpc::ClientContext context;
    v1::ApplyStepResponse response;
    auto writer = stub_->ApplyStep(&context, &response);
    for (const v1::StepPart& part : parts) {
      if (!writer->Write(part)) break;  // the server has answered already
    }
    writer->WritesDone();
    const grpc::Status status = writer->Finish();
    if (!status.ok()) return FromGrpcStatus(status);
    return response;
  }
  absl::StatusOr<v1::LoadResult> Load(const std::vector<v1::LoadPart>& parts) {
    grpc::ClientContext context;
    v1::LoadResult response;
    auto writer = stub_->LoadStateDict(&context, &response);
    for (const v1::LoadPart& part : parts) {
      if (!writer->Write(part)) break;
    }
    writer->WritesDone();
    const grpc::Status status = writer->Finish();
    if (!status.ok()) return FromGrpcStatus(status);
    return response;
  }

  // Header, table, chunks of 1 MiB and trailer of a step; offsets in table order.
  static std::vector<v1::StepPart> StepParts(
      const std::string& module,
      const std::vector<std::pair<v1::TensorInfo, std::string>>& tensors) {
    std::vector<v1::StepPart> parts(2);
    std::string region;
    for (const auto& [info, bytes] : tensors) {
      v1::TensorInfo* entry = parts[1].mutable_tensors()->add_tensors();
      *entry = info;
      entry->set_offset(region.size());
      region += bytes;
    }
    v1::StepHeader* header = parts[0].mutable_header();
    header->set_module(module);
    header->set_tensor_count(tensors.size());
    header->set_total_bytes(region.size());
    constexpr size_t kChunk = size_t{1} << 20;
    for (size_t offset = 0; offset < region.size(); offset += kChunk) {
      v1::Chunk* chunk = parts.emplace_back().mutable_chunk();
      chunk->set_offset(offset);
      chunk->set_data(region.substr(offset, kChunk));
    }
    parts.emplace_back().mutable_trailer()->set_total_bytes(region.size());
    return parts;
  }

  // Version, and the digest of every tensor: what must not change when a call fails.
  std::string StateOf(const std::string& module) {
    std::string state;
    for (auto method :
         {&v1::ModelState::Stub::ListParameters, &v1::ModelState::Stub::ListBuffers}) {
      v1::ListTensorsRequest request;
      request.set_module(module);
      request.set_digests(true);
      absl::StatusOr<v1::ListTensorsResponse> list = Call(method, request);
      if (!list.ok()) return list.status().ToString();
      absl::StrAppend(&state, "version ", list->version().number(), " step ", list->step(), "\n");
      for (const v1::TensorInfo& tensor : list->tensors()) {
        absl::StrAppend(&state, tensor.name(), " ", tensor.xxh3(), " ", tensor.requires_grad(),
                        "\n");
      }
    }
    return state;
  }

  v1::GetServerInfoResponse Info() {
    return Call(&v1::ModelState::Stub::GetServerInfo, v1::GetServerInfoRequest())
        .value_or(v1::GetServerInfoResponse());
  }

  // Waits (without sleeping) until no call runs, so that what calls held has been given back.
  bool WaitUntilIdle() {
    return server_->runtime().calls.WaitUntilIdle(absl::Now() + absl::Seconds(30));
  }

  ServerOptions options_;
  std::filesystem::path root_;
  std::unique_ptr<Server> server_;
  std::unique_ptr<v1::ModelState::Stub> stub_;

 private:
  static inline int counter_ = 0;
};

// Matches a Status or StatusOr by the reason of its error.
MATCHER_P(FailsWith, reason, absl::StrCat("fails with ", std::string(ReasonName(reason)))) {
  absl::Status status;
  if constexpr (std::is_same_v<std::decay_t<decltype(arg)>, absl::Status>) {
    status = arg;
  } else {
    status = arg.status();
  }
  *result_listener << status;
  return GetReason(status) == reason && status.code() == ReasonCode(reason);
}

}  // namespace modelstate

#endif  // MODELSTATE_TESTS_SERVER_RPC_SERVER_FIXTURE_H_
