#include <unistd.h>

#include <cmath>
#include <iostream>
#include <memory>
#include <optional>
#include <random>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/cli/context.h"
#include "client/cli/output.h"
#include "client/files/tensor_file.h"
#include "common/base/status.h"
#include "common/base/tensor_cast.h"

namespace modelstate::cli {
namespace {

// What both commands say of their steps.
struct StepArguments {
  std::string module;
  std::string worker;
  std::optional<uint64_t> sequence;
  bool ignore_frozen = false;
  Hyperparameters overrides;  // for these steps, of every group

  client::StepOptions options() const {
    client::StepOptions options;
    options.worker = worker.empty() ? absl::StrCat("cli-", ::getpid()) : worker;
    // The clock grows from one run of the same worker to the next: each run is a new step.
    options.sequence = sequence.value_or(static_cast<uint64_t>(absl::ToUnixMicros(absl::Now())));
    options.ignore_frozen = ignore_frozen;
    if (overrides != Hyperparameters()) options.overrides.push_back({std::nullopt, overrides});
    return options;
  }
};

struct FileArguments {
  StepArguments step;
  std::string file;
  double weight = 0;
  std::optional<double> grad_scale;
  bool accumulate = false;
  std::optional<uint32_t> accumulated;
  bool wait = false;
};

struct PushArguments {
  bool random = false;
  StepArguments step;
  uint64_t seed = 0;
  uint64_t steps = 1;
  double scale = 0.01;
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
    case client::StepOutcome::kAccumulated:
      return "ACCUMULATED";
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
          {"contributions", result.contributions},
          {"quorum", result.quorum},
          {"accumulated", result.accumulated},
          {"grad_norm", result.grad_norm},
          {"clip_coef", result.clip_coef},
          {"updated", result.updated},
          {"skipped", result.skipped},
          {"ignored", result.ignored},
          {"nonfinite", result.nonfinite},
          {"seconds", seconds}};
}

// What the file says of kinds, and which names the module has for buffers: files of others say
// nothing.
absl::StatusOr<std::vector<client::TensorRef>> GradientsOf(const Client& client,
                                                           const std::string& module,
                                                           const client::TensorFile& file) {
  MS_ASSIGN_OR_RETURN(const client::TensorList list, client.ListBuffers(module));
  absl::flat_hash_set<absl::string_view> buffers;
  for (const client::TensorInfo& tensor : list.tensors) buffers.insert(tensor.spec.name);
  std::vector<client::TensorRef> refs;
  for (client::TensorRef& ref : std::vector<client::TensorRef>(file.refs(TensorKind::kGradient))) {
    if (ref.spec.is_alias()) continue;  // its owner's gradient is the one
    const bool buffer = ref.spec.kind == TensorKind::kBuffer || buffers.contains(ref.spec.name);
    ref.spec.kind = buffer ? TensorKind::kBuffer : TensorKind::kGradient;
    refs.push_back(std::move(ref));
  }
  return refs;
}

void PrintStep(const client::StepResult& result) {
  std::cout << "step " << result.step << "  version " << result.version.number << "  "
            << OutcomeName(result.outcome) << (result.replayed ? " (replayed)" : "");
  if (result.quorum > 1) {
    std::cout << "  contributions " << result.contributions << " of " << result.quorum;
  }
  if (result.accumulated > 0) std::cout << "  accumulated " << result.accumulated;
  if (result.outcome == client::StepOutcome::kApplied) {
    std::cout << "  grad_norm " << result.grad_norm << "  updated " << result.updated;
  }
  if (result.skipped > 0) std::cout << "  skipped " << result.skipped;
  if (result.ignored > 0) std::cout << "  ignored " << result.ignored;
  if (!result.nonfinite.empty()) std::cout << "  not finite: " << QuotedList(result.nonfinite);
  std::cout << std::endl;
}

// One step, printed; its JSON.
absl::StatusOr<Json> Step(Context* context, const Client& client, const std::string& module,
                          absl::Span<const client::TensorRef> tensors,
                          const client::StepOptions& options) {
  const absl::Time start = absl::Now();
  MS_ASSIGN_OR_RETURN(const client::StepResult result,
                      client.ApplyStep(module, tensors, options, context->interrupt));
  const double seconds = absl::ToDoubleSeconds(absl::Now() - start);
  if (result.outcome == client::StepOutcome::kSkippedNonfinite) context->exit_code = kDifferent;
  if (!context->json) PrintStep(result);
  return StepJson(result, seconds);
}

absl::Status StepFrom(Context* context, const FileArguments& arguments) {
  MS_ASSIGN_OR_RETURN(const Client client, context->Connect());
  MS_ASSIGN_OR_RETURN(const client::TensorFile file, client::TensorFile::Read(arguments.file));
  MS_ASSIGN_OR_RETURN(const std::vector<client::TensorRef> tensors,
                      GradientsOf(client, arguments.step.module, file));
  client::StepOptions options = arguments.step.options();
  options.weight = arguments.weight;
  options.grad_scale = arguments.grad_scale;
  options.accumulate = arguments.accumulate;
  options.accumulated = arguments.accumulated;
  options.wait = arguments.wait;
  MS_ASSIGN_OR_RETURN(const Json step,
                      Step(context, client, arguments.step.module, tensors, options));
  if (context->json) {
    Json json = {{"worker", options.worker}, {"sequence", options.sequence}};
    json.update(step);
    Context::Print(json);
  }
  return absl::OkStatus();
}

absl::Status Push(Context* context, const PushArguments& arguments) {
  MS_ASSIGN_OR_RETURN(const Client client, context->Connect());
  MS_ASSIGN_OR_RETURN(const client::TensorList parameters,
                      client.ListParameters(arguments.step.module));
  RandomGradients random(parameters, arguments.seed, arguments.scale);
  client::StepOptions options = arguments.step.options();
  const uint64_t first = options.sequence;
  Json steps = Json::array();
  for (uint64_t i = 0; i < arguments.steps; ++i) {
    options.sequence = first + i;
    MS_ASSIGN_OR_RETURN(Json step,
                        Step(context, client, arguments.step.module, random.Next(), options));
    steps.push_back(std::move(step));
  }
  if (context->json) {
    Context::Print(
        {{"worker", options.worker}, {"last_sequence", options.sequence}, {"steps", steps}});
  }
  return absl::OkStatus();
}

void AddStepOptions(CLI::App* command, StepArguments* step, const char* sequence_help) {
  command->group(kTrainingGroup);
  CLI::Option* worker = command->add_option(
      "--worker", step->worker, "Names the steps, so that this run's own retries apply each once");
  command->add_option("--sequence", step->sequence, sequence_help)
      ->needs(worker)
      ->check(CLI::PositiveNumber);
  command->add_flag("--ignore-frozen", step->ignore_frozen,
                    "Leave out gradients of frozen parameters instead of refusing the step");
  AddHyperparameterOptions(command, &step->overrides);
  command->footer("Hyper-parameters are those of every group, for these steps only.");
}

void AddStepFrom(CLI::App* app, Context* context) {
  auto from = std::make_shared<FileArguments>();
  CLI::App* command = app->add_subcommand("step-from", "One optimizer step from a gradient file");
  command->add_option("MODULE", from->step.module)->required();
  command
      ->add_option("FILE", from->file,
                   "safetensors or PyTorch: gradients by parameter name, and values by the names "
                   "that the module has for buffers")
      ->required();
  AddStepOptions(command, &from->step,
                 "With --worker: number of the step; the same command again gets the first answer "
                 "and applies nothing");
  command->add_option("--weight", from->weight, "In a round's mean, 1")->check(CLI::PositiveNumber);
  command->add_option("--grad-scale", from->grad_scale,
                      "Of the loss, that the gradients were multiplied by");
  CLI::Option* accumulate = command->add_flag("--accumulate", from->accumulate,
                                              "Keep the gradients for this worker's next step");
  accumulate->needs("--worker");
  command->add_option("--accumulated", from->accumulated,
                      "How many the server must have accumulated of this worker before");
  command->add_flag("--wait", from->wait, "Where the optimizer has rounds: until the round closes")
      ->excludes(accumulate);
  command->callback([context, from] { context->Finish(StepFrom(context, *from)); });
}

}  // namespace

void AddStepCommands(CLI::App* app, Context* context) {
  AddStepFrom(app, context);
  auto push = std::make_shared<PushArguments>();
  CLI::App* command = app->add_subcommand("push", "Push random gradients, to try and to load");
  command->add_option("MODULE", push->step.module)->required();
  command
      ->add_flag(
          "--random", push->random,
          "Random gradients for every trainable parameter: said aloud, as they spoil a model")
      ->required();
  command->add_option("--seed", push->seed, "Of the random gradients");
  command->add_option("--steps", push->steps, "How many");
  command->add_option("--scale", push->scale, "Standard deviation, 0.01");
  AddStepOptions(command, &push->step, "With --worker: number of the first step");
  command->callback([context, push] { context->Finish(Push(context, *push)); });
}

}  // namespace modelstate::cli
