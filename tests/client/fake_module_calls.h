#ifndef MODELSTATE_TESTS_CLIENT_FAKE_MODULE_CALLS_H_
#define MODELSTATE_TESTS_CLIENT_FAKE_MODULE_CALLS_H_

#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/base/tensor_spec.h"
#include "common/wire/convert.h"
#include "common/wire/status_mapping.h"
#include "modelstate/v1/service.grpc.pb.h"

namespace modelstate {

// The calls of FakeServer about modules: they keep what arrived.
class FakeModuleCalls : public v1::ModelState::Service {
 public:
  std::vector<TensorSpec> specs;

  // What arrived.
  std::vector<v1::CreateModuleRequest> creates;
  std::vector<v1::LoadHeader> load_headers;
  std::vector<v1::TensorInfo> load_table;
  bool load_trailer = false;
  std::vector<std::string> deletes;
  v1::MoveModuleRequest move;
  v1::GetTensorRequest get_tensor;
  v1::ListTensorsRequest list;
  bool refuse_loads = false;
  std::function<void()> on_load;  // when the header of a load has arrived

  v1::ModuleSpec spec;  // GetModuleSpec gives it two tensors a page
  // A dry run answers with these, two of each list a message.
  std::vector<std::string> missing_keys;
  std::vector<std::string> unexpected_keys;

 protected:
  using Context = grpc::ServerContext;

  grpc::Status CreateModule(Context*, const v1::CreateModuleRequest* request,
                            v1::Module* response) override {
    creates.push_back(*request);
    response->set_name(request->name());
    response->set_state(request->spec().tensors().empty() ? v1::EMPTY : v1::READY);
    return grpc::Status::OK;
  }
  grpc::Status DeleteModule(Context*, const v1::DeleteModuleRequest* request,
                            v1::DeleteModuleResponse*) override {
    deletes.push_back(request->module());
    return grpc::Status::OK;
  }
  grpc::Status GetModuleSpec(Context*, const v1::GetModuleSpecRequest* request,
                             v1::GetModuleSpecResponse* response) override {
    int i = request->page_token().empty() ? 0 : std::stoi(request->page_token());
    if (i == 0) *response->mutable_spec()->mutable_metadata() = spec.metadata();
    for (; i < spec.tensors_size() && response->spec().tensors_size() < 2; ++i) {
      *response->mutable_spec()->add_tensors() = spec.tensors(i);
    }
    if (i < spec.tensors_size()) response->set_next_page_token(absl::StrCat(i));
    return grpc::Status::OK;
  }
  grpc::Status MoveModule(Context*, const v1::MoveModuleRequest* request,
                          v1::Module* response) override {
    move = *request;
    response->set_device(request->device());
    return grpc::Status::OK;
  }
  // Versions 30 to 1, at most seven on a page.
  grpc::Status ListVersions(Context*, const v1::ListVersionsRequest* request,
                            v1::ListVersionsResponse* response) override {
    uint64_t number = request->page_token().empty() ? 30 : std::stoul(request->page_token());
    const int page = std::min(7, request->page_size());
    for (; number > 0 && response->versions_size() < page; --number) {
      v1::VersionInfo* info = response->add_versions();
      VersionToProto({77, number}, info->mutable_version());
      info->set_mutation(v1::BUFFER_WRITE);
      info->set_detail("statistics.safetensors");
      info->set_held(number == 30);
    }
    if (number > 0) response->set_next_page_token(absl::StrCat(number));
    return grpc::Status::OK;
  }
  grpc::Status GetTensor(Context*, const v1::GetTensorRequest* request,
                         v1::GetTensorResponse* response) override {
    get_tensor = *request;
    TensorSpecToProto(specs[2], response->mutable_tensor());
    response->mutable_tensor()->mutable_values()->mutable_doubles()->add_values(0.5);
    response->mutable_statistics()->set_nonfinite(3);
    response->add_slice_shape(4);
    return grpc::Status::OK;
  }
  grpc::Status LoadStateDict(Context*, grpc::ServerReader<v1::LoadPart>* reader,
                             v1::LoadResult* response) override {
    load_table.clear();
    load_trailer = false;
    v1::LoadPart part;
    while (reader->Read(&part)) {
      if (part.has_header()) {
        load_headers.push_back(part.header());
        if (on_load) on_load();
      }
      for (const v1::TensorInfo& info : part.tensors().tensors()) load_table.push_back(info);
      load_trailer |= part.has_trailer();
    }
    if (refuse_loads) return ToGrpcStatus(MakeError(Reason::kDeviceMemory, "no memory"));
    const uint64_t skip = load_headers.back().options().skip_keys();
    for (uint64_t i = skip; i < std::min<uint64_t>(skip + 2, missing_keys.size()); ++i) {
      response->add_missing_keys(missing_keys[i]);
    }
    for (uint64_t i = skip; i < std::min<uint64_t>(skip + 2, unexpected_keys.size()); ++i) {
      response->add_unexpected_keys(unexpected_keys[i]);
    }
    response->set_missing_count(missing_keys.size());
    response->set_unexpected_count(unexpected_keys.size());
    return grpc::Status::OK;
  }
  grpc::Status ListOptimizerState(Context*, const v1::ListTensorsRequest* request,
                                  v1::ListTensorsResponse* response) override {
    list = *request;
    v1::TensorInfo* info = response->add_tensors();
    TensorSpecToProto(specs[1], info);
    info->set_kind(v1::OPTIMIZER_STATE);
    info->set_slot("exp_avg");
    response->set_total_size(1);
    return grpc::Status::OK;
  }
};

}  // namespace modelstate

#endif  // MODELSTATE_TESTS_CLIENT_FAKE_MODULE_CALLS_H_
