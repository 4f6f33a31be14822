#include <algorithm>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/wire/convert.h"
#include "common/wire/values_codec.h"
#include "server/rpc/listing.h"
#include "server/rpc/page_token.h"
#include "server/rpc/service.h"
#include "server/rpc/tensor_slice.h"
#include "server/rpc/tensor_statistics.h"

namespace modelstate {
namespace {

constexpr uint32_t kDefaultValues = 64;
constexpr uint32_t kMaxValues = 65536;

void DescribeTensor(const ModuleVersion& version, uint32_t index, v1::TensorInfo* info) {
  TensorSpecToProto(version.schema->spec(index), info);
  info->set_changed_version(version.changed_version[index]);
}

absl::Status ListTensors(Runtime& runtime, TensorKind kind, const v1::ListTensorsRequest& request,
                         v1::ListTensorsResponse* response) {
  MS_ASSIGN_OR_RETURN(std::shared_ptr<ModuleInstance> module, runtime.FindModule(request.module()));
  MS_ASSIGN_OR_RETURN(const ListingRequest wanted, ListingRequestFromProto(request));
  const VersionRef version = module->Current();
  const std::shared_ptr<const Optimizer> optimizer =
      kind == TensorKind::kParameter ? module->optimizer() : nullptr;
  const ModuleSchema& schema = *version->schema;
  const std::string scope = ListingScope(request, TensorKindName(kind), *version);
  MS_ASSIGN_OR_RETURN(const uint64_t first, DecodePageIndex(scope, request.page_token()));
  absl::StatusOr<ModuleSchema::Listing> listing = schema.List(kind, wanted.view, wanted.selection);
  if (!listing.ok()) {
    return Annotate(listing.status(), absl::StrCat("module \"", module->name(), "\""));
  }
  const std::vector<uint32_t>& indices = **listing;
  size_t bytes = 0;
  uint64_t element_bytes = 0;
  uint64_t next = first;
  for (; next < indices.size() && next - first < wanted.page_size && bytes < kMaxPageBytes &&
         element_bytes < kMaxPageElementBytes;
       ++next) {
    const uint32_t index = indices[next];
    const TensorStorage& storage = *version->storages[index];
    v1::TensorInfo* info = response->add_tensors();
    DescribeTensor(*version, index, info);
    // The two are read one after the other: between them a load may have changed the schema.
    if (optimizer != nullptr && optimizer->schema_size() == schema.size() &&
        optimizer->group_of(index) != Optimizer::kNoGroup) {
      info->set_group(optimizer->group_of(index));
    }
    element_bytes += ElementBytesToRead(wanted, storage);
    MS_RETURN_IF_ERROR(AddElementFacts(wanted, storage, schema.spec(index).dtype, info));
    bytes += info->ByteSizeLong();
  }
  if (next < indices.size()) {
    response->set_next_page_token(EncodePageToken(scope, absl::StrCat(next)));
  }
  response->set_total_size(indices.size());
  VersionToProto(version->version, response->mutable_version());
  response->set_step(version->step);
  return absl::OkStatus();
}

// The tensor `request` names, and the part of it that its slice selects.
absl::StatusOr<TensorSlice> ParseSlice(const v1::GetTensorRequest& request,
                                       const TensorSpec& spec) {
  if (request.slice().empty()) return TensorSlice(spec.shape);
  absl::StatusOr<TensorSlice> slice = TensorSlice::Parse(request.slice(), spec.shape);
  if (slice.ok()) return slice;
  return Annotate(slice.status(), absl::StrCat("tensor \"", spec.name, "\""));
}

absl::Status GetTensor(Runtime& runtime, const v1::GetTensorRequest& request,
                       v1::GetTensorResponse* response) {
  MS_ASSIGN_OR_RETURN(std::shared_ptr<ModuleInstance> module, runtime.FindModule(request.module()));
  Snapshot pinned;
  VersionRef current;
  if (request.snapshot_id().empty()) {
    current = module->Current();
  } else {
    MS_ASSIGN_OR_RETURN(PinTable::Pin pin, runtime.pins->Find(request.snapshot_id()));
    if (pin.module != module) {
      return MakeError(Reason::kSnapshotNotFound,
                       absl::StrCat("snapshot_id is of module \"", pin.module->name(),
                                    "\", not of \"", module->name(), "\""),
                       {{"snapshot_id", request.snapshot_id()}});
    }
    pinned = std::move(pin.snapshot);
  }
  const ModuleVersion& version = pinned ? *pinned : *current;
  const std::optional<uint32_t> index = version.schema->Find(request.name());
  if (!index) {
    return MakeError(
        Reason::kTensorNotFound,
        absl::StrCat("module \"", module->name(), "\" has no tensor \"", request.name(),
                     "\"; ListParameters and ListBuffers show the names"),
        {{"module", module->name()}, {"tensor", request.name()}});
  }
  const TensorSpec& spec = version.schema->spec(*index);
  MS_ASSIGN_OR_RETURN(const TensorSlice slice, ParseSlice(request, spec));
  const uint64_t elements = slice.elements();
  if (request.count() > kMaxValues) {
    return MakeError(Reason::kInvalidField,
                     absl::StrCat("count is ", request.count(), "; it is at most ", kMaxValues),
                     {{"field", "count"}});
  }
  if (request.first() > elements || (request.count() > elements - request.first())) {
    return MakeError(
        Reason::kRangeOutsideLayout,
        absl::StrCat(request.slice().empty() ? "" : "the slice of ", "tensor \"", spec.name,
                     "\" has ", elements, " elements; first = ", request.first(),
                     " and count = ", request.count(), " reach past them"),
        {{"tensor", spec.name}, {"elements", absl::StrCat(elements)}});
  }
  const uint64_t count = request.count() != 0
                             ? request.count()
                             : std::min<uint64_t>(kDefaultValues, elements - request.first());
  std::vector<uint8_t> scratch;
  MS_ASSIGN_OR_RETURN(const absl::Span<const uint8_t> bytes,
                      HostBytes(*version.storages[*index], &scratch));
  v1::TensorInfo* info = response->mutable_tensor();
  DescribeTensor(version, *index, info);
  *info->mutable_values() =
      DecodeValues(slice.Gather(bytes, DTypeSize(spec.dtype), request.first(), count), spec.dtype);
  if (!request.slice().empty()) {
    response->mutable_slice_shape()->Assign(slice.shape().begin(), slice.shape().end());
  }
  MS_RETURN_IF_ERROR(
      StatisticsToProto(*version.storages[*index], spec.dtype, response->mutable_statistics()));
  response->set_first(request.first());
  VersionToProto(version.version, response->mutable_version());
  response->set_step(version.step);
  return absl::OkStatus();
}

void AnswerList(UnaryCall* call, Runtime& runtime, TensorKind kind,
                const v1::ListTensorsRequest* request, v1::ListTensorsResponse* response) {
  const auto list = [&runtime, kind, request, response] {
    return ListTensors(runtime, kind, *request, response);
  };
  // Both may have to read every byte of the module.
  if (request->digests() || request->statistics()) return call->AnswerOnIoThread(list);
  call->AnswerNow(list);
}

}  // namespace

void ModelStateService::ListParameters(UnaryCall* call, const v1::ListTensorsRequest* request,
                                       v1::ListTensorsResponse* response) {
  AnswerList(call, runtime_, TensorKind::kParameter, request, response);
}

void ModelStateService::ListBuffers(UnaryCall* call, const v1::ListTensorsRequest* request,
                                    v1::ListTensorsResponse* response) {
  AnswerList(call, runtime_, TensorKind::kBuffer, request, response);
}

void ModelStateService::GetTensor(UnaryCall* call, const v1::GetTensorRequest* request,
                                  v1::GetTensorResponse* response) {
  call->AnswerOnIoThread(
      [this, request, response] { return modelstate::GetTensor(runtime_, *request, response); });
}

}  // namespace modelstate
