// The unary methods, and what the server says of itself.
#include "grpc/health/v1/health.grpc.pb.h"
#include "grpc/reflection/v1/reflection.grpc.pb.h"
#include "tests/server/rpc/server_fixture.h"

namespace modelstate {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using Stub = v1::ModelState::Stub;

class UnaryRpcsTest : public ServerTest {
 protected:
  absl::StatusOr<v1::Module> CreateWith(const std::vector<v1::TensorInfo>& tensors) {
    v1::CreateModuleRequest request;
    request.set_name("made");
    for (const v1::TensorInfo& tensor : tensors) *request.mutable_spec()->add_tensors() = tensor;
    return Call(&Stub::CreateModule, request);
  }

  absl::StatusOr<v1::GetTensorResponse> Tensors(const std::string& name, uint64_t first = 0,
                                                uint32_t count = 0) {
    v1::GetTensorRequest request;
    request.set_module("tiny");
    request.set_name(name);
    request.set_first(first);
    request.set_count(count);
    return Call(&Stub::GetTensor, request);
  }
};

TEST_F(UnaryRpcsTest, ServerInfoTellsLimitsFormatsAndOptimizers) {
  CreateTiny();
  const v1::GetServerInfoResponse info = Info();
  EXPECT_FALSE(info.version().empty());
  ASSERT_EQ(info.devices_size(), 1);
  EXPECT_EQ(info.devices(0).name(), "cpu");
  EXPECT_EQ(info.devices(0).memory_limit_bytes(), uint64_t{1} << 30);
  EXPECT_EQ(info.devices(0).memory_used_bytes(), 40);
  EXPECT_EQ(info.limits().push_memory_limit_bytes(), uint64_t{256} << 20);
  EXPECT_THAT(info.checkpoint_formats(),
              ElementsAre("safetensors", "torch zip", "torch legacy", "sharded safetensors",
                          "sharded torch", "modelstate directory"));
  EXPECT_THAT(info.optimizers(), ElementsAre("sgd", "adamw", "adam", "adagrad", "rmsprop", "nadam",
                                             "radam", "adamax", "adadelta", "lion"));
  EXPECT_EQ(info.module_count(), 1);
}

TEST_F(UnaryRpcsTest, ModulesAreMadeFoundListedAndDeleted) {
  const v1::Module made = CreateTiny("b");
  CreateTiny("a");
  CreateTiny("c");
  EXPECT_EQ(made.state(), v1::READY);
  EXPECT_EQ(made.version().number(), 1);
  EXPECT_EQ(made.parameter_count(), 2);
  EXPECT_EQ(made.buffer_count(), 1);
  EXPECT_EQ(made.parameter_elements(), 8);
  EXPECT_EQ(made.total_bytes(), 40);

  v1::ListModulesRequest list;
  list.set_page_size(2);
  auto page = Call(&Stub::ListModules, list);
  ASSERT_TRUE(page.ok()) << page.status();
  ASSERT_EQ(page->modules_size(), 2);
  EXPECT_EQ(page->modules(0).name(), "a");
  EXPECT_EQ(page->modules(1).name(), "b");
  list.set_page_token(page->next_page_token());
  page = Call(&Stub::ListModules, list);
  ASSERT_TRUE(page.ok()) << page.status();
  ASSERT_EQ(page->modules_size(), 1);
  EXPECT_EQ(page->modules(0).name(), "c");
  EXPECT_EQ(page->next_page_token(), "");
  list.set_page_token("not one");
  EXPECT_THAT(Call(&Stub::ListModules, list), FailsWith(Reason::kInvalidField));

  v1::DeleteModuleRequest erase;
  erase.set_module("b");
  EXPECT_TRUE(Call(&Stub::DeleteModule, erase).ok());
  v1::GetModuleRequest get;
  get.set_module("b");
  EXPECT_THAT(Call(&Stub::GetModule, get), FailsWith(Reason::kModuleNotFound));
  EXPECT_THAT(Call(&Stub::DeleteModule, erase), FailsWith(Reason::kModuleNotFound));
}

TEST_F(UnaryRpcsTest, CreateModuleFillsByInitializersAndTies) {
  v1::TensorInfo ones = Tensor("ones", v1::PARAMETER, {2}, v1::BF16);
  ones.mutable_initializer()->set_ones(true);
  v1::TensorInfo constant = Tensor("constant", v1::BUFFER, {3}, v1::I64);
  constant.mutable_initializer()->set_constant(-7);
  v1::TensorInfo tied;
  tied.set_name("tied");
  tied.set_alias_of("ones");
  Create("tiny", {ones, constant, Tensor("zeros", v1::BUFFER, {}), tied});
  EXPECT_THAT(Tensors("tied")->tensor().values().doubles().values(), ElementsAre(1, 1));
  EXPECT_THAT(Tensors("constant")->tensor().values().ints().values(), ElementsAre(-7, -7, -7));
  EXPECT_THAT(Tensors("zeros")->tensor().values().doubles().values(), ElementsAre(0));
}

TEST_F(UnaryRpcsTest, WrongSpecsAreRefusedAndMakeNothing) {
  const auto weight = [](std::vector<int64_t> shape) {
    return Tensor("weight", v1::PARAMETER, shape);
  };
  EXPECT_THAT(CreateWith({WithValues(weight({2}), {1})}), FailsWith(Reason::kShapeMismatch));
  EXPECT_THAT(CreateWith({WithValues(Tensor("n", v1::BUFFER, {1}, v1::U8), {300})}),
              FailsWith(Reason::kNotRepresentable));
  EXPECT_THAT(CreateWith({weight({1}), weight({1})}), FailsWith(Reason::kInvalidField));
  EXPECT_THAT(CreateWith({Tensor("weight", v1::PARAMETER, {1}, v1::I32)}),
              FailsWith(Reason::kInvalidField));
  v1::TensorInfo tied;
  tied.set_name("tied");
  tied.set_alias_of("nobody");
  EXPECT_THAT(CreateWith({tied}), FailsWith(Reason::kUnknownKey));
  const auto large = CreateWith({weight({int64_t{1} << 40})});
  EXPECT_THAT(large, FailsWith(Reason::kDeviceMemory));
  EXPECT_THAT(std::string(large.status().message()), HasSubstr("--device_memory_bytes"));
  v1::CreateModuleRequest bad_name;
  bad_name.set_name("../up");
  EXPECT_THAT(Call(&Stub::CreateModule, bad_name), FailsWith(Reason::kInvalidField));
  EXPECT_EQ(Info().module_count(), 0);
  EXPECT_EQ(Info().devices(0).memory_used_bytes(), 0);

  CreateTiny("made");
  EXPECT_THAT(CreateWith({}), FailsWith(Reason::kModuleExists));
}

TEST_F(UnaryRpcsTest, ListingsAreFilteredAndPaged) {
  CreateTiny();
  v1::ListTensorsRequest request;
  request.set_module("tiny");
  request.set_digests(true);
  request.set_page_size(1);
  auto page = Call(&Stub::ListParameters, request);
  ASSERT_TRUE(page.ok()) << page.status();
  ASSERT_EQ(page->tensors_size(), 1);
  EXPECT_EQ(page->tensors(0).name(), "weight");
  EXPECT_EQ(page->tensors(0).xxh3().size(), 16);
  EXPECT_EQ(page->total_size(), 2);
  const std::string token = page->next_page_token();
  request.set_page_token(token);
  page = Call(&Stub::ListParameters, request);
  ASSERT_TRUE(page.ok()) << page.status();
  EXPECT_EQ(page->tensors(0).name(), "bias");
  EXPECT_EQ(page->next_page_token(), "");

  // Of another method, of another request, and of a schema that is no more.
  EXPECT_THAT(Call(&Stub::ListBuffers, request), FailsWith(Reason::kInvalidField));
  request.mutable_selection()->add_globs("*");
  EXPECT_THAT(Call(&Stub::ListParameters, request), FailsWith(Reason::kInvalidField));
  request.clear_selection();
  v1::SetRequiresGradRequest freeze;
  freeze.set_module("tiny");
  freeze.mutable_selection()->add_names("bias");
  freeze.set_requires_grad(false);
  ASSERT_TRUE(Call(&Stub::SetRequiresGrad, freeze).ok());
  EXPECT_THAT(Call(&Stub::ListParameters, request), FailsWith(Reason::kInvalidField));

  request.clear_page_token();
  request.mutable_selection()->add_names("nothing");
  EXPECT_THAT(Call(&Stub::ListParameters, request), FailsWith(Reason::kTensorNotFound));
}

TEST_F(UnaryRpcsTest, GetTensorShowsElementsAndStatistics) {
  CreateTiny();
  const auto all = Tensors("weight");
  ASSERT_TRUE(all.ok()) << all.status();
  EXPECT_THAT(all->tensor().values().doubles().values(), ElementsAre(1, 2, 3, 4, 5, 6));
  EXPECT_EQ(all->statistics().min(), 1);
  EXPECT_EQ(all->statistics().max(), 6);
  EXPECT_EQ(all->statistics().mean(), 3.5);
  EXPECT_DOUBLE_EQ(all->statistics().norm(), std::sqrt(91.0));
  EXPECT_THAT(Tensors("weight", 4, 2)->tensor().values().doubles().values(), ElementsAre(5, 6));
  EXPECT_THAT(Tensors("weight", 4, 3), FailsWith(Reason::kRangeOutsideLayout));
  EXPECT_THAT(Tensors("weight", UINT64_MAX, 1), FailsWith(Reason::kRangeOutsideLayout));
  EXPECT_THAT(Tensors("nothing"), FailsWith(Reason::kTensorNotFound));
}

TEST_F(UnaryRpcsTest, FreezingTouchesParametersOnly) {
  CreateTiny();
  v1::SetRequiresGradRequest request;
  request.set_module("tiny");
  request.mutable_selection()->add_globs("*");
  request.set_requires_grad(false);
  const auto frozen = Call(&Stub::SetRequiresGrad, request);
  ASSERT_TRUE(frozen.ok()) << frozen.status();
  EXPECT_EQ(frozen->changed(), 2);
  EXPECT_EQ(frozen->version().number(), 2);
  request.mutable_selection()->add_names("running_mean");
  EXPECT_THAT(Call(&Stub::SetRequiresGrad, request), FailsWith(Reason::kNotAParameter));
  ASSERT_TRUE(Configure("tiny", v1::SGD, 1).ok());
  EXPECT_THAT(Push(StepParts("tiny", {{Tensor("bias", v1::GRADIENT, {2}), FloatBytes({1, 1})}})),
              FailsWith(Reason::kParameterFrozen));
}

TEST_F(UnaryRpcsTest, FreezingSaysWhichParametersAndWhatFor) {
  CreateTiny();
  v1::SetRequiresGradRequest request;
  request.set_module("tiny");
  request.set_requires_grad(false);
  const auto no_selection = Call(&Stub::SetRequiresGrad, request);
  EXPECT_THAT(no_selection, FailsWith(Reason::kInvalidField));
  EXPECT_THAT(std::string(no_selection.status().message()), HasSubstr("{\"globs\": [\"*\"]}"));
  request.mutable_selection();
  request.clear_requires_grad();
  const auto no_flag = Call(&Stub::SetRequiresGrad, request);
  EXPECT_THAT(no_flag, FailsWith(Reason::kInvalidField));
  EXPECT_THAT(std::string(no_flag.status().message()), HasSubstr("say true or false"));

  // An empty selection is all parameters.
  request.set_requires_grad(false);
  const auto frozen = Call(&Stub::SetRequiresGrad, request);
  ASSERT_TRUE(frozen.ok()) << frozen.status();
  EXPECT_EQ(frozen->changed(), 2);
}

TEST_F(UnaryRpcsTest, OptimizerIsConfiguredAndShown) {
  CreateTiny();
  v1::GetOptimizerRequest get;
  get.set_module("tiny");
  EXPECT_THAT(Call(&Stub::GetOptimizer, get), FailsWith(Reason::kNoOptimizer));
  const auto configured = Configure("tiny", v1::ADAMW, 0.01);
  ASSERT_TRUE(configured.ok()) << configured.status();
  ASSERT_EQ(configured->groups_size(), 1);
  EXPECT_EQ(configured->groups(0).hyperparameters().beta2(), 0.999);
  const auto shown = Call(&Stub::GetOptimizer, get);
  ASSERT_TRUE(shown.ok()) << shown.status();
  EXPECT_EQ(shown->config().algorithm(), v1::ADAMW);

  EXPECT_THAT(Configure("tiny", v1::ALGORITHM_UNSPECIFIED, 1), FailsWith(Reason::kInvalidField));
  const auto unknown = Configure("tiny", static_cast<v1::Algorithm>(77), 1);
  EXPECT_THAT(unknown, FailsWith(Reason::kInvalidField));
  EXPECT_THAT(std::string(unknown.status().message()),
              HasSubstr("not known here; use one of SGD, ADAMW"));
  EXPECT_THAT(Configure("tiny", v1::SGD, -1), FailsWith(Reason::kInvalidField));
}

TEST_F(UnaryRpcsTest, HealthHasAStatusPerModule) {
  auto health = grpc::health::v1::Health::NewStub(NewChannel());
  const auto check = [&](const std::string& service) {
    grpc::ClientContext context;
    grpc::health::v1::HealthCheckRequest request;
    grpc::health::v1::HealthCheckResponse response;
    request.set_service(service);
    const grpc::Status status = health->Check(&context, request, &response);
    return status.ok() ? static_cast<int>(response.status()) : -1;
  };
  EXPECT_EQ(check(""), grpc::health::v1::HealthCheckResponse::SERVING);
  EXPECT_EQ(check("modelstate.v1.ModelState"), grpc::health::v1::HealthCheckResponse::SERVING);
  EXPECT_EQ(check("tiny"), -1);
  Create("empty", {});
  EXPECT_EQ(check("empty"), grpc::health::v1::HealthCheckResponse::NOT_SERVING);
  CreateTiny();
  EXPECT_EQ(check("tiny"), grpc::health::v1::HealthCheckResponse::SERVING);
  v1::DeleteModuleRequest erase;
  erase.set_module("tiny");
  ASSERT_TRUE(Call(&Stub::DeleteModule, erase).ok());
  EXPECT_EQ(check("tiny"), grpc::health::v1::HealthCheckResponse::NOT_SERVING);
}

TEST_F(UnaryRpcsTest, ReflectionDescribesEveryServiceThatItLists) {
  auto stub = grpc::reflection::v1::ServerReflection::NewStub(NewChannel());
  grpc::ClientContext context;
  auto stream = stub->ServerReflectionInfo(&context);
  grpc::reflection::v1::ServerReflectionRequest request;
  grpc::reflection::v1::ServerReflectionResponse response;
  request.set_list_services("*");
  ASSERT_TRUE(stream->Write(request));
  ASSERT_TRUE(stream->Read(&response));
  std::vector<std::string> services;
  for (const auto& service : response.list_services_response().service()) {
    services.push_back(service.name());
  }
  EXPECT_THAT(services,
              ElementsAre("grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection",
                          "grpc.reflection.v1alpha.ServerReflection", "modelstate.v1.ModelState"));
  for (const std::string& service : services) {
    request.set_file_containing_symbol(service);
    ASSERT_TRUE(stream->Write(request));
    ASSERT_TRUE(stream->Read(&response));
    EXPECT_GT(response.file_descriptor_response().file_descriptor_proto_size(), 0) << service;
  }
  request.set_file_containing_symbol("no.Such");
  ASSERT_TRUE(stream->Write(request));
  ASSERT_TRUE(stream->Read(&response));
  EXPECT_EQ(response.error_response().error_code(), grpc::StatusCode::NOT_FOUND);
  stream->WritesDone();
  EXPECT_TRUE(stream->Finish().ok());
}

}  // namespace
}  // namespace modelstate
