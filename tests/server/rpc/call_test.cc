#include "server/rpc/call.h"

#include <google/protobuf/descriptor.h>
#include <grpcpp/generic/generic_stub.h>

#include "grpc/health/v1/health.grpc.pb.h"
#include "tests/server/rpc/server_fixture.h"

namespace modelstate {
namespace {

using grpc::health::v1::HealthCheckResponse;
using testing::HasSubstr;
using testing::Not;

class CallTest : public ServerTest {
 protected:
  // Calls `path` with these bytes as its messages, and waits for its end.
  grpc::Status CallRaw(const std::string& path, const std::vector<std::string>& messages) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(60));
    grpc::CompletionQueue queue;
    grpc::GenericStub stub(channel_);
    const auto wait = [&queue] {
      void* tag = nullptr;
      bool ok = false;
      return queue.Next(&tag, &ok) && ok;
    };
    auto stream = stub.PrepareCall(&context, path, &queue);
    stream->StartCall(this);
    wait();
    for (const std::string& message : messages) {
      const grpc::Slice slice(message);
      stream->Write(grpc::ByteBuffer(&slice, 1), this);
      if (!wait()) break;
    }
    stream->WritesDone(this);
    wait();
    grpc::ByteBuffer answer;
    do {
      stream->Read(&answer, this);
    } while (wait());
    grpc::Status status;
    stream->Finish(&status, this);
    wait();
    return status;
  }

  static std::vector<std::string> Paths() {
    std::vector<std::string> paths;
    const auto* service = google::protobuf::DescriptorPool::generated_pool()->FindServiceByName(
        v1::ModelState::service_full_name());
    for (int i = 0; i < service->method_count(); ++i) {
      paths.push_back(absl::StrCat("/", service->full_name(), "/", service->method(i)->name()));
    }
    return paths;
  }

  void SetUp() override {
    ServerTest::SetUp();
    channel_ = NewChannel();
  }

  std::shared_ptr<grpc::Channel> channel_;
};

TEST_F(CallTest, EveryMethodOfTheContractIsServed) {
  ASSERT_GT(Paths().size(), 20u);
  for (const std::string& path : Paths()) {
    EXPECT_THAT(CallRaw(path, {""}).error_message(), Not(HasSubstr("there is no method"))) << path;
  }
}

TEST_F(CallTest, AMethodThatIsNotThereIsNamed) {
  const grpc::Status status = CallRaw("/modelstate.v1.ModelState/Train", {""});
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNIMPLEMENTED);
  EXPECT_THAT(status.error_message(), HasSubstr("/modelstate.v1.ModelState/Train"));
}

TEST_F(CallTest, BytesThatAreNoMessageAreRefusedByEveryMethod) {
  for (const std::string& path : Paths()) {
    const absl::Status status = FromGrpcStatus(CallRaw(path, {"\xff\xff\xff\xff"}));
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << path << ": " << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("not a valid")) << path;
  }
}

TEST_F(CallTest, ACallWithoutARequestIsRefusedByEveryMethod) {
  for (const std::string& path : Paths()) {
    const absl::Status status = FromGrpcStatus(CallRaw(path, {}));
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << path << ": " << status;
  }
}

TEST_F(CallTest, HealthIsWatchedWhileAModuleComesAndGoes) {
  auto health = grpc::health::v1::Health::NewStub(channel_);
  grpc::ClientContext context;
  grpc::health::v1::HealthCheckRequest request;
  request.set_service("tiny");
  HealthCheckResponse response;
  const auto watch = health->Watch(&context, request);
  ASSERT_TRUE(watch->Read(&response));
  EXPECT_EQ(response.status(), HealthCheckResponse::SERVICE_UNKNOWN);
  CreateTiny();
  do {
    ASSERT_TRUE(watch->Read(&response));
  } while (response.status() != HealthCheckResponse::SERVING);
  v1::DeleteModuleRequest erase;
  erase.set_module("tiny");
  ASSERT_TRUE(Call(&v1::ModelState::Stub::DeleteModule, erase).ok());
  ASSERT_TRUE(watch->Read(&response));
  EXPECT_EQ(response.status(), HealthCheckResponse::NOT_SERVING);
  context.TryCancel();
  EXPECT_EQ(watch->Finish().error_code(), grpc::StatusCode::CANCELLED);
}

TEST_F(CallTest, AServerStopsUnderCallsThatNobodyEnds) {
  auto health = grpc::health::v1::Health::NewStub(channel_);
  grpc::ClientContext context;
  const auto watch = health->Watch(&context, grpc::health::v1::HealthCheckRequest());
  HealthCheckResponse response;
  ASSERT_TRUE(watch->Read(&response));
  grpc::ClientContext upload_context;
  v1::ApplyStepResponse answer;
  const auto upload = stub_->ApplyStep(&upload_context, &answer);
  v1::StepPart part;
  part.mutable_header()->set_module("none");
  upload->Write(part);
  server_.reset();
  while (watch->Read(&response)) {
  }
  EXPECT_FALSE(watch->Finish().ok());
  EXPECT_FALSE(upload->Finish().ok());
}

}  // namespace
}  // namespace modelstate
