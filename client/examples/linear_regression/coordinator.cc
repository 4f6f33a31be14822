// The coordinator: linear_regression_coordinator ADDRESS IRIS.CSV WORKERS STEPS
// Makes the module, says "ready", waits for STEPS steps of WORKERS workers, saves a checkpoint, and
// compares with the same training in this process. Exit 0 when the losses agree to 1e-4.
#include <cmath>
#include <iostream>

#include "absl/strings/numbers.h"
#include "client/client.h"
#include "client/examples/linear_regression/iris.h"
#include "common/base/status.h"

using namespace modelstate::client;
namespace examples = modelstate::examples;

namespace {

constexpr double kLearningRate = 0.05;
constexpr double kMomentum = 0.9;

absl::Status Train(const Client& client, uint32_t workers, uint64_t steps) {
  MS_RETURN_IF_ERROR(client.CreateModule(examples::kModule, examples::LinearSpecs()).status());
  OptimizerConfig config;
  config.algorithm = Algorithm::kSgd;
  config.hyperparameters.lr = kLearningRate;
  config.hyperparameters.momentum = kMomentum;
  config.rounds.quorum = workers;
  // A contribution from before the last step is refused, so that all of a round began alike.
  config.max_staleness = 0;
  MS_RETURN_IF_ERROR(client.ConfigureOptimizer(examples::kModule, config).status());
  std::cout << "ready" << std::endl;
  return client.Watch(examples::kModule,
                      [&](const WatchEvent& event) { return event.module.step < steps; });
}

// As torch.optim.SGD.
examples::Linear TrainHere(absl::Span<const examples::Flower> flowers, uint64_t steps) {
  examples::Linear model, velocity;
  for (uint64_t step = 0; step < steps; ++step) {
    const examples::Linear gradient = examples::Gradient(model, flowers);
    const auto update = [](float gradient, float* velocity, float* value) {
      *velocity = static_cast<float>(kMomentum * *velocity + gradient);
      *value -= static_cast<float>(kLearningRate * *velocity);
    };
    for (size_t i = 0; i < examples::kFeatures; ++i) {
      update(gradient.weight[i], &velocity.weight[i], &model.weight[i]);
    }
    update(gradient.bias[0], &velocity.bias[0], &model.bias[0]);
  }
  return model;
}

absl::Status Run(const std::string& address, const std::string& path, uint32_t workers,
                 uint64_t steps) {
  MS_ASSIGN_OR_RETURN(const std::vector<examples::Flower> flowers, examples::ReadIris(path));
  MS_ASSIGN_OR_RETURN(const Client client, Client::Connect(address));
  MS_RETURN_IF_ERROR(Train(client, workers, steps));
  MS_ASSIGN_OR_RETURN(const StateDict state, client.Fetch(examples::kModule));
  MS_RETURN_IF_ERROR(client.SaveCheckpoint(examples::kModule, "iris").status());
  const double loss = examples::Loss(examples::FromStateDict(state), flowers);
  const double here = examples::Loss(TrainHere(flowers, steps), flowers);
  std::cout << "steps " << state.step() << "\nloss at the start "
            << examples::Loss(examples::Linear(), flowers) << "\nloss " << loss
            << "\nloss of the same training in one process " << here << std::endl;
  if (state.step() != steps) return absl::InternalError("the count of steps is wrong");
  if (std::abs(loss - here) > 1e-4 * here) return absl::InternalError("the losses differ");
  return absl::OkStatus();
}

}  // namespace

int main(int argc, char** argv) {
  uint32_t workers = 0;
  uint64_t steps = 0;
  if (argc != 5 || !absl::SimpleAtoi(argv[3], &workers) || !absl::SimpleAtoi(argv[4], &steps) ||
      workers == 0) {
    std::cerr << "usage: " << argv[0] << " ADDRESS IRIS.CSV WORKERS STEPS\n";
    return 2;
  }
  const absl::Status status = Run(argv[1], argv[2], workers, steps);
  if (!status.ok()) std::cerr << status << '\n';
  return status.ok() ? 0 : 1;
}
