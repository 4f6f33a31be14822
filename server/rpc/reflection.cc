#include "server/rpc/reflection.h"

#include <google/protobuf/descriptor.h>
#include <google/protobuf/descriptor.pb.h>

#include <memory>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/wire/part_codec.h"
#include "grpc/health/v1/health.pb.h"
#include "grpc/reflection/v1/reflection.pb.h"
#include "grpc/reflection/v1alpha/reflection.pb.h"
#include "modelstate/v1/service.pb.h"

namespace modelstate {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::DescriptorPool;
using google::protobuf::FieldDescriptor;
using google::protobuf::FileDescriptor;

template <typename Response>
void SetNotFound(const std::string& what, Response* response) {
  response->mutable_error_response()->set_error_code(grpc::StatusCode::NOT_FOUND);
  response->mutable_error_response()->set_error_message(absl::StrCat(what, " is not known here"));
}

// The file and all that it imports, each once, what is asked for first.
template <typename Response>
void AddFile(const FileDescriptor* file, std::set<const FileDescriptor*>* seen,
             Response* response) {
  if (!seen->insert(file).second) return;
  google::protobuf::FileDescriptorProto proto;
  file->CopyTo(&proto);
  file->CopyJsonNameTo(&proto);
  proto.SerializeToString(
      response->mutable_file_descriptor_response()->add_file_descriptor_proto());
  for (int i = 0; i < file->dependency_count(); ++i) AddFile(file->dependency(i), seen, response);
}

template <typename Response>
void AnswerFile(const FileDescriptor* file, const std::string& what, Response* response) {
  if (file == nullptr) return SetNotFound(what, response);
  std::set<const FileDescriptor*> seen;
  AddFile(file, &seen, response);
}

template <typename Request, typename Response>
void Answer(const Request& request, const std::vector<std::string>& services, Response* response) {
  const DescriptorPool& pool = *DescriptorPool::generated_pool();
  response->Clear();
  response->set_valid_host(request.host());
  *response->mutable_original_request() = request;
  switch (request.message_request_case()) {
    case Request::kFileByFilename:
      return AnswerFile(pool.FindFileByName(request.file_by_filename()),
                        absl::StrCat("file ", request.file_by_filename()), response);
    case Request::kFileContainingSymbol:
      return AnswerFile(pool.FindFileContainingSymbol(request.file_containing_symbol()),
                        absl::StrCat("symbol ", request.file_containing_symbol()), response);
    case Request::kFileContainingExtension: {
      const auto& extension = request.file_containing_extension();
      const std::string what = absl::StrCat("extension ", extension.extension_number(), " of ",
                                            extension.containing_type());
      const Descriptor* type = pool.FindMessageTypeByName(extension.containing_type());
      const FieldDescriptor* field =
          type == nullptr ? nullptr
                          : pool.FindExtensionByNumber(type, extension.extension_number());
      return AnswerFile(field == nullptr ? nullptr : field->file(), what, response);
    }
    case Request::kAllExtensionNumbersOfType: {
      const std::string& name = request.all_extension_numbers_of_type();
      const Descriptor* type = pool.FindMessageTypeByName(name);
      if (type == nullptr) return SetNotFound(absl::StrCat("type ", name), response);
      response->mutable_all_extension_numbers_response()->set_base_type_name(name);
      std::vector<const FieldDescriptor*> extensions;
      pool.FindAllExtensions(type, &extensions);
      for (const FieldDescriptor* field : extensions) {
        response->mutable_all_extension_numbers_response()->add_extension_number(field->number());
      }
      return;
    }
    case Request::kListServices:
      for (const std::string& name : services) {
        response->mutable_list_services_response()->add_service()->set_name(name);
      }
      return;
    case Request::MESSAGE_REQUEST_NOT_SET:
      response->mutable_error_response()->set_error_code(grpc::StatusCode::INVALID_ARGUMENT);
      response->mutable_error_response()->set_error_message("the request asks for nothing");
      return;
  }
}

template <typename Request, typename Response>
class ReflectionHandler final : public CallHandler {
 public:
  ReflectionHandler(Call* call, std::shared_ptr<const std::vector<std::string>> services)
      : call_(*call), services_(std::move(services)) {}

 private:
  void OnMessage(grpc::ByteBuffer* message) override {
    Request request;
    if (absl::Status status = ParseRequest(message, &request); !status.ok()) {
      return call_.Finish(status);
    }
    Response response;
    Answer(request, *services_, &response);
    call_.Write(SerializeMessage(response));
  }
  void OnEnd() override { call_.Finish(absl::OkStatus()); }
  void OnWritten(bool ok) override {
    if (!ok) return call_.Finish(call_.GoneStatus());
    call_.Read();
  }

  Call& call_;
  const std::shared_ptr<const std::vector<std::string>> services_;
};

template <typename Request, typename Response>
Call::Method ReflectionMethod(const std::string& service,
                              std::shared_ptr<const std::vector<std::string>> services) {
  Call::Method method;
  method.path = absl::StrCat("/", service, "/ServerReflectionInfo");
  method.admitted = false;
  method.make_handler = [services = std::move(services)](Call* call) {
    return RefPtr<CallHandler>::Adopt(new ReflectionHandler<Request, Response>(call, services));
  };
  return method;
}

// Makes the linker keep the descriptors of services that are served without them.
void LinkServiceDescriptors() {
  grpc::health::v1::HealthCheckRequest::descriptor();
  // service.proto has no messages, so nothing else refers to the object file with its descriptor.
  [[maybe_unused]] static const void* volatile keep =
      &descriptor_table_modelstate_2fv1_2fservice_2eproto;
}

}  // namespace

std::vector<Call::Method> ReflectionMethods(std::vector<std::string> services) {
  LinkServiceDescriptors();
  const auto names = std::make_shared<const std::vector<std::string>>(std::move(services));
  return {ReflectionMethod<grpc::reflection::v1::ServerReflectionRequest,
                           grpc::reflection::v1::ServerReflectionResponse>(
              "grpc.reflection.v1.ServerReflection", names),
          ReflectionMethod<grpc::reflection::v1alpha::ServerReflectionRequest,
                           grpc::reflection::v1alpha::ServerReflectionResponse>(
              "grpc.reflection.v1alpha.ServerReflection", names)};
}

}  // namespace modelstate
