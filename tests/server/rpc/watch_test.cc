#include <atomic>
#include <thread>

#include "absl/synchronization/notification.h"
#include "tests/server/rpc/server_fixture.h"

namespace modelstate {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

// One WatchModule call.
class Watch {
 public:
  Watch(v1::ModelState::Stub& stub, const std::string& module) {
    v1::WatchModuleRequest request;
    request.set_module(module);
    reader_ = stub.WatchModule(&context_, request);
  }
  bool Read() { return reader_->Read(&seen_); }
  // Reads until this version; false when the call ended before.
  bool ReadUntil(uint64_t number) {
    uint64_t last = 0;
    while (Read()) {
      if (seen_.module().version().number() <= last) {
        ADD_FAILURE() << "version " << seen_.module().version().number() << " after " << last;
      }
      last = seen_.module().version().number();
      if (last >= number) return true;
    }
    return false;
  }
  const v1::WatchModuleResponse& seen() const { return seen_; }
  absl::Status Finish() { return FromGrpcStatus(reader_->Finish()); }
  // Ends the call, whatever it has to say.
  void Cancel() {
    context_.TryCancel();
    while (Read()) {
    }
    EXPECT_FALSE(Finish().ok());
  }

 private:
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReader<v1::WatchModuleResponse>> reader_;
  v1::WatchModuleResponse seen_;
};

class WatchTest : public ServerTest {
 protected:
  WatchTest() { options_.device = "cpu,cpu:1"; }

  void Freeze(const std::string& module, bool requires_grad) {
    v1::SetRequiresGradRequest request;
    request.set_module(module);
    request.mutable_selection()->add_globs("*");
    request.set_requires_grad(requires_grad);
    const auto response = Call(&v1::ModelState::Stub::SetRequiresGrad, request);
    ASSERT_TRUE(response.ok()) << response.status();
  }
  absl::Status Delete(const std::string& module) {
    v1::DeleteModuleRequest request;
    request.set_module(module);
    return Call(&v1::ModelState::Stub::DeleteModule, request).status();
  }
};

TEST_F(WatchTest, ManyWatchersEachSeeTheCurrentStateAndTheLastVersion) {
  CreateTiny();
  std::vector<std::unique_ptr<Watch>> watches;
  for (int i = 0; i < 40; ++i) watches.push_back(std::make_unique<Watch>(*stub_, "tiny"));
  for (auto& watch : watches) {
    ASSERT_TRUE(watch->Read());
    EXPECT_EQ(watch->seen().module().version().number(), 1u);
    EXPECT_EQ(watch->seen().last_mutation(), v1::CREATE);
  }
  EXPECT_EQ(server_->runtime().watches->hub_count(), 1u);
  for (int i = 0; i < 100; ++i) Freeze("tiny", i % 2 != 0);
  for (auto& watch : watches) {
    ASSERT_TRUE(watch->ReadUntil(101)) << watch->Finish();
    EXPECT_EQ(watch->seen().module().version().number(), 101u);
    EXPECT_EQ(watch->seen().last_mutation(), v1::FREEZE);
    EXPECT_EQ(watch->seen().module().name(), "tiny");
    EXPECT_EQ(watch->seen().module().parameter_count(), 2u);
  }
  // A version that comes when all is quiet reaches everybody too.
  Freeze("tiny", false);
  for (auto& watch : watches) ASSERT_TRUE(watch->ReadUntil(102));

  for (auto& watch : watches) {
    watch->Cancel();
  }
  EXPECT_TRUE(WaitUntilIdle());
  EXPECT_EQ(server_->runtime().watches->hub_count(), 0u) << "the hub goes with its last watcher";
}

TEST_F(WatchTest, WatchersThatJoinDuringVersionsMissNoneOfTheEnd) {
  CreateTiny();
  std::thread changes([this] {
    for (int i = 0; i < 200; ++i) Freeze("tiny", i % 2 != 0);
  });
  std::vector<std::thread> watchers;
  std::atomic<int> complete{0};
  for (int t = 0; t < 4; ++t) {
    watchers.emplace_back([&] {
      for (int i = 0; i < 10; ++i) {
        Watch watch(*stub_, "tiny");
        if (i < 9) {  // leaves early, at any moment
          watch.Read();
          watch.Cancel();
        } else {
          complete += watch.ReadUntil(201);
          watch.Cancel();
        }
      }
    });
  }
  for (std::thread& watcher : watchers) watcher.join();
  changes.join();
  EXPECT_EQ(complete, 4);
  EXPECT_TRUE(WaitUntilIdle());
  EXPECT_EQ(server_->runtime().watches->hub_count(), 0u);
}

TEST_F(WatchTest, DeletionEndsEveryWatchOfThisModuleAndNoOther) {
  CreateTiny();
  CreateTiny("other");
  Watch first(*stub_, "tiny");
  Watch second(*stub_, "tiny");
  Watch other(*stub_, "other");
  for (Watch* watch : {&first, &second, &other}) ASSERT_TRUE(watch->Read());
  EXPECT_EQ(server_->runtime().watches->hub_count(), 2u);
  const uint64_t incarnation = first.seen().module().version().incarnation();
  ASSERT_TRUE(Delete("tiny").ok());
  for (Watch* watch : {&first, &second}) {
    EXPECT_FALSE(watch->ReadUntil(1000));
    EXPECT_THAT(watch->Finish(), FailsWith(Reason::kModuleDeleted));
  }
  // One of the same name is another module.
  const v1::Module again = CreateTiny();
  EXPECT_NE(again.version().incarnation(), incarnation);
  EXPECT_EQ(again.version().number(), 1u);
  Freeze("other", false);
  EXPECT_TRUE(other.ReadUntil(2));
  other.Cancel();
}

TEST_F(WatchTest, DrainingEndsAWatchAtOnce) {
  CreateTiny();
  Watch watch(*stub_, "tiny");
  ASSERT_TRUE(watch.Read());
  std::thread drain([this] { server_->Drain(); });
  EXPECT_FALSE(watch.Read());
  EXPECT_THAT(watch.Finish(), FailsWith(Reason::kDraining));
  drain.join();
}

TEST_F(WatchTest, WatchOfNoModuleIsRefused) {
  Watch watch(*stub_, "nobody");
  EXPECT_FALSE(watch.Read());
  EXPECT_THAT(watch.Finish(), FailsWith(Reason::kModuleNotFound));
}

}  // namespace
}  // namespace modelstate
