// What a deletion does to calls that run.
#include <filesystem>

#include "tests/server/rpc/server_fixture.h"

namespace modelstate {
namespace {

class DeleteTest : public ServerTest {
 protected:
  absl::Status Delete(const std::string& module) {
    v1::DeleteModuleRequest request;
    request.set_module(module);
    return Call(&v1::ModelState::Stub::DeleteModule, request).status();
  }

  static constexpr int64_t kElements = int64_t{8} << 20;
  v1::Module CreateLarge() {
    v1::TensorInfo weight = Tensor("weight", v1::PARAMETER, {kElements});
    weight.mutable_initializer()->set_constant(2.5);
    return Create("large", {weight});
  }
};

TEST_F(DeleteTest, AStreamThatRunsFinishesAndGivesItsMemoryBack) {
  CreateLarge();
  grpc::ClientContext context;
  v1::StreamStateDictRequest request;
  request.set_module("large");
  auto reader = stub_->StreamStateDict(&context, request);
  v1::StatePart part;
  ASSERT_TRUE(reader->Read(&part));
  ASSERT_TRUE(part.has_header());
  ASSERT_TRUE(Delete("large").ok());
  const uint64_t held = Info().devices(0).memory_used_bytes();
  EXPECT_EQ(held, kElements * 4u);
  uint64_t bytes = 0;
  bool complete = false;
  const float expected = 2.5F;
  while (reader->Read(&part)) {
    complete = part.has_trailer();
    const std::string& data = part.chunk().data();
    for (size_t i = 0; i + 4 <= data.size(); i += 4) {
      ASSERT_EQ(std::memcmp(data.data() + i, &expected, 4), 0);
    }
    bytes += data.size();
  }
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_TRUE(complete);
  EXPECT_EQ(bytes, held);
  ASSERT_TRUE(WaitUntilIdle());
  EXPECT_EQ(Info().devices(0).memory_used_bytes(), 0u);
}

TEST_F(DeleteTest, AStepThatHasNotCommittedIsRefused) {
  const v1::Module before = CreateTiny();
  ASSERT_TRUE(Configure("tiny", v1::SGD, 1).ok());
  grpc::ClientContext context;
  v1::ApplyStepResponse response;
  auto writer = stub_->ApplyStep(&context, &response);
  const auto parts = StepParts("tiny", {{Tensor("bias", v1::GRADIENT, {2}), FloatBytes({1, 2})}});
  ASSERT_TRUE(writer->Write(parts[0]));
  ASSERT_TRUE(writer->Write(parts[1]));
  // The server has found the module when it has staged its table.
  while (Info().limits().push_memory_used_bytes() == 0) {
  }
  ASSERT_TRUE(Delete("tiny").ok());
  // A new module of the name is none of this push's business.
  const v1::Module again = CreateTiny();
  EXPECT_NE(again.version().incarnation(), before.version().incarnation());
  const std::string state = StateOf("tiny");
  for (size_t i = 2; i < parts.size(); ++i) writer->Write(parts[i]);
  writer->WritesDone();
  EXPECT_THAT(FromGrpcStatus(writer->Finish()), FailsWith(Reason::kModuleDeleted));
  EXPECT_EQ(StateOf("tiny"), state);
  EXPECT_EQ(Info().limits().push_memory_used_bytes(), 0u);
}

TEST_F(DeleteTest, ALoadThatHasNotCommittedIsRefused) {
  CreateTiny();
  grpc::ClientContext context;
  v1::LoadResult response;
  auto writer = stub_->LoadStateDict(&context, &response);
  v1::LoadPart part;
  part.mutable_header()->set_module("tiny");
  part.mutable_header()->set_tensor_count(1);
  part.mutable_header()->set_total_bytes(8);
  part.mutable_header()->mutable_options()->set_strict(false);
  ASSERT_TRUE(writer->Write(part));
  *part.mutable_tensors()->add_tensors() = Tensor("bias", v1::PARAMETER, {2});
  ASSERT_TRUE(writer->Write(part));
  while (Info().limits().push_memory_used_bytes() == 0) {
  }
  ASSERT_TRUE(Delete("tiny").ok());
  part.mutable_chunk()->set_data(FloatBytes({1, 2}));
  writer->Write(part);
  part.mutable_trailer()->set_total_bytes(8);
  writer->Write(part);
  writer->WritesDone();
  EXPECT_THAT(FromGrpcStatus(writer->Finish()), FailsWith(Reason::kModuleDeleted));
  EXPECT_EQ(Info().limits().push_memory_used_bytes(), 0u);
}

// Whether the deletion comes before the commit is chance: either the checkpoint is there, or the
// save says why not. It is tried until it comes before.
TEST_F(DeleteTest, ASaveThatHasNotCommittedEndsAndLeavesNoCheckpoint) {
  bool ended = false;
  for (int i = 0; i < 50 && !ended; ++i) {
    CreateLarge();
    grpc::ClientContext context;
    v1::SaveCheckpointRequest request;
    request.set_module("large");
    request.set_path(absl::StrCat("save", i));
    auto reader = stub_->SaveCheckpoint(&context, request);
    v1::SaveCheckpointResponse event;
    ASSERT_TRUE(reader->Read(&event));  // it has begun to write
    ASSERT_TRUE(Delete("large").ok());
    while (reader->Read(&event)) {
    }
    const absl::Status status = FromGrpcStatus(reader->Finish());
    EXPECT_EQ(std::filesystem::exists(root_ / request.path()), status.ok());
    ended = !status.ok();
    if (ended) {
      EXPECT_THAT(status, FailsWith(Reason::kModuleDeleted));
    }
  }
  EXPECT_TRUE(ended);
  ASSERT_TRUE(WaitUntilIdle());
  EXPECT_EQ(Info().devices(0).memory_used_bytes(), 0u);
}

}  // namespace
}  // namespace modelstate
