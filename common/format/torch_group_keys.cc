#include "common/format/torch_group_keys.h"

namespace modelstate {
namespace {

using V = TorchGroupKey::Value;

constexpr TorchGroupKey kBetas = {"betas", V::kBetas};
constexpr TorchGroupKey kForeach = {"foreach", V::kNone};
constexpr TorchGroupKey kFused = {"fused", V::kNone};
constexpr TorchGroupKey kCapturable = {"capturable", V::kFalse};
constexpr TorchGroupKey kDifferentiable = {"differentiable", V::kFalse};

constexpr TorchGroupKey kSgd[] = {{"lr"},           {"momentum"},    {"dampening"},
                                  {"weight_decay"}, {"nesterov"},    {"maximize"},
                                  kForeach,         kDifferentiable, kFused};
constexpr TorchGroupKey kAdam[] = {{"lr"},
                                   kBetas,
                                   {"eps"},
                                   {"weight_decay"},
                                   {"amsgrad"},
                                   {"maximize"},
                                   kForeach,
                                   kCapturable,
                                   kDifferentiable,
                                   kFused,
                                   {"decoupled_weight_decay"}};
constexpr TorchGroupKey kAdamW[] = {{"lr"},
                                    kBetas,
                                    {"eps"},
                                    {"weight_decay"},
                                    {"amsgrad"},
                                    {"maximize"},
                                    kForeach,
                                    kCapturable,
                                    kDifferentiable,
                                    kFused,
                                    {"decoupled_weight_decay", V::kTrue}};
constexpr TorchGroupKey kAdagrad[] = {{"lr"},
                                      {"lr_decay"},
                                      {"eps"},
                                      {"weight_decay"},
                                      {"initial_accumulator_value"},
                                      kForeach,
                                      {"maximize"},
                                      kDifferentiable,
                                      kFused};
constexpr TorchGroupKey kRmsprop[] = {{"lr"},       {"momentum"},     {"alpha"},   {"eps"},
                                      {"centered"}, {"weight_decay"}, kCapturable, kForeach,
                                      {"maximize"}, kDifferentiable};
constexpr TorchGroupKey kNAdam[] = {{"lr"},
                                    kBetas,
                                    {"eps"},
                                    {"weight_decay"},
                                    {"momentum_decay"},
                                    {"decoupled_weight_decay"},
                                    {"maximize"},
                                    kForeach,
                                    kCapturable,
                                    kDifferentiable};
constexpr TorchGroupKey kRAdam[] = {
    {"lr"},         kBetas,   {"eps"},     {"weight_decay"},
    {"maximize"},   kForeach, kCapturable, {"decoupled_weight_decay"},
    kDifferentiable};
constexpr TorchGroupKey kAdamax[] = {{"lr"},   kBetas,       {"eps"},         {"weight_decay"},
                                     kForeach, {"maximize"}, kDifferentiable, kCapturable};
constexpr TorchGroupKey kAdadelta[] = {{"lr"},       {"rho"},     {"eps"},  {"weight_decay"},
                                       {"maximize"}, kCapturable, kForeach, kDifferentiable};
// torch has none; these are the keys that implementations for it use.
constexpr TorchGroupKey kLion[] = {{"lr"}, kBetas, {"weight_decay"}, {"maximize"}};

}  // namespace

absl::Span<const TorchGroupKey> TorchGroupKeys(Algorithm algorithm) {
  switch (algorithm) {
    case Algorithm::kSgd:
      return kSgd;
    case Algorithm::kAdamW:
      return kAdamW;
    case Algorithm::kAdam:
      return kAdam;
    case Algorithm::kAdagrad:
      return kAdagrad;
    case Algorithm::kRmsprop:
      return kRmsprop;
    case Algorithm::kNAdam:
      return kNAdam;
    case Algorithm::kRAdam:
      return kRAdam;
    case Algorithm::kAdamax:
      return kAdamax;
    case Algorithm::kAdadelta:
      return kAdadelta;
    case Algorithm::kLion:
      return kLion;
    case Algorithm::kUnknown:
      break;
  }
  return {};
}

}  // namespace modelstate
