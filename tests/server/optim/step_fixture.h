#ifndef MODELSTATE_TESTS_SERVER_OPTIM_STEP_FIXTURE_H_
#define MODELSTATE_TESTS_SERVER_OPTIM_STEP_FIXTURE_H_

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "server/device/cpu/cpu_device.h"
#include "server/device/cpu/host_memory_source.h"
#include "server/optim/step.h"
#include "tests/server/test_storage.h"

namespace modelstate::testing {

// A module small enough to step by hand: what a module instance does, without its strand.
class SteppedModule {
 public:
  explicit SteppedModule(Device& device) : device_(device) {}

  static TensorSpec Parameter(std::string name, std::vector<int64_t> dims,
                              DType dtype = DType::kF32) {
    TensorSpec spec;
    spec.name = std::move(name);
    spec.dtype = dtype;
    spec.shape = *Shape::Create(dims);
    return spec;
  }
  static TensorSpec Buffer(std::string name, std::vector<int64_t> dims, DType dtype = DType::kF32) {
    TensorSpec spec = Parameter(std::move(name), std::move(dims), dtype);
    spec.kind = TensorKind::kBuffer;
    spec.requires_grad = false;
    return spec;
  }

  // All elements zero bytes.
  void Create(std::vector<TensorSpec> specs, const OptimizerConfig& config) {
    absl::StatusOr<std::shared_ptr<const ModuleSchema>> schema =
        ModuleSchema::Create(std::move(specs), 1);
    ASSERT_TRUE(schema.ok()) << schema.status();
    version.schema = *schema;
    version.version = {1, 1};
    version.device = &device_;
    version.storages.clear();
    for (uint32_t i = 0; i < version.schema->size(); ++i) {
      const uint32_t owner = version.schema->owner(i);
      if (owner != i) {
        version.storages.push_back(version.storages[owner]);
        continue;
      }
      const std::vector<uint8_t> zeros(version.schema->spec(i).nbytes());
      absl::StatusOr<RefPtr<TensorStorage>> storage = TensorStorage::FromHost(device_, zeros);
      ASSERT_TRUE(storage.ok()) << storage.status();
      version.storages.push_back(*std::move(storage));
    }
    state.parameters.assign(version.schema->size(), {});
    Configure(config);
  }

  void Configure(const OptimizerConfig& config) {
    absl::StatusOr<std::shared_ptr<const Optimizer>> made =
        Optimizer::Create(config, *version.schema);
    ASSERT_TRUE(made.ok()) << made.status();
    optimizer = *made;
  }

  template <typename T>
  void Set(const std::string& name, const std::vector<T>& values) {
    const uint32_t index = *version.schema->Find(name);
    version.storages[index] = *TensorStorage::FromHost(device_, Bytes(values));
  }

  template <typename T>
  std::vector<T> Get(const std::string& name) const {
    return As<T>(BytesOf(*version.storages[*version.schema->Find(name)]));
  }

  template <typename T>
  std::vector<T> Slot(const std::string& name, size_t slot) const {
    return As<T>(BytesOf(*state.parameters[*version.schema->Find(name)].slots[slot]));
  }

  // Gradients (or, for buffers, values) by name, as bytes, in the tensor's own dtype or another.
  struct Pushed {
    std::string name;
    std::vector<uint8_t> bytes;
    std::optional<DType> dtype = std::nullopt;
  };
  using Push = std::vector<Pushed>;

  absl::StatusOr<GradientSet> Stage(const Push& push) {
    std::vector<PushedTensor> table;
    for (const Pushed& pushed : push) {
      const TensorSpec& spec = version.schema->spec(*version.schema->Find(pushed.name));
      table.push_back(
          {pushed.name,
           spec.kind == TensorKind::kBuffer ? TensorKind::kBuffer : TensorKind::kGradient,
           pushed.dtype.value_or(spec.dtype), spec.shape});
    }
    MS_ASSIGN_OR_RETURN(GradientSet gradients,
                        StageGradients(version.schema, std::move(table), device_, *budget));
    for (size_t i = 0; i < push.size(); ++i) {
      EXPECT_EQ(gradients.entries[i].storage->size(), push[i].bytes.size());
      SetBytes(push[i].bytes, *gradients.entries[i].storage);
    }
    return gradients;
  }

  absl::StatusOr<StepResult> Step(const Push& push, std::optional<double> grad_scale = std::nullopt,
                                  absl::Span<const GroupOverride> overrides = {}) {
    MS_ASSIGN_OR_RETURN(GradientSet gradients, Stage(push));
    std::vector<Contribution> contributions(1);
    contributions[0].parts.push_back({std::move(gradients), grad_scale.value_or(1)});
    return StepWith(contributions, overrides);
  }

  absl::StatusOr<StepResult> StepWith(std::vector<Contribution>& contributions,
                                      absl::Span<const GroupOverride> overrides = {}) {
    StepOptions options;
    options.instruction_set = instruction_set;
    options.output_budget = budget.get();
    MS_ASSIGN_OR_RETURN(options.hyperparameters, optimizer->Resolve(overrides));
    MS_ASSIGN_OR_RETURN(StepResult result, ApplyOptimizerStep(version, *optimizer, options,
                                                              contributions, state, *compute));
    for (uint32_t i = 0; i < result.storages.size(); ++i) {
      const StorageRef& fresh = result.storages[version.schema->owner(i)];
      if (fresh) version.storages[i] = fresh;
    }
    return result;
  }

  template <typename T>
  static std::vector<uint8_t> Bytes(const std::vector<T>& values) {
    std::vector<uint8_t> bytes(values.size() * sizeof(T));
    if (!bytes.empty()) std::memcpy(bytes.data(), values.data(), bytes.size());
    return bytes;
  }
  template <typename T>
  static std::vector<T> As(absl::Span<const uint8_t> bytes) {
    std::vector<T> values(bytes.size() / sizeof(T));
    if (!bytes.empty()) std::memcpy(values.data(), bytes.data(), bytes.size());
    return values;
  }

  ModuleVersion version;
  std::shared_ptr<const Optimizer> optimizer;
  OptimizerState state;
  std::optional<InstructionSet> instruction_set;
  std::shared_ptr<MemoryBudget> budget = std::make_shared<MemoryBudget>(
      Reason::kPushMemory, "memory for arriving pushes", "--push_memory", uint64_t{1} << 32);
  std::shared_ptr<ComputePool> compute = std::make_shared<ComputePool>(1);

 private:
  Device& device_;
};

// splitmix64: the same numbers in every language.
inline uint64_t SplitMix64(uint64_t state) {
  uint64_t z = state + 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

// Element `index` of a stream: a multiple of 2^-12 in [-2, 2). As make_optimizer_goldens.py.
inline double Draw(uint64_t stream, uint64_t index) {
  return (static_cast<double>(SplitMix64(stream * 1000003 + index) >> 50) - 8192) / 4096.0;
}

template <typename T>
std::vector<T> DrawMany(uint64_t stream, size_t count) {
  std::vector<T> values(count);
  for (size_t i = 0; i < count; ++i) values[i] = static_cast<T>(Draw(stream, i));
  return values;
}

}  // namespace modelstate::testing

#endif  // MODELSTATE_TESTS_SERVER_OPTIM_STEP_FIXTURE_H_
