#include "bench/stub_transfer.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "common/wire/convert.h"

namespace modelstate {
namespace {

constexpr size_t kChunkBytes = size_t{1} << 20;
constexpr size_t kTableTensors = 1000;

}  // namespace

void StubService::Describe(size_t index, uint64_t offset, v1::TensorInfo* info) const {
  const TensorSpec& spec = payload_.specs()[index];
  TensorSpecToProto(spec, info);
  info->set_offset(offset);
}

grpc::Status StubService::StreamStateDict(grpc::ServerContext* /*context*/,
                                          const v1::StreamStateDictRequest* request,
                                          grpc::ServerWriter<v1::StatePart>* writer) {
  const absl::Span<const uint8_t> bytes = payload_.bytes();
  const size_t count = payload_.specs().size();
  v1::StatePart header;
  header.mutable_header()->set_module(request->module());
  header.mutable_header()->set_tensor_count(count);
  header.mutable_header()->set_total_bytes(bytes.size());
  writer->Write(header);
  uint64_t offset = 0;
  for (size_t first = 0; first < count; first += kTableTensors) {
    v1::StatePart table;
    for (size_t i = first; i < std::min(count, first + kTableTensors); ++i) {
      Describe(i, offset, table.mutable_tensors()->add_tensors());
      offset += payload_.specs()[i].nbytes();
    }
    writer->Write(table);
  }
  for (size_t begin = 0; begin < bytes.size(); begin += kChunkBytes) {
    const absl::Span<const uint8_t> piece = bytes.subspan(begin, kChunkBytes);
    v1::StatePart part;
    part.mutable_chunk()->set_offset(begin);
    part.mutable_chunk()->set_data(piece.data(), piece.size());
    if (!writer->Write(part)) return grpc::Status::CANCELLED;
  }
  v1::StatePart trailer;
  trailer.mutable_trailer()->set_total_bytes(bytes.size());
  writer->Write(trailer);
  return grpc::Status::OK;
}

grpc::Status StubService::ListParameters(grpc::ServerContext* /*context*/,
                                         const v1::ListTensorsRequest* /*request*/,
                                         v1::ListTensorsResponse* response) {
  for (size_t i = 0; i < payload_.specs().size(); ++i) Describe(i, 0, response->add_tensors());
  response->set_total_size(payload_.specs().size());
  return grpc::Status::OK;
}

void StubFetch(v1::ModelState::Stub& stub, const std::string& module,
               absl::Span<uint8_t> destination) {
  grpc::ClientContext context;
  v1::StreamStateDictRequest request;
  request.set_module(module);
  const auto reader = stub.StreamStateDict(&context, request);
  v1::StatePart part;
  size_t received = 0;
  while (reader->Read(&part)) {
    if (!part.has_chunk()) continue;
    const std::string& data = part.chunk().data();
    if (part.chunk().offset() > destination.size() ||
        data.size() > destination.size() - part.chunk().offset()) {
      break;
    }
    std::memcpy(destination.data() + part.chunk().offset(), data.data(), data.size());
    received += data.size();
  }
  const grpc::Status status = reader->Finish();
  if (status.ok() && received == destination.size()) return;
  std::fprintf(stderr, "stub fetch: %zu bytes, %s\n", received, status.error_message().c_str());
  std::exit(1);
}

}  // namespace modelstate
