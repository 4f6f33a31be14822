#ifndef MODELSTATE_CLIENT_UPLOAD_H_
#define MODELSTATE_CLIENT_UPLOAD_H_

#include <google/protobuf/message_lite.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"
#include "client/client.h"
#include "client/connection.h"

namespace modelstate::client {

// Counts the slices by which gRPC holds a caller's bytes. Thread-safe. Internal to the library.
class BorrowCount {
 public:
  // One more; the pointer is the user data of Release.
  static void* Borrow(const std::shared_ptr<BorrowCount>& count);
  static void Release(void* user_data);

  void WaitUntilNone();

 private:
  absl::Mutex mutex_;
  int64_t borrowed_ ABSL_GUARDED_BY(mutex_) = 0;
};

// Tensors on their way to the server, in the order given, which is also that of their bytes.
// Borrows `tensors` and their bytes until it is destroyed, which waits until gRPC has let go of
// them. Thread-compatible. Internal to the library.
class Upload {
 public:
  // INVALID_FIELD when the bytes of a tensor are not as many as its spec says.
  static absl::StatusOr<std::unique_ptr<Upload>> Create(absl::Span<const TensorRef> tensors,
                                                        bool digests);
  // For a dry run: the table alone goes out, and no bytes are needed.
  static std::unique_ptr<Upload> OfTable(absl::Span<const TensorRef> tensors);
  ~Upload();

  uint64_t tensor_count() const { return tensors_.size(); }
  uint64_t total_bytes() const { return total_bytes_; }

  // One call of `method`: `header_part` (a whole message), table, chunks and trailer; then its
  // response. Once more with smaller chunks where the server refuses their size. May be called
  // again after a failure.
  absl::Status Send(const Connection& connection, const std::string& method,
                    const google::protobuf::MessageLite& header_part,
                    google::protobuf::MessageLite* response, Cancellation* cancellation);

 private:
  absl::Status SendOnce(const Connection& connection, const std::string& method,
                        const google::protobuf::MessageLite& header_part,
                        google::protobuf::MessageLite* response, Cancellation* cancellation) const;

  using Write = std::function<bool(const grpc::ByteBuffer&)>;

  explicit Upload(absl::Span<const TensorRef> tensors) : tensors_(tensors) {}
  // Each false when the stream ended.
  bool SendTable(const Write& write) const;
  bool SendChunks(const Write& write) const;
  bool SendTrailer(const Write& write) const;

  const absl::Span<const TensorRef> tensors_;
  std::vector<uint64_t> offsets_;
  std::vector<uint64_t> digests_;  // empty: none are sent
  uint64_t total_bytes_ = 0;
  bool table_only_ = false;
  uint64_t chunk_bytes_ = uint64_t{1} << 20;  // smaller once a server has said so
  const std::shared_ptr<BorrowCount> borrows_ = std::make_shared<BorrowCount>();
};

// A header without tensors, table or trailer, and the response.
absl::Status SendHeaderOnly(const Connection& connection, const std::string& method,
                            const google::protobuf::MessageLite& header_part,
                            google::protobuf::MessageLite* response, Cancellation* cancellation);

// A header, a table of `count` entries whose elements are in the table itself, a trailer, and the
// response. `fill` writes entry i into an empty message, once each.
absl::Status SendInlineTable(const Connection& connection, const std::string& method,
                             const google::protobuf::MessageLite& header_part, size_t count,
                             const std::function<void(size_t, v1::TensorInfo*)>& fill,
                             google::protobuf::MessageLite* response, Cancellation* cancellation);

}  // namespace modelstate::client

#endif  // MODELSTATE_CLIENT_UPLOAD_H_
