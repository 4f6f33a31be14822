// One worker: linear_regression_worker ADDRESS IRIS.CSV INDEX WORKERS STEPS
// Takes every WORKERS-th flower from INDEX on; INDEX counts from 0. It can be started before the
// coordinator has made the module, and killed and started again at any time.
#include "client/worker.h"

#include <iostream>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "client/examples/linear_regression/iris.h"

using modelstate::client::Client;
using modelstate::client::PushOptions;
using modelstate::client::StateDict;
using modelstate::client::StepResult;
using modelstate::client::Worker;
namespace examples = modelstate::examples;

namespace {

absl::Status Train(Client client, absl::Span<const examples::Flower> shard, int index,
                   uint64_t steps) {
  // Until the coordinator has made the module, Fetch waits for it.
  Worker worker(client, examples::kModule, absl::StrCat("worker-", index));
  PushOptions options;
  options.weight = static_cast<double>(shard.size());
  while (true) {
    const absl::StatusOr<StateDict> weights = worker.Fetch();
    if (!weights.ok()) return weights.status();
    if (weights->step() >= steps) return absl::OkStatus();
    const examples::Linear model = examples::FromStateDict(*weights);
    const examples::Linear gradient = examples::Gradient(model, shard);
    // Returns when all workers have pushed and the step is taken.
    const absl::StatusOr<StepResult> step = worker.Push(examples::ToGradients(gradient), options);
    if (step.ok()) {
      std::cout << "step " << step->step << " loss " << examples::Loss(model, shard) << std::endl;
    } else if (!absl::IsAborted(step.status())) {
      return step.status();
    }  // else the weights are newer than what was fetched: again
  }
}

}  // namespace

int main(int argc, char** argv) {
  int index = 0, workers = 0;
  uint64_t steps = 0;
  if (argc != 6 || !absl::SimpleAtoi(argv[3], &index) || !absl::SimpleAtoi(argv[4], &workers) ||
      !absl::SimpleAtoi(argv[5], &steps) || index < 0 || index >= workers) {
    std::cerr << "usage: " << argv[0]
              << " ADDRESS IRIS.CSV INDEX WORKERS STEPS\nINDEX is one of 0 to WORKERS - 1\n";
    return 2;
  }
  const auto flowers = examples::ReadIris(argv[2]);
  const auto client = Client::Connect(argv[1]);
  absl::Status status = flowers.ok() ? client.status() : flowers.status();
  if (status.ok()) {
    std::vector<examples::Flower> shard;
    for (size_t i = index; i < flowers->size(); i += workers) shard.push_back((*flowers)[i]);
    status = Train(*client, shard, index, steps);
  }
  if (!status.ok()) std::cerr << status << '\n';
  return status.ok() ? 0 : 1;
}
