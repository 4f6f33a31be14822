#ifndef MODELSTATE_SERVER_CHECKPOINT_CHECKPOINT_SOURCE_H_
#define MODELSTATE_SERVER_CHECKPOINT_CHECKPOINT_SOURCE_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/base/file.h"
#include "common/format/checkpoint_reader.h"
#include "server/checkpoint/checkpoint_job.h"
#include "server/device/compute_pool.h"
#include "server/device/memory_budget.h"
#include "server/state/captured_state.h"
#include "server/state/load_plan.h"

namespace modelstate {

// A checkpoint that is open for loading: a file, a sharded one by its index or the directory that
// holds it, or a directory that CheckpointStore::Save made.
// The order is: Open, plan a load of incoming(), Stage, Restore, commit on the module.
// Thread-compatible; it blocks on files.
class CheckpointSource {
 public:
  // NOT_FOUND CHECKPOINT_NOT_FOUND; DATA_LOSS CHECKPOINT_CORRUPT; INVALID_ARGUMENT
  // CHECKPOINT_UNSUPPORTED, INVALID_FIELD.
  static absl::StatusOr<std::unique_ptr<CheckpointSource>> Open(const RootDirectory& root,
                                                                const std::string& path,
                                                                const std::string& state_dict_key);
  ~CheckpointSource();

  const std::string& format() const;  // as CheckpointInfo::format
  absl::Span<const IncomingTensor> incoming() const;
  // Sets what `options` have of the source: its modules' versions, and whether it is whole.
  void Describe(LoadOptions* options) const;

  // Reads the tensors of the plan into fresh storages of `device`, several at a time. Reserves
  // plan.total_bytes of `budget` until the result is committed or dropped.
  // RESOURCE_EXHAUSTED PUSH_MEMORY, DEVICE_MEMORY; DATA_LOSS CHECKPOINT_CORRUPT, DIGEST_MISMATCH.
  absl::StatusOr<StagedLoad> Stage(LoadPlan plan, Device& device, MemoryBudget& budget,
                                   ComputePool& readers, const JobControl& control) const;

  // Step count, optimizer and worker table of a directory checkpoint, for the schema of a plan;
  // nullopt for a plain file, and for a directory that was saved with weights only. Optimizer state
  // is matched by parameter name: an unknown one, or a size that is not the parameter's, is
  // CHECKPOINT_CORRUPT. Reserves the bytes of the state in `budget` before they are allocated,
  // until the result is committed or dropped: RESOURCE_EXHAUSTED PUSH_MEMORY. Reads with `readers`,
  // or in the caller alone.
  absl::StatusOr<std::optional<RestoredState>> Restore(const ModuleSchema& schema, Device& device,
                                                       MemoryBudget& budget,
                                                       const JobControl& control,
                                                       ComputePool* readers = nullptr) const;

  uint64_t read_bytes() const;

 private:
  struct Impl;
  explicit CheckpointSource(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_CHECKPOINT_CHECKPOINT_SOURCE_H_
