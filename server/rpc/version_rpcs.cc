#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/wire/convert.h"
#include "server/rpc/page_token.h"
#include "server/rpc/service.h"

namespace modelstate {
namespace {

void RecordToProto(const VersionRecord& record, v1::VersionInfo* proto) {
  VersionToProto(record.version, proto->mutable_version());
  proto->set_mutation(static_cast<v1::MutationKind>(record.mutation));
  TimeToProto(record.time, proto->mutable_time());
  proto->set_step(record.step);
  proto->set_schema_revision(record.schema_revision);
  proto->set_changed_parameters(record.changed_parameters);
  proto->set_changed_buffers(record.changed_buffers);
  proto->set_changed_bytes(record.changed_bytes);
  for (const std::string& name : *record.tensors) proto->add_tensors(name);
  proto->set_detail(record.detail);
}

}  // namespace

void ModelStateService::ListVersions(UnaryCall* call, const v1::ListVersionsRequest* request,
                                     v1::ListVersionsResponse* response) {
  call->AnswerNow([&]() -> absl::Status {
    MS_ASSIGN_OR_RETURN(std::shared_ptr<ModuleInstance> module,
                        runtime_.FindModule(request->module()));
    MS_ASSIGN_OR_RETURN(const size_t page_size, PageSize(request->page_size(), 100, 1000));
    v1::ListVersionsRequest fixed;
    fixed.set_module(request->module());
    // New versions come before a page that was shown: a token is good for the module's whole life.
    const std::string scope =
        PageScope(fixed, absl::StrCat("versions ", module->Current()->version.incarnation));
    MS_ASSIGN_OR_RETURN(const uint64_t before, DecodePageIndex(scope, request->page_token()));
    const std::vector<VersionRecord> records = module->History(before, page_size + 1);
    size_t count = 0;
    size_t bytes = 0;  // names may be long
    for (; count < records.size() && count < page_size && bytes < kMaxPageBytes; ++count) {
      v1::VersionInfo* info = response->add_versions();
      RecordToProto(records[count], info);
      info->set_held(module->IsHeld(records[count].version.number));
      bytes += info->ByteSizeLong();
    }
    if (records.size() > count) {
      response->set_next_page_token(
          EncodePageToken(scope, absl::StrCat(records[count - 1].version.number)));
    }
    return absl::OkStatus();
  });
}

}  // namespace modelstate
