// Budgets over the wire: what readers hold, who is refused, and how it all comes back.
#include <functional>
#include <thread>

#include "tests/server/rpc/server_fixture.h"

namespace modelstate {
namespace {

using testing::HasSubstr;

constexpr int kReaders = 50;
constexpr int64_t kElements = 256 << 10;
constexpr uint64_t kTensorBytes = kElements * 4;

// One stream that a caller has opened and does not read from any further than its header.
struct StalledReader {
  std::unique_ptr<v1::ModelState::Stub> stub;
  std::unique_ptr<grpc::ClientContext> context = std::make_unique<grpc::ClientContext>();
  std::unique_ptr<grpc::ClientReader<v1::StatePart>> reader;
  uint64_t version = 0;
};

class AdmissionTest : public ServerTest {
 protected:
  // A parameter that steps replace, one that they do not, and a buffer.
  void CreateModel() {
    Create("model", {Tensor("weight", v1::PARAMETER, {kElements}),
                     Tensor("embedding", v1::PARAMETER, {kElements}),
                     Tensor("running_mean", v1::BUFFER, {16})});
    ASSERT_TRUE(Configure("model", v1::SGD, 0.5).ok());
  }
  // Of the versions of `count` different steps, all held at once.
  static uint64_t HeldBytes(uint64_t count) { return count * kTensorBytes + kTensorBytes + 16 * 4; }

  absl::Status Step() {
    return Push(StepParts("model", {{Tensor("weight", v1::GRADIENT, {kElements}),
                                     FloatBytes(std::vector<float>(kElements, 1))}}))
        .status();
  }

  // With windows that do not grow, so that a version of 2 MiB is more than is ever under way.
  StalledReader OpenReader() {
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
    arguments.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, 64 << 10);
    StalledReader stalled;
    stalled.stub = v1::ModelState::NewStub(grpc::CreateCustomChannel(
        server_->address(), grpc::InsecureChannelCredentials(), arguments));
    v1::StreamStateDictRequest request;
    request.set_module("model");
    request.set_chunk_bytes(64 << 10);
    stalled.reader = stalled.stub->StreamStateDict(stalled.context.get(), request);
    v1::StatePart part;
    EXPECT_TRUE(stalled.reader->Read(&part));
    EXPECT_TRUE(part.has_header());
    stalled.version = part.header().version().number();
    return stalled;
  }

  absl::StatusOr<v1::Snapshot> Pin() {
    v1::PinSnapshotRequest request;
    request.set_module("model");
    return Call(&v1::ModelState::Stub::PinSnapshot, request);
  }

  // Until `done` says so; false when it does not for half a minute.
  static bool WaitFor(const std::function<bool()>& done) {
    const absl::Time deadline = absl::Now() + absl::Seconds(30);
    while (!done()) {
      if (absl::Now() > deadline) return false;
      std::this_thread::yield();
    }
    return true;
  }
  bool WaitUntilNothingIsHeld() {
    return WaitFor([this] {
      const v1::Limits limits = Info().limits();
      return limits.snapshot_memory_used_bytes() == 0 && limits.held_versions() == 0;
    });
  }
  // Nothing but this call and the current version is left.
  void ExpectAllIsBack(uint64_t device_bytes) {
    EXPECT_TRUE(WaitUntilNothingIsHeld());
    EXPECT_TRUE(WaitFor([this] { return Info().limits().running_calls() == 1; }));
    EXPECT_TRUE(WaitFor([&] { return Info().devices(0).memory_used_bytes() == device_bytes; }));
    EXPECT_TRUE(Pin().ok());
  }
};

TEST_F(AdmissionTest, FiftyStalledReadersHoldWhatTheFormulaSaysAndStepsGoOn) {
  server_.reset();
  options_.snapshot_memory_bytes = HeldBytes(kReaders);
  StartServer();
  CreateModel();
  const uint64_t device_bytes = Info().devices(0).memory_used_bytes();
  std::vector<StalledReader> readers;
  for (int i = 0; i < kReaders; ++i) {
    readers.push_back(OpenReader());
    ASSERT_EQ(readers.back().version, 2u + static_cast<uint64_t>(i));  // version 2: the optimizer
    ASSERT_EQ(Info().limits().snapshot_memory_used_bytes(),
              HeldBytes(static_cast<uint64_t>(i) + 1));
    const absl::Status step = Step();
    ASSERT_TRUE(step.ok()) << i << ": " << step;
  }
  const v1::Limits limits = Info().limits();
  EXPECT_EQ(limits.snapshot_memory_used_bytes(), limits.snapshot_memory_limit_bytes());
  EXPECT_EQ(limits.held_versions(), kReaders);
  EXPECT_EQ(limits.pins(), 0u);
  // A client has its answer a moment before the server has let go of the call.
  EXPECT_TRUE(WaitFor([this] { return Info().limits().running_calls() == kReaders + 1; }));
  // On the device there are the readers' weights and the module; not a byte more.
  EXPECT_EQ(Info().devices(0).memory_used_bytes(), device_bytes + kReaders * kTensorBytes);

  // The next one is refused at its header, with a hint, whatever it wants to read.
  const absl::Status pin = Pin().status();
  EXPECT_THAT(pin, FailsWith(Reason::kSnapshotLimit));
  EXPECT_EQ(pin.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(GetRetryAfter(pin).has_value());
  const Fetched stream = FetchAll("model");
  EXPECT_THAT(stream.status, FailsWith(Reason::kSnapshotLimit));
  EXPECT_TRUE(GetRetryAfter(stream.status).has_value());
  EXPECT_TRUE(stream.tensors.empty());
  EXPECT_TRUE(Step().ok());

  // Some cancel, the others go without a word, and their channels with them.
  for (size_t i = 0; i < readers.size(); i += 2) readers[i].context->TryCancel();
  readers.clear();
  ExpectAllIsBack(device_bytes);
}

TEST_F(AdmissionTest, ReadersThatNeverReadAreCutOffAndEverythingIsGivenBack) {
  server_.reset();
  options_.stream_stall_timeout = absl::Milliseconds(200);
  StartServer();
  CreateModel();
  const uint64_t device_bytes = Info().devices(0).memory_used_bytes();
  std::vector<StalledReader> readers;
  for (int i = 0; i < 8; ++i) {
    readers.push_back(OpenReader());
    ASSERT_TRUE(Step().ok());
  }
  ExpectAllIsBack(device_bytes);
  for (StalledReader& stalled : readers) {
    v1::StatePart part;
    while (stalled.reader->Read(&part)) {
    }
    const grpc::Status status = stalled.reader->Finish();
    EXPECT_EQ(status.error_code(), grpc::StatusCode::ABORTED);
    EXPECT_THAT(status.error_message(), HasSubstr("STREAM_STALLED"));
  }
}

TEST_F(AdmissionTest, PollerThatIsUpToDateIsNeverRefusedForMemory) {
  server_.reset();
  options_.snapshot_memory_bytes = HeldBytes(1);
  StartServer();
  CreateModel();
  ASSERT_TRUE(Pin().ok());
  ASSERT_TRUE(Step().ok());
  v1::StreamStateDictRequest request;
  request.set_module("model");
  EXPECT_THAT(Fetch(request).status, FailsWith(Reason::kSnapshotLimit));
  v1::GetModuleRequest get;
  get.set_module("model");
  *request.mutable_if_newer_than() = Call(&v1::ModelState::Stub::GetModule, get)->version();
  for (bool by_number : {false, true}) {
    if (by_number) request.set_version(request.if_newer_than().number());
    const Fetched poll = Fetch(request);
    ASSERT_TRUE(poll.status.ok()) << poll.status;
    EXPECT_TRUE(poll.header.not_modified());
    EXPECT_EQ(poll.header.tensor_count(), 3u);
    EXPECT_FALSE(poll.has_trailer);
  }
  request.clear_at();
  ASSERT_TRUE(Step().ok());  // now there is something newer, which needs room
  EXPECT_THAT(Fetch(request).status, FailsWith(Reason::kSnapshotLimit));
}

TEST_F(AdmissionTest, ReaderThatWouldStarveStepsIsToldWhatToDo) {
  server_.reset();
  options_.device_memory_bytes = 8 * kTensorBytes;
  options_.push_memory_bytes = 8 * kTensorBytes;
  options_.snapshot_memory_bytes = uint64_t{1} << 40;
  StartServer();
  CreateModel();
  std::vector<std::string> pins;
  absl::Status refused;
  for (int i = 0; i < 5; ++i) {
    if (const auto pin = Pin(); pin.ok()) {
      pins.push_back(pin->snapshot_id());
    } else {
      refused = pin.status();
    }
    const absl::Status step = Step();
    ASSERT_TRUE(step.ok()) << i << ": " << step;
  }
  EXPECT_FALSE(pins.empty());
  EXPECT_EQ(Info().limits().pins(), pins.size());
  EXPECT_THAT(refused, FailsWith(Reason::kSnapshotLimit));
  EXPECT_TRUE(GetRetryAfter(refused).has_value());
  EXPECT_THAT(std::string(refused.message()), HasSubstr("--device_memory_bytes"));
  for (const std::string& id : pins) {
    v1::ReleaseSnapshotRequest release;
    release.set_snapshot_id(id);
    ASSERT_TRUE(Call(&v1::ModelState::Stub::ReleaseSnapshot, release).ok());
  }
  EXPECT_EQ(Info().limits().pins(), 0u);
  EXPECT_TRUE(Pin().ok());
}

}  // namespace
}  // namespace modelstate
