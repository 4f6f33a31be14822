#include "tests/client/fake_server.h"

#include <grpcpp/server_builder.h>

#include <algorithm>
#include <random>
#include <utility>

#include "common/base/digest.h"
#include "common/wire/convert.h"
#include "common/wire/status_mapping.h"

namespace modelstate {

FakeServer::FakeServer(int port) {
  for (int i = 0; i < 40; ++i) {
    TensorSpec spec;
    spec.name = absl::StrCat("layer", i, ".weight");
    spec.kind = i % 5 == 0 ? TensorKind::kBuffer : TensorKind::kParameter;
    spec.dtype = i % 3 == 0 ? DType::kBF16 : DType::kF32;
    spec.shape = *Shape::Create({i, 100});
    specs.push_back(std::move(spec));
  }
  TensorSpec tied = specs[7];
  tied.name = "tied.weight";
  tied.alias_of = specs[7].name;
  specs.push_back(std::move(tied));
  layout = StateLayout(specs);
  std::mt19937 random(11);
  region.resize(layout.total_bytes());
  for (char& c : region) c = static_cast<char>(random());
  grpc::ServerBuilder builder;
  builder.AddListeningPort(absl::StrCat("localhost:", port), grpc::InsecureServerCredentials(),
                           &port_);
  builder.RegisterService(this);
  server_ = builder.BuildAndStart();
}

Client FakeServer::Connect(const std::string& target) {
  ClientOptions options;
  options.timeout = absl::Seconds(30);
  options.initial_backoff = absl::Milliseconds(1);
  options.max_backoff = absl::Milliseconds(5);
  return *Client::Connect(target, options);
}

void FakeServer::AddOptimizerState() {
  has_optimizer_state = true;
  for (const char* slot : {"exp_avg", "exp_avg_sq"}) {
    TensorSpec spec = specs[37];
    spec.kind = TensorKind::kOptimizerState;
    spec.slot = slot;
    specs.push_back(std::move(spec));
  }
  layout = StateLayout(specs);
  std::mt19937 random(12);
  region.resize(layout.total_bytes());
  for (char& c : region) c = static_cast<char>(random());
}

void FakeServer::AddLargeTensor(uint64_t size) {
  TensorSpec spec;
  spec.name = "large";
  spec.kind = TensorKind::kBuffer;
  spec.dtype = DType::kU8;
  spec.shape = *Shape::Create({static_cast<int64_t>(size)});
  specs.push_back(std::move(spec));
  layout = StateLayout(specs);
  region.resize(layout.total_bytes());
  for (size_t i = layout.range(specs.size() - 1).begin; i < region.size(); ++i) {
    region[i] = static_cast<char>(i * i >> 7);
  }
  chunk_bytes = 1000000;
}

absl::Status FakeServer::NextRefusal() {
  if (refusals.empty()) return absl::OkStatus();
  const Reason reason = refusals.front();
  refusals.erase(refusals.begin());
  return MakeError(reason, "as the test asked");
}

grpc::Status FakeServer::GetModule(Context*, const v1::GetModuleRequest* request,
                                   v1::Module* response) {
  if (request->module() != "m") {
    return ToGrpcStatus(MakeError(Reason::kModuleNotFound, "no module \"x\"", {{"module", "x"}}));
  }
  response->set_name("m");
  response->set_state(v1::READY);
  VersionToProto({incarnation, version}, response->mutable_version());
  return grpc::Status::OK;
}

void FakeServer::List(TensorKind kind, const v1::ListTensorsRequest& request,
                      v1::ListTensorsResponse* response) {
  list = request;
  response->set_total_size(33);
  // Seven on a page, so that the client must turn pages.
  size_t i = request.page_token().empty() ? 0 : std::stoul(request.page_token());
  for (; i < specs.size() && response->tensors_size() < 7; ++i) {
    if (specs[i].kind != kind) continue;
    v1::TensorInfo* info = response->add_tensors();
    TensorSpecToProto(specs[i], info);
    info->set_changed_version(1);
    if (request.digests()) info->set_xxh3(DigestToHex(Xxh3(bytes(i))));
  }
  if (i < specs.size()) response->set_next_page_token(absl::StrCat(i));
  VersionToProto({incarnation, version}, response->mutable_version());
}

grpc::Status FakeServer::ListParameters(Context*, const v1::ListTensorsRequest* request,
                                        v1::ListTensorsResponse* response) {
  List(TensorKind::kParameter, *request, response);
  return grpc::Status::OK;
}

grpc::Status FakeServer::ListBuffers(Context*, const v1::ListTensorsRequest* request,
                                     v1::ListTensorsResponse* response) {
  List(TensorKind::kBuffer, *request, response);
  return grpc::Status::OK;
}

grpc::Status FakeServer::ListOptimizerState(Context* context, const v1::ListTensorsRequest* request,
                                            v1::ListTensorsResponse* response) {
  if (!has_optimizer_state) {
    return FakeModuleCalls::ListOptimizerState(context, request, response);
  }
  List(TensorKind::kOptimizerState, *request, response);
  return grpc::Status::OK;
}

grpc::Status FakeServer::PinSnapshot(Context*, const v1::PinSnapshotRequest* request,
                                     v1::Snapshot* response) {
  ++pin_calls;
  if (refuse_pins) return ToGrpcStatus(MakeError(Reason::kSnapshotLimit, "the budget is full"));
  if (!request->snapshot_id().empty() && on_renewal) on_renewal();
  if (request->snapshot_id().empty()) {
    pinned_optimizer_state = request->optimizer_state();
    held = absl::StrCat("pin-", ++pins);
  } else if (request->snapshot_id() != held) {
    return ToGrpcStatus(MakeError(Reason::kSnapshotNotFound, "no such pin"));
  }
  response->set_snapshot_id(held);
  VersionToProto({incarnation, version}, response->mutable_version());
  return grpc::Status::OK;
}

grpc::Status FakeServer::ReleaseSnapshot(Context*, const v1::ReleaseSnapshotRequest*,
                                         v1::ReleaseSnapshotResponse*) {
  ++releases;
  return grpc::Status::OK;
}

grpc::Status FakeServer::StreamStateDict(Context*, const v1::StreamStateDictRequest* request,
                                         grpc::ServerWriter<v1::StatePart>* writer) {
  if (const absl::Status refusal = NextRefusal(); !refusal.ok()) return ToGrpcStatus(refusal);
  if (!request->snapshot_id().empty() && request->snapshot_id() != held) {
    ++refused_pins;
    return ToGrpcStatus(MakeError(Reason::kSnapshotNotFound, "no such pin"));
  }
  const size_t stream = streams++;
  if (stream >= refuse_streams_from) {
    return ToGrpcStatus(MakeError(Reason::kDeviceMemory, "as the test asked"));
  }
  const uint64_t limit = stream < break_after.size() ? break_after[stream] : UINT64_MAX;
  if (request->ranges().empty()) stream_snapshot_id = request->snapshot_id();
  if (has_optimizer_state && !(request->optimizer_state() && pinned_optimizer_state)) {
    return ToGrpcStatus(MakeError(Reason::kInvalidField, "a stream or pin without it"));
  }
  if (request->module() != "m") {
    return ToGrpcStatus(MakeError(Reason::kModuleNotFound, "no module \"x\"", {{"module", "x"}}));
  }
  v1::StatePart part;
  v1::Header& header = *part.mutable_header();
  header.set_module("m");
  const Version sent_version = {incarnation,
                                request->version() != 0 ? request->version() : version};
  VersionToProto(sent_version, header.mutable_version());
  header.set_layout_digest(layout.digest());
  if (request->has_if_newer_than() && VersionFromProto(request->if_newer_than()) == sent_version) {
    header.set_not_modified(true);
    writer->Write(part);
    return grpc::Status::OK;
  }
  header.set_tensor_count(specs.size());
  header.set_total_bytes(layout.total_bytes());
  writer->Write(part);
  std::vector<ByteRange> ranges = *ByteRangesFromProto(request->ranges());
  if (ranges.empty()) ranges.push_back({0, layout.total_bytes()});
  const auto is_part = [&ranges](const ByteRange& tensor) {
    return std::any_of(ranges.begin(), ranges.end(), [&tensor](const ByteRange& range) {
      const bool whole = range.begin <= tensor.begin && tensor.end <= range.end;
      return range.begin < tensor.end && tensor.begin < range.end && !whole;
    });
  };
  part.mutable_tensors();
  for (uint32_t i = 0; i < specs.size(); ++i) {
    v1::TensorInfo* info = part.mutable_tensors()->add_tensors();
    TensorSpecToProto(specs[i], info);
    info->set_offset(layout.range(i).begin);
    if (is_part(layout.range(i))) info->set_xxh3(DigestToHex(Xxh3(bytes(i))));
  }
  writer->Write(part);
  uint64_t sent = 0;
  for (const ByteRange& range : ranges) {
    for (uint64_t pos = range.begin; pos < range.end;) {
      const uint64_t size = std::min<uint64_t>(chunk_bytes, range.end - pos);
      if (sent + size > limit) return grpc::Status(grpc::StatusCode::UNAVAILABLE, "broken");
      part.mutable_chunk()->set_offset(pos);
      part.mutable_chunk()->set_data(region.substr(pos, size));
      if (!writer->Write(part)) return grpc::Status::CANCELLED;
      sent += size;
      sent_bytes += size;
      pos += size;
    }
  }
  if (no_trailer) return grpc::Status::OK;
  part.mutable_trailer()->set_total_bytes(sent);
  for (uint32_t i = 0; i < specs.size(); ++i) {
    const ByteRange place = layout.range(i);
    const bool whole = std::any_of(ranges.begin(), ranges.end(), [&place](const ByteRange& range) {
      return range.begin <= place.begin && place.end <= range.end;
    });
    if (!layout.owns_bytes(i) || !whole) continue;
    v1::TensorDigest* digest = part.mutable_trailer()->add_digests();
    digest->set_index(i);
    digest->set_xxh3(DigestToHex(Xxh3(bytes(i)) + (wrong_digest && i == 3 ? 1 : 0)));
  }
  writer->Write(part);
  return grpc::Status::OK;
}

grpc::Status FakeServer::ApplyStep(Context*, grpc::ServerReader<v1::StepPart>* reader,
                                   v1::ApplyStepResponse* response) {
  if (const absl::Status refusal = NextRefusal(); !refusal.ok()) return ToGrpcStatus(refusal);
  step_bytes.clear();
  step_names.clear();
  v1::StepPart part;
  bool trailer = false;
  while (reader->Read(&part)) {
    if (part.has_header()) step_headers.push_back(part.header());
    for (const v1::TensorInfo& info : part.tensors().tensors()) step_names.push_back(info.name());
    if (part.chunk().data().size() > max_chunk_bytes) {
      return ToGrpcStatus(MakeError(Reason::kChunkInvalid, "too large a chunk",
                                    {{"max_chunk_bytes", absl::StrCat(max_chunk_bytes)}}));
    }
    step_bytes += part.chunk().data();
    trailer |= part.has_trailer();
  }
  if (fail_steps > 0) {
    --fail_steps;
    return grpc::Status(grpc::StatusCode::UNAVAILABLE, "the answer is lost");
  }
  if (forgets_steps && !trailer) {
    return ToGrpcStatus(MakeError(Reason::kStepNotSeen, "the step was not seen"));
  }
  response->set_outcome(v1::APPLIED);
  response->set_replayed(!trailer);
  response->set_ignored(step_headers.back().ignore_frozen() ? 2 : 0);
  response->set_step(1);
  return grpc::Status::OK;
}

grpc::Status FakeServer::WatchModule(Context* context, const v1::WatchModuleRequest*,
                                     grpc::ServerWriter<v1::WatchModuleResponse>* writer) {
  v1::WatchModuleResponse response;
  response.set_last_mutation(v1::STEP);
  for (uint64_t number = 1; !context->IsCancelled(); ++number) {
    response.mutable_module()->mutable_version()->set_number(number);
    if (!writer->Write(response)) break;
  }
  return grpc::Status::CANCELLED;
}

}  // namespace modelstate
