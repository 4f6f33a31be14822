#include "server/checkpoint/checkpoint_source.h"

#include <algorithm>
#include <atomic>
#include <functional>
#include <tuple>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "common/base/status.h"
#include "common/base/tensor_cast.h"
#include "server/checkpoint/checkpoint_info.h"
#include "server/checkpoint/checkpoint_path.h"
#include "server/checkpoint/job_progress.h"
#include "server/checkpoint/manifest.h"
#include "server/checkpoint/open_reader.h"
#include "server/rules/rule_info.h"

namespace modelstate {
namespace {

absl::Status Corrupt(absl::string_view path, absl::string_view text, absl::string_view tensor) {
  return MakeError(Reason::kCheckpointCorrupt,
                   absl::StrCat("checkpoint \"", path, "\": ", text, "; use another checkpoint"),
                   {{"path", std::string(path)}, {"tensor", std::string(tensor)}});
}

// One tensor of a file and the fresh storage that it goes to.
struct ReadItem {
  size_t source = 0;  // of the reader
  DType dtype = DType::kF32;
  uint64_t target_bytes = 0;
  RefPtr<TensorStorage>* out = nullptr;
};

// What a thread that reads has for itself.
struct Lane {
  std::unique_ptr<HostWriter> writer;
  std::unique_ptr<ReadPass> pass;
};

// A piece at a time, so that no second copy of the tensor is held.
absl::Status ReadCast(const CheckpointReader& reader, const ReadItem& item, DeviceBuffer& buffer,
                      Lane& lane) {
  const StoredTensor& stored = reader.tensors()[item.source];
  const size_t width = DTypeSize(stored.dtype);
  const size_t target_width = DTypeSize(item.dtype);
  std::vector<uint8_t> target;
  uint64_t done = 0;  // bytes of the target
  const auto cast = [&](absl::Span<const uint8_t> piece) {
    const uint64_t elements = piece.size() / width;
    target.resize(elements * target_width);
    CastElements(stored.dtype, piece.data(), item.dtype, target.data(),
                 static_cast<int64_t>(elements));
    lane.writer->Write(target, buffer, done);
    done += target.size();
    return absl::OkStatus();
  };
  return reader.ReadStream(item.source, cast, *lane.pass);
}

absl::Status ReadOne(const CheckpointReader& reader, const ReadItem& item, Device& device,
                     Lane& lane) {
  const StoredTensor& stored = reader.tensors()[item.source];
  MS_ASSIGN_OR_RETURN(*item.out, TensorStorage::Allocate(device, item.target_bytes));
  DeviceBuffer& buffer = (*item.out)->MutableBuffer();
  if (stored.dtype != item.dtype) return ReadCast(reader, item, buffer, lane);
  const auto place = [&](uint64_t offset, uint64_t max) {
    return lane.writer->Reserve(buffer, offset, max);
  };
  MS_RETURN_IF_ERROR(reader.ReadInto(item.source, place, *lane.pass));
  if (stored.xxh3) (*item.out)->CacheDigest(*stored.xxh3);  // it has been compared
  return absl::OkStatus();
}

class Lanes {
 public:
  Lanes(Device& device, uint64_t bytes, const JobControl& control)
      : device_(device), bytes_(bytes), control_(control) {}

  absl::StatusOr<Lane> Take() {
    {
      absl::MutexLock lock(&mutex_);
      if (!idle_.empty()) {
        Lane lane = std::move(idle_.back());
        idle_.pop_back();
        return lane;
      }
    }
    MS_ASSIGN_OR_RETURN(std::unique_ptr<HostWriter> writer, device_.NewWriter(bytes_));
    const auto gate = [this] { return control_.CheckNotCancelled(); };
    return Lane{std::move(writer), std::make_unique<ReadPass>(gate)};
  }
  void GiveBack(Lane lane) {
    absl::MutexLock lock(&mutex_);
    idle_.push_back(std::move(lane));
  }
  absl::Status Finish() {
    absl::MutexLock lock(&mutex_);
    absl::Status status;
    for (const Lane& lane : idle_) status.Update(lane.writer->Finish());
    return status;
  }

 private:
  Device& device_;
  const uint64_t bytes_;
  const JobControl& control_;
  absl::Mutex mutex_;
  std::vector<Lane> idle_ ABSL_GUARDED_BY(mutex_);
};

// Items that one thread reads one after the other: a large one, or neighbours in a file that fit
// one window.
struct Run {
  size_t begin = 0;  // in the plan's order
  size_t end = 0;
  uint64_t bytes = 0;
  uint64_t file_end = 0;
};

struct ReadPlan {
  std::vector<uint32_t> order;  // of the items
  std::vector<Run> runs;        // large ones first, so that none is left over at the end
};

ReadPlan PlanReads(const CheckpointReader& reader, const std::vector<ReadItem>& items) {
  // What lies between tensors of a torch zip, and more.
  constexpr uint64_t kMaxGap = uint64_t{16} << 10;
  std::vector<CheckpointReader::Extent> extents;
  extents.reserve(items.size());
  for (const ReadItem& item : items) {
    extents.push_back(reader.StoredAt(item.source).value_or(CheckpointReader::Extent()));
  }
  ReadPlan plan;
  plan.order.resize(items.size());
  for (uint32_t i = 0; i < plan.order.size(); ++i) plan.order[i] = i;
  std::stable_sort(plan.order.begin(), plan.order.end(), [&extents](uint32_t a, uint32_t b) {
    return std::tie(extents[a].file, extents[a].begin) <
           std::tie(extents[b].file, extents[b].begin);
  });
  const CheckpointReader::Extent* last = nullptr;
  for (size_t i = 0; i < plan.order.size(); ++i) {
    const CheckpointReader::Extent& next = extents[plan.order[i]];
    const uint64_t bytes = items[plan.order[i]].target_bytes;
    const bool joins = last != nullptr && next.file != nullptr && next.file == last->file &&
                       next.begin >= last->end && next.begin - last->end <= kMaxGap &&
                       plan.runs.back().bytes + bytes <= FileWindow::kMaxBytes;
    if (!joins) plan.runs.push_back({i, i, 0, 0});
    Run& run = plan.runs.back();
    run.end = i + 1;
    run.bytes += bytes;
    run.file_end = next.end;
    last = &next;
  }
  std::stable_sort(plan.runs.begin(), plan.runs.end(),
                   [](const Run& a, const Run& b) { return a.bytes > b.bytes; });
  return plan;
}

// Reads all items, several at a time. The first failure in the order of `items` is what is
// returned.
absl::Status ReadAll(const CheckpointReader& reader, const std::vector<ReadItem>& items,
                     Device& device, ComputePool* readers, ProgressMeter& meter,
                     const JobControl& control) {
  const ReadPlan plan = PlanReads(reader, items);
  uint64_t bytes = 0;
  for (const ReadItem& item : items) bytes += item.target_bytes;
  Lanes lanes(device, bytes, control);
  std::atomic<bool> failed{false};
  absl::Mutex mutex;
  size_t first = items.size();
  absl::Status status;
  const auto fail = [&](size_t item, absl::Status why) {
    failed.store(true, std::memory_order_relaxed);
    absl::MutexLock lock(&mutex);
    if (item >= first) return;
    first = item;
    status = std::move(why);
  };
  const auto task = [&](size_t position) {
    if (failed.load(std::memory_order_relaxed)) return;
    const Run& run = plan.runs[position];
    absl::StatusOr<Lane> lane = lanes.Take();
    if (!lane.ok()) return fail(plan.order[run.begin], lane.status());
    lane->pass->Expect(run.file_end);
    for (size_t i = run.begin; i < run.end; ++i) {
      const size_t item = plan.order[i];
      absl::Status read = ReadOne(reader, items[item], device, *lane);
      if (!read.ok()) {
        fail(item, std::move(read));
        break;
      }
      meter.Add(items[item].target_bytes);
    }
    lanes.GiveBack(*std::move(lane));
  };
  if (readers != nullptr) {
    readers->ParallelFor(plan.runs.size(), task);
  } else {
    for (size_t i = 0; i < plan.runs.size(); ++i) task(i);
  }
  status.Update(lanes.Finish());
  return status;
}

}  // namespace

struct CheckpointSource::Impl {
  std::string path;
  std::string format;
  std::unique_ptr<CheckpointReader> reader;
  std::unique_ptr<CheckpointReader> optimizer_reader;  // null: no optimizer file
  std::optional<StoredManifest> manifest;              // directories only
  std::vector<IncomingTensor> incoming;
  std::vector<uint32_t> source_of;  // by index of `incoming`: the reader's tensor
  std::atomic<uint64_t> read_bytes{0};

  absl::Status OpenDirectory(const RootDirectory& root, const std::string& state_dict_key);
  absl::Status OpenSaved(const RootDirectory& directory);
  absl::Status OpenFile(const RootDirectory& root, const std::string& state_dict_key);
  void TakeFileOrder();
  absl::Status TakeManifestOrder();
  absl::StatusOr<std::vector<ReadItem>> MatchOptimizer(const ModuleSchema& schema,
                                                       const Optimizer& optimizer,
                                                       OptimizerState& state) const;
};

absl::Status CheckpointSource::Impl::OpenDirectory(const RootDirectory& root,
                                                   const std::string& state_dict_key) {
  MS_RETURN_IF_ERROR(WithDirectory(root, path, [&](const RootDirectory& d) -> absl::Status {
    manifest.reset();
    optimizer_reader.reset();
    MS_ASSIGN_OR_RETURN(std::optional<FolderCheckpoint> folder,
                        OpenFolder(d, path, state_dict_key));
    if (folder) {
      reader = std::move(folder->reader);
      return absl::OkStatus();
    }
    if (!state_dict_key.empty()) {
      return MakeError(Reason::kInvalidField,
                       absl::StrCat("state_dict_key is for PyTorch files; \"", path,
                                    "\" is a directory without one: leave the key out"),
                       {{"field", "state_dict_key"}});
    }
    return OpenSaved(d);
  }));
  if (manifest) return TakeManifestOrder();
  TakeFileOrder();
  return absl::OkStatus();
}

absl::Status CheckpointSource::Impl::OpenSaved(const RootDirectory& directory) {
  MS_ASSIGN_OR_RETURN(manifest, ReadManifest(directory, path));
  MS_RETURN_IF_ERROR(CheckManifestSizes(directory, path, manifest->head()));
  for (const ManifestFile& entry : manifest->head().files) {
    MS_ASSIGN_OR_RETURN((entry.name == kModelFile ? reader : optimizer_reader),
                        OpenListed(directory, path, entry));
  }
  return absl::OkStatus();
}

// By way of its directory: what is an index has its shards there.
absl::Status CheckpointSource::Impl::OpenFile(const RootDirectory& root,
                                              const std::string& state_dict_key) {
  const std::string directory = ParentPath(path);
  const std::string name(LastPart(path));
  const auto open = [&](const RootDirectory& d) -> absl::Status {
    MS_ASSIGN_OR_RETURN(reader, OpenReader(d, directory, name, state_dict_key));
    return absl::OkStatus();
  };
  MS_RETURN_IF_ERROR(WithDirectory(root, directory, open));
  TakeFileOrder();
  return absl::OkStatus();
}

void CheckpointSource::Impl::TakeFileOrder() {
  format = CheckpointFormatName(reader->format());
  const char* rule = IsTorchFormat(reader->format()) ? "pickled Parameter" : "checkpoint kind";
  for (uint32_t i = 0; i < reader->tensors().size(); ++i) {
    const StoredTensor& stored = reader->tensors()[i];
    incoming.push_back({stored.name, stored.dtype, stored.shape, stored.kind,
                        stored.kind ? rule : nullptr, stored.requires_grad, stored.alias_of});
    source_of.push_back(i);
  }
}

// The manifest has the state_dict order, which a safetensors file does not keep for tied names. The
// two must agree in everything else.
absl::Status CheckpointSource::Impl::TakeManifestOrder() {
  format = kDirectoryFormat;
  absl::flat_hash_map<absl::string_view, uint32_t> by_name;
  for (uint32_t i = 0; i < reader->tensors().size(); ++i) {
    by_name.emplace(reader->tensors()[i].name, i);
  }
  if (reader->tensors().size() != manifest->tensor_count()) {
    return Corrupt(path,
                   absl::StrCat(kModelFile, " has ", reader->tensors().size(),
                                " tensors, the manifest ", manifest->tensor_count()),
                   "");
  }
  return manifest->ForEachTensor([&](Manifest::TensorEntry entry) -> absl::Status {
    const TensorSpec& spec = entry.spec;
    const auto it = by_name.find(spec.name);
    if (it == by_name.end()) {
      return Corrupt(path,
                     absl::StrCat("tensor \"", spec.name, "\" of the manifest is not in ",
                                  kModelFile, ", or is twice in the manifest"),
                     spec.name);
    }
    const uint32_t index = it->second;
    const StoredTensor& stored = reader->tensors()[index];
    by_name.erase(it);  // so that no name counts twice
    const bool trains = spec.kind == TensorKind::kParameter && spec.requires_grad;
    if (stored.dtype != spec.dtype || stored.shape != spec.shape || stored.kind != spec.kind ||
        stored.requires_grad.value_or(false) != trains || stored.alias_of != spec.alias_of ||
        stored.xxh3 != entry.xxh3) {
      return Corrupt(path,
                     absl::StrCat("tensor \"", spec.name, "\" is described in one way by ",
                                  kModelFile, " and in another by the manifest"),
                     spec.name);
    }
    incoming.push_back({spec.name, spec.dtype, spec.shape, spec.kind, "checkpoint kind",
                        stored.requires_grad, spec.alias_of});
    source_of.push_back(index);
    return absl::OkStatus();
  });
}

CheckpointSource::CheckpointSource(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
CheckpointSource::~CheckpointSource() = default;

const std::string& CheckpointSource::format() const { return impl_->format; }
absl::Span<const IncomingTensor> CheckpointSource::incoming() const { return impl_->incoming; }
void CheckpointSource::Describe(LoadOptions* options) const {
  options->module_versions = impl_->reader->module_versions();
  options->source_is_whole = impl_->manifest.has_value();
}
uint64_t CheckpointSource::read_bytes() const { return impl_->read_bytes; }

absl::StatusOr<std::unique_ptr<CheckpointSource>> CheckpointSource::Open(
    const RootDirectory& root, const std::string& path, const std::string& state_dict_key) {
  MS_ASSIGN_OR_RETURN(const RootDirectory::Entry entry, root.Stat(path));
  auto impl = std::make_unique<Impl>();
  impl->path = path;
  MS_RETURN_IF_ERROR(entry.is_directory ? impl->OpenDirectory(root, state_dict_key)
                                        : impl->OpenFile(root, state_dict_key));
  return std::unique_ptr<CheckpointSource>(new CheckpointSource(std::move(impl)));
}

absl::StatusOr<StagedLoad> CheckpointSource::Stage(LoadPlan plan, Device& device,
                                                   MemoryBudget& budget, ComputePool& readers,
                                                   const JobControl& control) const {
  StagedLoad staged;
  MS_ASSIGN_OR_RETURN(staged.reservation, budget.Reserve(plan.total_bytes));
  std::vector<RefPtr<TensorStorage>> storages(plan.items.size());
  std::vector<ReadItem> items;
  items.reserve(plan.items.size());
  uint64_t source_bytes = 0;
  for (size_t i = 0; i < plan.items.size(); ++i) {
    const LoadPlan::Item& item = plan.items[i];
    const size_t source = impl_->source_of[item.source];
    const StoredTensor& stored = impl_->reader->tensors()[source];
    items.push_back({source, item.target_dtype, item.target_bytes, &storages[i]});
    source_bytes += stored.nbytes();
  }
  ProgressMeter meter(control, "read", plan.total_bytes);
  absl::Status read = ReadAll(*impl_->reader, items, device, &readers, meter, control);
  if (!read.ok()) return Annotate(read, absl::StrCat("checkpoint \"", impl_->path, "\""));
  impl_->read_bytes += source_bytes;
  staged.storages.reserve(storages.size());
  for (RefPtr<TensorStorage>& storage : storages) staged.storages.push_back(std::move(storage));
  staged.plan = std::move(plan);
  return staged;
}

// The slots that the manifest lists, in the optimizer file, and their places in `state`.
absl::StatusOr<std::vector<ReadItem>> CheckpointSource::Impl::MatchOptimizer(
    const ModuleSchema& schema, const Optimizer& optimizer, OptimizerState& state) const {
  absl::flat_hash_map<absl::string_view, size_t> by_name;
  if (optimizer_reader != nullptr) {
    for (size_t i = 0; i < optimizer_reader->tensors().size(); ++i) {
      by_name.emplace(optimizer_reader->tensors()[i].name, i);
    }
  }
  std::vector<ReadItem> items;
  const RuleInfo& rule = GetRule(optimizer.algorithm());
  const auto match = [&](Manifest::ParameterEntry entry) -> absl::Status {
    const auto corrupt = [this, &entry](absl::string_view text) {
      return Corrupt(path,
                     absl::StrCat("optimizer state of \"", entry.parameter, "\": ", text,
                                  " (weights_only loads without it)"),
                     entry.parameter);
    };
    const std::optional<uint32_t> index = schema.Find(entry.parameter);
    if (!index || schema.spec(*index).kind != TensorKind::kParameter ||
        schema.owner(*index) != *index) {
      return corrupt("the module has no such parameter");
    }
    const TensorSpec& spec = schema.spec(*index);
    ParameterState& parameter = state.parameters[*index];
    if (entry.step == 0 || parameter.step != 0) {
      return corrupt("its step count is 0, or it is listed twice");
    }
    parameter.step = entry.step;
    parameter.product = entry.product;
    for (const SlotInfo& info : AllSlots(optimizer.algorithm(), spec.dtype)) {
      const absl::string_view slot = info.name;
      if (std::find(entry.slots.begin(), entry.slots.end(), slot) == entry.slots.end()) {
        // The next step begins it, as it would have without the save: a master of a module of
        // another dtype, what another configuration or override has only switched on.
        const bool always =
            info.place != kMasterPlace && rule.slots[info.place - kMasterPlace - 1].kept == nullptr;
        if (always) return corrupt(absl::StrCat("it lacks ", slot));
        continue;
      }
      const auto it = by_name.find(absl::StrCat(slot, "/", entry.parameter));
      if (it == by_name.end()) return corrupt(absl::StrCat(kOptimizerFile, " lacks its ", slot));
      const int64_t elements = spec.shape.num_elements();
      const StoredTensor& stored = optimizer_reader->tensors()[it->second];
      if (stored.shape.num_elements() != elements) {
        return corrupt(absl::StrCat("its ", slot, " has ", stored.shape.num_elements(),
                                    " elements, the parameter ", elements));
      }
      items.push_back({it->second, info.dtype,
                       static_cast<uint64_t>(elements) * DTypeSize(info.dtype),
                       &parameter.slots[info.place]});
    }
    return absl::OkStatus();
  };
  MS_RETURN_IF_ERROR(manifest->ForEachParameter(match));
  return items;
}

absl::StatusOr<std::optional<RestoredState>> CheckpointSource::Restore(const ModuleSchema& schema,
                                                                       Device& device,
                                                                       MemoryBudget& budget,
                                                                       const JobControl& control,
                                                                       ComputePool* readers) const {
  const std::optional<StoredManifest>& manifest = impl_->manifest;
  if (!manifest || manifest->head().weights_only) return std::optional<RestoredState>();
  RestoredState restored;
  restored.step = manifest->head().step;
  restored.metadata = manifest->head().metadata;
  MS_ASSIGN_OR_RETURN(restored.workers, manifest->Workers());
  restored.optimizer_state.parameters.resize(schema.size());
  MS_ASSIGN_OR_RETURN(const std::optional<OptimizerConfig> config, manifest->Optimizer());
  if (!config) return std::optional<RestoredState>(std::move(restored));

  absl::StatusOr<std::shared_ptr<const Optimizer>> optimizer = Optimizer::Create(*config, schema);
  if (!optimizer.ok()) {
    return Corrupt(impl_->path,
                   absl::StrCat("its optimizer does not fit the module (weights_only loads without "
                                "it): ",
                                optimizer.status().message()),
                   "");
  }
  restored.optimizer = *std::move(optimizer);
  MS_ASSIGN_OR_RETURN(const std::vector<ReadItem> items,
                      impl_->MatchOptimizer(schema, *restored.optimizer, restored.optimizer_state));
  uint64_t bytes = 0;
  for (const ReadItem& item : items) bytes += item.target_bytes;
  absl::StatusOr<MemoryBudget::Reservation> reservation = budget.Reserve(bytes);
  if (!reservation.ok()) {
    return Annotate(reservation.status(), absl::StrCat("checkpoint \"", impl_->path,
                                                       "\": cannot load its optimizer state "
                                                       "(weights_only loads without it)"));
  }
  restored.reservation = *std::move(reservation);
  ProgressMeter meter(control, "read", bytes);
  if (!items.empty()) {
    absl::Status read = ReadAll(*impl_->optimizer_reader, items, device, readers, meter, control);
    if (!read.ok()) return Annotate(read, absl::StrCat("checkpoint \"", impl_->path, "\""));
  }
  impl_->read_bytes += bytes;
  return std::optional<RestoredState>(std::move(restored));
}

}  // namespace modelstate
