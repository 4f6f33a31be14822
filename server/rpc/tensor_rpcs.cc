#include <algorithm>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "common/base/digest.h"
#include "common/base/status.h"
#include "common/wire/convert.h"
#include "common/wire/values_codec.h"
#include "server/rpc/page_token.h"
#include "server/rpc/service.h"
#include "server/rpc/tensor_statistics.h"
#include "server/rpc/unary_handler.h"

namespace modelstate {
namespace {

constexpr uint32_t kDefaultValues = 64;
constexpr uint32_t kMaxValues = 65536;

// Copies of the elements where the host cannot see them; else `scratch` stays empty.
absl::StatusOr<absl::Span<const uint8_t>> HostBytes(const TensorStorage& storage,
                                                    std::vector<uint8_t>* scratch) {
  if (storage.device().host_visible()) return storage.HostBytes();
  scratch->resize(storage.size());
  MS_RETURN_IF_ERROR(storage.CopyToHost(0, absl::MakeSpan(*scratch)));
  return absl::MakeConstSpan(*scratch);
}

absl::Status DescribeTensor(const ModuleVersion& version, uint32_t index, bool digest,
                            v1::TensorInfo* info) {
  TensorSpecToProto(version.schema->spec(index), info);
  info->set_changed_version(version.changed_version[index]);
  if (digest) {
    MS_ASSIGN_OR_RETURN(const uint64_t xxh3, version.storages[index]->Digest());
    info->set_xxh3(DigestToHex(xxh3));
  }
  return absl::OkStatus();
}

absl::Status ListTensors(Runtime& runtime, TensorKind kind, const v1::ListTensorsRequest& request,
                         v1::ListTensorsResponse* response) {
  MS_ASSIGN_OR_RETURN(std::shared_ptr<ModuleInstance> module, runtime.FindModule(request.module()));
  MS_ASSIGN_OR_RETURN(Selection selection, SelectionFromProto(request.selection()));
  MS_ASSIGN_OR_RETURN(const size_t page_size, PageSize(request.page_size(), 1000, 10000));
  if (selection.float_dtype) {
    return MakeError(Reason::kInvalidField,
                     "selection.float_dtype casts what is read; a listing shows the module's own "
                     "dtypes: leave it out",
                     {{"field", "selection.float_dtype"}});
  }
  // A list of buffers shows all of them: that they are not in a state_dict is one of their marks.
  selection.include_non_persistent = true;
  const VersionRef version = module->Current();
  const ModuleSchema& schema = *version->schema;

  v1::ListTensorsRequest listing = request;
  listing.clear_page_size();
  listing.clear_page_token();
  const std::string scope =
      PageScope(listing, absl::StrCat(TensorKindName(kind), " ", version->version.incarnation, " ",
                                      schema.revision()));
  MS_ASSIGN_OR_RETURN(const std::string position, DecodePageToken(scope, request.page_token()));
  uint64_t first = 0;
  if (!position.empty() && !absl::SimpleAtoi(position, &first)) {
    return MakeError(Reason::kInvalidField, "page_token is malformed; start again without one",
                     {{"field", "page_token"}});
  }

  std::vector<std::string> unknown;
  std::vector<uint32_t> indices = Select(selection, schema.specs(), &unknown);
  if (!unknown.empty()) {
    return MakeError(Reason::kTensorNotFound,
                     absl::StrCat("module \"", module->name(), "\" has no tensor ",
                                  QuotedList(unknown), "; list without a selection to see all"),
                     {{"module", module->name()}, {"tensor", unknown.front()}});
  }
  indices.erase(std::remove_if(indices.begin(), indices.end(),
                               [&](uint32_t index) { return schema.spec(index).kind != kind; }),
                indices.end());
  size_t bytes = 0;
  uint64_t next = first;
  for (; next < indices.size() && next - first < page_size && bytes < kMaxPageBytes; ++next) {
    v1::TensorInfo* info = response->add_tensors();
    MS_RETURN_IF_ERROR(DescribeTensor(*version, indices[next], request.digests(), info));
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
  const auto elements = static_cast<uint64_t>(spec.shape.num_elements());
  if (request.count() > kMaxValues) {
    return MakeError(Reason::kInvalidField,
                     absl::StrCat("count is ", request.count(), "; it is at most ", kMaxValues),
                     {{"field", "count"}});
  }
  if (request.first() > elements || (request.count() > elements - request.first())) {
    return MakeError(Reason::kRangeOutsideLayout,
                     absl::StrCat("tensor \"", spec.name, "\" has ", elements,
                                  " elements; first = ", request.first(),
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
  MS_RETURN_IF_ERROR(DescribeTensor(version, *index, false, info));
  const size_t width = DTypeSize(spec.dtype);
  *info->mutable_values() =
      DecodeValues(bytes.subspan(request.first() * width, count * width), spec.dtype);
  const TensorStatistics statistics = ComputeStatistics(bytes, spec.dtype);
  v1::TensorStatistics* out = response->mutable_statistics();
  out->set_count(statistics.count);
  out->set_min(statistics.min);
  out->set_max(statistics.max);
  out->set_mean(statistics.mean);
  out->set_norm(statistics.norm);
  out->set_nonfinite(statistics.nonfinite);
  response->set_first(request.first());
  VersionToProto(version.version, response->mutable_version());
  response->set_step(version.step);
  return absl::OkStatus();
}

grpc::ServerUnaryReactor* AnswerList(Runtime& runtime, TensorKind kind,
                                     const v1::ListTensorsRequest* request,
                                     v1::ListTensorsResponse* response) {
  const auto list = [&runtime, kind, request, response] {
    return ListTensors(runtime, kind, *request, response);
  };
  // Digests may have to read every byte of the module.
  return request->digests() ? UnaryHandler::AnswerOnIoThread(runtime, list)
                            : UnaryHandler::AnswerNow(runtime, list);
}

}  // namespace

grpc::ServerUnaryReactor* ModelStateService::ListParameters(Context*,
                                                            const v1::ListTensorsRequest* request,
                                                            v1::ListTensorsResponse* response) {
  return AnswerList(runtime_, TensorKind::kParameter, request, response);
}

grpc::ServerUnaryReactor* ModelStateService::ListBuffers(Context*,
                                                         const v1::ListTensorsRequest* request,
                                                         v1::ListTensorsResponse* response) {
  return AnswerList(runtime_, TensorKind::kBuffer, request, response);
}

grpc::ServerUnaryReactor* ModelStateService::ListOptimizerState(Context*,
                                                                const v1::ListTensorsRequest*,
                                                                v1::ListTensorsResponse*) {
  return UnaryHandler::AnswerNow(runtime_, [] {
    return MakeError(
        Reason::kNotImplemented,
        "ListOptimizerState is not built yet; GetOptimizer tells the bytes of the state");
  });
}

grpc::ServerUnaryReactor* ModelStateService::GetTensor(Context*,
                                                       const v1::GetTensorRequest* request,
                                                       v1::GetTensorResponse* response) {
  return UnaryHandler::AnswerOnIoThread(runtime_, [this, request, response] {
    return modelstate::GetTensor(runtime_, *request, response);
  });
}

}  // namespace modelstate
