#include <vector>

#include "common/base/status.h"
#include "server/rpc/module_convert.h"
#include "server/rpc/page_token.h"
#include "server/rpc/service.h"

namespace modelstate {

void ModelStateService::ListCheckpoints(UnaryCall* call, const v1::ListCheckpointsRequest* request,
                                        v1::ListCheckpointsResponse* response) {
  call->AnswerOnIoThread([this, request, response]() -> absl::Status {
    MS_ASSIGN_OR_RETURN(const size_t page_size, PageSize(request->page_size(), 100, 1000));
    v1::ListCheckpointsRequest listing = *request;
    listing.clear_page_size();
    listing.clear_page_token();
    const std::string scope = PageScope(listing, "checkpoints");
    ListOptions options;
    MS_ASSIGN_OR_RETURN(options.after, DecodePageToken(scope, request->page_token()));
    options.limit = page_size;
    options.verify = request->verify();
    options.recursive = request->recursive();
    const std::string directory = request->directory().empty() ? "." : request->directory();
    // One more than the page tells whether there is another; it must not be verified for that.
    MS_ASSIGN_OR_RETURN(std::vector<CheckpointInfo> found,
                        runtime_.checkpoints->List(directory, options));
    for (const CheckpointInfo& info : found) CheckpointToProto(info, response->add_checkpoints());
    if (found.size() == page_size) {
      options.after = found.back().path;
      options.limit = 1;
      options.verify = false;
      MS_ASSIGN_OR_RETURN(const std::vector<CheckpointInfo> more,
                          runtime_.checkpoints->List(directory, options));
      if (!more.empty()) response->set_next_page_token(EncodePageToken(scope, found.back().path));
    }
    return absl::OkStatus();
  });
}

void ModelStateService::DeleteCheckpoint(UnaryCall* call,
                                         const v1::DeleteCheckpointRequest* request,
                                         v1::DeleteCheckpointResponse*) {
  call->AnswerOnIoThread([this, request] { return runtime_.checkpoints->Delete(request->path()); });
}

}  // namespace modelstate
