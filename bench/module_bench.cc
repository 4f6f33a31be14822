// What listings and load errors cost, and that it does not grow with the module. Everything is
// asked for over a real channel, interleaved with GetServerInfo, the cheapest call there is; ratios
// are to that.
//
//   build/release/bin/module_bench [--tensors=100000] [--modules=1000] [--rounds=41]
//   [--server=PATH]

#include <grpcpp/grpcpp.h>

#include <functional>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "bench/server_process.h"
#include "client/client.h"
#include "common/wire/status_mapping.h"
#include "modelstate/v1/service.grpc.pb.h"

ABSL_FLAG(int, tensors, 100000, "tensors of the large module; the small one has a hundredth");
ABSL_FLAG(int, modules, 1000, "modules of 100 tensors each");
ABSL_FLAG(int, rounds, 41, "rounds, each measuring every row once");
ABSL_FLAG(std::string, server, "", "path of modelstate-server; default: beside this program");

namespace modelstate {
namespace {

using Stub = v1::ModelState::Stub;

void Check(const grpc::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.error_message().c_str());
  std::exit(1);
}

// A module of small tensors, half of them buffers.
void Fill(const Client& client, const std::string& name, int tensors) {
  static const std::vector<float> elements = {1, 2, 3, 4};
  std::vector<client::TensorRef> state(static_cast<size_t>(tensors));
  for (int i = 0; i < tensors; ++i) {
    client::TensorRef& tensor = state[static_cast<size_t>(i)];
    tensor.spec.name = absl::StrCat("layers.", i / 2, i % 2 == 0 ? ".weight" : ".running_mean");
    tensor.spec.dtype = DType::kF32;
    tensor.spec.shape = OrDie(Shape::Create({4}));
    tensor.bytes = absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(elements.data()), 16);
  }
  OrDie(client.CreateModule(name));
  OrDie(client.LoadStateDict(name, state));
}

// The token of the page that begins in the middle and of the last one, by walking there.
std::vector<std::string> Tokens(Stub& stub, const std::string& module, int page_size) {
  std::vector<std::string> tokens = {""};
  v1::ListTensorsRequest request;
  request.set_module(module);
  request.set_page_size(page_size);
  for (;;) {
    grpc::ClientContext context;
    v1::ListTensorsResponse response;
    Check(stub.ListParameters(&context, request, &response));
    if (response.next_page_token().empty()) break;
    tokens.push_back(response.next_page_token());
    request.set_page_token(response.next_page_token());
  }
  return {tokens.front(), tokens[tokens.size() / 2], tokens.back()};
}

struct Row {
  std::string name;
  std::function<void()> call;
  std::vector<double> seconds;
};

void Run(const std::string& server_binary) {
  const ServerProcess server(server_binary);
  const Client client = OrDie(Client::Connect(server.target()));
  const auto stub = v1::ModelState::NewStub(
      grpc::CreateChannel(server.target(), grpc::InsecureChannelCredentials()));
  const int large = absl::GetFlag(FLAGS_tensors);
  const int small = large / 100;
  const int modules = absl::GetFlag(FLAGS_modules);
  constexpr int kPage = 100;
  Fill(client, "large", large);
  Fill(client, "small", small);
  // Names that sort before and after, so that the registry has to look.
  for (int i = 0; i < modules; ++i) Fill(client, absl::StrCat("many", i), 100);

  std::vector<Row> rows;
  rows.push_back({"GetServerInfo",
                  [&] {
                    grpc::ClientContext context;
                    v1::GetServerInfoResponse response;
                    Check(stub->GetServerInfo(&context, {}, &response));
                  },
                  {}});
  const char* places[] = {"first", "middle", "last"};
  for (const auto& [module, size] :
       {std::pair<std::string, int>{"small", small}, {"large", large}}) {
    const std::vector<std::string> tokens = Tokens(*stub, module, kPage);
    for (size_t i = 0; i < tokens.size(); ++i) {
      v1::ListTensorsRequest request;
      request.set_module(module);
      request.set_page_size(kPage);
      request.set_page_token(tokens[i]);
      rows.push_back({absl::StrCat(places[i], " page of ", size),
                      [&stub, request] {
                        grpc::ClientContext context;
                        v1::ListTensorsResponse response;
                        Check(stub->ListParameters(&context, request, &response));
                      },
                      {}});
    }
    v1::ListTensorsRequest request;
    request.set_module(module);
    request.set_page_size(kPage);
    request.mutable_selection()->add_globs("*weight");
    rows.push_back({absl::StrCat("page by glob of ", size),
                    [&stub, request] {
                      grpc::ClientContext context;
                      v1::ListTensorsResponse response;
                      Check(stub->ListParameters(&context, request, &response));
                    },
                    {}});
  }
  rows.push_back({absl::StrCat("100 of ", modules + 2, " modules"),
                  [&] {
                    grpc::ClientContext context;
                    v1::ListModulesRequest request;
                    request.set_page_size(kPage);
                    v1::ListModulesResponse response;
                    Check(stub->ListModules(&context, request, &response));
                  },
                  {}});
  rows.push_back({absl::StrCat("GetModule, one of ", modules + 2),
                  [&] {
                    grpc::ClientContext context;
                    v1::GetModuleRequest request;
                    request.set_module("many500");
                    v1::Module response;
                    Check(stub->GetModule(&context, request, &response));
                  },
                  {}});
  size_t error_bytes = 0;
  for (const auto& [module, size] :
       {std::pair<std::string, int>{"small", small}, {"large", large}}) {
    rows.push_back({absl::StrCat("strict load, ", size, " keys missing"),
                    [&, module = module] {
                      const absl::StatusOr<client::LoadResult> result =
                          client.LoadStateDict(module, {});
                      if (result.ok()) std::exit(1);
                      error_bytes = result.status().message().size();
                    },
                    {}});
  }

  for (int round = 0; round < absl::GetFlag(FLAGS_rounds); ++round) {
    for (Row& row : rows) {
      const double begin = Now();
      row.call();
      row.seconds.push_back(Now() - begin);
    }
  }
  std::printf("%-34s %12s %8s\n", "", "microseconds", "ratio");
  for (const Row& row : rows) {
    std::printf("%-34s %12.0f %8.2f\n", row.name.c_str(), 1e6 * Median(row.seconds),
                Median(row.seconds) / Median(rows.front().seconds));
  }
  std::printf("text of the last error: %zu bytes\n", error_bytes);
}

}  // namespace
}  // namespace modelstate

int main(int argc, char** argv) {
  absl::ParseCommandLine(argc, argv);
  modelstate::Run(modelstate::ServerBinary(absl::GetFlag(FLAGS_server), argv[0]));
  return 0;
}
