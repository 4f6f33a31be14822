#include <unistd.h>

#include <cmath>
#include <iostream>
#include <memory>
#include <optional>
#include <random>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/cli/context.h"
#include "client/cli/output.h"
#include "client/files/tensor_file.h"
#include "common/base/status.h"
#include "common/base/tensor_cast.h"

namespace modelstate::cli {
namespace {

struct PushArguments {
  std::string module;
  std::string file;
  bool random = false;
  uint64_t seed = 0;
  uint64_t steps = 1;
  double scale = 0.01;
  std::string worker;
  std::optional<uint64_t> sequence;
  std::optional<double> lr;
};

// Normally distributed gradients for every trainable parameter.
class RandomGradients {
 public:
  RandomGradients(const client::TensorList& parameters, uint64_t seed, double scale)
      : random_(seed), scale_(static_cast<float>(scale)) {
    for (const client::TensorInfo& tensor : parameters.tensors) {
      if (tensor.spec.is_alias() || !tensor.spec.requires_grad) continue;
      if (!IsFloatingPoint(tensor.spec.dtype)) continue;
      client::TensorRef ref;
      ref.spec = tensor.spec;
      ref.spec.kind = TensorKind::kGradient;
      refs_.push_back(std::move(ref));
      bytes_.emplace_back(tensor.spec.nbytes());
    }
  }

  absl::Span<const client::TensorRef> Next() {
    std::normal_distribution<float> normal(0.0f, scale_);
    for (size_t i = 0; i < refs_.size(); ++i) {
      const int64_t count = refs_[i].spec.shape.num_elements();
      std::vector<float> values(static_cast<size_t>(count));
      for (float& value : values) value = normal(random_);
      CastElements(DType::kF32, reinterpret_cast<const uint8_t*>(values.data()),
                   refs_[i].spec.dtype, bytes_[i].data(), count);
      refs_[i].bytes = bytes_[i];
    }
    return refs_;
  }

 private:
  std::mt19937_64 random_;
  const float scale_;
  std::vector<client::TensorRef> refs_;
  std::vector<std::vector<uint8_t>> bytes_;
};

const char* OutcomeName(client::StepOutcome outcome) {
  switch (outcome) {
    case client::StepOutcome::kApplied:
      return "APPLIED";
    case client::StepOutcome::kPending:
      return "PENDING";
    case client::StepOutcome::kSkippedNonfinite:
      return "SKIPPED_NONFINITE";
    case client::StepOutcome::kUnknown:
      break;
  }
  return "UNKNOWN";
}

Json StepJson(const client::StepResult& result, double seconds) {
  return {{"outcome", OutcomeName(result.outcome)},
          {"replayed", result.replayed},
          {"version", ToJson(result.version)},
          {"step", result.step},
          {"grad_norm", result.grad_norm},
          {"clip_coef", result.clip_coef},
          {"updated", result.updated},
          {"skipped", result.skipped},
          {"nonfinite", result.nonfinite},
          {"seconds", seconds}};
}

std::vector<client::TensorRef> GradientsOf(const client::TensorFile& file) {
  std::vector<client::TensorRef> refs;
  for (client::TensorRef& ref : std::vector<client::TensorRef>(file.refs(TensorKind::kGradient))) {
    if (ref.spec.is_alias()) continue;  // its owner's gradient is the one
    if (ref.spec.kind != TensorKind::kBuffer) ref.spec.kind = TensorKind::kGradient;
    refs.push_back(std::move(ref));
  }
  return refs;
}

absl::Status Push(Context* context, const PushArguments& arguments) {
  MS_ASSIGN_OR_RETURN(const Client client, context->Connect());
  std::optional<RandomGradients> random;
  std::optional<client::TensorFile> file;
  std::vector<client::TensorRef> from_file;
  if (arguments.random) {
    MS_ASSIGN_OR_RETURN(const client::TensorList parameters,
                        client.ListParameters(arguments.module));
    random.emplace(parameters, arguments.seed, arguments.scale);
  } else {
    MS_ASSIGN_OR_RETURN(file, client::TensorFile::Read(arguments.file));
    from_file = GradientsOf(*file);
  }
  client::StepOptions options;
  options.worker = arguments.worker.empty() ? absl::StrCat("cli-", ::getpid()) : arguments.worker;
  // The clock grows from one run of the same worker to the next: each run is a new step.
  const uint64_t first =
      arguments.sequence.value_or(static_cast<uint64_t>(absl::ToUnixMicros(absl::Now())));
  if (arguments.lr) options.overrides.push_back({std::nullopt, {}});
  if (arguments.lr) options.overrides[0].hyperparameters.lr = arguments.lr;

  Json steps = Json::array();
  for (uint64_t i = 0; i < arguments.steps; ++i) {
    options.sequence = first + i;
    const absl::Span<const client::TensorRef> tensors = random ? random->Next() : from_file;
    const absl::Time start = absl::Now();
    MS_ASSIGN_OR_RETURN(const client::StepResult result,
                        client.ApplyStep(arguments.module, tensors, options, context->interrupt));
    const double seconds = absl::ToDoubleSeconds(absl::Now() - start);
    if (result.outcome == client::StepOutcome::kSkippedNonfinite) context->exit_code = kDifferent;
    steps.push_back(StepJson(result, seconds));
    if (context->json) continue;
    std::cout << "step " << result.step << "  version " << result.version.number << "  "
              << OutcomeName(result.outcome) << (result.replayed ? " (replayed)" : "")
              << "  grad_norm " << result.grad_norm << "  updated " << result.updated
              << (result.skipped > 0 ? absl::StrCat("  skipped ", result.skipped) : "")
              << (result.nonfinite.empty()
                      ? ""
                      : absl::StrCat("  not finite: ", QuotedList(result.nonfinite)))
              << std::endl;
  }
  if (context->json) {
    Context::Print(
        {{"worker", options.worker}, {"last_sequence", options.sequence}, {"steps", steps}});
  }
  return absl::OkStatus();
}

struct OptimizerArguments {
  std::string module;
  bool adamw = false;
  bool sgd = false;
  bool reset_state = false;
  client::Hyperparameters hyperparameters;
  std::optional<double> max_grad_norm;
  std::optional<uint64_t> max_staleness;
};

// Each pair of hyper-parameter and name, once.
template <typename Params, typename Visitor>
void ForEach(Params& params, Visitor visit) {
  visit("lr", params.lr);
  visit("weight_decay", params.weight_decay);
  visit("maximize", params.maximize);
  visit("momentum", params.momentum);
  visit("dampening", params.dampening);
  visit("nesterov", params.nesterov);
  visit("beta1", params.beta1);
  visit("beta2", params.beta2);
  visit("eps", params.eps);
}

Json ToJson(const client::Hyperparameters& params) {
  Json json = Json::object();
  ForEach(params, [&json](const char* name, const auto& value) {
    if (value) json[name] = *value;
  });
  return json;
}

void PrintOptimizer(const Context& context, const client::OptimizerInfo& info) {
  const char* algorithm = info.config.algorithm == client::Algorithm::kSgd     ? "SGD"
                          : info.config.algorithm == client::Algorithm::kAdamW ? "ADAMW"
                                                                               : "UNKNOWN";
  if (context.json) {
    Json groups = Json::array();
    for (const client::ParameterGroupInfo& group : info.groups) {
      groups.push_back({{"name", group.name},
                        {"parameters", group.parameter_count},
                        {"hyperparameters", ToJson(group.hyperparameters)}});
    }
    Json json = {{"algorithm", algorithm},
                 {"groups", groups},
                 {"step", info.step},
                 {"state_bytes", info.state_bytes},
                 {"version", cli::ToJson(info.version)}};
    if (info.config.max_grad_norm) json["max_grad_norm"] = *info.config.max_grad_norm;
    if (info.config.max_staleness) json["max_staleness"] = *info.config.max_staleness;
    Context::Print(json);
    return;
  }
  std::cout << algorithm << ", step " << info.step << ", " << HumanBytes(info.state_bytes)
            << " of state";
  if (info.config.max_grad_norm) std::cout << ", clipped to " << *info.config.max_grad_norm;
  std::cout << "\n";
  for (size_t i = 0; i < info.groups.size(); ++i) {
    const client::ParameterGroupInfo& group = info.groups[i];
    std::cout << "group " << i << (group.name.empty() ? "" : absl::StrCat(" \"", group.name, "\""))
              << ": " << group.parameter_count << " parameters";
    ForEach(group.hyperparameters, [](const char* name, const auto& value) {
      if (value) std::cout << std::boolalpha << ", " << name << " " << *value;
    });
    std::cout << "\n";
  }
}

absl::Status Optimizer(const Context& context, const OptimizerArguments& arguments) {
  MS_ASSIGN_OR_RETURN(const Client client, context.Connect());
  bool change = arguments.adamw || arguments.sgd || arguments.reset_state ||
                arguments.max_grad_norm || arguments.max_staleness;
  ForEach(arguments.hyperparameters,
          [&change](const char*, const auto& value) { change |= value.has_value(); });
  absl::StatusOr<client::OptimizerInfo> current = absl::NotFoundError("");
  if (!arguments.adamw && !arguments.sgd) {
    current = client.GetOptimizer(arguments.module);
    if (!current.ok()) return current.status();
    if (!change) {
      PrintOptimizer(context, *current);
      return absl::OkStatus();
    }
  }
  // Without an algorithm the current configuration is changed in part.
  client::OptimizerConfig config = current.ok() ? current->config : client::OptimizerConfig();
  if (arguments.adamw) config.algorithm = client::Algorithm::kAdamW;
  if (arguments.sgd) config.algorithm = client::Algorithm::kSgd;
  client::Hyperparameters& to = config.hyperparameters;
  const client::Hyperparameters& from = arguments.hyperparameters;
  if (from.lr) to.lr = from.lr;
  if (from.weight_decay) to.weight_decay = from.weight_decay;
  if (from.maximize) to.maximize = from.maximize;
  if (from.momentum) to.momentum = from.momentum;
  if (from.dampening) to.dampening = from.dampening;
  if (from.nesterov) to.nesterov = from.nesterov;
  if (from.beta1) to.beta1 = from.beta1;
  if (from.beta2) to.beta2 = from.beta2;
  if (from.eps) to.eps = from.eps;
  if (arguments.max_grad_norm) config.max_grad_norm = arguments.max_grad_norm;
  if (arguments.max_staleness) config.max_staleness = arguments.max_staleness;
  MS_ASSIGN_OR_RETURN(const client::OptimizerInfo info,
                      client.ConfigureOptimizer(arguments.module, config, arguments.reset_state));
  PrintOptimizer(context, info);
  return absl::OkStatus();
}

}  // namespace

void AddStepCommands(CLI::App* app, Context* context) {
  auto push = std::make_shared<PushArguments>();
  CLI::App* command = app->add_subcommand("push", "Push gradients: one optimizer step each");
  command->add_option("MODULE", push->module)->required();
  CLI::Option* file = command->add_option("--gradients", push->file,
                                          "A safetensors file of gradients (and buffer values)");
  CLI::Option* random =
      command->add_flag("--random", push->random, "Random gradients for every trainable parameter");
  file->excludes(random);
  command->add_option("--seed", push->seed, "Of the random gradients")->needs(random);
  command->add_option("--steps", push->steps, "How many random steps")->needs(random);
  command->add_option("--scale", push->scale, "Standard deviation, 0.01")->needs(random);
  CLI::Option* worker = command->add_option(
      "--worker", push->worker, "Names the steps, so that this run's own retries apply each once");
  command
      ->add_option("--sequence", push->sequence,
                   "With --worker: number of the (first) step; the same command again gets the "
                   "first answer and applies nothing")
      ->needs(worker)
      ->check(CLI::PositiveNumber);
  command->add_option("--lr", push->lr, "For these steps only");
  command->callback([context, push] {
    if (push->file.empty() && !push->random) {
      throw CLI::RequiredError("--gradients FILE or --random");
    }
    context->Finish(Push(context, *push));
  });

  auto optimizer = std::make_shared<OptimizerArguments>();
  client::Hyperparameters& params = optimizer->hyperparameters;
  command = app->add_subcommand("optimizer", "Show the optimizer, or configure it");
  command->add_option("MODULE", optimizer->module)->required();
  CLI::Option* adamw = command->add_flag("--adamw", optimizer->adamw, "torch.optim.AdamW");
  CLI::Option* sgd = command->add_flag("--sgd", optimizer->sgd, "torch.optim.SGD");
  adamw->excludes(sgd);
  command->add_option("--lr", params.lr);
  command->add_option("--weight-decay", params.weight_decay);
  command->add_option("--maximize", params.maximize);
  command->add_option("--momentum", params.momentum, "SGD");
  command->add_option("--dampening", params.dampening, "SGD");
  command->add_option("--nesterov", params.nesterov, "SGD");
  command->add_option("--beta1", params.beta1, "AdamW");
  command->add_option("--beta2", params.beta2, "AdamW");
  command->add_option("--eps", params.eps, "AdamW");
  command->add_option("--max-grad-norm", optimizer->max_grad_norm, "Clip gradients");
  command->add_option("--max-staleness", optimizer->max_staleness, "Refuse older pushes");
  command->add_flag("--reset-state", optimizer->reset_state, "Drop moments");
  command->callback([context, optimizer] { context->Finish(Optimizer(*context, *optimizer)); });
}

}  // namespace modelstate::cli
