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
  absl::Notification writes;
  absl::Notification waits;
  const auto hold = [&](const JobProgress& progress) {
    if (absl::string_view(progress.phase) != "write" || writes.HasBeenNotified()) return;
    writes.Notify();
    waits.WaitForNotification();
  };
  const auto tell = [&](const JobProgress& progress) {
    if (absl::string_view(progress.phase) == "queue") waits.Notify();
  };
  std::thread running([&] {
    const JobControl control(hold);
    const auto saved = store_->Save(first_, "c", {}, control);
    EXPECT_TRUE(saved.ok()) << saved.status();
  });
  writes.WaitForNotification();
  // Not to this path: not held up.
  EXPECT_TRUE(Save(*module_, "d").ok());
  const JobControl control(tell);
  const auto saved = store_->Save(second_, "c", {.overwrite = true}, control);
  running.join();
  ASSERT_TRUE(saved.ok()) << saved.status();
  EXPECT_EQ(store_->List("", {.limit = 1, .verify = true})->at(0).step, second_.snapshot->step);
}

TEST_F(SaveQueueTest, ASaveThatWaitsCanBeCancelled) {
  absl::Notification writes;
  absl::Notification cancelled;
  const auto hold = [&](const JobProgress& progress) {
    if (absl::string_view(progress.phase) != "write" || writes.HasBeenNotified()) return;
    writes.Notify();
    cancelled.WaitForNotification();
  };
  std::thread running([&] {
    const JobControl control(hold);
    EXPECT_TRUE(store_->Save(first_, "c", {}, control).ok());
  });
  writes.WaitForNotification();
  JobControl* waiting = nullptr;
  const auto cancel = [&](const JobProgress& progress) {
    if (absl::string_view(progress.phase) == "queue") waiting->Cancel();
  };
  JobControl control(cancel);
  waiting = &control;
  EXPECT_TRUE(absl::IsCancelled(store_->Save(second_, "c", {.overwrite = true}, control).status()));
  cancelled.Notify();
  running.join();
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
