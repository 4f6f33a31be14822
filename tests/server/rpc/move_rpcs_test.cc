#include "tests/server/rpc/server_fixture.h"

namespace modelstate {
namespace {

using testing::HasSubstr;

// A server with two pools of host memory.
class MoveRpcsTest : public ServerTest {
 protected:
  MoveRpcsTest() { options_.device = "cpu,cpu:1"; }

  uint64_t Used(const std::string& device) {
    const v1::GetServerInfoResponse info = Info();
    for (const v1::DeviceInfo& entry : info.devices()) {
      if (entry.name() == device) return entry.memory_used_bytes();
    }
    ADD_FAILURE() << "no device " << device;
    return 0;
  }

  absl::StatusOr<v1::Module> Move(const std::string& module, const std::string& device,
                                  std::optional<v1::DType> dtype = std::nullopt) {
    v1::MoveModuleRequest request;
    request.set_module(module);
    request.set_device(device);
    if (dtype) request.set_dtype(*dtype);
    return Call(&v1::ModelState::Stub::MoveModule, request);
  }
};

TEST_F(MoveRpcsTest, ServerInfoListsEveryDevice) {
  const v1::GetServerInfoResponse info = Info();
  ASSERT_EQ(info.devices_size(), 2);
  EXPECT_EQ(info.devices(0).name(), "cpu");
  EXPECT_EQ(info.devices(1).name(), "cpu:1");
  EXPECT_EQ(info.devices(1).memory_limit_bytes(), uint64_t{1} << 30);
}

TEST_F(MoveRpcsTest, CreateModuleChoosesTheDevice) {
  EXPECT_EQ(CreateTiny("first").device(), "cpu");
  v1::CreateModuleRequest request;
  request.set_name("second");
  request.set_device("cpu:1");
  *request.mutable_spec()->add_tensors() = Tensor("weight", v1::PARAMETER, {1024});
  const uint64_t before = Used("cpu");
  auto module = Call(&v1::ModelState::Stub::CreateModule, request);
  ASSERT_TRUE(module.ok()) << module.status();
  EXPECT_EQ(module->device(), "cpu:1");
  EXPECT_EQ(Used("cpu:1"), 4096u);
  EXPECT_EQ(Used("cpu"), before);

  request.set_name("third");
  request.set_device("cpu:2");
  const auto unknown = Call(&v1::ModelState::Stub::CreateModule, request);
  EXPECT_THAT(unknown, FailsWith(Reason::kInvalidField));
  EXPECT_THAT(std::string(unknown.status().message()), HasSubstr("\"cpu\", \"cpu:1\""));
}

TEST_F(MoveRpcsTest, AMovedModuleIsReadSteppedSavedAndLoadedAsBefore) {
  CreateTiny();
  ASSERT_TRUE(Configure("tiny", v1::ADAMW, 0.5).ok());
  const std::string bias = FloatBytes({1, 1});
  ASSERT_TRUE(Push(StepParts("tiny", {{Tensor("bias", v1::GRADIENT, {2}), bias}})).ok());
  const auto before = FetchAll("tiny").Bytes();
  const auto moved = Move("tiny", "cpu:1");
  ASSERT_TRUE(moved.ok()) << moved.status();
  EXPECT_EQ(moved->device(), "cpu:1");
  EXPECT_EQ(moved->version().number(), 4u);
  EXPECT_EQ(moved->schema_revision(), 1u);
  ASSERT_TRUE(WaitUntilIdle());  // the fetch has let go of the old place
  EXPECT_EQ(Used("cpu"), 0u);
  EXPECT_EQ(FetchAll("tiny").Bytes(), before);

  v1::GetTensorRequest tensor;
  tensor.set_module("tiny");
  tensor.set_name("weight");
  const auto weight = Call(&v1::ModelState::Stub::GetTensor, tensor);
  ASSERT_TRUE(weight.ok()) << weight.status();
  EXPECT_EQ(weight->tensor().values().doubles().values(5), 6);

  // The step's memory comes from the new place, and so does a load's.
  ASSERT_TRUE(Push(StepParts("tiny", {{Tensor("bias", v1::GRADIENT, {2}), bias}})).ok());
  EXPECT_EQ(Used("cpu"), 0u);
  const auto stepped = FetchAll("tiny").Bytes();
  EXPECT_NE(stepped.at("bias"), before.at("bias"));
  grpc::ClientContext save_context;
  v1::SaveCheckpointRequest save;
  save.set_module("tiny");
  save.set_path("moved");
  auto saver = stub_->SaveCheckpoint(&save_context, save);
  v1::SaveCheckpointResponse saved;
  while (saver->Read(&saved)) {
  }
  ASSERT_TRUE(FromGrpcStatus(saver->Finish()).ok());
  ASSERT_TRUE(Push(StepParts("tiny", {{Tensor("bias", v1::GRADIENT, {2}), bias}})).ok());
  ASSERT_TRUE(Move("tiny", "", v1::BF16).ok());
  ASSERT_TRUE(Move("tiny", "", v1::F32).ok());
  grpc::ClientContext load_context;
  v1::LoadCheckpointRequest load;
  load.set_module("tiny");
  load.set_path("moved");
  auto loader = stub_->LoadCheckpoint(&load_context, load);
  v1::LoadCheckpointResponse loaded;
  while (loader->Read(&loaded)) {
  }
  const absl::Status status = FromGrpcStatus(loader->Finish());
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_EQ(FetchAll("tiny").Bytes(), stepped);
  EXPECT_EQ(Used("cpu"), 0u);
}

TEST_F(MoveRpcsTest, AHeldVersionStaysOnTheOldDeviceUntilItsLastReaderEnds) {
  CreateTiny();
  v1::PinSnapshotRequest pin;
  pin.set_module("tiny");
  pin.mutable_lease()->set_seconds(60);
  const auto snapshot = Call(&v1::ModelState::Stub::PinSnapshot, pin);
  ASSERT_TRUE(snapshot.ok()) << snapshot.status();
  const auto before = FetchAll("tiny").Bytes();
  ASSERT_TRUE(Move("tiny", "cpu:1", v1::F16).ok());
  v1::StreamStateDictRequest request;
  request.set_module("tiny");
  request.set_snapshot_id(snapshot->snapshot_id());
  EXPECT_EQ(Fetch(request).Bytes(), before);
  EXPECT_GT(Used("cpu"), 0u);
  EXPECT_EQ(FetchAll("tiny").tensors.at(0).dtype(), v1::F16);
  v1::ReleaseSnapshotRequest release;
  release.set_snapshot_id(snapshot->snapshot_id());
  ASSERT_TRUE(Call(&v1::ModelState::Stub::ReleaseSnapshot, release).ok());
  ASSERT_TRUE(WaitUntilIdle());
  EXPECT_EQ(Used("cpu"), 0u);
}

TEST_F(MoveRpcsTest, MoveRefusesWhatItCannotDoAndChangesNothing) {
  CreateTiny();
  const std::string state = StateOf("tiny");
  const auto nowhere = Move("tiny", "cuda:0");
  EXPECT_THAT(nowhere, FailsWith(Reason::kInvalidField));
  EXPECT_THAT(std::string(nowhere.status().message()), HasSubstr("\"cpu\", \"cpu:1\""));
  const auto integer = Move("tiny", "", v1::I64);
  EXPECT_THAT(integer, FailsWith(Reason::kInvalidField));
  EXPECT_THAT(std::string(integer.status().message()),
              HasSubstr("nn.Module.to only accepts floating point or complex dtypes, but got "
                        "desired dtype=torch.int64"));
  EXPECT_THAT(Move("tiny", "", static_cast<v1::DType>(99)), FailsWith(Reason::kInvalidField));
  EXPECT_THAT(Move("tiny", ""), FailsWith(Reason::kInvalidField));
  EXPECT_THAT(Move("nobody", "cpu"), FailsWith(Reason::kModuleNotFound));
  Create("empty", {});
  EXPECT_THAT(Move("empty", "cpu:1"), FailsWith(Reason::kModuleEmpty));
  const auto same = Move("tiny", "cpu", v1::F32);
  ASSERT_TRUE(same.ok()) << same.status();
  EXPECT_EQ(same->version().number(), 1u);
  EXPECT_EQ(StateOf("tiny"), state);
}

// Versions as ListVersions tells them.
class VersionRpcsTest : public MoveRpcsTest {
 protected:
  absl::StatusOr<v1::ListVersionsResponse> List(const std::string& module, int32_t page_size = 0,
                                                const std::string& token = "") {
    v1::ListVersionsRequest request;
    request.set_module(module);
    request.set_page_size(page_size);
    request.set_page_token(token);
    return Call(&v1::ModelState::Stub::ListVersions, request);
  }
};

TEST_F(VersionRpcsTest, TellsWhatChangedTheNewestFirstAndWhatIsHeld) {
  CreateTiny();
  ASSERT_TRUE(Configure("tiny", v1::SGD, 0.5).ok());
  v1::PinSnapshotRequest pin;
  pin.set_module("tiny");
  pin.mutable_lease()->set_seconds(60);
  ASSERT_TRUE(Call(&v1::ModelState::Stub::PinSnapshot, pin).ok());
  auto parts = StepParts("tiny", {{Tensor("bias", v1::GRADIENT, {2}), FloatBytes({1, 1})}});
  parts[0].mutable_header()->set_worker("w3");
  parts[0].mutable_header()->set_sequence(17);
  ASSERT_TRUE(Push(parts).ok());
  v1::LoadPart header;
  header.mutable_header()->set_module("tiny");
  header.mutable_header()->set_tensor_count(1);
  header.mutable_header()->mutable_options()->set_strict(false);
  v1::LoadPart table;
  *table.mutable_tensors()->add_tensors() =
      WithValues(Tensor("running_mean", v1::BUFFER, {2}), {3, 4});
  v1::LoadPart trailer;
  trailer.mutable_trailer();
  const auto loaded = Load({header, table, trailer});
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  ASSERT_TRUE(Move("tiny", "cpu:1", v1::BF16).ok());

  const auto list = List("tiny");
  ASSERT_TRUE(list.ok()) << list.status();
  ASSERT_EQ(list->versions_size(), 5);
  EXPECT_EQ(list->next_page_token(), "");
  const auto& versions = list->versions();
  EXPECT_EQ(versions[0].mutation(), v1::MOVE);
  EXPECT_EQ(versions[0].detail(), "F32 to BF16, cpu to cpu:1");
  EXPECT_EQ(versions[0].version().number(), 5u);
  EXPECT_EQ(versions[0].schema_revision(), 2u);
  EXPECT_EQ(versions[1].mutation(), v1::BUFFER_WRITE);
  EXPECT_EQ(versions[1].detail(), "from the caller");
  EXPECT_EQ(versions[1].changed_buffers(), 1u);
  EXPECT_EQ(versions[2].mutation(), v1::STEP);
  EXPECT_EQ(versions[2].detail(), "worker w3, sequence 17");
  EXPECT_EQ(versions[2].changed_bytes(), 8u);
  EXPECT_EQ(versions[2].tensors(0), "bias");
  EXPECT_EQ(versions[2].step(), 1u);
  EXPECT_EQ(versions[3].mutation(), v1::CONFIGURE_OPTIMIZER);
  EXPECT_EQ(versions[4].mutation(), v1::CREATE);
  EXPECT_GT(versions[4].time().seconds(), 0);
  std::vector<bool> held;
  for (const v1::VersionInfo& version : versions) held.push_back(version.held());
  EXPECT_EQ(held, std::vector<bool>({true, false, false, true, false}));
}

TEST_F(VersionRpcsTest, PagesGoOnWhereTheyWereThoughNewVersionsCome) {
  CreateTiny();
  ASSERT_TRUE(Configure("tiny", v1::SGD, 0.5).ok());
  const auto step = [this] {
    ASSERT_TRUE(
        Push(StepParts("tiny", {{Tensor("bias", v1::GRADIENT, {2}), FloatBytes({1, 1})}})).ok());
  };
  for (int i = 0; i < 5; ++i) step();
  std::vector<uint64_t> seen;
  std::string token;
  do {
    const auto page = List("tiny", 3, token);
    ASSERT_TRUE(page.ok()) << page.status();
    EXPECT_LE(page->versions_size(), 3);
    for (const v1::VersionInfo& version : page->versions()) {
      seen.push_back(version.version().number());
    }
    token = page->next_page_token();
    step();
  } while (!token.empty());
  EXPECT_EQ(seen, std::vector<uint64_t>({7, 6, 5, 4, 3, 2, 1}));

  token = List("tiny", 1)->next_page_token();
  CreateTiny("other");
  EXPECT_THAT(List("other", 1, token), FailsWith(Reason::kInvalidField));
  v1::DeleteModuleRequest remove;
  remove.set_module("tiny");
  ASSERT_TRUE(Call(&v1::ModelState::Stub::DeleteModule, remove).ok());
  CreateTiny();
  EXPECT_THAT(List("tiny", 1, token), FailsWith(Reason::kInvalidField));
  EXPECT_THAT(List("tiny", 1001), FailsWith(Reason::kInvalidField));
  EXPECT_THAT(List("nobody"), FailsWith(Reason::kModuleNotFound));
}

}  // namespace
}  // namespace modelstate
