#ifndef MODELSTATE_SERVER_RPC_LISTING_H_
#define MODELSTATE_SERVER_RPC_LISTING_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "common/base/dtype.h"
#include "modelstate/v1/module.pb.h"
#include "server/module/module_instance.h"

namespace modelstate {

// A page ends early once this many bytes of elements were read for its digests and statistics.
inline constexpr uint64_t kMaxPageElementBytes = uint64_t{256} << 20;

// What a ListTensorsRequest asks for, checked. INVALID_FIELD.
struct ListingRequest {
  Selection selection;
  ListView view = ListView::kAll;
  size_t page_size = 0;
  bool digests = false;
  bool statistics = false;
  // Whether answering reads elements, and so belongs on an I/O thread.
  bool reads_elements() const { return digests || statistics; }
};
absl::StatusOr<ListingRequest> ListingRequestFromProto(const v1::ListTensorsRequest& request);

// What page tokens of this listing belong to: the request, the method (`what`), and the module's
// life and schema.
std::string ListingScope(const v1::ListTensorsRequest& request, absl::string_view what,
                         const ModuleVersion& version);

// How many bytes AddElementFacts would read.
uint64_t ElementBytesToRead(const ListingRequest& request, const TensorStorage& storage);

// Digest and statistics of the elements, as far as `request` asks for them.
absl::Status AddElementFacts(const ListingRequest& request, const TensorStorage& storage,
                             DType dtype, v1::TensorInfo* info);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RPC_LISTING_H_
