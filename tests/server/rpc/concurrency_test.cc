// Readers and steps at the same time, and a module of many tensors.
#include <atomic>
#include <thread>

#include "tests/server/rpc/server_fixture.h"

namespace modelstate {
namespace {

class ConcurrencyTest : public ServerTest {
 protected:
  // Module "counter": every element of its parameters and of its buffer is the number of steps.
  void CreateCounter(int64_t count) {
    std::vector<v1::TensorInfo> tensors;
    for (int i = 0; i < 4; ++i) {
      tensors.push_back(Tensor(absl::StrCat("p", i), v1::PARAMETER, {count}));
    }
    tensors.push_back(Tensor("b", v1::BUFFER, {count}));
    Create("counter", tensors);
    ASSERT_TRUE(Configure("counter", v1::SGD, 1).ok());
  }

  // With a learning rate of 1 a gradient of -1 counts up by one.
  absl::StatusOr<v1::ApplyStepResponse> CountUp(int64_t count, int step) {
    std::vector<std::pair<v1::TensorInfo, std::string>> tensors;
    const std::string minus_ones = FloatBytes(std::vector<float>(static_cast<size_t>(count), -1));
    for (int i = 0; i < 4; ++i) {
      tensors.emplace_back(Tensor(absl::StrCat("p", i), v1::GRADIENT, {count}), minus_ones);
    }
    tensors.emplace_back(
        Tensor("b", v1::BUFFER, {count}),
        FloatBytes(std::vector<float>(static_cast<size_t>(count), static_cast<float>(step))));
    return Push(StepParts("counter", tensors));
  }
};

TEST_F(ConcurrencyTest, EverySnapshotIsOneVersionThatWasCurrentDuringItsCall) {
  constexpr int64_t kCount = 20000;
  constexpr int kSteps = 60;
  constexpr int kReaders = 16;
  CreateCounter(kCount);
  std::atomic<int> acknowledged{0};
  std::atomic<int> begun{0};
  std::atomic<bool> done{false};
  std::atomic<int> snapshots{0};
  std::vector<std::thread> readers;
  for (int r = 0; r < kReaders; ++r) {
    readers.emplace_back([&] {
      bool last = false;
      while (!last) {
        last = done.load();
        const int floor = acknowledged.load();
        const Fetched state = FetchAll("counter");
        const int ceiling = begun.load();
        ASSERT_TRUE(state.status.ok()) << state.status;
        ASSERT_TRUE(state.has_trailer);
        const auto step = static_cast<float>(state.header.step());
        EXPECT_GE(step, floor);
        EXPECT_LE(step, ceiling);
        for (float value : FloatsOf(state.Region())) ASSERT_EQ(value, step) << "a torn snapshot";
        snapshots.fetch_add(1);
      }
    });
  }
  for (int step = 1; step <= kSteps; ++step) {
    begun.store(step);
    const auto answer = CountUp(kCount, step);
    ASSERT_TRUE(answer.ok()) << answer.status();
    ASSERT_EQ(answer->step(), step);
    acknowledged.store(step);
  }
  done.store(true);
  for (std::thread& reader : readers) reader.join();
  EXPECT_GE(snapshots.load(), kReaders);
  ASSERT_TRUE(WaitUntilIdle());
  EXPECT_EQ(Info().limits().snapshot_memory_used_bytes(), 0);
}

TEST_F(ConcurrencyTest, ReaderThatDoesNotReadHoldsNoStepUp) {
  constexpr int64_t kCount = 1 << 20;  // 20 MiB in all: more than the sockets hold
  CreateCounter(kCount);
  grpc::ClientContext context;
  v1::StreamStateDictRequest request;
  request.set_module("counter");
  auto reader = stub_->StreamStateDict(&context, request);
  v1::StatePart part;
  ASSERT_TRUE(reader->Read(&part));
  // The reader does not read on until three steps were acknowledged.
  for (int step = 1; step <= 3; ++step) ASSERT_TRUE(CountUp(kCount, step).ok());
  uint64_t bytes = 0;
  while (reader->Read(&part)) {
    if (!part.has_chunk()) continue;
    bytes += part.chunk().data().size();
    for (float value : FloatsOf(part.chunk().data())) ASSERT_EQ(value, 0);
  }
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_EQ(bytes, 5 * kCount * sizeof(float));
}

TEST_F(ConcurrencyTest, ManyTensorsAreListedStreamedAndStepped) {
  constexpr int kTensors = 100000;
  std::vector<v1::LoadPart> load(1);
  v1::LoadHeader* header = load[0].mutable_header();
  header->set_module("wide");
  header->set_tensor_count(kTensors);
  header->set_total_bytes(kTensors * 4);
  std::vector<v1::StepPart> push(1);
  push[0].mutable_header()->set_module("wide");
  push[0].mutable_header()->set_tensor_count(kTensors);
  push[0].mutable_header()->set_total_bytes(kTensors * 4);
  for (int i = 0; i < kTensors; ++i) {
    if (i % 5000 == 0) {
      load.emplace_back();
      push.emplace_back();
    }
    v1::TensorInfo info = Tensor(absl::StrCat("block.", i, ".weight"), v1::PARAMETER, {1});
    info.set_offset(static_cast<uint64_t>(i) * 4);
    *load.back().mutable_tensors()->add_tensors() = info;
    info.set_kind(v1::GRADIENT);
    *push.back().mutable_tensors()->add_tensors() = info;
  }
  load.emplace_back().mutable_chunk()->set_data(FloatBytes(std::vector<float>(kTensors, 3)));
  load.emplace_back().mutable_trailer();
  push.emplace_back().mutable_chunk()->set_data(FloatBytes(std::vector<float>(kTensors, 1)));
  push.emplace_back().mutable_trailer();
  Create("wide", {});
  const auto loaded = Load(load);
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ(loaded->loaded(), kTensors);
  ASSERT_TRUE(Configure("wide", v1::SGD, 1).ok());
  const auto answer = Push(push);
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_EQ(answer->updated(), kTensors);

  v1::ListTensorsRequest list;
  list.set_module("wide");
  list.set_page_size(10000);
  int listed = 0;
  do {
    const auto page = Call(&v1::ModelState::Stub::ListParameters, list);
    ASSERT_TRUE(page.ok()) << page.status();
    EXPECT_EQ(page->total_size(), kTensors);
    for (const v1::TensorInfo& info : page->tensors()) {
      ASSERT_EQ(info.name(), absl::StrCat("block.", listed++, ".weight"));
    }
    list.set_page_token(page->next_page_token());
  } while (!list.page_token().empty());
  EXPECT_EQ(listed, kTensors);

  const Fetched state = FetchAll("wide");
  ASSERT_TRUE(state.status.ok()) << state.status;
  ASSERT_EQ(state.tensors.size(), kTensors);
  for (float value : FloatsOf(state.Region())) ASSERT_EQ(value, 2);
}

}  // namespace
}  // namespace modelstate
