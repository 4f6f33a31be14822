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
  bool ignore_frozen = false;
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
          {"grad_norm", result.grad_norm},
          {"clip_coef", result.clip_coef},
          {"updated", result.updated},
          {"skipped", result.skipped},
          {"ignored", result.ignored},
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
  options.ignore_frozen = arguments.ignore_frozen;
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
              << (result.ignored > 0 ? absl::StrCat("  ignored ", result.ignored) : "")
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

}  // namespace

void AddStepCommands(CLI::App* app, Context* context) {
  auto push = std::make_shared<PushArguments>();
  CLI::App* command = app->add_subcommand("push", "Push gradients: one optimizer step each");
  command->group(kTrainingGroup);
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
  command->add_flag("--ignore-frozen", push->ignore_frozen,
                    "Leave out gradients of frozen parameters instead of refusing the push");
  command->callback([context, push] {
    if (push->file.empty() && !push->random) {
      throw CLI::RequiredError("--gradients FILE or --random");
    }
    context->Finish(Push(context, *push));
  });
}

}  // namespace modelstate::cli
