#include <algorithm>
#include <string>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/wire/convert.h"
#include "server/rpc/page_token.h"
#include "server/rpc/service.h"

namespace modelstate {

void ModelStateService::GetModuleSpec(UnaryCall* call, const v1::GetModuleSpecRequest* request,
                                      v1::GetModuleSpecResponse* response) {
  call->AnswerNow([&]() -> absl::Status {
    MS_ASSIGN_OR_RETURN(std::shared_ptr<ModuleInstance> module,
                        runtime_.FindModule(request->module()));
    MS_ASSIGN_OR_RETURN(const size_t page_size, PageSize(request->page_size(), 1000, 10000));
    const VersionRef version = module->Current();
    const ModuleSchema& schema = *version->schema;
    v1::GetModuleSpecRequest listing;
    listing.set_module(request->module());
    const std::string scope = PageScope(
        listing, absl::StrCat("spec ", version->version.incarnation, " ", schema.revision()));
    MS_ASSIGN_OR_RETURN(const uint64_t first, DecodePageIndex(scope, request->page_token()));
    v1::ModuleSpec* spec = response->mutable_spec();
    size_t bytes = 0;
    if (first == 0 && version->metadata != nullptr) {
      for (const auto& [key, value] : *version->metadata) (*spec->mutable_metadata())[key] = value;
      bytes = spec->ByteSizeLong();
    }
    uint64_t next = first;
    for (; next < schema.size() && next - first < page_size && bytes < kMaxPageBytes; ++next) {
      v1::TensorInfo* info = spec->add_tensors();
      TensorSpecToProto(schema.spec(static_cast<uint32_t>(next)), info);
      info->clear_nbytes();  // follows from the rest
      bytes += info->ByteSizeLong();
    }
    if (next < schema.size()) {
      response->set_next_page_token(EncodePageToken(scope, absl::StrCat(next)));
    }
    response->set_total_size(schema.size());
    VersionToProto(version->version, response->mutable_version());
    return absl::OkStatus();
  });
}

}  // namespace modelstate
