// Transfers through a real server process against their baselines, in turns within one run:
// raw TCP, and the same service with generated stubs. One row of the table at a time; bench/run.sh
// runs all and makes the table. Every fetch is compared with what the server was given.
//
//   build/release/bin/transfer_bench --row=fetch [--bytes=1073741824] [--rounds=7] [--json=FILE]
//   --row: fetch, push, file, fanout, small, memory, unary
//   [--server=PATH] [--python="PYTHON bench/stub_server.py"]

#include <grpcpp/grpcpp.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "bench/payload.h"
#include "bench/process_stats.h"
#include "bench/raw_tcp.h"
#include "bench/server_process.h"
#include "bench/stub_transfer.h"
#include "bench/turns.h"
#include "client/client.h"
#include "client/files/fetch_to_file.h"
#include "client/raw_call.h"
#include "common/wire/part_codec.h"
#include "common/wire/transport_tuning.h"

ABSL_FLAG(std::string, row, "fetch", "what to measure");
ABSL_FLAG(uint64_t, bytes, uint64_t{1} << 30, "payload");
ABSL_FLAG(int, rounds, 7, "rounds, each measuring everything of the row once");
ABSL_FLAG(std::string, only, "", "measure this alone, without its baselines: for a profiler");
ABSL_FLAG(std::string, json, "", "write what each round measured to this file");
ABSL_FLAG(std::string, server, "", "path of modelstate-server; default: beside this program");
ABSL_FLAG(std::string, python, "",
          "command that serves a file with stubs from Python; the file is its last argument");
ABSL_FLAG(std::string, folder, "/dev/shm", "where files are fetched to: a tmpfs");
ABSL_FLAG(std::string, receive, "",
          "fetch from this server and print the memory beyond the payload");

namespace modelstate {
namespace {

constexpr char kModule[] = "bench";

// The executables, and what all rows have in common.
struct Setup {
  std::string self;
  std::string server;
  std::string stub_server;
};

double Time(const std::function<void()>& run) {
  const double begin = Now();
  run();
  return Now() - begin;
}

void Fill(const Client& client, const Payload& payload, const std::string& module = kModule) {
  OrDie(client.CreateModule(module));
  OrDie(client.LoadStateDict(module, payload.Tensors(TensorKind::kParameter)));
}

// Into the memory of `state`, as the baselines receive into memory that is there.
double CheckedFetch(const Client& client, const Payload& payload, bool digests,
                    client::StateDict* state, const std::string& module = kModule) {
  client::FetchOptions options;
  options.digests = digests;
  const double begin = Now();
  OrDie(client.FetchInto(module, state, options));
  const double seconds = Now() - begin;
  payload.Check(state->data(), "fetch");
  return seconds;
}

// With the sockets of our own client: what is compared is how bytes are handled.
std::unique_ptr<v1::ModelState::Stub> StubOf(const std::string& target) {
  grpc::ChannelArguments arguments;
  SetTransportProfile(TransportProfile::kLan, &arguments);
  return v1::ModelState::NewStub(
      grpc::CreateCustomChannel(target, grpc::InsecureChannelCredentials(), arguments));
}

// A copy of the payload in a file, for a server in another language.
class PayloadFile {
 public:
  explicit PayloadFile(const Payload& payload)
      : path_(absl::StrCat(absl::GetFlag(FLAGS_folder), "/modelstate-bench-", getpid(), ".bin")) {
    std::ofstream(path_, std::ios::binary)
        .write(reinterpret_cast<const char*>(payload.bytes().data()),
               static_cast<std::streamsize>(payload.bytes().size()));
  }
  ~PayloadFile() { unlink(path_.c_str()); }
  const std::string& path() const { return path_; }

 private:
  const std::string path_;
};

uint64_t RunFetch(const Setup& setup, Turns& turns) {
  const Payload payload(MixedTensors(absl::GetFlag(FLAGS_bytes)));
  RawTcp tcp(payload.bytes().size(), nullptr, payload.bytes().data());  // forks: before any thread
  const ServerProcess server(setup.server);
  const ServerProcess stub_server(std::vector<std::string>{
      setup.stub_server, absl::StrCat("--bytes=", absl::GetFlag(FLAGS_bytes))});
  std::optional<PayloadFile> file;
  std::optional<ServerProcess> python;
  if (!absl::GetFlag(FLAGS_python).empty()) {
    file.emplace(payload);
    std::vector<std::string> command = absl::StrSplit(absl::GetFlag(FLAGS_python), ' ');
    command.push_back(file->path());
    python.emplace(command);
  }
  const Client client = ConnectNear(server.target());
  Fill(client, payload);
  std::vector<uint8_t> destination(payload.bytes().size(), 1);
  const auto from_stubs = [&](const std::string& target) {
    return [&, stub = std::shared_ptr<v1::ModelState::Stub>(StubOf(target))] {
      const double seconds = Time([&] { StubFetch(*stub, kModule, absl::MakeSpan(destination)); });
      payload.Check(destination, "stubs");
      return seconds;
    };
  };
  turns.Add("raw TCP", [&] {
    const double seconds = tcp.Fetch(destination.data());
    payload.Check(destination, "raw TCP");
    return seconds;
  });
  client::StateDict state;
  turns.Add("fetch, verified", [&] { return CheckedFetch(client, payload, true, &state); });
  turns.Add("fetch, no digests", [&] { return CheckedFetch(client, payload, false, &state); });
  turns.Add("fetch, new memory", [&] {
    client::StateDict fresh;
    return CheckedFetch(client, payload, true, &fresh);
  });
  turns.Add("C++ stubs", from_stubs(stub_server.target()));
  if (python) turns.Add("Python stubs", from_stubs(python->target()));
  turns.Run(absl::GetFlag(FLAGS_rounds), absl::GetFlag(FLAGS_only));
  return payload.bytes().size();
}

// A push that waits in a round for a second worker has been taken in whole and not stepped.
uint64_t RunPush(const Setup& setup, Turns& turns) {
  const Payload payload(MixedTensors(absl::GetFlag(FLAGS_bytes)));
  RawTcp tcp(payload.bytes().size());
  const ServerProcess server(setup.server);
  const Client client = ConnectNear(server.target());
  client::OptimizerConfig optimizer;
  optimizer.algorithm = client::Algorithm::kSgd;
  optimizer.hyperparameters.lr = 1;
  optimizer.hyperparameters.maximize = true;
  OrDie(client.CreateModule("stepped", payload.specs()));
  OrDie(client.ConfigureOptimizer("stepped", optimizer));
  optimizer.rounds.quorum = 2;
  OrDie(client.CreateModule("waiting", payload.specs()));
  OrDie(client.ConfigureOptimizer("waiting", optimizer));
  const std::vector<client::TensorRef> gradients = payload.Tensors(TensorKind::kGradient);
  client::StepOptions step;
  step.digests = false;
  client::StepOptions first_worker = step;
  client::StepOptions second_worker = step;
  first_worker.worker = std::string("a");
  second_worker.worker = std::string("b");
  bool first = true;
  turns.Add("raw TCP", [&] { return tcp.Push(payload.bytes().data()); });
  turns.Add("push", [&] {
    ++first_worker.sequence;
    ++second_worker.sequence;
    const double seconds =
        Time([&] { OrDie(client.ApplyStep("waiting", gradients, first_worker)); });
    OrDie(client.ApplyStep("waiting", absl::MakeSpan(gradients).first(1), second_worker));
    return seconds;
  });
  turns.Add("push and SGD step", [&] {
    const double seconds = Time([&] { OrDie(client.ApplyStep("stepped", gradients, step)); });
    // From zero a step of ascent with lr 1 leaves the gradients.
    client::StateDict state;
    if (std::exchange(first, false)) CheckedFetch(client, payload, true, &state, "stepped");
    return seconds;
  });
  turns.Run(absl::GetFlag(FLAGS_rounds), absl::GetFlag(FLAGS_only));
  return payload.bytes().size();
}

uint64_t RunFile(const Setup& setup, Turns& turns) {
  const Payload payload(MixedTensors(absl::GetFlag(FLAGS_bytes)));
  RawTcp tcp(payload.bytes().size(), nullptr, payload.bytes().data());
  const ServerProcess server(setup.server);
  const Client client = ConnectNear(server.target());
  Fill(client, payload);
  const std::string path =
      absl::StrCat(absl::GetFlag(FLAGS_folder), "/modelstate-bench-", getpid(), ".safetensors");
  turns.Add("raw TCP to file", [&] {
    const double seconds = tcp.FetchToFile(path);
    unlink(path.c_str());
    return seconds;
  });
  turns.Add("fetch to file", [&] {
    const double seconds = Time([&] { OrDie(client::FetchToFile(client, kModule, path)); });
    std::ifstream file(path, std::ios::binary | std::ios::ate);
    std::vector<uint8_t> data(payload.bytes().size());
    file.seekg(-static_cast<std::streamoff>(data.size()), std::ios::end);
    file.read(reinterpret_cast<char*>(data.data()), static_cast<std::streamsize>(data.size()));
    payload.Check(data, "file");
    unlink(path.c_str());
    return seconds;
  });
  turns.Run(absl::GetFlag(FLAGS_rounds), absl::GetFlag(FLAGS_only));
  return payload.bytes().size();
}

// A quarter of the payload: each reader has its own copy.
uint64_t RunFanout(const Setup& setup, Turns& turns) {
  constexpr int kReaders = 8;
  const Payload payload(MixedTensors(absl::GetFlag(FLAGS_bytes) / 4));
  const ServerProcess server(setup.server);
  const Client client = ConnectNear(server.target());
  Fill(client, payload);
  std::vector<Client> readers;
  for (int i = 0; i < kReaders; ++i) readers.push_back(ConnectNear(server.target()));
  const auto measured = [&](const std::string& name, const std::function<void()>& run) {
    return [&turns, &server, name, run] {
      const double cpu = CpuSeconds(server.pid());
      const double seconds = Time(run);
      turns.Record(absl::StrCat(name, ", server CPU"), CpuSeconds(server.pid()) - cpu);
      return seconds;
    };
  };
  std::vector<client::StateDict> states(kReaders);
  turns.Add("one reader", measured("one reader", [&] {
              for (client::StateDict& state : states) {
                CheckedFetch(readers[0], payload, true, &state);
              }
            }));
  turns.Add(
      "8 readers", measured("8 readers", [&] {
        std::vector<std::thread> threads;
        for (int i = 0; i < kReaders; ++i) {
          threads.emplace_back([&, i] { CheckedFetch(readers[i], payload, true, &states[i]); });
        }
        for (std::thread& thread : threads) thread.join();
      }));
  turns.Run(absl::GetFlag(FLAGS_rounds), absl::GetFlag(FLAGS_only));
  return payload.bytes().size() * kReaders;
}

uint64_t RunSmall(const Setup& setup, Turns& turns) {
  constexpr uint64_t kTensorBytes = 1024;
  const uint64_t count = std::min<uint64_t>(300'000, absl::GetFlag(FLAGS_bytes) / kTensorBytes);
  const Payload small(EqualTensors(count, kTensorBytes));
  const Payload large(EqualTensors(1, count * kTensorBytes));
  const ServerProcess server(setup.server);
  const Client client = ConnectNear(server.target());
  Fill(client, small, "small");
  Fill(client, large, "large");
  client::StateDict one;
  client::StateDict many;
  turns.Add("one tensor", [&] { return CheckedFetch(client, large, true, &one, "large"); });
  turns.Add("many tensors", [&] { return CheckedFetch(client, small, true, &many, "small"); });
  turns.Run(absl::GetFlag(FLAGS_rounds), absl::GetFlag(FLAGS_only));
  return large.bytes().size();
}

// Bytes, of processes that have done nothing before: a receiver, and a server with 8 streams.
uint64_t RunMemory(const Setup& setup, Turns& turns) {
  constexpr int kStreams = 8;
  const Payload payload(MixedTensors(absl::GetFlag(FLAGS_bytes)));
  const std::vector<TensorSpec> part = MixedTensors(absl::GetFlag(FLAGS_bytes) / 8);
  turns.Add("receiver", [&] {
    const ServerProcess server(setup.server);
    Fill(ConnectNear(server.target()), payload);
    FILE* child = popen(absl::StrCat(setup.self, " --receive=", server.target()).c_str(), "r");
    double beyond = 0;
    if (child == nullptr || std::fscanf(child, "%lf", &beyond) != 1) std::exit(1);
    pclose(child);
    return beyond;
  });
  turns.Add("sender, each of 8 streams", [&] {
    const ServerProcess server(setup.server);
    // Not by a load, whose receive buffers malloc would keep and the streams use.
    OrDie(ConnectNear(server.target()).CreateModule(kModule, part));
    const uint64_t before = ResidentBytes(server.pid());
    ResetPeakResidentBytes(server.pid());
    std::vector<std::thread> threads;
    for (int i = 0; i < kStreams; ++i) {
      threads.emplace_back([&] { OrDie(ConnectNear(server.target()).Fetch(kModule)); });
    }
    for (std::thread& thread : threads) thread.join();
    const uint64_t peak = PeakResidentBytes(server.pid());
    return static_cast<double>(peak > before ? peak - before : 0) / kStreams;
  });
  turns.Run(absl::GetFlag(FLAGS_rounds), absl::GetFlag(FLAGS_only));
  return payload.bytes().size();
}

// Answers are not parsed here, so that the server's part is what is compared.
uint64_t RunUnary(const Setup& setup, Turns& turns) {
  constexpr int kCallers = 16;
  constexpr int kCallsEach = 250;
  constexpr uint64_t kTensors = 450;  // answers of 16 KB
  const Payload payload(EqualTensors(kTensors, 1024));
  const ServerProcess server(setup.server);
  const ServerProcess stub_server(
      std::vector<std::string>{setup.stub_server, absl::StrCat("--tensors=", kTensors)});
  const Client client = ConnectNear(server.target());
  const Client stubs = ConnectNear(stub_server.target());
  Fill(client, payload);
  v1::ListTensorsRequest request;
  request.set_module(kModule);
  request.set_page_size(static_cast<int>(kTensors));
  uint64_t answer_bytes = 0;
  const auto call = [&](const Client& to) {
    client::RawCall list(to.connection(), "ListParameters", nullptr);
    grpc::ByteBuffer answer;
    list.Write(SerializeMessage(request));
    list.WritesDone();
    const bool answered = list.Read(&answer);
    OrDie(list.Finish());
    if (!answered) std::exit(1);
    return answer.Length();
  };
  const auto calls = [&](const char* name, const Client& to, const ServerProcess& process) {
    return [&, name] {
      const double cpu = CpuSeconds(process.pid());
      const double seconds = Time([&] {
        std::vector<std::thread> threads;
        for (int i = 0; i < kCallers; ++i) {
          threads.emplace_back([&] {
            for (int n = 0; n < kCallsEach; ++n) call(to);
          });
        }
        for (std::thread& thread : threads) thread.join();
      });
      turns.Record(absl::StrCat(name, ", server CPU"), CpuSeconds(process.pid()) - cpu);
      return seconds;
    };
  };
  answer_bytes = call(client);
  std::printf("answers of %llu and %llu bytes\n", static_cast<unsigned long long>(answer_bytes),
              static_cast<unsigned long long>(call(stubs)));
  turns.Add("built per call", calls("built per call", stubs, stub_server));
  turns.Add("ListParameters", calls("ListParameters", client, server));
  turns.Run(absl::GetFlag(FLAGS_rounds), absl::GetFlag(FLAGS_only));
  return answer_bytes;
}

void PrintMemoryBeyondPayload(const std::string& target) {
  const client::StateDict state = OrDie(ConnectNear(target).Fetch(kModule));
  std::printf("%.0f\n", static_cast<double>(PeakResidentBytes(getpid())) -
                            static_cast<double>(state.data().size()));
}

int Main(const std::string& self) {
  if (!absl::GetFlag(FLAGS_receive).empty()) {
    PrintMemoryBeyondPayload(absl::GetFlag(FLAGS_receive));
    return 0;
  }
  const std::string folder = self.substr(0, self.rfind('/') + 1);
  const Setup setup = {self, ServerBinary(absl::GetFlag(FLAGS_server), self),
                       absl::StrCat(folder, "stub_server")};
  const std::map<std::string, uint64_t (*)(const Setup&, Turns&)> rows = {
      {"fetch", RunFetch}, {"push", RunPush},     {"file", RunFile},  {"fanout", RunFanout},
      {"small", RunSmall}, {"memory", RunMemory}, {"unary", RunUnary}};
  const auto row = rows.find(absl::GetFlag(FLAGS_row));
  if (row == rows.end()) {
    std::fprintf(stderr, "no row \"%s\"\n", absl::GetFlag(FLAGS_row).c_str());
    return 2;
  }
  Turns turns;
  const uint64_t bytes = row->second(setup, turns);
  turns.PrintMedians();
  if (!absl::GetFlag(FLAGS_json).empty()) {
    turns.WriteJson(absl::GetFlag(FLAGS_json), row->first, bytes);
  }
  return 0;
}

}  // namespace
}  // namespace modelstate

int main(int argc, char** argv) {
  absl::ParseCommandLine(argc, argv);
  modelstate::TuneMalloc();
  return modelstate::Main(argv[0]);
}
