// StreamStateDict and the pins it reads from.
#include "common/base/digest.h"
#include "server/rpc/state_stream.h"
#include "tests/server/rpc/server_fixture.h"

namespace modelstate {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

class StreamRpcsTest : public ServerTest {
 protected:
  void SetUp() override {
    // The fake GPU runs the threads of its kernels one after the other.
    options_.stream_stall_timeout =
        TestDevice() == "cpu" ? absl::Milliseconds(400) : absl::Seconds(5);
    ServerTest::SetUp();
  }

  static v1::StreamStateDictRequest Request(const std::string& module) {
    v1::StreamStateDictRequest request;
    request.set_module(module);
    return request;
  }

  static std::string DigestOf(const std::string& bytes) {
    return DigestToHex(
        Xxh3(absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size())));
  }

  // A parameter of `count` floats: 0, 1, 2, ... and small tensors around it.
  void CreateLarge(int64_t count) {
    std::vector<double> values(static_cast<size_t>(count));
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<double>(i);
    Create("large", {Tensor("a", v1::PARAMETER, {3}),
                     WithValues(Tensor("big", v1::PARAMETER, {count}), values),
                     WithValues(Tensor("small", v1::BUFFER, {5}, v1::U8), {1, 2, 3, 4, 5}),
                     Tensor("nothing", v1::BUFFER, {0, 4})});
  }

  void Step(const std::string& name, int64_t count) {
    const auto answer =
        Push(StepParts("large", {{Tensor(name, v1::GRADIENT, {count}),
                                  FloatBytes(std::vector<float>(static_cast<size_t>(count), 1))}}));
    ASSERT_TRUE(answer.ok()) << answer.status();
  }
};

TEST_F(StreamRpcsTest, SendsHeaderTableChunksAndTrailerWithDigests) {
  CreateLarge(300000);
  const Fetched state = FetchAll("large");
  ASSERT_TRUE(state.status.ok()) << state.status;
  ASSERT_TRUE(state.has_trailer);
  EXPECT_EQ(state.header.tensor_count(), 4);
  EXPECT_EQ(state.header.total_bytes(), 300003 * 4 + 5);
  EXPECT_EQ(state.trailer.total_bytes(), state.header.total_bytes());
  ASSERT_EQ(state.tensors.size(), 4);
  EXPECT_EQ(state.tensors[1].name(), "big");
  uint64_t next = 0;
  for (const v1::Chunk& chunk : state.chunks) {
    EXPECT_EQ(chunk.offset(), next);
    EXPECT_LE(chunk.data().size(), size_t{1} << 20);
    next += chunk.data().size();
  }
  EXPECT_EQ(next, state.header.total_bytes());
  std::map<std::string, std::string> bytes = state.Bytes();
  const std::vector<float> big = FloatsOf(bytes["big"]);
  for (size_t i = 0; i < big.size(); ++i) ASSERT_EQ(big[i], static_cast<float>(i));
  EXPECT_EQ(bytes["small"], std::string("\1\2\3\4\5"));
  ASSERT_EQ(state.trailer.digests_size(), 3);  // all that have bytes
  for (const v1::TensorDigest& digest : state.trailer.digests()) {
    const std::string& data = bytes[state.tensors[digest.index()].name()];
    EXPECT_EQ(digest.xxh3(), DigestToHex(Xxh3(absl::MakeConstSpan(
                                 reinterpret_cast<const uint8_t*>(data.data()), data.size()))));
  }
}

TEST_F(StreamRpcsTest, RangesJoinToTheWholeUnderOneLayout) {
  CreateLarge(5000);
  const Fetched whole = FetchAll("large");
  const std::string region = whole.Region();
  v1::StreamStateDictRequest request = Request("large");
  request.set_chunk_bytes(1024);
  request.set_layout_digest(whole.header.layout_digest());
  const auto add = [&](uint64_t begin, uint64_t end) {
    v1::ByteRange* range = request.add_ranges();
    range->set_begin(begin);
    range->set_end(end);
  };
  add(1, 7);
  add(100, 3001);
  add(3001, 3002);
  add(region.size() - 6, region.size());
  const Fetched part = Fetch(request);
  ASSERT_TRUE(part.status.ok()) << part.status;
  std::string expected(region.size(), '\0');
  uint64_t bytes = 0;
  for (const v1::ByteRange& range : request.ranges()) {
    const uint64_t size = range.end() - range.begin();
    expected.replace(range.begin(), size, region, range.begin(), size);
    bytes += size;
  }
  EXPECT_EQ(part.Region(), expected);
  EXPECT_EQ(part.trailer.total_bytes(), bytes);
  EXPECT_EQ(part.header.total_bytes(), region.size());
  // Only what was whole in this stream has a digest: the five bytes at the end.
  ASSERT_EQ(part.trailer.digests_size(), 1);
  EXPECT_EQ(part.tensors[part.trailer.digests(0).index()].name(), "small");
}

// Who puts a tensor together from several streams learns from each what it must be.
TEST_F(StreamRpcsTest, TensorsInPartHaveTheirDigestInTheTable) {
  CreateTiny();
  ASSERT_TRUE(Configure("tiny", v1::ADAMW, 0.01).ok());
  ASSERT_TRUE(
      Push(StepParts("tiny", {{Tensor("bias", v1::GRADIENT, {2}), FloatBytes({1, 1})}})).ok());
  for (const v1::DType dtype : {v1::F32, v1::BF16, v1::F64}) {
    SCOPED_TRACE(v1::DType_Name(dtype));
    v1::StreamStateDictRequest request = Request("tiny");
    request.set_optimizer_state(true);
    request.mutable_selection()->set_float_dtype(dtype);
    const Fetched whole = Fetch(request);
    ASSERT_TRUE(whole.status.ok()) << whole.status;
    const auto bytes_of = [&whole](const v1::TensorInfo& tensor) {
      return whole.Region().substr(tensor.offset(), tensor.nbytes());
    };
    for (const v1::TensorInfo& chosen : whole.tensors) {
      EXPECT_EQ(chosen.xxh3(), "") << "all of it follows";
      if (chosen.nbytes() < 2) continue;
      for (const uint64_t begin : {chosen.offset(), chosen.offset() + chosen.nbytes() - 1}) {
        request.clear_ranges();
        v1::ByteRange* range = request.add_ranges();
        range->set_begin(begin);
        range->set_end(begin + 1);
        request.set_skip_digests(false);
        Fetched part = Fetch(request);
        ASSERT_TRUE(part.status.ok()) << part.status;
        EXPECT_EQ(part.trailer.digests_size(), 0);
        for (const v1::TensorInfo& tensor : part.tensors) {
          const bool is_chosen = tensor.offset() == chosen.offset();
          EXPECT_EQ(tensor.xxh3(), is_chosen ? DigestOf(bytes_of(tensor)) : std::string())
              << tensor.slot() << tensor.name();
        }
        request.set_skip_digests(true);
        part = Fetch(request);
        for (const v1::TensorInfo& tensor : part.tensors) EXPECT_EQ(tensor.xxh3(), "");
      }
    }
  }
}

// gRPC sends them when it likes, and lets go of them later still.
TEST_F(StreamRpcsTest, MessagesKeepTheirBytesWhenTheStreamHasGoneOn) {
  v1::TensorInfo info = Tensor("w", v1::PARAMETER, {6'000'000});
  info.mutable_initializer()->mutable_uniform();
  Create("large", {info});
  const std::string region = FetchAll("large").Region();
  std::vector<grpc::ByteBuffer> messages;
  {
    StateStream::Contents contents;
    contents.snapshot = *(*server_->runtime().registry->Find("large"))->Hold();
    contents.view = *contents.snapshot->schema->View(Selection());
    StateStream::Options options;
    options.module = "large";
    options.cast_budget = server_->runtime().cast_budget;
    const auto stream = StateStream::Create(std::move(contents), std::move(options));
    ASSERT_TRUE(stream.ok()) << stream.status();
    for (auto message = (*stream)->Next(); message.ok() && *message; message = (*stream)->Next()) {
      messages.push_back(**message);
    }
  }
  EXPECT_TRUE(FetchAll("large").Region() == region);  // uses again what was given back
  std::string kept(region.size(), '\0');
  for (grpc::ByteBuffer& message : messages) {
    v1::StatePart part;
    ASSERT_TRUE(grpc::SerializationTraits<v1::StatePart>::Deserialize(&message, &part).ok());
    if (part.has_chunk())
      kept.replace(part.chunk().offset(), part.chunk().data().size(), part.chunk().data());
  }
  EXPECT_TRUE(kept == region);
}

// A trailer is one message, and has no room for more.
TEST_F(StreamRpcsTest, DigestsThatDoNotFitInTheTrailerAreInTheTable) {
  constexpr size_t kTensors = StateStream::kMaxDigests + 7;
  Create("many", {});
  std::vector<v1::LoadPart> parts(2);
  std::string region;
  for (size_t i = 0; i < kTensors; ++i) {
    v1::TensorInfo* info = parts[1].mutable_tensors()->add_tensors();
    *info = Tensor(absl::StrCat(i), v1::BUFFER, {1}, v1::U8);
    info->set_offset(i);
    region.push_back(static_cast<char>(i * 7));
  }
  v1::LoadHeader* header = parts[0].mutable_header();
  header->set_module("many");
  header->set_tensor_count(kTensors);
  header->set_total_bytes(region.size());
  parts.emplace_back().mutable_chunk()->set_data(region);
  parts.emplace_back().mutable_trailer();
  const auto loaded = Load(parts);
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  const Fetched fetched = FetchAll("many");
  ASSERT_TRUE(fetched.status.ok()) << fetched.status;
  std::vector<std::string> digests(kTensors);
  for (const v1::TensorDigest& digest : fetched.trailer.digests()) {
    digests[digest.index()] = digest.xxh3();
  }
  const std::string bytes = fetched.Region();
  for (size_t i = 0; i < kTensors; ++i) {
    const v1::TensorInfo& tensor = fetched.tensors[i];
    ASSERT_EQ(digests[i].empty(), !tensor.xxh3().empty()) << i;
    const std::string& digest = digests[i].empty() ? tensor.xxh3() : digests[i];
    ASSERT_EQ(digest, DigestOf(bytes.substr(tensor.offset(), 1))) << i;
  }
}

TEST_F(StreamRpcsTest, SelectionAndFloatDTypeApply) {
  CreateTiny();
  v1::StreamStateDictRequest request = Request("tiny");
  request.mutable_selection()->add_names("weight");
  request.mutable_selection()->add_globs("running_*");
  request.mutable_selection()->set_float_dtype(v1::F64);
  const Fetched state = Fetch(request);
  ASSERT_TRUE(state.status.ok()) << state.status;
  ASSERT_EQ(state.tensors.size(), 2);
  EXPECT_EQ(state.tensors[0].dtype(), v1::F64);
  const std::string bytes = state.Bytes()["weight"];
  ASSERT_EQ(bytes.size(), 6 * sizeof(double));
  double values[6];
  std::memcpy(values, bytes.data(), sizeof(values));
  EXPECT_THAT(values, ElementsAre(1, 2, 3, 4, 5, 6));
  EXPECT_EQ(state.trailer.digests_size(), 2);

  // A range that cuts cast elements.
  v1::ByteRange* range = request.add_ranges();
  range->set_begin(3);
  range->set_end(13);
  const Fetched cut = Fetch(request);
  ASSERT_TRUE(cut.status.ok()) << cut.status;
  EXPECT_EQ(cut.Region().substr(3, 10), state.Region().substr(3, 10));
}

// Readers of one version share its casts for as long as somebody holds it.
TEST_F(StreamRpcsTest, ACastIsMadeOncePerVersion) {
  if (TestDevice() != "cpu") GTEST_SKIP() << "each reader of a GPU has its own casts";
  CreateLarge(500'000);
  const auto budget = server_->runtime().cast_budget;
  v1::PinSnapshotRequest pin;
  pin.set_module("large");
  const auto pinned = Call(&v1::ModelState::Stub::PinSnapshot, pin);
  ASSERT_TRUE(pinned.ok()) << pinned.status();
  v1::StreamStateDictRequest request = Request("large");
  request.set_snapshot_id(pinned->snapshot_id());
  request.mutable_selection()->set_float_dtype(v1::BF16);
  const Fetched first = Fetch(request);
  ASSERT_TRUE(first.status.ok()) << first.status;
  EXPECT_EQ(budget->used(), 2 * 500'003u) << "those that are cast, and once";
  const Fetched second = Fetch(request);
  EXPECT_EQ(second.Region(), first.Region());
  EXPECT_EQ(second.trailer.SerializeAsString(), first.trailer.SerializeAsString());
  EXPECT_EQ(budget->used(), 2 * 500'003u);
  request.mutable_selection()->set_float_dtype(v1::F16);
  EXPECT_TRUE(Fetch(request).status.ok());
  EXPECT_EQ(budget->used(), 4 * 500'003u);
  v1::ReleaseSnapshotRequest release;
  release.set_snapshot_id(pinned->snapshot_id());
  ASSERT_TRUE(Call(&v1::ModelState::Stub::ReleaseSnapshot, release).ok());
  EXPECT_TRUE(WaitUntilIdle());
  EXPECT_EQ(budget->used(), 0u);
}

class NoCastMemoryTest : public StreamRpcsTest {
 protected:
  void SetUp() override {
    options_.cast_memory_bytes = 1;
    StreamRpcsTest::SetUp();
  }
};

TEST_F(NoCastMemoryTest, EachReaderHasItsOwnCast) {
  CreateLarge(500'000);
  v1::StreamStateDictRequest request = Request("large");
  request.mutable_selection()->set_float_dtype(v1::F64);
  const Fetched fetched = Fetch(request);
  ASSERT_TRUE(fetched.status.ok()) << fetched.status;
  const std::string big = fetched.Bytes()["big"];
  double value = 0;
  std::memcpy(&value, big.data() + 499'999 * sizeof(double), sizeof(double));
  EXPECT_EQ(value, 499'999);
  for (const v1::TensorDigest& digest : fetched.trailer.digests()) {
    const v1::TensorInfo& tensor = fetched.tensors[digest.index()];
    EXPECT_EQ(digest.xxh3(), DigestOf(fetched.Region().substr(tensor.offset(), tensor.nbytes())));
  }
}

TEST_F(StreamRpcsTest, NotModifiedIsAHeaderAlone) {
  CreateTiny();
  v1::StreamStateDictRequest request = Request("tiny");
  *request.mutable_if_newer_than() = FetchAll("tiny").header.version();
  const Fetched same = Fetch(request);
  ASSERT_TRUE(same.status.ok()) << same.status;
  EXPECT_TRUE(same.header.not_modified());
  EXPECT_TRUE(same.tensors.empty());
  EXPECT_TRUE(same.chunks.empty());
  EXPECT_FALSE(same.has_trailer);

  request.mutable_if_newer_than()->set_incarnation(1);
  EXPECT_THAT(Fetch(request).status, FailsWith(Reason::kIncarnationChanged));
}

TEST_F(StreamRpcsTest, PinnedVersionStaysReadableWhileStepsGoOn) {
  CreateLarge(1000);
  ASSERT_TRUE(Configure("large", v1::SGD, 1).ok());
  v1::PinSnapshotRequest pin;
  pin.set_module("large");
  const auto snapshot = Call(&v1::ModelState::Stub::PinSnapshot, pin);
  ASSERT_TRUE(snapshot.ok()) << snapshot.status();
  const std::string before = FetchAll("large").Region();
  Step("big", 1000);
  ASSERT_NE(FetchAll("large").Region(), before);

  v1::StreamStateDictRequest by_pin = Request("large");
  by_pin.set_snapshot_id(snapshot->snapshot_id());
  EXPECT_EQ(Fetch(by_pin).Region(), before);
  v1::StreamStateDictRequest by_number = Request("large");
  by_number.set_version(snapshot->version().number());
  EXPECT_EQ(Fetch(by_number).Region(), before);

  v1::PinSnapshotRequest renew;
  renew.set_snapshot_id(snapshot->snapshot_id());
  renew.mutable_lease()->set_seconds(600);
  const auto renewed = Call(&v1::ModelState::Stub::PinSnapshot, renew);
  ASSERT_TRUE(renewed.ok()) << renewed.status();
  EXPECT_GT(renewed->expire_time().seconds(), snapshot->expire_time().seconds());

  v1::ReleaseSnapshotRequest release;
  release.set_snapshot_id(snapshot->snapshot_id());
  EXPECT_TRUE(Call(&v1::ModelState::Stub::ReleaseSnapshot, release).ok());
  EXPECT_THAT(Call(&v1::ModelState::Stub::ReleaseSnapshot, release),
              FailsWith(Reason::kSnapshotNotFound));
  EXPECT_THAT(Fetch(by_pin).status, FailsWith(Reason::kSnapshotNotFound));
  ASSERT_TRUE(WaitUntilIdle());
  EXPECT_THAT(Fetch(by_number).status, FailsWith(Reason::kSnapshotNotFound));
}

TEST_F(StreamRpcsTest, WrongRequestsAreRefusedBeforeAnythingIsSent) {
  CreateTiny();
  Create("empty", {});
  EXPECT_THAT(FetchAll("nobody").status, FailsWith(Reason::kModuleNotFound));
  EXPECT_THAT(FetchAll("").status, FailsWith(Reason::kInvalidField));
  EXPECT_THAT(FetchAll("empty").status, FailsWith(Reason::kModuleEmpty));

  v1::StreamStateDictRequest request = Request("tiny");
  request.mutable_selection()->add_names("nothing");
  EXPECT_THAT(Fetch(request).status, FailsWith(Reason::kTensorNotFound));

  request = Request("tiny");
  request.set_layout_digest("00000000000000000000000000000000");
  const Fetched other = Fetch(request);
  EXPECT_THAT(other.status, FailsWith(Reason::kLayoutMismatch));
  EXPECT_EQ(GetErrorMetadata(other.status)["layout_digest"],
            FetchAll("tiny").header.layout_digest());

  request = Request("tiny");
  request.add_ranges()->set_end(41);
  EXPECT_THAT(Fetch(request).status, FailsWith(Reason::kRangeOutsideLayout));
  request.mutable_ranges(0)->set_end(20);
  request.add_ranges()->set_begin(10);
  request.mutable_ranges(1)->set_end(30);
  EXPECT_THAT(Fetch(request).status, FailsWith(Reason::kInvalidField));

  request = Request("tiny");
  request.set_chunk_bytes(100 << 20);
  EXPECT_THAT(Fetch(request).status, FailsWith(Reason::kInvalidField));

  v1::PinSnapshotRequest pin;
  pin.set_module("tiny");
  pin.mutable_lease()->set_seconds(1000000);
  EXPECT_THAT(Call(&v1::ModelState::Stub::PinSnapshot, pin), FailsWith(Reason::kInvalidField));
}

TEST_F(StreamRpcsTest, ReaderThatTakesNothingIsCutOffAndItsVersionGivenBack) {
  Create("large", {Tensor("big", v1::PARAMETER, {8 << 20})});  // more than the sockets hold
  grpc::ClientContext context;
  auto reader = stub_->StreamStateDict(&context, Request("large"));
  v1::StatePart part;
  ASSERT_TRUE(reader->Read(&part));
  EXPECT_GT(Info().limits().snapshot_memory_used_bytes(), 0);
  // Not reading. The server ends the call by itself, or this waits in vain.
  ASSERT_TRUE(WaitUntilIdle());
  EXPECT_EQ(Info().limits().snapshot_memory_used_bytes(), 0);
  while (reader->Read(&part)) {
  }
  const grpc::Status status = reader->Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::ABORTED);
  EXPECT_THAT(status.error_message(), HasSubstr("STREAM_STALLED"));
}

TEST_F(StreamRpcsTest, PushThatStallsIsCutOffAndItsMemoryGivenBack) {
  CreateLarge(1000);
  ASSERT_TRUE(Configure("large", v1::SGD, 1).ok());
  const std::vector<v1::StepPart> parts = StepParts(
      "large", {{Tensor("big", v1::GRADIENT, {1000}), FloatBytes(std::vector<float>(1000, 1))}});
  grpc::ClientContext context;
  v1::ApplyStepResponse response;
  auto writer = stub_->ApplyStep(&context, &response);
  ASSERT_TRUE(writer->Write(parts[0]));
  ASSERT_TRUE(writer->Write(parts[1]));
  const grpc::Status status = writer->Finish();  // without WritesDone: the server ends it
  EXPECT_EQ(status.error_code(), grpc::StatusCode::ABORTED);
  EXPECT_THAT(status.error_message(), HasSubstr("STREAM_STALLED"));
  ASSERT_TRUE(WaitUntilIdle());
  EXPECT_EQ(Info().limits().push_memory_used_bytes(), 0);
}

}  // namespace
}  // namespace modelstate
