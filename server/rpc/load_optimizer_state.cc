#include "server/rpc/load_optimizer_state.h"

#include <cmath>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/bytes.h"
#include "common/base/status.h"
#include "common/base/tensor_cast.h"
#include "common/wire/convert.h"
#include "common/wire/optimizer_convert.h"
#include "common/wire/part_codec.h"
#include "server/rpc/module_convert.h"
#include "server/rpc/push_admission.h"
#include "server/state/state_move.h"

namespace modelstate {
namespace {

using Part = OptimizerStatePlan::Part;

constexpr double kMaxStep = 9007199254740992;  // 2^53: from there on a double skips numbers

}  // namespace

void LoadOptimizerStatePush::OnMessage(grpc::ByteBuffer* message) {
  const bool first = !receiver_.has_header();
  absl::StatusOr<PartKind> kind = receiver_.Receive(message, &header_);
  if (!kind.ok()) return Fail(kind.status());
  if (first && *kind == PartKind::kHeader) {
    if (absl::Status status = Begin(); !status.ok()) return Fail(status);
  }
  call_.Read();
}

void LoadOptimizerStatePush::Fail(const absl::Status& status) {
  writer_.reset();
  arrivals_.clear();
  staged_ = StagedOptimizerState();
  call_.Finish(status);
}

absl::Status LoadOptimizerStatePush::Begin() {
  MS_ASSIGN_OR_RETURN(module_, runtime_.FindModule(header_.module()));
  MS_RETURN_IF_ERROR(CheckPushFits(*module_->environment().push_budget, header_.total_bytes()));
  if (header_.has_step() && static_cast<double>(header_.step()) > kMaxStep) {
    return MakeError(Reason::kInvalidField,
                     absl::StrCat("step is ", header_.step(),
                                  "; it counts steps and goes on from "
                                  "there: at most 2^53"),
                     {{"field", "step"}});
  }
  TensorReceiver::Options options;
  options.tensor_count = header_.tensor_count();
  options.total_bytes = header_.total_bytes();
  options.max_chunk_bytes = runtime_.max_chunk_bytes;
  options.default_kind = TensorKind::kOptimizerState;
  return receiver_.Begin(std::move(options));
}

absl::Status LoadOptimizerStatePush::OnTable(absl::Span<const ReceivedTensor> tensors) {
  MS_RETURN_IF_ERROR(Match(tensors));
  return Allocate(tensors);
}

absl::Status LoadOptimizerStatePush::Match(absl::Span<const ReceivedTensor> tensors) {
  staged_.schema = module_->Current()->schema;
  if (staged_.schema->empty()) {
    return MakeError(Reason::kModuleEmpty,
                     absl::StrCat("module \"", module_->name(),
                                  "\" has no tensors yet: load a checkpoint or a state_dict into "
                                  "it first"),
                     {{"module", module_->name()}});
  }
  if (header_.has_optimizer()) {
    MS_ASSIGN_OR_RETURN(const OptimizerConfig config,
                        OptimizerConfigFromProto(header_.optimizer()));
    MS_ASSIGN_OR_RETURN(staged_.optimizer, Optimizer::Create(config, *staged_.schema));
    staged_.configures = true;
  } else {
    staged_.optimizer = module_->optimizer();
    if (staged_.optimizer == nullptr) {
      return MakeError(Reason::kNoOptimizer,
                       absl::StrCat("module \"", module_->name(),
                                    "\" has no optimizer: send one in the header, or call "
                                    "ConfigureOptimizer first"),
                       {{"module", module_->name()}});
    }
    if (staged_.optimizer->schema_size() != staged_.schema->size()) {
      return MakeError(Reason::kStaleBase,
                       absl::StrCat("the tensors of module \"", module_->name(),
                                    "\" are being loaded anew: load its optimizer state again"),
                       {{"module", module_->name()}});
    }
  }
  std::vector<const TensorSpec*> table;
  table.reserve(tensors.size());
  for (const ReceivedTensor& tensor : tensors) table.push_back(&tensor.spec);
  absl::StatusOr<OptimizerStatePlan> plan =
      PlanOptimizerState(*staged_.schema, *staged_.optimizer, table);
  if (!plan.ok()) {
    return Annotate(plan.status(), absl::StrCat("module \"", module_->name(), "\""));
  }
  plan_ = *std::move(plan);
  return absl::OkStatus();
}

absl::Status LoadOptimizerStatePush::Allocate(absl::Span<const ReceivedTensor> tensors) {
  // What arrives in another dtype is held twice until it is cast.
  uint64_t bytes = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const OptimizerStatePlan::Item& item = plan_.items[i];
    if (item.part != Part::kSlot) continue;
    bytes += item.bytes;
    if (tensors[i].spec.dtype != item.dtype) bytes += tensors[i].spec.nbytes();
  }
  MS_ASSIGN_OR_RETURN(staged_.reservation, module_->environment().push_budget->Reserve(bytes));
  Device& device = module_->device();
  MS_ASSIGN_OR_RETURN(writer_, device.NewWriter(bytes));
  staged_.state.parameters.resize(staged_.schema->size());
  arrivals_.resize(tensors.size());
  scalars_.resize(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const OptimizerStatePlan::Item& item = plan_.items[i];
    if (item.part == Part::kSlot) {
      RefPtr<TensorStorage>& target = staged_.state.parameters[item.parameter].slots[item.place];
      MS_ASSIGN_OR_RETURN(target, TensorStorage::Allocate(device, item.bytes));
      arrivals_[i] = target;
      if (tensors[i].spec.dtype != item.dtype) {
        MS_ASSIGN_OR_RETURN(arrivals_[i],
                            TensorStorage::Allocate(device, tensors[i].spec.nbytes()));
      }
    }
    if (!tensors[i].values || tensors[i].values->empty()) continue;
    const absl::Span<const uint8_t> values = AsBytes(*tensors[i].values);
    if (arrivals_[i]) {
      writer_->Write(values, arrivals_[i]->MutableBuffer(), 0);
    } else {
      std::memcpy(scalars_[i].data(), values.data(), values.size());
    }
  }
  return absl::OkStatus();
}

absl::Span<uint8_t> LoadOptimizerStatePush::Destination(size_t index, uint64_t offset,
                                                        uint64_t max) {
  if (arrivals_[index]) return writer_->Reserve(arrivals_[index]->MutableBuffer(), offset, max);
  return absl::MakeSpan(scalars_[index]).subspan(offset, max);
}

void LoadOptimizerStatePush::OnEnd() {
  if (absl::Status status = receiver_.CheckFinished(); !status.ok()) return Fail(status);
  runtime_.PostIo([this] {
    if (absl::Status status = CompleteItems(); !status.ok()) return Fail(status);
    Commit();
  });
}

absl::Status LoadOptimizerStatePush::CompleteItems() {
  MS_RETURN_IF_ERROR(writer_->Finish());
  std::vector<Conversion> conversions;
  for (size_t i = 0; i < plan_.items.size(); ++i) {
    const OptimizerStatePlan::Item& item = plan_.items[i];
    if (item.part != Part::kSlot) {
      MS_RETURN_IF_ERROR(ReadScalar(i));
      continue;
    }
    const TensorSpec& spec = receiver_.tensors()[i].spec;
    RefPtr<TensorStorage>& target = staged_.state.parameters[item.parameter].slots[item.place];
    if (arrivals_[i] != target) {
      conversions.push_back({arrivals_[i], target, spec.dtype, item.dtype,
                             static_cast<uint64_t>(spec.shape.num_elements())});
    } else if (const std::optional<uint64_t> digest = receiver_.digest(i)) {
      target->CacheDigest(*digest);
    }
  }
  MS_RETURN_IF_ERROR(ConvertElements(conversions, runtime_.compute.get()));
  // A slot may be written in place as soon as nobody else refers to it.
  conversions.clear();
  arrivals_.clear();
  return absl::OkStatus();
}

absl::Status LoadOptimizerStatePush::ReadScalar(size_t index) {
  const OptimizerStatePlan::Item& item = plan_.items[index];
  const TensorSpec& spec = receiver_.tensors()[index].spec;
  double value = 0;
  CastElements(spec.dtype, scalars_[index].data(), DType::kF64, reinterpret_cast<uint8_t*>(&value),
               1);
  ParameterState& state = staged_.state.parameters[item.parameter];
  const bool is_step = item.part == Part::kStep;
  const bool good = is_step ? value >= 1 && value <= kMaxStep && value == std::floor(value)
                            : std::isfinite(value);
  if (!good) {
    return MakeError(
        Reason::kInvalidField,
        absl::StrCat("\"", DisplayName(spec), "\" is ", value,
                     is_step ? "; it counts steps, from 1 on: leave out all of a parameter that "
                               "has not stepped"
                             : "; it must be finite"),
        {{"tensor", spec.name}, {"slot", spec.slot}});
  }
  if (is_step) {
    state.step = static_cast<uint64_t>(value);
  } else {
    state.product = static_cast<float>(value);
  }
  return absl::OkStatus();
}

void LoadOptimizerStatePush::Commit() {
  std::optional<Version> base;
  if (header_.has_base()) base = VersionFromProto(header_.base());
  if (header_.has_step()) staged_.step = header_.step();
  module_->ReplaceOptimizerState(std::exchange(staged_, StagedOptimizerState()), base,
                                 [this](absl::StatusOr<VersionRef> version) {
                                   if (!version.ok()) return call_.Finish(version.status());
                                   v1::Optimizer response;
                                   OptimizerToProto(*module_, **version, *module_->optimizer(),
                                                    &response);
                                   call_.FinishWith(SerializeMessage(response));
                                 });
}

}  // namespace modelstate
