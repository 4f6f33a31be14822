// CheckpointStore::Save: the write path, which no crash may leave half done.
#include <algorithm>
#include <optional>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "common/base/bytes.h"
#include "common/base/digest.h"
#include "common/base/random.h"
#include "common/base/status.h"
#include "common/format/safetensors_writer.h"
#include "server/checkpoint/checkpoint_path.h"
#include "server/checkpoint/checkpoint_store.h"
#include "server/checkpoint/manifest.h"
#include "server/checkpoint/tensor_file.h"

namespace modelstate {
namespace {

absl::Status Exists(const std::string& path, absl::string_view way_out) {
  return MakeError(Reason::kCheckpointExists,
                   absl::StrCat("checkpoint \"", path, "\" exists: ", way_out), {{"path", path}});
}

// The slots of a module's optimizer state as tensors of a file: `exp_avg/conv1.weight`.
struct OptimizerTensors {
  std::vector<TensorSpec> specs;
  std::vector<StorageRef> storages;
  std::vector<Manifest::ParameterEntry> parameters;
};

OptimizerTensors CollectOptimizer(const CapturedState& state) {
  OptimizerTensors out;
  if (state.optimizer == nullptr) return out;
  const ModuleSchema& schema = *state.snapshot->schema;
  for (uint32_t index = 0; index < state.optimizer_state.parameters.size(); ++index) {
    const ParameterState& parameter = state.optimizer_state.parameters[index];
    if (parameter.step == 0) continue;
    const TensorSpec& spec = schema.spec(index);
    Manifest::ParameterEntry entry{spec.name, parameter.step, parameter.product, {}};
    for (const SlotInfo& info : AllSlots(state.optimizer->algorithm(), spec.dtype)) {
      if (!parameter.slots[info.place]) continue;  // not begun, or a master that is made anew
      TensorSpec& slot = out.specs.emplace_back();
      slot.name = absl::StrCat(info.name, "/", spec.name);
      slot.kind = TensorKind::kOptimizerState;
      slot.dtype = info.dtype;
      slot.shape = spec.shape;
      out.storages.push_back(parameter.slots[info.place]);
      entry.slots.push_back(info.name);
    }
    out.parameters.push_back(std::move(entry));
  }
  return out;
}

absl::Status WriteManifest(const RootDirectory& root, const std::string& path,
                           const std::string& text) {
  MS_ASSIGN_OR_RETURN(const File file, root.CreateFile(path));
  MS_RETURN_IF_ERROR(file.WriteAt(0, AsBytes(text)));
  return file.SyncData();
}

// Moves what no save made from a checkpoint that was replaced to the one in its place: it came
// while that was written.
void KeepOthers(const RootDirectory& root, const std::string& from, const std::string& to) {
  const absl::StatusOr<std::vector<RootDirectory::Entry>> entries = root.List(from);
  if (!entries.ok()) return;
  for (const RootDirectory::Entry& entry : *entries) {
    if (!entry.is_directory && IsSavedFileName(entry.name)) continue;
    // One that fails stays in `from`, which is not removed then.
    root.Rename(JoinPath(from, entry.name), JoinPath(to, entry.name), /*exchange=*/false)
        .IgnoreError();
  }
}

// Makes the directories above `path` that are missing, durably. One that is there may have been
// made by a save that did not get to syncing it.
absl::Status MakeParents(const RootDirectory& root, const std::string& path) {
  const std::string parent = ParentPath(path);
  if (!root.Stat(parent).ok()) MS_RETURN_IF_ERROR(root.MakeDirectories(parent));
  for (std::string above = parent; above != ".";) {
    above = ParentPath(above);
    MS_RETURN_IF_ERROR(root.SyncDirectory(above));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckpointStore::CheckNewPath(const std::string& path) const {
  MS_RETURN_IF_ERROR(RootDirectory::ValidatePath(path));
  const absl::string_view name = LastPart(path);
  absl::string_view problem;
  if (path == ".") {
    problem = "is the root itself";
  } else if (name.size() + kTemporarySuffixBytes > 255) {
    problem = "has a last part over 234 bytes";
  }
  // Lists and restores look no deeper.
  if (std::count(path.begin(), path.end(), '/') > kMaxScanDepth) problem = "has more than 17 parts";
  for (const absl::string_view part : absl::StrSplit(path, '/')) {
    if (problem.empty()) problem = PathPartProblem(part);
  }
  if (!problem.empty()) {
    return MakeError(Reason::kInvalidField,
                     absl::StrCat("path \"", path.substr(0, 128), "\" ", problem,
                                  ": choose another, such as \"resnet50/step-100\""),
                     {{"field", "path"}});
  }
  // A checkpoint inside of another would be lost with that one.
  for (std::string above = ParentPath(path); above != "."; above = ParentPath(above)) {
    MS_ASSIGN_OR_RETURN(const bool is_checkpoint, HasManifest(above));
    if (is_checkpoint) {
      return MakeError(Reason::kInvalidField,
                       absl::StrCat("path \"", path, "\" lies inside of checkpoint \"", above,
                                    "\": choose a path beside it"),
                       {{"field", "path"}});
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<CheckpointInfo> CheckpointStore::Save(const CapturedState& state,
                                                     const std::string& path,
                                                     const SaveOptions& options,
                                                     const JobControl& control) const {
  MS_RETURN_IF_ERROR(CheckNewPath(path));
  const uint64_t ticket = RandomUint64();
  {
    absl::MutexLock lock(&mutex_);
    saving_[path].push_back(ticket);
  }
  const absl::Cleanup done = [this, &path, ticket] {
    absl::MutexLock lock(&mutex_);
    const auto queue = saving_.find(path);
    std::erase(queue->second, ticket);
    if (queue->second.empty()) saving_.erase(queue);
    save_ended_.SignalAll();
  };
  MS_RETURN_IF_ERROR(AwaitTurn(path, ticket, control));
  return SaveAs(state, path, options, control);
}

absl::Status CheckpointStore::AwaitTurn(const std::string& path, uint64_t ticket,
                                        const JobControl& control) const {
  const auto is_first = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return saving_.find(path)->second.front() == ticket;
  };
  {
    absl::MutexLock lock(&mutex_);
    if (is_first()) return absl::OkStatus();
  }
  control.Report({"queue", 0, 0});
  absl::MutexLock lock(&mutex_);
  while (!is_first()) {
    MS_RETURN_IF_ERROR(control.CheckNotCancelled());
    // Nobody wakes a job to tell that it is cancelled.
    save_ended_.WaitWithTimeout(&mutex_, absl::Milliseconds(100));
  }
  return absl::OkStatus();
}

absl::StatusOr<CheckpointInfo> CheckpointStore::SaveAs(const CapturedState& state,
                                                       const std::string& path,
                                                       const SaveOptions& options,
                                                       const JobControl& control) const {
  const absl::StatusOr<RootDirectory::Entry> present = root_.Stat(path);
  const bool exists = present.ok();
  std::string aside;  // where what is there goes; empty: it is replaced
  if (!exists && GetReason(present.status()) != Reason::kCheckpointNotFound) {
    return present.status();
  }
  if (exists) {
    MS_ASSIGN_OR_RETURN(const bool replaceable, IsCheckpointDirectory(path));
    if (!replaceable) {
      return MakeError(
          Reason::kInvalidField,
          absl::StrCat("path \"", path, "\" is taken by a ",
                       present->is_directory ? "directory that is no checkpoint" : "file",
                       ", which a save never replaces: choose another path"),
          {{"field", "path"}});
    }
    if (!options.overwrite) return Exists(path, "set overwrite, or choose another path");
    MS_RETURN_IF_ERROR(CheckHoldsOnlyParts(root_, path));
    if (options.same_module) {
      const std::optional<CheckpointInfo> other = Describe(path, *present, /*verify=*/false);
      // One that is damaged does not say whose it is.
      const bool known = other && !other->module.empty();
      if (known && other->module != state.module) {
        return Exists(path, absl::StrCat("it is of module \"", other->module,
                                         "\"; delete it, or save it under another name"));
      }
      if (known && other->version.incarnation != state.snapshot->version.incarnation) {
        aside = AsidePath(path, other->version.incarnation);
      }
    }
  }

  Manifest manifest;
  manifest.module = state.module;
  manifest.version = state.snapshot->version;
  manifest.step = state.snapshot->step;
  manifest.create_time = absl::Now();
  manifest.weights_only = options.weights_only;
  manifest.metadata = *state.snapshot->metadata;

  const StateView& view = *state.snapshot->schema->state_dict();
  std::vector<StorageRef> storages;
  storages.reserve(view.indices.size());
  for (uint32_t index : view.indices) storages.push_back(state.snapshot->storages[index]);
  OptimizerTensors optimizer;
  if (!options.weights_only) {
    optimizer = CollectOptimizer(state);
    if (state.optimizer != nullptr) manifest.optimizer = state.optimizer->config();
    manifest.optimizer_state = std::move(optimizer.parameters);
    manifest.workers = state.workers;
  }
  const StateLayout optimizer_layout(optimizer.specs);

  ProgressMeter meter(control, "write", view.layout.total_bytes() + optimizer_layout.total_bytes());
  MS_RETURN_IF_ERROR(MakeParents(root_, path));
  const std::string temporary = TemporaryPath(path, RandomUint64());
  MS_RETURN_IF_ERROR(root_.MakeDirectory(temporary));
  absl::Cleanup remove = [this, &temporary] { root_.RemoveRecursively(temporary).IgnoreError(); };
  // Another server that starts on this root would take them for what a crash has left.
  MS_ASSIGN_OR_RETURN(const RootDirectory made, HoldDirectory(root_, temporary));
  std::optional<RootDirectory> replaced;
  if (exists) {
    MS_ASSIGN_OR_RETURN(replaced, HoldDirectory(root_, path));
  }

  MS_ASSIGN_OR_RETURN(Manifest::FileEntry model_file,
                      WriteTensorFile(root_, absl::StrCat(temporary, "/", kModelFile),
                                      {view.specs,
                                       &view.layout,
                                       storages,
                                       {{"format", "pt"},
                                        {kKindsMetadataKey, KindsMetadata(view.specs)},
                                        {kManifestMetadataKey, kManifestFile}}},
                                      meter, control));
  manifest.files.push_back(std::move(model_file));
  for (size_t i = 0; i < view.specs.size(); ++i) {
    Manifest::TensorEntry& entry = manifest.tensors.emplace_back();
    entry.spec = view.specs[i];
    entry.xxh3 = *storages[i]->CachedDigest();  // the write has seen to it
    if (view.layout.owns_bytes(i)) entry.spec.alias_of.clear();
  }
  if (!optimizer.specs.empty()) {
    MS_ASSIGN_OR_RETURN(
        Manifest::FileEntry optimizer_file,
        WriteTensorFile(root_, absl::StrCat(temporary, "/", kOptimizerFile),
                        {optimizer.specs, &optimizer_layout, optimizer.storages, {}}, meter,
                        control));
    manifest.files.push_back(std::move(optimizer_file));
  }
  MS_ASSIGN_OR_RETURN(const std::string text, ManifestToText(manifest));
  MS_RETURN_IF_ERROR(WriteManifest(root_, absl::StrCat(temporary, "/", kManifestFile), text));
  MS_RETURN_IF_ERROR(root_.SyncDirectory(temporary));

  MS_RETURN_IF_ERROR(control.CheckNotCancelled());
  ProgressMeter commit(control, "commit", 0);
  bool replaces = exists && aside.empty();
  if (exists && !aside.empty()) {
    MS_RETURN_IF_ERROR(root_.Rename(path, aside, /*exchange=*/false));
  }
  absl::Status renamed = root_.Rename(temporary, path, replaces);
  if (replaces && GetReason(renamed) == Reason::kCheckpointNotFound) {  // somebody moved it away
    replaces = false;
    renamed = root_.Rename(temporary, path, /*exchange=*/false);
  }
  if (options.overwrite && GetReason(renamed) == Reason::kCheckpointExists) {
    return Exists(path,
                  "another server with the same checkpoint root has just made it; save again");
  }
  MS_RETURN_IF_ERROR(renamed);
  // From here on a failure does not say which of the two a crash would leave: both are whole, so
  // both stay until the rename is known to be on disk. `temporary` is now the one replaced.
  std::move(remove).Cancel();
  MS_RETURN_IF_ERROR(root_.SyncDirectory(ParentPath(path)));
  if (replaces) {
    KeepOthers(root_, temporary, path);
    RemoveParts(root_, temporary).IgnoreError();  // else the next start does
  }
  CheckpointInfo info = DescribeManifest(manifest, text.size(), path);
  info.tensor_count = manifest.tensors.size();
  info.has_optimizer = manifest.optimizer.has_value();
  info.set_aside = aside;
  return info;
}

}  // namespace modelstate
