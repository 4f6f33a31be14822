#include "client/upload.h"

#include <grpcpp/support/proto_buffer_reader.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "client/from_proto.h"
#include "client/key_lists.h"
#include "client/raw_call.h"
#include "common/base/digest.h"
#include "common/base/status.h"
#include "common/wire/convert.h"
#include "common/wire/optimizer_convert.h"
#include "common/wire/part_codec.h"
#include "common/wire/table_splitter.h"

namespace modelstate::client {
namespace {

// A limit that a server named when it refused a chunk of `sent` bytes as too large; else nullopt.
std::optional<uint64_t> SmallerChunks(const absl::Status& status, uint64_t sent) {
  if (GetReason(status) != Reason::kChunkInvalid) return std::nullopt;
  const ErrorMetadata metadata = GetErrorMetadata(status);
  const auto limit = metadata.find("max_chunk_bytes");
  uint64_t bytes = 0;
  if (limit == metadata.end() || !absl::SimpleAtoi(limit->second, &bytes)) return std::nullopt;
  if (bytes == 0 || bytes >= sent) return std::nullopt;
  return bytes;
}

absl::Status ReadResponse(RawCall* call, google::protobuf::MessageLite* response) {
  grpc::ByteBuffer message;
  bool parsed = false;
  if (call->Read(&message)) {
    grpc::ProtoBufferReader reader(&message);
    parsed = response->ParseFromZeroCopyStream(&reader);
  }
  MS_RETURN_IF_ERROR(call->Finish());
  if (!parsed) return absl::InternalError("the server's answer is not a valid message");
  return absl::OkStatus();
}

}  // namespace

void* BorrowCount::Borrow(const std::shared_ptr<BorrowCount>& count) {
  absl::MutexLock lock(&count->mutex_);
  ++count->borrowed_;
  // Its own reference, because the one who waits may be gone before the lock is given back.
  return new std::shared_ptr<BorrowCount>(count);
}

void BorrowCount::Release(void* user_data) {
  const std::unique_ptr<std::shared_ptr<BorrowCount>> count(
      static_cast<std::shared_ptr<BorrowCount>*>(user_data));
  absl::MutexLock lock(&(*count)->mutex_);
  --(*count)->borrowed_;
}

void BorrowCount::WaitUntilNone() {
  absl::MutexLock lock(&mutex_);
  mutex_.Await(absl::Condition(
      +[](int64_t* borrowed) { return *borrowed == 0; }, &borrowed_));
}

absl::StatusOr<std::unique_ptr<Upload>> Upload::Create(absl::Span<const TensorRef> tensors,
                                                       bool digests) {
  std::unique_ptr<Upload> upload(new Upload(tensors));
  upload->offsets_.reserve(tensors.size());
  for (const TensorRef& tensor : tensors) {
    const uint64_t want = tensor.spec.is_alias() ? 0 : tensor.spec.nbytes();
    if (tensor.bytes.size() != want) {
      return MakeError(Reason::kInvalidField,
                       absl::StrCat("tensor \"", tensor.spec.name, "\": ", tensor.bytes.size(),
                                    " bytes were given, its dtype and shape have ", want));
    }
    upload->offsets_.push_back(upload->total_bytes_);
    upload->total_bytes_ += want;
  }
  if (digests) {
    upload->digests_.reserve(tensors.size());
    for (const TensorRef& tensor : tensors) upload->digests_.push_back(Xxh3(tensor.bytes));
  }
  return upload;
}

std::unique_ptr<Upload> Upload::OfTable(absl::Span<const TensorRef> tensors) {
  std::unique_ptr<Upload> upload(new Upload(tensors));
  upload->table_only_ = true;
  upload->offsets_.reserve(tensors.size());
  for (const TensorRef& tensor : tensors) {
    upload->offsets_.push_back(upload->total_bytes_);
    if (!tensor.spec.is_alias()) upload->total_bytes_ += tensor.spec.nbytes();
  }
  return upload;
}

Upload::~Upload() { borrows_->WaitUntilNone(); }

bool Upload::SendTable(const Write& write) const {
  TableSplitter splitter(tensors_.size(), [this](size_t i, v1::TensorInfo* info) {
    TensorSpecToProto(tensors_[i].spec, info);
    if (!tensors_[i].spec.is_alias()) info->set_offset(offsets_[i]);
  });
  // Table and trailer have the same field numbers in LoadPart, StepPart and OptimizerStatePart.
  v1::LoadPart part;
  while (splitter.Next(part.mutable_tensors())) {
    if (!write(SerializeMessage(part))) return false;
  }
  return true;
}

bool Upload::SendChunks(const Write& write) const {
  ChunkEncoder encoder;
  uint64_t offset = 0;
  encoder.Begin(0);
  for (const TensorRef& tensor : tensors_) {
    absl::Span<const uint8_t> rest = tensor.bytes;
    while (!rest.empty()) {
      const auto piece = rest.subspan(0, std::min(rest.size(), chunk_bytes_ - encoder.size()));
      rest.remove_prefix(piece.size());
      if (piece.size() < ChunkEncoder::kCopyBelow) {
        encoder.AddCopied(piece);
      } else {
        encoder.AddBorrowed(piece, &BorrowCount::Release, BorrowCount::Borrow(borrows_));
      }
      if (encoder.size() < chunk_bytes_) continue;
      offset += encoder.size();
      if (!write(encoder.Finish())) return false;
      encoder.Begin(offset);
    }
  }
  return encoder.size() == 0 || write(encoder.Finish());
}

bool Upload::SendTrailer(const Write& write) const {
  v1::LoadPart part;
  part.mutable_trailer()->set_total_bytes(total_bytes_);
  for (size_t i = 0; i < digests_.size(); ++i) {
    if (tensors_[i].spec.is_alias()) continue;
    v1::TensorDigest* digest = part.mutable_trailer()->add_digests();
    digest->set_index(static_cast<uint32_t>(i));
    digest->set_xxh3(DigestToHex(digests_[i]));
  }
  // About 24 bytes each: beyond 4 MiB the server would refuse the message, so it goes unchecked.
  constexpr size_t kMaxTrailerBytes = size_t{3} << 20;
  if (part.ByteSizeLong() > kMaxTrailerBytes) part.mutable_trailer()->clear_digests();
  return write(SerializeMessage(part));
}

absl::Status Upload::Send(const Connection& connection, const std::string& method,
                          const google::protobuf::MessageLite& header_part,
                          google::protobuf::MessageLite* response, Cancellation* cancellation) {
  while (true) {
    absl::Status status = SendOnce(connection, method, header_part, response, cancellation);
    const std::optional<uint64_t> limit = SmallerChunks(status, chunk_bytes_);
    if (!limit) return status;
    chunk_bytes_ = *limit;  // nothing of what was refused has been applied
  }
}

absl::Status Upload::SendOnce(const Connection& connection, const std::string& method,
                              const google::protobuf::MessageLite& header_part,
                              google::protobuf::MessageLite* response,
                              Cancellation* cancellation) const {
  RawCall call(connection, method, cancellation);
  const Write write = [&call](const grpc::ByteBuffer& message) { return call.Write(message); };
  // Where a write fails the call has ended, and the response or status tells why.
  const bool sent = write(SerializeMessage(header_part)) && SendTable(write) &&
                    (table_only_ || (SendChunks(write) && SendTrailer(write)));
  if (sent) call.WritesDone();
  return ReadResponse(&call, response);
}

absl::Status SendHeaderOnly(const Connection& connection, const std::string& method,
                            const google::protobuf::MessageLite& header_part,
                            google::protobuf::MessageLite* response, Cancellation* cancellation) {
  RawCall call(connection, method, cancellation);
  if (call.Write(SerializeMessage(header_part))) call.WritesDone();
  return ReadResponse(&call, response);
}

absl::Status SendInlineTable(const Connection& connection, const std::string& method,
                             const google::protobuf::MessageLite& header_part, size_t count,
                             const std::function<void(size_t, v1::TensorInfo*)>& fill,
                             google::protobuf::MessageLite* response, Cancellation* cancellation) {
  RawCall call(connection, method, cancellation);
  bool open = call.Write(SerializeMessage(header_part));
  TableSplitter splitter(count, fill);
  v1::LoadPart part;
  while (open && splitter.Next(part.mutable_tensors())) open = call.Write(SerializeMessage(part));
  part.mutable_trailer();
  if (open && call.Write(SerializeMessage(part))) call.WritesDone();
  return ReadResponse(&call, response);
}

absl::StatusOr<StepResult> Client::ApplyStep(const std::string& module,
                                             absl::Span<const TensorRef> tensors,
                                             const StepOptions& options,
                                             Cancellation* cancellation) const {
  MS_ASSIGN_OR_RETURN(std::unique_ptr<Upload> upload, Upload::Create(tensors, options.digests));
  v1::StepPart part;
  v1::StepHeader& header = *part.mutable_header();
  header.set_module(module);
  header.set_worker(options.worker);
  header.set_sequence(options.sequence);
  if (options.base) VersionToProto(*options.base, header.mutable_base());
  header.set_weight(options.weight);
  if (options.grad_scale) header.set_grad_scale(*options.grad_scale);
  GroupOverridesToProto(options.overrides, header.mutable_group_overrides());
  header.set_wait(options.wait);
  header.set_ignore_frozen(options.ignore_frozen);
  header.set_accumulate(options.accumulate);
  if (options.accumulated) header.set_accumulated(*options.accumulated);
  header.set_tensor_count(upload->tensor_count());
  header.set_total_bytes(upload->total_bytes());
  const bool named = !options.worker.empty();
  bool maybe_arrived = named && options.resend;
  Backoff backoff(connection_->options());
  while (true) {
    v1::ApplyStepResponse response;
    absl::Status status;
    if (maybe_arrived) {
      status = SendHeaderOnly(*connection_, "ApplyStep", part, &response, cancellation);
      // The server has not seen it: then it needs all of it.
      if (GetReason(status) == Reason::kStepNotSeen) maybe_arrived = false;
    }
    if (!maybe_arrived) {
      response.Clear();
      status = upload->Send(*connection_, "ApplyStep", part, &response, cancellation);
      maybe_arrived = named;
    }
    if (status.ok()) return FromProto(response);
    // A refusal with a hint came before anything was applied; other failures may hide a success.
    const bool safe = named || GetRetryAfter(status).has_value();
    if (!safe || !backoff.WaitBeforeRetry(status, cancellation)) return status;
  }
}

absl::StatusOr<StepResult> Client::ReplayStep(const std::string& module, const std::string& worker,
                                              uint64_t sequence, bool wait,
                                              Cancellation* cancellation) const {
  v1::StepPart part;
  part.mutable_header()->set_module(module);
  part.mutable_header()->set_worker(worker);
  part.mutable_header()->set_sequence(sequence);
  part.mutable_header()->set_wait(wait);
  Backoff backoff(connection_->options());
  while (true) {
    v1::ApplyStepResponse response;
    absl::Status status = SendHeaderOnly(*connection_, "ApplyStep", part, &response, cancellation);
    if (status.ok()) return FromProto(response);
    if (!backoff.WaitBeforeRetry(status, cancellation)) return status;
  }
}

absl::StatusOr<OptimizerInfo> Client::LoadOptimizerState(const std::string& module,
                                                         absl::Span<const TensorRef> tensors,
                                                         const LoadOptimizerStateOptions& options,
                                                         Cancellation* cancellation) const {
  MS_ASSIGN_OR_RETURN(std::unique_ptr<Upload> upload, Upload::Create(tensors, options.digests));
  v1::OptimizerStatePart part;
  v1::OptimizerStateHeader& header = *part.mutable_header();
  header.set_module(module);
  if (options.optimizer) OptimizerConfigToProto(*options.optimizer, header.mutable_optimizer());
  if (options.base) VersionToProto(*options.base, header.mutable_base());
  if (options.step) header.set_step(*options.step);
  header.set_tensor_count(upload->tensor_count());
  header.set_total_bytes(upload->total_bytes());
  Backoff backoff(connection_->options());
  while (true) {
    v1::Optimizer response;
    const absl::Status status =
        upload->Send(*connection_, "LoadOptimizerState", part, &response, cancellation);
    if (status.ok()) return FromProto(response);
    // A refusal with a hint changed nothing; other failures may hide a success.
    if (!GetRetryAfter(status) || !backoff.WaitBeforeRetry(status, cancellation)) return status;
  }
}

absl::StatusOr<LoadResult> Client::LoadStateDict(const std::string& module,
                                                 absl::Span<const TensorRef> tensors,
                                                 const LoadOptions& options,
                                                 Cancellation* cancellation) const {
  MS_ASSIGN_OR_RETURN(
      std::unique_ptr<Upload> upload,
      options.dry_run ? Upload::OfTable(tensors) : Upload::Create(tensors, /*digests=*/true));
  v1::LoadPart part;
  v1::LoadHeader& header = *part.mutable_header();
  header.set_module(module);
  ToProto(options, header.mutable_options());
  header.set_tensor_count(upload->tensor_count());
  header.set_total_bytes(upload->total_bytes());
  const auto call = [&](uint64_t skip_keys) -> absl::StatusOr<LoadResult> {
    header.mutable_options()->set_skip_keys(skip_keys);
    v1::LoadResult response;
    MS_RETURN_IF_ERROR(upload->Send(*connection_, "LoadStateDict", part, &response, cancellation));
    return FromProto(response);
  };
  MS_ASSIGN_OR_RETURN(LoadResult result, call(0));
  if (options.dry_run) MS_RETURN_IF_ERROR(CompleteKeyLists(call, &result));
  return result;
}

}  // namespace modelstate::client
