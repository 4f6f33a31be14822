#include "server/rpc/load_push.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "common/base/bytes.h"
#include "common/base/status.h"
#include "common/wire/convert.h"
#include "common/wire/part_codec.h"
#include "server/rpc/module_convert.h"
#include "server/rpc/push_admission.h"
#include "server/state/registration.h"
#include "server/state/state_move.h"

namespace modelstate {
namespace {

constexpr size_t kScratchBytes = size_t{64} << 10;

IncomingTensor ToIncoming(const ReceivedTensor& tensor) {
  IncomingTensor incoming;
  incoming.name = tensor.spec.name;
  incoming.dtype = tensor.spec.dtype;
  incoming.shape = tensor.spec.shape;
  incoming.kind = tensor.stated_kind;
  if (tensor.stated_kind) incoming.kind_rule = "request";
  incoming.requires_grad = tensor.stated_requires_grad;
  incoming.alias_of = tensor.spec.alias_of;
  incoming.persistent = tensor.spec.persistent;
  return incoming;
}

// For each entry of a table, the one that its bytes come with: itself, or the first of the names
// that are tied together.
std::vector<uint32_t> FindHolders(absl::Span<const ReceivedTensor> tensors) {
  absl::flat_hash_map<absl::string_view, uint32_t> first;
  std::vector<uint32_t> holders(tensors.size());
  for (uint32_t i = 0; i < tensors.size(); ++i) {
    const TensorSpec& spec = tensors[i].spec;
    const absl::string_view owner = spec.is_alias() ? spec.alias_of : spec.name;
    const bool own = tensors[i].owns_bytes || tensors[i].values || tensors[i].initializer;
    const uint32_t holder = first.emplace(owner, i).first->second;
    holders[i] = own ? i : holder;
  }
  return holders;
}

}  // namespace

void LoadPush::OnMessage(grpc::ByteBuffer* message) {
  const bool first = !receiver_.has_header();
  absl::StatusOr<PartKind> kind = receiver_.Receive(message, &header_);
  if (!kind.ok()) return Fail(kind.status());
  if (first && *kind == PartKind::kHeader) {
    if (absl::Status status = Begin(); !status.ok()) return Fail(status);
  }
  if (dry_plan_) return AnswerDryRun();
  call_.Read();
}

void LoadPush::Fail(const absl::Status& status) {
  writer_.reset();
  arrivals_.clear();
  targets_.clear();
  staged_.reset();
  call_.Finish(status);
}

absl::Status LoadPush::Begin() {
  MS_ASSIGN_OR_RETURN(module_, runtime_.FindModule(header_.module()));
  MS_ASSIGN_OR_RETURN(options_, LoadOptionsFromProto(header_.options()));
  if (!options_.dry_run) {
    MS_RETURN_IF_ERROR(CheckPushFits(*module_->environment().push_budget, header_.total_bytes()));
  }
  TensorReceiver::Options options;
  options.tensor_count = header_.tensor_count();
  options.total_bytes = header_.total_bytes();
  options.max_chunk_bytes = runtime_.max_chunk_bytes;
  options.allow_initializers = true;
  return receiver_.Begin(std::move(options));
}

absl::Status LoadPush::OnTable(absl::Span<const ReceivedTensor> tensors) {
  const VersionRef current = module_->Current();
  std::vector<IncomingTensor> incoming;
  bool registers = false;
  incoming.reserve(tensors.size());
  for (const ReceivedTensor& tensor : tensors) {
    if (tensor.stated_kind && *tensor.stated_kind != TensorKind::kParameter &&
        *tensor.stated_kind != TensorKind::kBuffer) {
      return MakeError(Reason::kInvalidField,
                       absl::StrCat("tensor \"", tensor.spec.name, "\" has kind ",
                                    TensorKindName(*tensor.stated_kind),
                                    "; a state_dict holds parameters and buffers"),
                       {{"tensor", tensor.spec.name}});
    }
    MS_RETURN_IF_ERROR(CheckTiedHasNoValue(
        tensor.spec, tensor.values.has_value() || tensor.initializer.has_value()));
    registers = registers || (tensor.stated_kind && tensor.initializer);
    incoming.push_back(ToIncoming(tensor));
  }
  MS_ASSIGN_OR_RETURN(LoadPlan plan,
                      LoadPlan::Create(module_->name(), current->schema, incoming, options_));
  // Such a table into an empty module is a CreateModule that does not fit one message.
  if (registers && current->schema->empty()) {
    Registrar registrar;
    for (const TensorSpec& spec : plan.schema->specs()) {
      MS_RETURN_IF_ERROR(registrar.AddName(spec.name, spec.kind));
    }
  }
  holder_ = FindHolders(tensors);
  MS_RETURN_IF_ERROR(PlanFills(plan, tensors));
  if (options_.dry_run) {
    dry_plan_ = std::move(plan);
    return absl::OkStatus();
  }
  // What arrives in another dtype is held twice until it is cast.
  uint64_t bytes = plan.total_bytes;
  for (const LoadPlan::Item& item : plan.items) {
    if (item.source_dtype != item.target_dtype && !tensors[item.source].initializer) {
      bytes += tensors[item.source].spec.nbytes();
    }
  }
  Device& device = *current->device;
  staged_.emplace();
  MS_ASSIGN_OR_RETURN(staged_->reservation, module_->environment().push_budget->Reserve(bytes));
  arrivals_.resize(tensors.size());
  targets_.resize(plan.items.size());
  for (size_t i = 0; i < plan.items.size(); ++i) {
    const LoadPlan::Item& item = plan.items[i];
    const uint32_t holder = holder_[item.source];
    MS_ASSIGN_OR_RETURN(targets_[i], TensorStorage::Allocate(device, item.target_bytes));
    if (fills_.contains(i)) continue;
    if (arrivals_[holder]) continue;  // two targets of one source: copied at the end
    if (item.source_dtype == item.target_dtype) {
      arrivals_[holder] = targets_[i];
    } else {
      MS_ASSIGN_OR_RETURN(arrivals_[holder],
                          TensorStorage::Allocate(device, tensors[holder].spec.nbytes()));
    }
  }
  MS_ASSIGN_OR_RETURN(writer_, device.NewWriter(bytes));
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (!tensors[i].values || !arrivals_[i]) continue;
    writer_->Write(AsBytes(*tensors[i].values), arrivals_[i]->MutableBuffer(), 0);
  }
  staged_->plan = std::move(plan);
  scratch_.resize(kScratchBytes);
  return absl::OkStatus();
}

// Each target is filled as CreateModule would fill a tensor of its dtype and shape. Where one
// source goes to several, they get the same elements, by the first one's name.
absl::Status LoadPush::PlanFills(const LoadPlan& plan, absl::Span<const ReceivedTensor> tensors) {
  absl::flat_hash_map<uint32_t, std::string> names;
  for (size_t i = 0; i < plan.items.size(); ++i) {
    const LoadPlan::Item& item = plan.items[i];
    const uint32_t holder = holder_[item.source];
    if (!tensors[holder].initializer) continue;
    Fill fill;
    fill.spec = plan.schema->spec(item.target);
    fill.spec.name = names.emplace(holder, fill.spec.name).first->second;
    v1::TensorInfo info;
    *info.mutable_initializer() = *tensors[holder].initializer;
    MS_ASSIGN_OR_RETURN(fill.value, InitialValueFromProto(info, fill.spec, header_.seed()));
    fills_.emplace(i, std::move(fill));
  }
  return absl::OkStatus();
}

absl::Span<uint8_t> LoadPush::Destination(size_t index, uint64_t offset, uint64_t max) {
  if (arrivals_[index]) return writer_->Reserve(arrivals_[index]->MutableBuffer(), offset, max);
  return absl::MakeSpan(scratch_).subspan(0, std::min<uint64_t>(max, kScratchBytes));
}

void LoadPush::OnEnd() {
  if (absl::Status status = receiver_.CheckFinished(); !status.ok()) return Fail(status);
  runtime_.PostIo([this] {
    if (absl::Status status = CompleteItems(); !status.ok()) return Fail(status);
    Commit();
  });
}

absl::Status LoadPush::CompleteItems() {
  if (!staged_) return absl::InternalError("a load ended without its table");
  MS_RETURN_IF_ERROR(writer_->Finish());
  std::vector<Conversion> conversions;
  for (size_t i = 0; i < staged_->plan.items.size(); ++i) {
    const LoadPlan::Item& item = staged_->plan.items[i];
    if (const auto fill = fills_.find(i); fill != fills_.end()) {
      MS_RETURN_IF_ERROR(
          FillInitialValue(fill->second.value, fill->second.spec, *runtime_.compute, *targets_[i]));
      continue;
    }
    const RefPtr<TensorStorage>& arrival = arrivals_[holder_[item.source]];
    if (arrival != targets_[i]) {
      const TensorSpec& spec = receiver_.tensors()[item.source].spec;
      conversions.push_back({arrival, targets_[i], item.source_dtype, item.target_dtype,
                             static_cast<uint64_t>(spec.shape.num_elements())});
    } else if (std::optional<uint64_t> digest = receiver_.digest(item.source)) {
      targets_[i]->CacheDigest(*digest);
    }
  }
  MS_RETURN_IF_ERROR(ConvertElements(conversions, runtime_.compute.get()));
  conversions.clear();
  arrivals_.clear();
  for (RefPtr<TensorStorage>& target : targets_) staged_->storages.push_back(std::move(target));
  targets_.clear();
  return absl::OkStatus();
}

void LoadPush::AnswerDryRun() {
  v1::LoadResult result;
  LoadPlanToProto(*dry_plan_, options_.skip_keys, &result);
  ModuleToProto(*module_, *module_->Current(), result.mutable_module());
  call_.FinishWith(SerializeMessage(result));
}

void LoadPush::Commit() {
  v1::LoadResult result;
  LoadPlanToProto(staged_->plan, options_.skip_keys, &result);
  std::optional<Version> base;
  if (header_.has_base()) base = VersionFromProto(header_.base());
  StagedLoad load = *std::move(staged_);
  load.detail = "from the caller";
  staged_.reset();
  module_->CommitLoad(
      std::move(load), base, std::nullopt,
      [this, result = std::move(result)](absl::StatusOr<VersionRef> version) mutable {
        if (!version.ok()) return call_.Finish(version.status());
        ModuleToProto(*module_, **version, result.mutable_module());
        call_.FinishWith(SerializeMessage(result));
      });
}

}  // namespace modelstate
