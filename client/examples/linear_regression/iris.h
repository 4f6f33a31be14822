#ifndef MODELSTATE_CLIENT_EXAMPLES_LINEAR_REGRESSION_IRIS_H_
#define MODELSTATE_CLIENT_EXAMPLES_LINEAR_REGRESSION_IRIS_H_

#include <array>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "client/client.h"

// The problem: how wide is the petal of an iris, from three other lengths? torch.nn.Linear(3, 1)
// and the mean squared error.
namespace modelstate::examples {

inline constexpr char kModule[] = "iris";
inline constexpr size_t kFeatures = 3;

struct Flower {
  std::array<float, kFeatures> features;  // of mean 0 and variance 1 over the whole file
  float petal_width;                      // cm
};

absl::StatusOr<std::vector<Flower>> ReadIris(const std::string& path);

// The parameters in state_dict order, or their gradients.
struct Linear {
  std::array<float, kFeatures> weight{};  // [1, 3]
  std::array<float, 1> bias{};            // [1]
};

std::vector<TensorSpec> LinearSpecs();
Linear FromStateDict(const client::StateDict& state);
// To push; `gradient` outlives it.
std::vector<client::TensorRef> ToGradients(const Linear& gradient);

// The mean over `flowers`.
double Loss(const Linear& model, absl::Span<const Flower> flowers);
Linear Gradient(const Linear& model, absl::Span<const Flower> flowers);

}  // namespace modelstate::examples

#endif  // MODELSTATE_CLIENT_EXAMPLES_LINEAR_REGRESSION_IRIS_H_
