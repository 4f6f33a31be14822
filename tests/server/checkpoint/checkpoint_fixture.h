#ifndef MODELSTATE_TESTS_SERVER_CHECKPOINT_CHECKPOINT_FIXTURE_H_
#define MODELSTATE_TESTS_SERVER_CHECKPOINT_CHECKPOINT_FIXTURE_H_

#include <filesystem>
#include <fstream>
#include <iterator>

#include "server/checkpoint/checkpoint_source.h"
#include "server/checkpoint/checkpoint_store.h"
#include "tests/server/module/module_fixture.h"

namespace modelstate {

inline std::string ReadWhole(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>());
}

inline void WriteWhole(const std::filesystem::path& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;
}

// Modules beside a checkpoint root of their own.
class CheckpointFixture : public ModuleFixture {
 protected:
  CheckpointFixture() {
    std::string pattern =
        (std::filesystem::path(testing::TempDir()) / "checkpoint-XXXXXX").string();
    EXPECT_NE(mkdtemp(pattern.data()), nullptr);
    root_ = pattern;
    auto store = CheckpointStore::Open(root_.string());
    EXPECT_TRUE(store.ok()) << store.status();
    store_ = *std::move(store);
  }
  ~CheckpointFixture() override { std::filesystem::remove_all(root_); }

  absl::StatusOr<CheckpointInfo> Save(ModuleInstance& module, const std::string& path,
                                      SaveOptions options = {}) {
    MS_ASSIGN_OR_RETURN(const CapturedState state, Capture(module));
    static const auto ignore = [](const JobProgress&) {};
    const JobControl control(ignore);
    return store_->Save(state, path, options, control);
  }

  // Loads `path` into `module`, as the server does.
  absl::StatusOr<VersionRef> Load(ModuleInstance& module, const std::string& path,
                                  LoadOptions options = {}, bool weights_only = false) {
    static const auto ignore = [](const JobProgress&) {};
    const JobControl control(ignore);
    MS_ASSIGN_OR_RETURN(const auto source, CheckpointSource::Open(store_->root(), path, ""));
    MS_ASSIGN_OR_RETURN(LoadPlan plan, LoadPlan::Create(module.name(), module.Current()->schema,
                                                        source->incoming(), options));
    MS_ASSIGN_OR_RETURN(StagedLoad staged,
                        source->Stage(std::move(plan), device_, *push_budget_, compute_, control));
    std::optional<RestoredState> restored;
    if (!weights_only) {
      MS_ASSIGN_OR_RETURN(restored, source->Restore(*staged.plan.schema, device_, *push_budget_,
                                                    control, &compute_));
    }
    return Await<VersionRef>([&](ModuleInstance::Done<VersionRef> done) {
      module.CommitLoad(std::move(staged), std::nullopt, std::move(restored), std::move(done));
    });
  }

  std::filesystem::path root_;
  std::unique_ptr<CheckpointStore> store_;
};

}  // namespace modelstate

#endif  // MODELSTATE_TESTS_SERVER_CHECKPOINT_CHECKPOINT_FIXTURE_H_
