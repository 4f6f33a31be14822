// Checkpoints, watching, and stopping.
#include <fstream>
#include <thread>

#include "tests/server/rpc/checkpoint_calls.h"

namespace modelstate {
namespace {

using testing::Contains;
using testing::ElementsAre;
using Stub = v1::ModelState::Stub;

class CheckpointRpcsTest : public CheckpointCalls {
 protected:
  absl::StatusOr<v1::Checkpoint> Save(const std::string& module, const std::string& path,
                                      bool overwrite = false) {
    v1::SaveCheckpointRequest request;
    request.set_module(module);
    request.set_path(path);
    request.set_overwrite(overwrite);
    grpc::ClientContext context;
    auto reader = stub_->SaveCheckpoint(&context, request);
    v1::SaveCheckpointResponse event;
    v1::Checkpoint result;
    while (reader->Read(&event)) {
      if (event.has_result()) result = event.result();
    }
    const grpc::Status status = reader->Finish();
    if (!status.ok()) return FromGrpcStatus(status);
    return result;
  }
};

TEST_F(CheckpointRpcsTest, LoadsARealFileIntoANewModuleWithProgress) {
  std::filesystem::copy(absl::StrCat(DataFolder(), "crepe-tiny.pth"), root_);
  const auto result = LoadFile(LoadRequest("crepe", "crepe-tiny.pth", true));
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->load().module().parameter_count(), 26);
  EXPECT_EQ(result->load().module().buffer_count(), 18);
  EXPECT_EQ(result->format(), "torch zip");
  EXPECT_THAT(phases_, Contains("read"));
  EXPECT_TRUE(FetchAll("crepe").status.ok());
  EXPECT_EQ(Info().limits().push_memory_used_bytes(), 0);
}

TEST_F(CheckpointRpcsTest, LoadThatFailsLeavesNoModule) {
  for (const char* path : {"missing.pth", "../outside.pth", "/etc/passwd", "."}) {
    EXPECT_FALSE(LoadFile(LoadRequest("crepe", path, true)).ok()) << path;
  }
  EXPECT_THAT(LoadFile(LoadRequest("crepe", "missing.pth", true)),
              FailsWith(Reason::kCheckpointNotFound));
  EXPECT_THAT(LoadFile(LoadRequest("crepe", "../outside.pth", true)),
              FailsWith(Reason::kInvalidField));
  EXPECT_THAT(LoadFile(LoadRequest("crepe", "missing.pth", false)),
              FailsWith(Reason::kModuleNotFound));
  EXPECT_EQ(Info().module_count(), 0);
}

TEST_F(CheckpointRpcsTest, SavedModuleComesBackWithStepOptimizerAndSequences) {
  CreateTiny();
  ASSERT_TRUE(Configure("tiny", v1::ADAMW, 0.1).ok());
  std::vector<v1::StepPart> push =
      StepParts("tiny", {{Tensor("bias", v1::GRADIENT, {2}), FloatBytes({1, -1})}});
  push[0].mutable_header()->set_worker("w");
  push[0].mutable_header()->set_sequence(1);
  ASSERT_TRUE(Push(push).ok());
  const std::string region = FetchAll("tiny").Region();
  const auto saved = Save("tiny", "runs/one");
  ASSERT_TRUE(saved.ok()) << saved.status();
  EXPECT_TRUE(saved->has_optimizer());
  EXPECT_EQ(saved->step(), 1);
  EXPECT_THAT(Save("tiny", "runs/one"), FailsWith(Reason::kCheckpointExists));
  EXPECT_TRUE(Save("tiny", "runs/one", true).ok());

  const auto loaded = LoadFile(LoadRequest("copy", "runs/one", true));
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_TRUE(loaded->optimizer_loaded());
  EXPECT_EQ(loaded->load().module().step(), 1);
  EXPECT_EQ(FetchAll("copy").Region(), region);
  push[0].mutable_header()->set_module("copy");
  const auto again = Push(push);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_TRUE(again->replayed());

  v1::ListCheckpointsRequest list;
  list.set_directory("runs");
  list.set_verify(true);
  const auto listed = Call(&Stub::ListCheckpoints, list);
  ASSERT_TRUE(listed.ok()) << listed.status();
  ASSERT_EQ(listed->checkpoints_size(), 1);
  EXPECT_EQ(listed->checkpoints(0).path(), "runs/one");
  EXPECT_TRUE(listed->checkpoints(0).verified());
  v1::DeleteCheckpointRequest erase;
  erase.set_path("runs/one");
  EXPECT_TRUE(Call(&Stub::DeleteCheckpoint, erase).ok());
  EXPECT_THAT(Call(&Stub::DeleteCheckpoint, erase), FailsWith(Reason::kCheckpointNotFound));
  EXPECT_EQ(Call(&Stub::ListCheckpoints, list)->checkpoints_size(), 0);
  // A message can hold only UTF-8.
  std::ofstream(root_ / "runs/q\xff.pt") << "x";
  const auto unnamed = Call(&Stub::ListCheckpoints, list);
  ASSERT_TRUE(unnamed.ok()) << unnamed.status();
  EXPECT_EQ(unnamed->checkpoints(0).path(), "runs/q?.pt");
  EXPECT_THAT(unnamed->checkpoints(0).problem(), testing::HasSubstr("rename it"));
}

TEST_F(CheckpointRpcsTest, CheckpointsArePaged) {
  CreateTiny();
  for (const char* path : {"c", "a", "b"}) ASSERT_TRUE(Save("tiny", path).ok());
  v1::ListCheckpointsRequest list;
  list.set_page_size(2);
  std::vector<std::string> paths;
  int pages = 0;
  do {
    const auto page = Call(&Stub::ListCheckpoints, list);
    ASSERT_TRUE(page.ok()) << page.status();
    for (const auto& checkpoint : page->checkpoints()) paths.push_back(checkpoint.path());
    list.set_page_token(page->next_page_token());
    ++pages;
  } while (!list.page_token().empty());
  EXPECT_THAT(paths, ElementsAre("a", "b", "c"));
  EXPECT_EQ(pages, 2);
}

TEST_F(CheckpointRpcsTest, SaveOfAnEmptyModuleIsRefused) {
  Create("empty", {});
  EXPECT_THAT(Save("empty", "x"), FailsWith(Reason::kModuleEmpty));
  EXPECT_THAT(Save("nobody", "x"), FailsWith(Reason::kModuleNotFound));
  CreateTiny();
  EXPECT_THAT(Save("tiny", "../x"), FailsWith(Reason::kInvalidField));
}

TEST_F(CheckpointRpcsTest, WatcherSeesTheStateThenChangesThenTheEnd) {
  CreateTiny();
  grpc::ClientContext context;
  v1::WatchModuleRequest request;
  request.set_module("tiny");
  auto reader = stub_->WatchModule(&context, request);
  v1::WatchModuleResponse event;
  ASSERT_TRUE(reader->Read(&event));
  EXPECT_EQ(event.module().version().number(), 1);
  EXPECT_EQ(event.last_mutation(), v1::CREATE);
  ASSERT_TRUE(Configure("tiny", v1::SGD, 1).ok());
  ASSERT_TRUE(reader->Read(&event));
  EXPECT_EQ(event.module().version().number(), 2);
  EXPECT_EQ(event.last_mutation(), v1::CONFIGURE_OPTIMIZER);
  v1::DeleteModuleRequest erase;
  erase.set_module("tiny");
  ASSERT_TRUE(Call(&Stub::DeleteModule, erase).ok());
  EXPECT_FALSE(reader->Read(&event));
  EXPECT_THAT(FromGrpcStatus(reader->Finish()), FailsWith(Reason::kModuleDeleted));
}

TEST_F(CheckpointRpcsTest, DrainRefusesNewCallsAndLetsStreamsFinish) {
  Create("big", {Tensor("w", v1::PARAMETER, {8 << 20})});  // more than the sockets hold
  CreateTiny();
  grpc::ClientContext watch_context;
  v1::WatchModuleRequest watch;
  watch.set_module("tiny");
  auto watcher = stub_->WatchModule(&watch_context, watch);
  v1::WatchModuleResponse event;
  ASSERT_TRUE(watcher->Read(&event));
  grpc::ClientContext context;
  v1::StreamStateDictRequest request;
  request.set_module("big");
  auto reader = stub_->StreamStateDict(&context, request);
  v1::StatePart part;
  ASSERT_TRUE(reader->Read(&part));

  std::thread drain([&] { server_->Drain(); });
  EXPECT_FALSE(watcher->Read(&event));  // the watcher's end tells that the drain has begun
  EXPECT_THAT(FromGrpcStatus(watcher->Finish()), FailsWith(Reason::kDraining));
  v1::GetModuleRequest get;
  get.set_module("tiny");
  EXPECT_THAT(Call(&Stub::GetModule, get), FailsWith(Reason::kDraining));
  EXPECT_THAT(FetchAll("tiny").status, FailsWith(Reason::kDraining));
  EXPECT_THAT(Push(StepParts("tiny", {})), FailsWith(Reason::kDraining));
  bool trailer = false;
  while (reader->Read(&part)) trailer = part.has_trailer();
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_TRUE(trailer);
  drain.join();
}

}  // namespace
}  // namespace modelstate
