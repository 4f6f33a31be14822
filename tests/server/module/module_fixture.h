#ifndef MODELSTATE_TESTS_SERVER_MODULE_MODULE_FIXTURE_H_
#define MODELSTATE_TESTS_SERVER_MODULE_MODULE_FIXTURE_H_

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <asio/thread_pool.hpp>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/synchronization/notification.h"
#include "common/base/status.h"
#include "common/base/tensor_cast.h"
#include "server/device/cpu/cpu_device.h"
#include "server/module/module_instance.h"
#include "tests/server/test_storage.h"

namespace modelstate {

// Makes a call that takes a `Done` and waits for its answer.
template <typename T, typename F>
absl::StatusOr<T> Await(F&& call) {
  absl::Notification done;
  absl::StatusOr<T> result;
  call([&](absl::StatusOr<T> answer) {
    result = std::move(answer);
    done.Notify();
  });
  done.WaitForNotification();
  return result;
}

inline Shape MakeShape(std::vector<int64_t> dims) { return *Shape::Create(dims); }

inline TensorSpec Parameter(std::string name, std::vector<int64_t> dims,
                            DType dtype = DType::kF32) {
  TensorSpec spec;
  spec.name = std::move(name);
  spec.dtype = dtype;
  spec.shape = MakeShape(std::move(dims));
  return spec;
}

inline TensorSpec Buffer(std::string name, std::vector<int64_t> dims, DType dtype = DType::kF32) {
  TensorSpec spec = Parameter(std::move(name), std::move(dims), dtype);
  spec.kind = TensorKind::kBuffer;
  return spec;
}

inline std::string Bytes(const StorageRef& storage) {
  const std::vector<uint8_t> bytes = BytesOf(*storage);
  return std::string(bytes.begin(), bytes.end());
}

// The bytes of every tensor, by name.
inline std::map<std::string, std::string> Contents(const ModuleVersion& version) {
  std::map<std::string, std::string> contents;
  for (uint32_t i = 0; i < version.schema->size(); ++i) {
    contents[version.schema->spec(i).name] = Bytes(version.storages[i]);
  }
  return contents;
}

// `values` as elements of `dtype`.
inline std::vector<uint8_t> Encode(const std::vector<float>& values, DType dtype) {
  std::vector<uint8_t> bytes(values.size() * DTypeSize(dtype));
  CastElements(DType::kF32, reinterpret_cast<const uint8_t*>(values.data()), dtype, bytes.data(),
               static_cast<int64_t>(values.size()));
  return bytes;
}

// A tensor of a push, in the dtype of the module's, every element the same.
struct PushTensor {
  std::string name;
  float value = 0;
  TensorKind kind = TensorKind::kGradient;
};

// A host with one device, on which modules can be made and stepped.
class ModuleFixture : public ::testing::Test {
 protected:
  explicit ModuleFixture(uint64_t device_bytes = uint64_t{1} << 30,
                         uint64_t snapshot_bytes = uint64_t{1} << 30)
      : owned_device_(MakeTestDevice(device_bytes)),
        device_(*owned_device_),
        compute_(2),
        snapshot_budget_(std::make_shared<MemoryBudget>(Reason::kSnapshotLimit, "held versions",
                                                        "--snapshot_memory", snapshot_bytes)),
        push_budget_(std::make_shared<MemoryBudget>(Reason::kPushMemory, "arriving pushes",
                                                    "--push_memory", uint64_t{1} << 30)) {}

  ModuleEnvironment Environment() {
    return {&device_, &compute_, &strands_, snapshot_budget_, push_budget_, worker_limits_, [this] {
              return now_;
            }};
  }

  // Element k of a tensor is its index in the module plus k / 8, in its dtype where that is a
  // floating-point one; other dtypes are filled with bytes.
  std::shared_ptr<ModuleInstance> MakeModule(std::vector<TensorSpec> specs,
                                             std::optional<float> fill = std::nullopt) {
    auto schema = ModuleSchema::Create(std::move(specs), 1);
    EXPECT_TRUE(schema.ok()) << schema.status();
    std::vector<StorageRef> storages;
    for (uint32_t i = 0; i < (*schema)->size(); ++i) {
      const TensorSpec& spec = (*schema)->spec(i);
      if ((*schema)->owner(i) != i) {
        storages.push_back(storages[(*schema)->owner(i)]);
        continue;
      }
      RefPtr<TensorStorage> storage = *TensorStorage::Allocate(device_, spec.nbytes());
      std::vector<uint8_t> bytes(storage->size());
      if (IsFloatingPoint(spec.dtype)) {
        std::vector<float> values(static_cast<size_t>(spec.shape.num_elements()));
        for (size_t k = 0; k < values.size(); ++k) {
          values[k] = fill.value_or(static_cast<float>(i) + 0.125F * static_cast<float>(k % 64));
        }
        bytes = Encode(values, spec.dtype);
      } else {
        for (size_t k = 0; k < bytes.size(); ++k) bytes[k] = static_cast<uint8_t>(k * 7 + i);
      }
      SetBytes(bytes, *storage);
      storages.push_back(std::move(storage));
    }
    return std::make_shared<ModuleInstance>("tiny", Environment(), *schema, std::move(storages),
                                            ModuleMetadata{{"purpose", "test"}});
  }

  // In the budget of pushes, whatever the module has set aside for its rounds.
  absl::StatusOr<GradientSet> Stage(ModuleInstance& module, const std::vector<PushTensor>& push) {
    return StageIn(*push_budget_, module, push);
  }
  absl::StatusOr<GradientSet> StageIn(MemoryBudget& budget, ModuleInstance& module,
                                      const std::vector<PushTensor>& push) {
    const VersionRef current = module.Current();
    std::vector<PushedTensor> table;
    for (const PushTensor& tensor : push) {
      PushedTensor& entry = table.emplace_back();
      entry.name = tensor.name;
      entry.kind = tensor.kind;
      if (const auto index = current->schema->Find(tensor.name)) {
        entry.dtype = current->schema->spec(*index).dtype;
        entry.shape = current->schema->spec(*index).shape;
      }
    }
    absl::StatusOr<GradientSet> gradients =
        StageGradients(current->schema, std::move(table), device_, budget, false,
                       /*outputs=*/&budget == push_budget_.get());
    if (!gradients.ok()) return gradients;
    for (size_t i = 0; i < push.size(); ++i) {
      const PushedTensor& tensor = gradients->tensors[i];
      const std::vector<float> values(static_cast<size_t>(tensor.shape.num_elements()),
                                      push[i].value);
      SetBytes(Encode(values, tensor.dtype), *gradients->entries[i].storage);
    }
    return gradients;
  }

  absl::StatusOr<StepAnswer> Apply(ModuleInstance& module, StepRequest request) {
    return Await<StepAnswer>([&](ModuleInstance::Done<StepAnswer> done) {
      module.ApplyStep(std::move(request), std::move(done));
    });
  }

  absl::StatusOr<StepAnswer> Push(ModuleInstance& module, const std::vector<PushTensor>& push,
                                  StepRequest request = {}) {
    MS_ASSIGN_OR_RETURN(request.gradients, Stage(module, push));
    return Apply(module, std::move(request));
  }

  absl::StatusOr<ModuleInstance::ConfigureResult> ConfigureAndSee(ModuleInstance& module,
                                                                  OptimizerConfig config,
                                                                  bool reset = false) {
    return Await<ModuleInstance::ConfigureResult>(
        [&](ModuleInstance::Done<ModuleInstance::ConfigureResult> done) {
          module.ConfigureOptimizer(std::move(config), reset, std::move(done));
        });
  }
  absl::StatusOr<VersionRef> Configure(ModuleInstance& module, OptimizerConfig config,
                                       bool reset = false) {
    MS_ASSIGN_OR_RETURN(ModuleInstance::ConfigureResult result,
                        ConfigureAndSee(module, std::move(config), reset));
    return result.version;
  }

  static OptimizerConfig Sgd(double lr = 1, double momentum = 0) {
    OptimizerConfig config;
    config.algorithm = Algorithm::kSgd;
    config.hyperparameters.lr = lr;
    config.hyperparameters.momentum = momentum;
    return config;
  }
  static OptimizerConfig AdamW(double lr = 0.01) {
    OptimizerConfig config;
    config.algorithm = Algorithm::kAdamW;
    config.hyperparameters.lr = lr;
    return config;
  }

  absl::StatusOr<ModuleInstance::FreezeResult> SetRequiresGrad(ModuleInstance& module,
                                                               Selection selection, bool value) {
    return Await<ModuleInstance::FreezeResult>(
        [&](ModuleInstance::Done<ModuleInstance::FreezeResult> done) {
          module.SetRequiresGrad(std::move(selection), value, std::move(done));
        });
  }

  static Selection Names(std::vector<std::string> names) {
    Selection selection;
    selection.names = std::move(names);
    return selection;
  }

  absl::StatusOr<CapturedState> Capture(ModuleInstance& module, bool with_optimizer = true) {
    return Await<CapturedState>([&](ModuleInstance::Done<CapturedState> done) {
      module.Capture(with_optimizer, std::move(done));
    });
  }

  static void Delete(ModuleInstance& module) {
    absl::Notification done;
    module.Delete([&done] { done.Notify(); });
    done.WaitForNotification();
  }

  absl::Time now_ = absl::FromUnixSeconds(1'700'000'000);
  const std::unique_ptr<Device> owned_device_;
  Device& device_;
  ComputePool compute_;
  asio::thread_pool strands_{2};
  std::shared_ptr<MemoryBudget> snapshot_budget_;
  WorkerLimits worker_limits_;
  std::shared_ptr<MemoryBudget> push_budget_;
};

// The reason of a failure; a status without one fails the test's comparison.
inline std::optional<Reason> ReasonOf(const absl::Status& status) { return GetReason(status); }
template <typename T>
std::optional<Reason> ReasonOf(const absl::StatusOr<T>& result) {
  return GetReason(result.status());
}

}  // namespace modelstate

#endif  // MODELSTATE_TESTS_SERVER_MODULE_MODULE_FIXTURE_H_
