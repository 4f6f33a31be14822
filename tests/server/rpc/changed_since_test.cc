#include "tests/server/rpc/server_fixture.h"

namespace modelstate {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

class ChangedSinceTest : public ServerTest {
 protected:
  // Takes one step of SGD with lr 1 that moves `name` of "tiny", two elements long.
  void StepOn(const std::string& name, float gradient) {
    grpc::ClientContext context;
    v1::ApplyStepResponse response;
    auto writer = stub_->ApplyStep(&context, &response);
    v1::StepPart part;
    part.mutable_header()->set_module("tiny");
    part.mutable_header()->set_tensor_count(1);
    writer->Write(part);
    *part.mutable_tensors()->add_tensors() =
        WithValues(Tensor(name, v1::GRADIENT, {2}), {gradient, gradient});
    writer->Write(part);
    part.mutable_trailer();
    writer->Write(part);
    writer->WritesDone();
    const grpc::Status status = writer->Finish();
    ASSERT_TRUE(status.ok()) << status.error_message();
  }
  void Configure() {
    v1::ConfigureOptimizerRequest request;
    request.set_module("tiny");
    request.mutable_optimizer()->set_algorithm(v1::SGD);
    request.mutable_optimizer()->mutable_hyperparameters()->set_lr(1);
    ASSERT_TRUE(Call(&v1::ModelState::Stub::ConfigureOptimizer, request).ok());
  }
  v1::StreamStateDictRequest Since(const v1::Version& version) {
    v1::StreamStateDictRequest request;
    request.set_module("tiny");
    *request.mutable_changed_since() = version;
    return request;
  }
};

TEST_F(ChangedSinceTest, SendsTheTensorsThatWereWrittenSinceThenAndNoOthers) {
  CreateTiny();
  Configure();
  const Fetched first = FetchAll("tiny");
  StepOn("bias", 1);
  StepOn("bias", 1);
  const Fetched changed = Fetch(Since(first.header.version()));
  ASSERT_TRUE(changed.status.ok()) << changed.status;
  ASSERT_EQ(changed.tensors.size(), 1u);
  EXPECT_EQ(changed.tensors[0].name(), "bias");
  EXPECT_EQ(changed.header.total_bytes(), 8u);
  EXPECT_THAT(FloatsOf(changed.Region()), ElementsAre(-1.5F, -2.5F));
  EXPECT_EQ(changed.header.base().number(), first.header.version().number());
  EXPECT_EQ(changed.header.selection_layout_digest(), first.header.layout_digest());
  EXPECT_NE(changed.header.layout_digest(), first.header.layout_digest());
  EXPECT_TRUE(changed.has_trailer);
  EXPECT_EQ(changed.trailer.digests_size(), 1);

  // With the whole selection's layout, which is checked, and relative to now: nothing.
  v1::StreamStateDictRequest request = Since(changed.header.version());
  request.set_layout_digest(first.header.layout_digest());
  const Fetched nothing = Fetch(request);
  ASSERT_TRUE(nothing.status.ok()) << nothing.status;
  EXPECT_TRUE(nothing.tensors.empty());
  EXPECT_TRUE(nothing.has_trailer);
}

TEST_F(ChangedSinceTest, KeepsToTheSelectionAndItsCast) {
  CreateTiny();
  Configure();
  const Fetched first = FetchAll("tiny");
  StepOn("bias", 1);
  v1::StreamStateDictRequest request = Since(first.header.version());
  request.mutable_selection()->set_float_dtype(v1::BF16);
  const Fetched cast = Fetch(request);
  ASSERT_EQ(cast.tensors.size(), 1u);
  EXPECT_EQ(cast.tensors[0].dtype(), v1::BF16);
  EXPECT_EQ(cast.header.total_bytes(), 4u);
  request.mutable_selection()->add_kinds(v1::BUFFER);
  EXPECT_TRUE(Fetch(request).tensors.empty());
}

TEST_F(ChangedSinceTest, TiedTensorsChangeTogether) {
  v1::TensorInfo tied = Tensor("tied", v1::PARAMETER, {2});
  tied.set_alias_of("bias");
  Create("tiny", {Tensor("weight", v1::PARAMETER, {3}), Tensor("bias", v1::PARAMETER, {2}), tied});
  Configure();
  const v1::Version before = FetchAll("tiny").header.version();
  StepOn("tied", 1);
  const Fetched changed = Fetch(Since(before));
  ASSERT_EQ(changed.tensors.size(), 2u);
  EXPECT_EQ(changed.tensors[1].alias_of(), "bias");
  EXPECT_EQ(changed.header.total_bytes(), 8u);
}

TEST_F(ChangedSinceTest, SaysWhenACopyCannotBeBroughtUpToDate) {
  CreateTiny();
  const Fetched first = FetchAll("tiny");
  v1::StreamStateDictRequest request = Since(first.header.version());
  request.mutable_changed_since()->set_incarnation(1);
  EXPECT_THAT(Fetch(request).status, FailsWith(Reason::kIncarnationChanged));

  request = Since(first.header.version());
  request.mutable_changed_since()->set_number(99);
  const absl::Status future = Fetch(request).status;
  EXPECT_THAT(future, FailsWith(Reason::kInvalidField));
  EXPECT_THAT(std::string(future.message()), HasSubstr("99"));

  for (const char* with : {"ranges", "optimizer_state"}) {
    request = Since(first.header.version());
    if (std::string(with) == "ranges") request.add_ranges()->set_end(4);
    if (std::string(with) == "optimizer_state") request.set_optimizer_state(true);
    EXPECT_THAT(Fetch(request).status, FailsWith(Reason::kInvalidField)) << with;
  }

  // A cast: the copy's layout is no longer the module's.
  v1::MoveModuleRequest move;
  move.set_module("tiny");
  move.set_dtype(v1::BF16);
  ASSERT_TRUE(Call(&v1::ModelState::Stub::MoveModule, move).ok());
  request = Since(first.header.version());
  request.set_layout_digest(first.header.layout_digest());
  EXPECT_THAT(Fetch(request).status, FailsWith(Reason::kLayoutMismatch));
}

}  // namespace
}  // namespace modelstate
