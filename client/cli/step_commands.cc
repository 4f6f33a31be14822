#include <cmath>
#include <iostream>
#include <limits>
#include <memory>
#include <optional>
#include <random>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/cli/context.h"
#include "client/cli/output.h"
#include "client/cli/validators.h"
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
  bool wait = false;
  Hyperparameters overrides;                 // for these steps, of every group
  std::vector<std::string> group_overrides;  // GROUP:SETTINGS, checked as they were given
};

struct FileArguments {
  StepArguments step;
  std::string file;
  double weight = 1;
  std::optional<double> grad_scale;
  bool accumulate = false;
  std::optional<uint32_t> accumulated;
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

// Steps without a worker have neither.
Json NameJson(const client::StepOptions& options, const char* sequence) {
  if (options.worker.empty()) return {{"worker", nullptr}, {sequence, nullptr}};
  return {{"worker", options.worker}, {sequence, options.sequence}};
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

// One more than the last that the server has of this worker: its answer to an old one tells.
absl::StatusOr<uint64_t> NextSequence(const Context& context, const Client& client,
                                      const std::string& module, const std::string& worker) {
  constexpr uint64_t kFirst = 1;
  const absl::Status status =
      client.ReplayStep(module, worker, kFirst, /*wait=*/false, context.interrupt).status();
  if (status.ok()) return kFirst + 1;
  const ErrorMetadata metadata = GetErrorMetadata(status);
  const auto found = metadata.find("last_sequence");
  uint64_t last = 0;
  if (found != metadata.end() && absl::SimpleAtoi(found->second, &last)) {
    return last < std::numeric_limits<uint64_t>::max() ? last + 1 : last;  // that one is refused
  }
  // Of a worker that has not pushed yet there is none. What else may be wrong, the step will say.
  if (GetReason(status) && !absl::IsUnavailable(status)) return kFirst;
  return status;
}

// A group by its name, or else by its index.
absl::StatusOr<uint32_t> FindGroup(const client::OptimizerInfo& optimizer,
                                   const std::string& text) {
  std::vector<std::string> names;
  for (size_t i = 0; i < optimizer.groups.size(); ++i) {
    if (optimizer.groups[i].name == text) return static_cast<uint32_t>(i);
    names.push_back(optimizer.groups[i].name);
  }
  uint32_t index = 0;
  if (absl::SimpleAtoi(text, &index) && index < optimizer.groups.size()) return index;
  return MakeError(Reason::kInvalidField,
                   absl::StrCat("the optimizer has no group \"", text, "\" for --override; it has ",
                                QuotedList(names), ", or an index below ", names.size()),
                   {{"field", "override"}});
}

absl::StatusOr<client::StepOptions> OptionsOf(const Context& context, const Client& client,
                                              const StepArguments& arguments) {
  client::StepOptions options;
  options.worker = arguments.worker;
  options.ignore_frozen = arguments.ignore_frozen;
  options.wait = arguments.wait;
  if (arguments.overrides != Hyperparameters()) {
    options.overrides.push_back({std::nullopt, arguments.overrides});
  }
  if (!arguments.group_overrides.empty()) {
    MS_ASSIGN_OR_RETURN(const client::OptimizerInfo optimizer,
                        client.GetOptimizer(arguments.module));
    for (const std::string& text : arguments.group_overrides) {
      const size_t colon = text.rfind(':');
      GroupOverride& added = options.overrides.emplace_back();
      MS_ASSIGN_OR_RETURN(added.group, FindGroup(optimizer, text.substr(0, colon)));
      ParseSettings(text.substr(colon + 1), &added.hyperparameters);
    }
  }
  if (arguments.sequence) {
    options.sequence = *arguments.sequence;
  } else if (!arguments.worker.empty()) {
    MS_ASSIGN_OR_RETURN(options.sequence,
                        NextSequence(context, client, arguments.module, arguments.worker));
  }
  return options;
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
  if (!result.nonfinite.empty()) {
    std::cout << "  not finite: " << Printable(QuotedList(result.nonfinite));
  }
  std::cout << std::endl;
}

// One step, printed; its JSON.
absl::StatusOr<Json> Step(Context* context, const Client& client, const std::string& module,
                          absl::Span<const client::TensorRef> tensors,
                          const client::StepOptions& options) {
  const absl::Time start = absl::Now();
  const absl::StatusOr<client::StepResult> answer =
      client.ApplyStep(module, tensors, options, context->interrupt);
  if (!answer.ok()) {
    const bool lost = options.worker.empty() && !GetReason(answer.status());
    return lost ? Annotate(answer.status(),
                           "whether the step was applied is not known (with --worker it would have "
                           "been sent again)")
                : answer.status();
  }
  const client::StepResult& result = *answer;
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
  MS_ASSIGN_OR_RETURN(client::StepOptions options, OptionsOf(*context, client, arguments.step));
  options.weight = arguments.weight;
  options.grad_scale = arguments.grad_scale;
  options.accumulate = arguments.accumulate;
  options.accumulated = arguments.accumulated;
  MS_ASSIGN_OR_RETURN(const Json step,
                      Step(context, client, arguments.step.module, tensors, options));
  if (context->json) {
    Json json = NameJson(options, "sequence");
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
  MS_ASSIGN_OR_RETURN(client::StepOptions options, OptionsOf(*context, client, arguments.step));
  const uint64_t first = options.sequence;
  Json steps = Json::array();
  for (uint64_t i = 0; i < arguments.steps; ++i) {
    if (!options.worker.empty()) options.sequence = first + i;
    MS_ASSIGN_OR_RETURN(Json step,
                        Step(context, client, arguments.step.module, random.Next(), options));
    steps.push_back(std::move(step));
  }
  if (context->json) {
    Json json = NameJson(options, "last_sequence");
    json["steps"] = steps;
    Context::Print(json);
  }
  return absl::OkStatus();
}

CLI::Option* AddStepOptions(CLI::App* command, StepArguments* step, const char* sequence_help) {
  command->group(kTrainingGroup);
  CLI::Option* worker =
      command->add_option("--worker", step->worker,
                          "Names the steps, so that this run's own retries apply each once; needed "
                          "where the optimizer has rounds. Without it a step whose answer is lost "
                          "is not sent again");
  command->add_option("--sequence", step->sequence, sequence_help)
      ->needs(worker)
      ->check(Positive())
      ->check(WholeNumber<uint64_t>());
  command->add_flag("--ignore-frozen", step->ignore_frozen,
                    "Leave out gradients of frozen parameters instead of refusing the step");
  AddHyperparameterOptions(command, &step->overrides);
  command
      ->add_option("--override", step->group_overrides,
                   "Hyper-parameters of one group, by its name or index: GROUP:lr=0.1,momentum=0; "
                   "repeatable")
      ->allow_extra_args(false)
      ->check(CLI::Validator(
          [](const std::string& text) -> std::string {
            const size_t colon = text.rfind(':');
            Hyperparameters parsed;
            if (colon == std::string::npos || colon == 0) {
              return "hyper-parameters of a group are written as GROUP:lr=0.1,momentum=0";
            }
            const std::string problem = ParseSettings(text.substr(colon + 1), &parsed);
            if (problem.empty() && parsed == Hyperparameters()) {
              return absl::StrCat("\"", text, "\" sets nothing");
            }
            return problem;
          },
          "GROUP"));
  command->footer(
      "Hyper-parameters are those of every group, and with --override of one; for these steps "
      "only.");
  return command->add_flag("--wait", step->wait,
                           "Where the optimizer has rounds: until the round closes");
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
  CLI::Option* wait = AddStepOptions(
      command, &from->step,
      "With --worker: number of the step; the same command again gets the first answer and applies "
      "nothing. Without it one more than this worker's last");
  command->add_option("--weight", from->weight, "In a round's mean, 1")->check(Positive());
  command->add_option("--grad-scale", from->grad_scale,
                      "Of the loss, that the gradients were multiplied by");
  CLI::Option* accumulate = command->add_flag("--accumulate", from->accumulate,
                                              "Keep the gradients for this worker's next step");
  accumulate->needs("--worker");
  command
      ->add_option("--accumulated", from->accumulated,
                   "How many the server must have accumulated of this worker before")
      ->check(WholeNumber<uint32_t>());
  wait->excludes(accumulate);
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
  command->add_option("--seed", push->seed, "Of the random gradients")
      ->check(WholeNumber<uint64_t>());
  command
      ->add_option("--steps", push->steps,
                   "How many; more than one where the optimizer has rounds needs --wait")
      ->check(WholeNumber<uint64_t>());
  command->add_option("--scale", push->scale, "Standard deviation, 0.01");
  AddStepOptions(command, &push->step,
                 "With --worker: number of the first step. Without it one more than this worker's "
                 "last");
  command->callback([context, push] { context->Finish(Push(context, *push)); });
}

}  // namespace modelstate::cli
