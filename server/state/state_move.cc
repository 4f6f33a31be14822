#include "server/state/state_move.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "common/base/status.h"
#include "common/base/tensor_cast.h"

namespace modelstate {
namespace {

// Enough to be worth a hand-over, and at most 1 MiB of host memory per thread where a device's
// memory cannot be reached.
constexpr uint64_t kPieceElements = uint64_t{1} << 16;

void Convert(const Conversion& conversion, const uint8_t* source, uint8_t* target, uint64_t count) {
  if (conversion.from == conversion.to) {
    std::memcpy(target, source, count * DTypeSize(conversion.to));
  } else {
    CastElements(conversion.from, source, conversion.to, target, static_cast<int64_t>(count));
  }
}

// The elements [begin, begin + count).
absl::Status ConvertPiece(const Conversion& conversion, uint64_t begin, uint64_t count) {
  const uint64_t source_offset = begin * DTypeSize(conversion.from);
  const uint64_t target_offset = begin * DTypeSize(conversion.to);
  const bool reads_in_place = conversion.source->device().host_visible();
  const bool writes_in_place = conversion.target->device().host_visible();
  std::vector<uint8_t> read;
  std::vector<uint8_t> written;
  const uint8_t* source = nullptr;
  if (reads_in_place) {
    source = conversion.source->HostBytes().data() + source_offset;
  } else {
    read.resize(count * DTypeSize(conversion.from));
    MS_RETURN_IF_ERROR(conversion.source->CopyToHost(source_offset, absl::MakeSpan(read)));
    source = read.data();
  }
  if (writes_in_place) {
    Convert(conversion, source, conversion.target->buffer().data() + target_offset, count);
    return absl::OkStatus();
  }
  absl::Span<const uint8_t> converted(source, count * DTypeSize(conversion.to));
  if (conversion.from != conversion.to) {
    written.resize(converted.size());
    Convert(conversion, source, written.data(), count);
    converted = written;
  }
  DeviceBuffer& buffer = conversion.target->MutableBuffer();
  return conversion.target->device().CopyFromHost(converted, buffer, target_offset);
}

// Keeps the first error of several threads.
class FirstError {
 public:
  void Update(const absl::Status& status) {
    if (status.ok()) return;
    absl::MutexLock lock(&mutex_);
    status_.Update(status);
    failed_.store(true, std::memory_order_relaxed);
  }
  bool failed() const { return failed_.load(std::memory_order_relaxed); }
  absl::Status status() const {
    absl::MutexLock lock(&mutex_);
    return status_;
  }

 private:
  mutable absl::Mutex mutex_;
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
  std::atomic<bool> failed_{false};
};

// Collects what has to be converted, with the targets allocated.
class Mover {
 public:
  explicit Mover(Device& device) : device_(device) {}

  // `source` itself where it is right already.
  absl::StatusOr<RefPtr<TensorStorage>> Add(const RefPtr<TensorStorage>& source, DType from,
                                            DType to, uint64_t count) {
    if (from == to && &source->device() == &device_) return source;
    return AddFresh(source, from, to, count);
  }
  absl::StatusOr<StorageRef> Add(const StorageRef& source, DType from, DType to, uint64_t count) {
    if (from == to && &source->device() == &device_) return source;
    MS_ASSIGN_OR_RETURN(StorageRef target, AddFresh(source, from, to, count));
    return target;
  }

  absl::Status Run(ComputePool* compute) const { return ConvertElements(conversions_, compute); }

 private:
  absl::StatusOr<RefPtr<TensorStorage>> AddFresh(StorageRef source, DType from, DType to,
                                                 uint64_t count) {
    MS_ASSIGN_OR_RETURN(RefPtr<TensorStorage> target,
                        TensorStorage::Allocate(device_, count * DTypeSize(to)));
    conversions_.push_back({std::move(source), target, from, to, count});
    return target;
  }

  Device& device_;
  std::vector<Conversion> conversions_;
};

absl::StatusOr<ParameterState> MoveParameterState(const ParameterState& state,
                                                  const Optimizer& optimizer, DType from, DType to,
                                                  uint64_t count, Mover* mover) {
  ParameterState moved;
  moved.step = state.step;
  moved.product = state.product;
  for (const SlotInfo& after : AllSlots(optimizer.algorithm(), to)) {
    if (after.place == kMasterPlace && from != to) continue;
    for (const SlotInfo& before : AllSlots(optimizer.algorithm(), from)) {
      if (before.place != after.place || !state.slots[before.place]) continue;
      MS_ASSIGN_OR_RETURN(moved.slots[after.place],
                          mover->Add(state.slots[before.place], before.dtype, after.dtype, count));
    }
  }
  return moved;
}

}  // namespace

absl::Status ConvertElements(absl::Span<const Conversion> conversions, ComputePool* compute) {
  struct Piece {
    const Conversion* conversion;
    uint64_t begin;
  };
  std::vector<Piece> pieces;
  for (const Conversion& conversion : conversions) {
    if (conversion.source->size() != conversion.count * DTypeSize(conversion.from) ||
        conversion.target->size() != conversion.count * DTypeSize(conversion.to)) {
      return absl::InternalError("a conversion does not fit its storages");
    }
    conversion.target->MutableBuffer();  // forgets the digest once, not in every thread
    for (uint64_t begin = 0; begin < conversion.count; begin += kPieceElements) {
      pieces.push_back({&conversion, begin});
    }
  }
  FirstError error;
  const auto convert = [&](size_t i) {
    const Piece& piece = pieces[i];
    if (error.failed()) return;
    error.Update(ConvertPiece(*piece.conversion, piece.begin,
                              std::min(kPieceElements, piece.conversion->count - piece.begin)));
  };
  if (compute != nullptr && pieces.size() > 1) {
    compute->ParallelFor(pieces.size(), convert);
  } else {
    for (size_t i = 0; i < pieces.size(); ++i) convert(i);
  }
  MS_RETURN_IF_ERROR(error.status());
  for (const Conversion& conversion : conversions) {
    if (conversion.from != conversion.to) continue;
    if (const std::optional<uint64_t> digest = conversion.source->CachedDigest()) {
      conversion.target->CacheDigest(*digest);
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<RefPtr<TensorStorage>> ConvertStorage(const StorageRef& source, DType from, DType to,
                                                     uint64_t count, Device& target,
                                                     ComputePool* compute) {
  MS_ASSIGN_OR_RETURN(RefPtr<TensorStorage> storage,
                      TensorStorage::Allocate(target, count * DTypeSize(to)));
  const Conversion conversion{source, storage, from, to, count};
  MS_RETURN_IF_ERROR(ConvertElements({&conversion, 1}, compute));
  return storage;
}

absl::StatusOr<std::optional<MovedState>> MoveState(const ModuleVersion& current,
                                                    const Optimizer* optimizer,
                                                    const OptimizerState& optimizer_state,
                                                    Device& device, std::optional<DType> dtype,
                                                    ComputePool* compute) {
  const ModuleSchema& schema = *current.schema;
  MovedState moved;
  moved.cast.resize(schema.size());
  std::vector<TensorSpec> specs(schema.specs().begin(), schema.specs().end());
  bool any_cast = false;
  for (uint32_t i = 0; i < schema.size(); ++i) {
    if (!dtype || !IsFloatingPoint(specs[i].dtype) || specs[i].dtype == *dtype) continue;
    specs[i].dtype = *dtype;
    moved.cast[i] = true;
    any_cast = true;
    moved.parameters_cast |= specs[i].kind == TensorKind::kParameter;
  }
  if (!any_cast && &device == current.device) return std::optional<MovedState>();
  moved.schema = current.schema;
  if (any_cast) {
    MS_ASSIGN_OR_RETURN(moved.schema,
                        ModuleSchema::Create(std::move(specs), schema.revision() + 1));
  }

  Mover mover(device);
  moved.storages.resize(schema.size());
  moved.optimizer_state.parameters.resize(schema.size());
  for (uint32_t i = 0; i < schema.size(); ++i) {
    const uint32_t owner = schema.owner(i);
    if (owner != i) {
      moved.storages[i] = moved.storages[owner];
      continue;
    }
    const DType from = schema.spec(i).dtype;
    const DType to = moved.schema->spec(i).dtype;
    const uint64_t count = static_cast<uint64_t>(schema.spec(i).shape.num_elements());
    MS_ASSIGN_OR_RETURN(moved.storages[i], mover.Add(current.storages[i], from, to, count));
    if (optimizer == nullptr || schema.spec(i).kind != TensorKind::kParameter) continue;
    MS_ASSIGN_OR_RETURN(
        moved.optimizer_state.parameters[i],
        MoveParameterState(optimizer_state.parameters[i], *optimizer, from, to, count, &mover));
  }
  MS_RETURN_IF_ERROR(mover.Run(compute));
  return std::optional<MovedState>(std::move(moved));
}

}  // namespace modelstate
