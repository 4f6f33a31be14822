#include "server/rpc/listing.h"

#include "absl/strings/str_cat.h"
#include "common/base/digest.h"
#include "common/base/status.h"
#include "common/wire/convert.h"
#include "server/rpc/page_token.h"
#include "server/rpc/tensor_statistics.h"

namespace modelstate {

absl::StatusOr<ListingRequest> ListingRequestFromProto(const v1::ListTensorsRequest& request) {
  ListingRequest result;
  MS_ASSIGN_OR_RETURN(result.selection, SelectionFromProto(request.selection()));
  MS_ASSIGN_OR_RETURN(result.page_size, PageSize(request.page_size(), 1000, 10000));
  if (result.selection.float_dtype) {
    return MakeError(Reason::kInvalidField,
                     "selection.float_dtype casts what is read; a listing shows the module's own "
                     "dtypes: leave it out",
                     {{"field", "selection.float_dtype"}});
  }
  if (!v1::ListView_IsValid(request.view())) {
    return MakeError(Reason::kInvalidField,
                     absl::StrCat("view ", static_cast<int>(request.view()),
                                  " is not known here; use NAMED or STATE_DICT, or leave it out"),
                     {{"field", "view"}});
  }
  result.view = static_cast<ListView>(request.view());
  result.digests = request.digests();
  result.statistics = request.statistics();
  return result;
}

std::string ListingScope(const v1::ListTensorsRequest& request, absl::string_view what,
                         const ModuleVersion& version) {
  v1::ListTensorsRequest listing = request;
  listing.clear_page_size();
  listing.clear_page_token();
  return PageScope(listing, absl::StrCat(what, " ", version.version.incarnation, " ",
                                         version.schema->revision()));
}

uint64_t ElementBytesToRead(const ListingRequest& request, const TensorStorage& storage) {
  const bool reads = request.statistics || (request.digests && !storage.CachedDigest());
  return reads ? storage.size() : 0;
}

absl::Status AddElementFacts(const ListingRequest& request, const TensorStorage& storage,
                             DType dtype, v1::TensorInfo* info) {
  if (request.digests) {
    MS_ASSIGN_OR_RETURN(const uint64_t xxh3, storage.Digest());
    info->set_xxh3(DigestToHex(xxh3));
  }
  if (!request.statistics) return absl::OkStatus();
  return StatisticsToProto(storage, dtype, info->mutable_statistics());
}

}  // namespace modelstate
