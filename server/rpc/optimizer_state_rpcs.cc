#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/base/digest.h"
#include "common/base/status.h"
#include "common/wire/convert.h"
#include "server/rpc/listing.h"
#include "server/rpc/page_token.h"
#include "server/rpc/service.h"
#include "server/rpc/tensor_statistics.h"
#include "server/rules/rule_info.h"
#include "server/state/optimizer_tensors.h"

namespace modelstate {
namespace {

absl::StatusOr<OptimizerStatePlace> DecodePosition(absl::string_view scope,
                                                   absl::string_view token) {
  MS_ASSIGN_OR_RETURN(const std::string text, DecodePageToken(scope, token));
  OptimizerStatePlace position;
  if (text.empty()) return position;
  const std::vector<absl::string_view> parts = absl::StrSplit(text, ' ');
  if (parts.size() != 2 || !absl::SimpleAtoi(parts[0], &position.parameter) ||
      !absl::SimpleAtoi(parts[1], &position.slot)) {
    return MakeError(Reason::kInvalidField, "page_token is malformed; start again without one",
                     {{"field", "page_token"}});
  }
  return position;
}

// One ListOptimizerState call between the strand, which looks at the state, and an I/O thread.
struct Listing {
  ListingRequest wanted;
  std::string scope;
  OptimizerStatePlace position;
};

absl::Status DescribeScalar(const Listing& listing, const char* slot, float value,
                            v1::TensorInfo* info) {
  info->set_slot(slot);
  info->set_dtype(v1::F32);
  info->set_nbytes(sizeof(value));
  info->mutable_values()->mutable_doubles()->add_values(value);
  const auto bytes = absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(&value), sizeof(value));
  if (listing.wanted.digests) info->set_xxh3(DigestToHex(Xxh3(bytes)));
  if (listing.wanted.statistics) {
    const TensorStatistics statistics = ComputeStatistics(bytes, DType::kF32);
    info->mutable_statistics()->set_count(statistics.count);
    info->mutable_statistics()->set_min(statistics.min);
    info->mutable_statistics()->set_max(statistics.max);
    info->mutable_statistics()->set_mean(statistics.mean);
    info->mutable_statistics()->set_norm(statistics.norm);
  }
  return absl::OkStatus();
}

absl::Status DescribeEntry(const Listing& listing, const OptimizerStatePart& part,
                           const OptimizerStatePart::Entry& entry, v1::TensorInfo* info) {
  const TensorSpec& spec = part.schema->spec(entry.place.parameter);
  info->set_name(spec.name);
  info->set_kind(v1::OPTIMIZER_STATE);
  if (entry.place.slot == 0) return DescribeScalar(listing, kStepSlot, entry.scalar, info);
  if (entry.place.slot == kProductPlace) {
    const char* product = GetRule(part.optimizer->algorithm()).product;
    return DescribeScalar(listing, product, entry.scalar, info);
  }
  const SlotList slots = AllSlots(part.optimizer->algorithm(), spec.dtype);
  const auto found = std::find_if(slots.begin(), slots.end(), [&](const SlotInfo& info) {
    return info.place + 1 == entry.place.slot;
  });
  if (found == slots.end()) {
    return absl::InternalError(absl::StrCat("optimizer state of \"", spec.name,
                                            "\" has a slot that its optimizer has not"));
  }
  const SlotInfo& slot = *found;
  info->set_slot(slot.name);
  info->set_dtype(DTypeToProto(slot.dtype));
  info->mutable_shape()->Assign(spec.shape.dims().begin(), spec.shape.dims().end());
  info->set_nbytes(static_cast<uint64_t>(spec.shape.num_elements()) * DTypeSize(slot.dtype));
  if (!entry.storage) return absl::OkStatus();
  return AddElementFacts(listing.wanted, *entry.storage, slot.dtype, info);
}

absl::Status DescribePart(const Listing& listing, OptimizerStatePart& part,
                          v1::ListTensorsResponse* response) {
  size_t bytes = 0;
  std::optional<OptimizerStatePlace> next = part.next;
  for (OptimizerStatePart::Entry& entry : part.entries) {
    if (bytes >= kMaxPageBytes) {
      next = entry.place;
      break;
    }
    v1::TensorInfo* info = response->add_tensors();
    MS_RETURN_IF_ERROR(DescribeEntry(listing, part, entry, info));
    bytes += info->ByteSizeLong();
  }
  if (next) {
    response->set_next_page_token(
        EncodePageToken(listing.scope, absl::StrCat(next->parameter, " ", next->slot)));
  }
  response->set_total_size(part.count);
  VersionToProto(part.version, response->mutable_version());
  response->set_step(part.step);
  return absl::OkStatus();
}

}  // namespace

void ModelStateService::ListOptimizerState(UnaryCall* call, const v1::ListTensorsRequest* request,
                                           v1::ListTensorsResponse* response) {
  call->AnswerLater([&]() -> absl::Status {
    MS_ASSIGN_OR_RETURN(std::shared_ptr<ModuleInstance> module,
                        runtime_.FindModule(request->module()));
    Listing listing;
    MS_ASSIGN_OR_RETURN(listing.wanted, ListingRequestFromProto(*request));
    const VersionRef version = module->Current();
    OptimizerStateQuery query;
    query.epoch = module->optimizer_epoch();
    listing.scope = ListingScope(*request, absl::StrCat("optimizer state ", query.epoch), *version);
    MS_ASSIGN_OR_RETURN(listing.position, DecodePosition(listing.scope, request->page_token()));
    query.schema = version->schema;
    absl::StatusOr<ModuleSchema::Listing> parameters =
        SelectStateful(*version->schema, listing.wanted.selection);
    if (!parameters.ok()) {
      return Annotate(parameters.status(), absl::StrCat("module \"", module->name(), "\""));
    }
    query.parameters = *std::move(parameters);
    query.from = listing.position;
    query.max_entries = listing.wanted.page_size;
    query.max_referenced_bytes = listing.wanted.reads_elements() ? kMaxPageElementBytes : 0;
    module->ReadOptimizerState(
        std::move(query), [this, call, response, listing = std::move(listing)](
                              absl::StatusOr<OptimizerStatePart> part) mutable {
          if (!part.ok()) return call->Finish(part.status());
          runtime_.PostIo([call, response, listing = std::move(listing),
                           part = *std::move(part)]() mutable {
            const absl::Status status = DescribePart(listing, part, response);
            part = OptimizerStatePart();  // nothing is held any more when the caller hears of it
            call->Finish(status);
          });
        });
    return absl::OkStatus();
  });
}

}  // namespace modelstate
