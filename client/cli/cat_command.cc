#include <functional>
#include <iostream>
#include <memory>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "client/cli/context.h"
#include "client/cli/output.h"
#include "client/cli/validators.h"
#include "common/base/status.h"

namespace modelstate::cli {
namespace {

// Elements [first, first + count) of a tensor of `shape` in nested brackets, a line for each
// innermost row; "..." stands for what is left out before and after.
std::string Nested(const std::vector<int64_t>& shape, uint64_t first, uint64_t count,
                   const std::function<std::string(uint64_t)>& element) {
  if (shape.empty()) return count == 0 ? "..." : element(0);
  uint64_t total = 1;
  // Elements below one index of each dimension and its inner ones: spans[0] is the whole.
  std::vector<uint64_t> spans(shape.size());
  for (size_t d = shape.size(); d-- > 0;) {
    total *= static_cast<uint64_t>(shape[d]);
    spans[d] = total;
  }
  if (total == 0) return "[]";
  std::string text;
  // At the first element every bracket is open, whether or not its own first element is shown.
  for (size_t d = 0; d < shape.size(); ++d) text += '[';
  if (first > 0) absl::StrAppend(&text, count > 0 || first < total ? "..., " : "...");
  for (uint64_t i = 0; i < count; ++i) {
    const uint64_t flat = first + i;
    if (i > 0) {
      size_t closed = 0;
      for (uint64_t span : spans) closed += flat % span == 0 ? 1 : 0;
      if (closed == 0) {
        text += ", ";
      } else {
        absl::StrAppend(&text, std::string(closed, ']'), ",", std::string(closed, '\n'),
                        std::string(shape.size() - closed, ' '), std::string(closed, '['));
      }
    }
    text += element(i);
  }
  if (first + count < total) text += count > 0 ? ", ..." : "...";
  return text + std::string(shape.size(), ']');
}

struct CatArguments {
  std::string module;
  std::string tensor;
  client::GetTensorOptions options;
};

absl::Status Cat(const Context& context, const CatArguments& arguments) {
  MS_ASSIGN_OR_RETURN(const Client client, context.Connect());
  MS_ASSIGN_OR_RETURN(const client::TensorElements elements,
                      client.GetTensor(arguments.module, arguments.tensor, arguments.options));
  const TensorSpec& spec = elements.tensor.spec;
  const bool complex = spec.dtype == DType::kC64;
  const uint64_t count =
      !elements.ints.empty() ? elements.ints.size() : elements.doubles.size() / (complex ? 2 : 1);
  if (context.json) {
    Json values = Json::array();
    for (int64_t value : elements.ints) values.push_back(value);
    for (double value : elements.doubles) values.push_back(ToJson(value));
    Context::Print({{"tensor", ToJson(elements.tensor)},
                    {"slice_shape", elements.slice_shape},
                    {"first", elements.first},
                    {"count", count},
                    {"values", values},
                    {"statistics", ToJson(elements.statistics)},
                    {"version", ToJson(elements.version)},
                    {"step", elements.step}});
    return absl::OkStatus();
  }
  const auto element = [&](uint64_t i) -> std::string {
    if (!elements.ints.empty()) {
      if (spec.dtype != DType::kBool) return absl::StrCat(elements.ints[i]);
      return elements.ints[i] != 0 ? "true" : "false";
    }
    if (!complex) return Number(elements.doubles[i]);
    const double imaginary = elements.doubles[2 * i + 1];
    return absl::StrCat(Number(elements.doubles[2 * i]), imaginary < 0 ? "" : "+",
                        Number(imaginary), "j");
  };
  std::cout << Printable(spec.name)
            << (spec.is_alias() ? absl::StrCat(" = ", Printable(spec.alias_of)) : "") << "  "
            << TensorKindName(spec.kind) << "  " << DTypeName(spec.dtype) << "  "
            << spec.shape.ToString();
  if (!arguments.options.slice.empty()) {
    std::cout << "  slice [" << arguments.options.slice << "] of shape ["
              << absl::StrJoin(elements.slice_shape, ", ") << "]";
  }
  std::cout << "\n" << Nested(elements.slice_shape, elements.first, count, element) << "\n";
  const client::TensorStatistics& statistics = elements.statistics;
  if (statistics.count > statistics.nonfinite) {
    std::cout << "min " << Number(statistics.min) << "  max " << Number(statistics.max) << "  mean "
              << Number(statistics.mean) << "  norm " << Number(statistics.norm) << "  ";
  }
  std::cout << "non-finite " << statistics.nonfinite << " of " << statistics.count << "  version "
            << elements.version.number << "  step " << elements.step << "\n";
  return absl::OkStatus();
}

}  // namespace

void AddCatCommand(CLI::App* app, Context* context) {
  auto cat = std::make_shared<CatArguments>();
  CLI::App* command =
      app->add_subcommand("cat", "Print elements of a tensor, and statistics over all of it");
  command->group(kTensorsGroup);
  command->add_option("MODULE", cat->module)->required();
  command->add_option("TENSOR", cat->tensor)->required();
  command->add_option("--slice", cat->options.slice,
                      "A part as Python's indexing writes it: \"0\", \"-1, ::2\", \"..., 3:5\"");
  command->add_option("--first", cat->options.first, "Row-major index of the first element")
      ->check(WholeNumber<uint64_t>());
  command
      ->add_option("--count", cat->options.count,
                   "How many elements, at most 65536; without it at most 64")
      ->check(WholeNumber<uint32_t>());
  command->add_option("--snapshot", cat->options.snapshot_id,
                      "Of the version that this pin holds, not the newest");
  command->callback([context, cat] { context->Finish(Cat(*context, *cat)); });
}

}  // namespace modelstate::cli
