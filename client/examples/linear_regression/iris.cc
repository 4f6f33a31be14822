#include "client/examples/linear_regression/iris.h"

#include <cmath>
#include <cstring>
#include <fstream>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace modelstate::examples {
namespace {

double Error(const Linear& model, const Flower& flower) {
  double predicted = model.bias[0];
  for (size_t i = 0; i < kFeatures; ++i) {
    predicted += double{model.weight[i]} * flower.features[i];
  }
  return predicted - flower.petal_width;
}

void Standardize(std::vector<Flower>* flowers) {
  for (size_t i = 0; i < kFeatures; ++i) {
    double sum = 0, squares = 0;
    for (const Flower& flower : *flowers) {
      sum += flower.features[i];
      squares += double{flower.features[i]} * flower.features[i];
    }
    const double count = static_cast<double>(flowers->size());
    const double mean = sum / count;
    const double deviation = std::sqrt(squares / count - mean * mean);
    for (Flower& flower : *flowers) {
      flower.features[i] = static_cast<float>((flower.features[i] - mean) / deviation);
    }
  }
}

}  // namespace

absl::StatusOr<std::vector<Flower>> ReadIris(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  if (!std::getline(file, line)) return absl::NotFoundError(absl::StrCat("cannot read ", path));
  std::vector<Flower> flowers;
  while (std::getline(file, line)) {
    const std::vector<std::string> columns = absl::StrSplit(line, ',');
    Flower flower{};
    bool numbers = columns.size() == kFeatures + 1;
    for (size_t i = 0; numbers && i < kFeatures; ++i) {
      numbers = absl::SimpleAtof(columns[i], &flower.features[i]);
    }
    if (!numbers || !absl::SimpleAtof(columns[kFeatures], &flower.petal_width)) {
      return absl::InvalidArgumentError(absl::StrCat(path, ": not four numbers: ", line));
    }
    flowers.push_back(flower);
  }
  Standardize(&flowers);
  return flowers;
}

std::vector<TensorSpec> LinearSpecs() {
  std::vector<TensorSpec> specs(2);
  specs[0].name = "weight";
  specs[0].shape = *Shape::Create({1, kFeatures});
  specs[1].name = "bias";
  specs[1].shape = *Shape::Create({1});
  return specs;
}

Linear FromStateDict(const client::StateDict& state) {
  Linear model;
  std::memcpy(model.weight.data(), state.bytes(*state.Find("weight")).data(), sizeof(model.weight));
  std::memcpy(model.bias.data(), state.bytes(*state.Find("bias")).data(), sizeof(model.bias));
  return model;
}

std::vector<client::TensorRef> ToGradients(const Linear& gradient) {
  const auto bytes = [](const auto& values) {
    return absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(values.data()), sizeof(values));
  };
  std::vector<TensorSpec> specs = LinearSpecs();
  for (TensorSpec& spec : specs) spec.kind = TensorKind::kGradient;
  return {{specs[0], bytes(gradient.weight)}, {specs[1], bytes(gradient.bias)}};
}

double Loss(const Linear& model, absl::Span<const Flower> flowers) {
  double sum = 0;
  for (const Flower& flower : flowers) sum += std::pow(Error(model, flower), 2);
  return sum / static_cast<double>(flowers.size());
}

Linear Gradient(const Linear& model, absl::Span<const Flower> flowers) {
  std::array<double, kFeatures + 1> sums{};
  for (const Flower& flower : flowers) {
    const double slope = 2 * Error(model, flower) / static_cast<double>(flowers.size());
    for (size_t i = 0; i < kFeatures; ++i) sums[i] += slope * flower.features[i];
    sums[kFeatures] += slope;
  }
  Linear gradient;
  for (size_t i = 0; i < kFeatures; ++i) gradient.weight[i] = static_cast<float>(sums[i]);
  gradient.bias[0] = static_cast<float>(sums[kFeatures]);
  return gradient;
}

}  // namespace modelstate::examples
