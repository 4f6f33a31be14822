// Several saves at once, and which of several is the latest.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <thread>

#include "absl/strings/string_view.h"
#include "absl/synchronization/notification.h"
#include "common/base/status.h"
#include "tests/server/checkpoint/checkpoint_fixture.h"

namespace modelstate {
namespace {

// A save that has begun to write, and goes on when it is told to.
class HeldSave {
 public:
  HeldSave(const CheckpointStore& store, const CapturedState& state, const std::string& path)
      : thread_([this, &store, &state, path] {
          const auto hold = [this](const JobProgress& progress) {
            if (absl::string_view(progress.phase) != "write" || writes_.HasBeenNotified()) return;
            writes_.Notify();
            may_go_on_.WaitForNotification();
          };
          status_ = store.Save(state, path, {}, JobControl(hold)).status();
        }) {
    writes_.WaitForNotification();
  }
  void LetGo() { may_go_on_.Notify(); }
  absl::Status Join() {
    thread_.join();
    return status_;
  }

 private:
  absl::Notification writes_;
  absl::Notification may_go_on_;
  absl::Status status_;
  std::thread thread_;  // last: it uses the others
};

class SaveQueueTest : public CheckpointFixture {
 protected:
  SaveQueueTest() {
    module_ = MakeModule({Parameter("weight", {40, 30})});
    EXPECT_TRUE(Configure(*module_, AdamW()).ok());
    first_ = *Capture(*module_);
    EXPECT_TRUE(Push(*module_, {{"weight", 1}}).ok());
    second_ = *Capture(*module_);
  }

  std::shared_ptr<ModuleInstance> module_;
  CapturedState first_;
  CapturedState second_;
};

TEST_F(SaveQueueTest, ASaveWaitsForTheOneToItsPath) {
  HeldSave running(*store_, first_, "c");
  // Not to this path: not held up.
  EXPECT_TRUE(Save(*module_, "d").ok());
  const auto tell = [&](const JobProgress& progress) {
    if (absl::string_view(progress.phase) == "queue") running.LetGo();
  };
  const JobControl control(tell);
  const auto saved = store_->Save(second_, "c", {.overwrite = true}, control);
  EXPECT_TRUE(running.Join().ok());
  ASSERT_TRUE(saved.ok()) << saved.status();
  EXPECT_EQ(store_->List("", {.limit = 1, .verify = true})->at(0).step, second_.snapshot->step);
}

TEST_F(SaveQueueTest, ASaveThatWaitsCanBeCancelled) {
  HeldSave running(*store_, first_, "c");
  JobControl* waiting = nullptr;
  const auto cancel = [&](const JobProgress& progress) {
    if (absl::string_view(progress.phase) == "queue") waiting->Cancel();
  };
  JobControl control(cancel);
  waiting = &control;
  EXPECT_TRUE(absl::IsCancelled(store_->Save(second_, "c", {.overwrite = true}, control).status()));
  running.LetGo();
  EXPECT_TRUE(running.Join().ok());
  EXPECT_EQ(store_->List("", {.verify = true})->at(0).step, first_.snapshot->step);
  // And nobody waits for it.
  EXPECT_TRUE(Save(*module_, "c", {.overwrite = true}).ok());
}

// Who loads an older checkpoint and saves within the same second means what comes of that.
TEST_F(SaveQueueTest, TheLatestOfOneSecondIsTheOneThatWasSavedLast) {
  static const auto ignore = [](const JobProgress&) {};
  const JobControl control(ignore);
  for (int i = 0; i < 5; ++i) {
    const SaveOptions overwrite = {.overwrite = true};
    const auto newer = store_->Save(second_, "z/new", overwrite, control);
    const auto older = store_->Save(first_, "z/back", overwrite, control);
    ASSERT_TRUE(newer.ok() && older.ok()) << newer.status() << older.status();
    EXPECT_LT(newer->create_time, older->create_time);
    EXPECT_EQ(*store_->Resolve("z/latest"), "z/back");
    // As their manifests say it, too.
    const auto list = store_->List("z", {});
    EXPECT_EQ(list->at(0).create_time, older->create_time);
    EXPECT_EQ(list->at(1).create_time, newer->create_time);
  }
}

}  // namespace
}  // namespace modelstate
