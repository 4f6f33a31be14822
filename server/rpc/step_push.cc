#include "server/rpc/step_push.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/algorithm/container.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "common/base/bytes.h"
#include "common/base/status.h"
#include "common/wire/convert.h"
#include "common/wire/optimizer_convert.h"
#include "common/wire/part_codec.h"
#include "server/rpc/module_convert.h"
#include "server/rpc/push_admission.h"

namespace modelstate {
namespace {

constexpr size_t kScratchBytes = size_t{64} << 10;
constexpr size_t kMaxWorkerBytes = 256;

// Fixed width and little-endian, so that no two lists of fields look alike.
void AppendNumber(uint64_t value, std::string* out) {
  for (int i = 0; i < 8; ++i) out->push_back(static_cast<char>(value >> (8 * i)));
}

void AppendDouble(double value, std::string* out) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(bits));
  AppendNumber(bits, out);
}

void AppendText(absl::string_view text, std::string* out) {
  AppendNumber(text.size(), out);
  absl::StrAppend(out, text);
}

absl::Status FieldError(absl::string_view field, absl::string_view text) {
  return MakeError(Reason::kInvalidField, text, {{"field", std::string(field)}});
}

}  // namespace

void StepPush::OnMessage(grpc::ByteBuffer* message) {
  const bool first = !receiver_.has_header();
  absl::StatusOr<PartKind> kind = receiver_.Receive(message, &header_);
  if (!kind.ok()) return Fail(kind.status());
  if (!first || *kind != PartKind::kHeader) return call_.Read();
  if (absl::Status status = Begin(); !status.ok()) return Fail(status);
  if (header_.worker().empty()) return call_.Read();
  module_->FindStep(header_.worker(), header_.sequence(),
                    [this](absl::StatusOr<std::optional<StepAnswer>> answer) {
                      if (!answer.ok()) return call_.Finish(answer.status());
                      replay_ = answer->has_value();
                      call_.Read();
                    });
}

void StepPush::OnGone() {
  gone_ = true;
  if (waits_) module_->EndWait(header_.worker(), this);
}

void StepPush::Fail(const absl::Status& status) {
  entries_.clear();
  writer_.reset();
  gradients_.reset();
  call_.Finish(status);
}

absl::Status StepPush::Begin() {
  MS_ASSIGN_OR_RETURN(module_, runtime_.FindModule(header_.module()));
  if (header_.worker().empty() != (header_.sequence() == 0)) {
    return FieldError(header_.worker().empty() ? "worker" : "sequence",
                      "worker and sequence name a step together: set both (sequences begin at 1), "
                      "or neither");
  }
  if (header_.worker().size() > kMaxWorkerBytes) {
    return FieldError("worker", absl::StrCat("worker has ", header_.worker().size(),
                                             " bytes; at most ", kMaxWorkerBytes, " are allowed"));
  }
  // It is shown in logs and error texts.
  if (absl::c_any_of(header_.worker(), [](unsigned char c) { return absl::ascii_iscntrl(c); })) {
    return FieldError("worker",
                      "worker has a control character (a NUL, a line end or the like); use a name "
                      "that can be printed");
  }
  if (!header_.ignore_frozen()) {  // else the table tells what is left to stage
    // What is accumulated stays: the push that will step on it must fit beside it.
    const uint64_t bytes = header_.total_bytes();
    const uint64_t with_next = header_.accumulate() ? bytes + std::min(bytes, ~bytes) : bytes;
    MS_RETURN_IF_ERROR(CheckPushFits(*budget(), with_next));
  }
  TensorReceiver::Options options;
  options.tensor_count = header_.tensor_count();
  options.total_bytes = header_.total_bytes();
  options.max_chunk_bytes = runtime_.max_chunk_bytes;
  options.default_kind = TensorKind::kGradient;
  return receiver_.Begin(std::move(options));
}

absl::Status StepPush::OnTable(absl::Span<const ReceivedTensor> tensors) {
  std::vector<PushedTensor> table;
  table.reserve(tensors.size());
  for (const ReceivedTensor& tensor : tensors) {
    if (tensor.spec.is_alias()) {
      return MakeError(Reason::kInvalidField,
                       absl::StrCat("\"", tensor.spec.name,
                                    "\" has alias_of: push a tied parameter's gradient once, "
                                    "under either name, without it"),
                       {{"tensor", tensor.spec.name}});
    }
    table.push_back({tensor.spec.name, tensor.spec.kind, tensor.spec.dtype, tensor.spec.shape});
  }
  if (replay_) {
    scratch_.resize(kScratchBytes);
    return absl::OkStatus();
  }
  MS_ASSIGN_OR_RETURN(
      gradients_, StageGradients(module_->Current()->schema, std::move(table), module_->device(),
                                 *budget(), header_.ignore_frozen(),
                                 /*outputs=*/!header_.accumulate() && !module_->has_rounds()));
  MS_ASSIGN_OR_RETURN(writer_, gradients_->device->NewWriter(gradients_->reservation.bytes()));
  gradients_->norm_scale = header_.has_grad_scale() ? header_.grad_scale() : 1;
  entries_.resize(tensors.size());
  for (GradientSet::Entry& entry : gradients_->entries) {
    entries_[entry.tensor] = &entry;
    const std::optional<std::string>& values = tensors[entry.tensor].values;
    if (values) writer_->Write(AsBytes(*values), entry.storage->MutableBuffer(), 0);
  }
  if (gradients_->ignored > 0) scratch_.resize(kScratchBytes);
  return absl::OkStatus();
}

absl::Span<uint8_t> StepPush::Destination(size_t index, uint64_t offset, uint64_t max) {
  // What is replayed or ignored is only checked and hashed.
  if (replay_ || entries_[index] == nullptr) {
    return absl::MakeSpan(scratch_).subspan(0, std::min<uint64_t>(max, kScratchBytes));
  }
  return writer_->Reserve(entries_[index]->storage->MutableBuffer(), offset, max);
}

void StepPush::OnBytes(size_t index, uint64_t offset, absl::Span<const uint8_t> bytes) {
  // What is accumulated is added to something else before its norm is asked for.
  if (replay_ || header_.accumulate() || entries_[index] == nullptr) return;
  const TensorSpec& spec = receiver_.tensors()[index].spec;
  if (spec.kind != TensorKind::kGradient) return;
  GradientSet::Entry& entry = *entries_[index];
  if (offset == 0) {
    norm_.Begin(spec.dtype, gradients_->schema->spec(entry.index).dtype, gradients_->norm_scale);
  }
  norm_.Update(bytes);
  if (offset + bytes.size() == spec.nbytes()) entry.norm = norm_.Finish();
}

void StepPush::OnEnd() {
  absl::StatusOr<StepRequest> request = CompleteRequest();
  if (!request.ok()) return Fail(request.status());
  Apply(*std::move(request));
}

std::shared_ptr<MemoryBudget> StepPush::budget() const {
  return header_.accumulate() ? module_->environment().push_budget : module_->push_budget();
}

absl::StatusOr<StepRequest> StepPush::CompleteRequest() {
  StepRequest request;
  request.worker = header_.worker();
  request.sequence = header_.sequence();
  request.wait = header_.wait();
  const bool header_alone = receiver_.has_header() && receiver_.tensors().empty() &&
                            !receiver_.finished() && !request.worker.empty();
  if (header_alone) return request;
  MS_RETURN_IF_ERROR(receiver_.CheckFinished());
  if (header_.has_base()) request.base = VersionFromProto(header_.base());
  if (header_.has_weight()) request.weight = header_.weight();
  if (header_.has_grad_scale()) request.grad_scale = header_.grad_scale();
  request.accumulate = header_.accumulate();
  if (header_.has_accumulated()) request.accumulated = header_.accumulated();
  request.overrides = GroupOverridesFromProto(header_.group_overrides());
  request.payload_digest = PayloadDigest();
  request.gradients = std::move(gradients_);
  request.arrival = std::move(writer_);
  gradients_.reset();
  return request;
}

void StepPush::Apply(StepRequest request) {
  request.call = this;
  request.wait = request.wait && !gone_;
  waits_ = request.wait;
  module_->ApplyStep(std::move(request), [this](absl::StatusOr<StepAnswer> answer) {
    if (!answer.ok()) return call_.Finish(answer.status());
    v1::ApplyStepResponse response;
    StepAnswerToProto(*answer, &response);
    call_.FinishWith(SerializeMessage(response));
  });
}

// Over the table in its order, for each tensor with the XXH3-64 of its elements (so it does not
// matter how they were cut into chunks, or whether they came inline), then weight, grad_scale and
// the overrides; whether frozen parameters are ignored is in what it begins with. The base is left
// out: it says when the gradients were computed, not what they are.
std::string StepPush::PayloadDigest() const {
  // Without ignore_frozen the digest is what it was before there was that field.
  std::string text = header_.ignore_frozen() ? "modelstate.v1 step ignoring frozen parameters"
                                             : "modelstate.v1 step";
  AppendNumber(receiver_.tensors().size(), &text);
  for (size_t i = 0; i < receiver_.tensors().size(); ++i) {
    const TensorSpec& spec = receiver_.tensors()[i].spec;
    AppendText(spec.name, &text);
    AppendNumber(static_cast<uint64_t>(spec.kind), &text);
    AppendNumber(static_cast<uint64_t>(spec.dtype), &text);
    AppendNumber(spec.shape.rank(), &text);
    for (int64_t dim : spec.shape.dims()) AppendNumber(static_cast<uint64_t>(dim), &text);
    AppendNumber(receiver_.digest(i).value_or(0), &text);
  }
  AppendDouble(header_.has_weight() ? header_.weight() : 1, &text);
  AppendNumber(header_.has_grad_scale() ? 1 : 0, &text);
  AppendDouble(header_.grad_scale(), &text);
  for (const v1::GroupOverride& item : header_.group_overrides()) {
    AppendText(item.SerializeAsString(), &text);
  }
  if (header_.accumulate()) AppendText("accumulate", &text);
  return Xxh3Hex128(text);
}

}  // namespace modelstate
