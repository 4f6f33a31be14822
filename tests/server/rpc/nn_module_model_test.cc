// Hundreds of random operations on modules of a server, and the same on a small model of nn.Module,
// while readers stream snapshots: every snapshot must be exactly one version of the model.
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <random>
#include <thread>

#include "absl/strings/match.h"
#include "common/base/digest.h"
#include "common/base/tensor_cast.h"
#include "tests/server/rpc/server_fixture.h"

namespace modelstate {
namespace {

// Elements are small whole numbers, so that they are exact in every dtype that occurs and a step of
// SGD with lr 0.5 and gradients of -2, 0 and 2 is too.
struct ModelTensor {
  std::string name;
  bool parameter = true;
  v1::DType dtype = v1::F32;
  std::vector<int64_t> shape;
  bool requires_grad = true;
  bool persistent = true;
  int owner = -1;  // index of the tensor that it is tied to; -1: none
  std::vector<double> elements;
};

struct ModelModule {
  std::vector<ModelTensor> tensors;
  v1::Version version;
  uint64_t step = 0;
  std::string device = "cpu";
};

bool IsFloat(v1::DType dtype) { return dtype <= v1::BF16; }

std::string Encode(v1::DType dtype, const std::vector<double>& elements) {
  const auto to = static_cast<DType>(dtype);
  std::string bytes(elements.size() * DTypeSize(to), '\0');
  CastElements(DType::kF64, reinterpret_cast<const uint8_t*>(elements.data()), to,
               reinterpret_cast<uint8_t*>(bytes.data()), static_cast<int64_t>(elements.size()));
  return bytes;
}

// The state_dict as one text: names in order with their bytes.
std::string StateText(const std::vector<std::pair<std::string, std::string>>& state) {
  std::string text;
  for (const auto& [name, bytes] : state)
    absl::StrAppend(&text, name, " ", Xxh3Hex128(bytes), "\n");
  return text;
}

std::string VersionKey(const v1::Version& version) {
  return absl::StrCat(version.incarnation(), "/", version.number());
}

class NnModuleModelTest : public ServerTest, public testing::WithParamInterface<uint32_t> {
 protected:
  NnModuleModelTest() : random_(GetParam()) { options_.device = "cpu,cpu:1"; }

  int Draw(int below) { return std::uniform_int_distribution<int>(0, below - 1)(random_); }
  bool Chance(int percent) { return Draw(100) < percent; }
  std::vector<double> DrawElements(const std::vector<int64_t>& shape) {
    int64_t count = 1;
    for (int64_t dim : shape) count *= dim;
    std::vector<double> elements(static_cast<size_t>(count));
    for (double& element : elements) element = Draw(17) - 8;
    return elements;
  }

  const ModelTensor& Owner(const ModelModule& module, const ModelTensor& tensor) const {
    return tensor.owner < 0 ? tensor : module.tensors[static_cast<size_t>(tensor.owner)];
  }
  std::string Expected(const ModelModule& module, bool non_persistent = false) const {
    std::vector<std::pair<std::string, std::string>> state;
    for (const ModelTensor& tensor : module.tensors) {
      if (!tensor.persistent && !non_persistent) continue;
      const ModelTensor& owner = Owner(module, tensor);
      state.emplace_back(tensor.name, Encode(owner.dtype, owner.elements));
    }
    return StateText(state);
  }
  // What a stream brought; an alias has its owner's bytes.
  static std::string Seen(const Fetched& fetched) {
    const auto bytes = fetched.Bytes();
    std::vector<std::pair<std::string, std::string>> state;
    for (const v1::TensorInfo& tensor : fetched.tensors) {
      state.emplace_back(tensor.name(),
                         bytes.at(tensor.alias_of().empty() ? tensor.name() : tensor.alias_of()));
    }
    return StateText(state);
  }

  // The server published this: the model has changed accordingly.
  void Published(ModelModule& module, const v1::Version& version) {
    ASSERT_EQ(version.number(), module.version.number() + 1);
    module.version = version;
    history_[VersionKey(version)] = Expected(module);
  }

  void CreateOne();
  void DeleteOne(const std::string& name);
  void Step(const std::string& name);
  void Freeze(const std::string& name);
  void Load(const std::string& name);
  void Move(const std::string& name);
  void Pin(const std::string& name);
  void CheckPins();
  void SaveAndLoad(const std::string& name);
  void CheckAll(const std::string& name);
  void ReadUntilStopped(uint32_t seed);

  std::mt19937 random_;
  std::map<std::string, ModelModule> modules_;
  std::map<std::string, std::string> history_;  // VersionKey -> Expected
  struct Pinned {
    std::string module;
    std::string state;
    v1::Version version;
  };
  std::map<std::string, Pinned> pins_;
  int created_ = 0;
  int saved_ = 0;

  std::atomic<bool> stop_{false};
  absl::Mutex seen_mutex_;
  std::vector<std::pair<std::string, std::string>> seen_ ABSL_GUARDED_BY(seen_mutex_);
};

void NnModuleModelTest::CreateOne() {
  const std::string name = absl::StrCat("m", created_++);
  ModelModule module;
  const int count = 2 + Draw(6);
  for (int i = 0; i < count; ++i) {
    ModelTensor tensor;
    tensor.parameter = i == 0 || Chance(60);
    tensor.name = absl::StrCat("layer", i / 2, tensor.parameter ? ".p" : ".b", i);
    tensor.dtype =
        tensor.parameter ? (Chance(70) ? v1::F32 : v1::BF16) : (Chance(60) ? v1::F32 : v1::I64);
    for (int dims = Draw(3); dims > 0; --dims) tensor.shape.push_back(1 + Draw(40));
    tensor.requires_grad = tensor.parameter && !Chance(15);
    tensor.persistent = tensor.parameter || !Chance(25);
    tensor.elements = DrawElements(tensor.shape);
    module.tensors.push_back(std::move(tensor));
  }
  if (Chance(50)) {
    ModelTensor tied = module.tensors.front();
    tied.name = "tied.weight";
    tied.owner = 0;
    module.tensors.push_back(std::move(tied));
  }
  std::vector<v1::TensorInfo> infos;
  for (const ModelTensor& tensor : module.tensors) {
    v1::TensorInfo& info = infos.emplace_back();
    info.set_name(tensor.name);
    if (tensor.owner >= 0) {
      info.set_alias_of(module.tensors[static_cast<size_t>(tensor.owner)].name);
      continue;
    }
    info = Tensor(tensor.name, tensor.parameter ? v1::PARAMETER : v1::BUFFER, tensor.shape,
                  tensor.dtype);
    info.mutable_values()->set_raw(Encode(tensor.dtype, tensor.elements));
    if (tensor.parameter) {
      info.set_requires_grad(tensor.requires_grad);
    } else {
      info.set_persistent(tensor.persistent);
    }
  }
  module.version = Create(name, infos).version();
  ASSERT_EQ(module.version.number(), 1);
  history_[VersionKey(module.version)] = Expected(module);
  modules_[name] = std::move(module);
  auto optimizer = Configure(name, v1::SGD, 0.5);
  ASSERT_TRUE(optimizer.ok()) << optimizer.status();
  Published(modules_[name], optimizer->version());
}

void NnModuleModelTest::DeleteOne(const std::string& name) {
  v1::DeleteModuleRequest request;
  request.set_module(name);
  ASSERT_TRUE(Call(&v1::ModelState::Stub::DeleteModule, request).ok());
  std::erase_if(pins_, [&](const auto& pin) { return pin.second.module == name; });
  modules_.erase(name);
}

void NnModuleModelTest::Step(const std::string& name) {
  ModelModule& module = modules_[name];
  const bool ignore_frozen = Chance(50);
  const bool wrong = Chance(15);  // a gradient for a buffer
  ModelModule after = module;
  std::vector<std::pair<v1::TensorInfo, std::string>> push;
  bool frozen = false;
  bool buffer_gradient = false;
  uint64_t updated = 0;
  uint64_t ignored = 0;
  for (size_t i = 0; i < module.tensors.size(); ++i) {
    const ModelTensor& tensor = module.tensors[i];
    if (tensor.owner >= 0 || Chance(30)) continue;
    if (!tensor.parameter) {
      const bool as_gradient = wrong && !buffer_gradient;
      buffer_gradient = buffer_gradient || as_gradient;
      after.tensors[i].elements = DrawElements(tensor.shape);
      push.emplace_back(
          Tensor(tensor.name, as_gradient ? v1::GRADIENT : v1::BUFFER, tensor.shape, tensor.dtype),
          Encode(tensor.dtype, after.tensors[i].elements));
      continue;
    }
    if (!tensor.requires_grad && Chance(50)) continue;
    std::vector<double> gradient(tensor.elements.size());
    for (double& element : gradient) element = 2 * (Draw(3) - 1);
    if (tensor.requires_grad) {
      for (size_t k = 0; k < gradient.size(); ++k)
        after.tensors[i].elements[k] -= 0.5 * gradient[k];
      ++updated;
    } else {
      frozen = true;
      ++ignored;
    }
    // Under either name of a tie.
    const bool by_alias = i == 0 && module.tensors.back().owner == 0 && Chance(50);
    push.emplace_back(
        Tensor(by_alias ? "tied.weight" : tensor.name, v1::GRADIENT, tensor.shape, tensor.dtype),
        Encode(tensor.dtype, gradient));
  }
  if (push.empty()) return;
  std::vector<v1::StepPart> parts = StepParts(name, push);
  parts.front().mutable_header()->set_ignore_frozen(ignore_frozen);
  const absl::StatusOr<v1::ApplyStepResponse> answer = Push(parts);
  if (buffer_gradient || (frozen && !ignore_frozen)) {
    ASSERT_FALSE(answer.ok());
    const auto reason = GetReason(answer.status());
    EXPECT_TRUE((buffer_gradient && reason == Reason::kNotAParameter) ||
                (frozen && !ignore_frozen && reason == Reason::kParameterFrozen))
        << answer.status();
    return;
  }
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_EQ(answer->updated(), updated);
  EXPECT_EQ(answer->ignored(), ignored);
  ++after.step;
  EXPECT_EQ(answer->step(), after.step);
  module = std::move(after);
  Published(module, answer->version());
}

void NnModuleModelTest::Freeze(const std::string& name) {
  ModelModule& module = modules_[name];
  const bool flag = Chance(60);
  const std::string prefix = absl::StrCat("layer", Draw(4), ".");
  const bool all = Chance(30);
  v1::SetRequiresGradRequest request;
  request.set_module(name);
  request.set_requires_grad(flag);
  if (all) {
    request.mutable_selection()->add_globs("*");
  } else {
    request.mutable_selection()->add_prefixes(prefix);
  }
  uint64_t changed = 0;
  for (ModelTensor& tensor : module.tensors) {
    if (!tensor.parameter || tensor.owner >= 0) continue;
    if (!all && !absl::StartsWith(tensor.name, prefix)) continue;
    changed += tensor.requires_grad != flag;
    tensor.requires_grad = flag;
  }
  const auto answer = Call(&v1::ModelState::Stub::SetRequiresGrad, request);
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_EQ(answer->changed(), changed);
  if (changed > 0) Published(module, answer->version());
}

// The whole state_dict, or only buffers of it; or one that is refused.
void NnModuleModelTest::Load(const std::string& name) {
  ModelModule& module = modules_[name];
  ModelModule after = module;
  const bool strict = Chance(50);
  const bool drop_one = strict && Chance(30);
  std::vector<v1::LoadPart> parts(2);
  std::string region;
  bool dropped = false;
  for (size_t i = 0; i < module.tensors.size(); ++i) {
    const ModelTensor& tensor = module.tensors[i];
    if (tensor.owner >= 0 || !tensor.persistent) continue;
    if (!strict && (tensor.parameter || Chance(30))) continue;
    if (drop_one && !dropped) {
      dropped = true;
      continue;
    }
    after.tensors[i].elements = DrawElements(tensor.shape);
    // In another dtype it is cast to the module's.
    const v1::DType dtype = Chance(30) ? v1::F64 : tensor.dtype;
    v1::TensorInfo* info = parts[1].mutable_tensors()->add_tensors();
    *info = Tensor(tensor.name, v1::TENSOR_KIND_UNSPECIFIED, tensor.shape, dtype);
    info->set_offset(region.size());
    region += Encode(dtype, after.tensors[i].elements);
  }
  v1::LoadHeader* header = parts[0].mutable_header();
  header->set_module(name);
  header->mutable_options()->set_strict(strict);
  header->set_tensor_count(static_cast<uint64_t>(parts[1].tensors().tensors_size()));
  header->set_total_bytes(region.size());
  if (header->tensor_count() == 0) return;
  if (!region.empty()) {
    v1::Chunk* chunk = parts.emplace_back().mutable_chunk();
    chunk->set_data(region);
  }
  parts.emplace_back().mutable_trailer()->set_total_bytes(region.size());
  const auto answer = ServerTest::Load(parts);
  if (dropped) {
    EXPECT_THAT(answer, FailsWith(Reason::kMissingKey));
    return;
  }
  ASSERT_TRUE(answer.ok()) << answer.status();
  module = std::move(after);
  Published(module, answer->module().version());
}

void NnModuleModelTest::Move(const std::string& name) {
  ModelModule& module = modules_[name];
  v1::MoveModuleRequest request;
  request.set_module(name);
  bool changes = false;
  if (Chance(50)) {
    request.set_device(Chance(50) ? "cpu" : "cpu:1");
    changes = request.device() != module.device;
    module.device = request.device();
  }
  if (request.device().empty() || Chance(50)) {
    const v1::DType dtypes[] = {v1::F64, v1::F32, v1::F16, v1::BF16};
    request.set_dtype(dtypes[Draw(4)]);
    for (ModelTensor& tensor : module.tensors) {
      if (!IsFloat(tensor.dtype)) continue;
      changes = changes || tensor.dtype != request.dtype();
      tensor.dtype = request.dtype();
    }
  }
  const auto answer = Call(&v1::ModelState::Stub::MoveModule, request);
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_EQ(answer->device(), module.device);
  if (changes) {
    Published(module, answer->version());
  } else {
    EXPECT_EQ(VersionKey(answer->version()), VersionKey(module.version));
  }
}

void NnModuleModelTest::Pin(const std::string& name) {
  v1::PinSnapshotRequest request;
  request.set_module(name);
  const auto pin = Call(&v1::ModelState::Stub::PinSnapshot, request);
  ASSERT_TRUE(pin.ok()) << pin.status();
  pins_[pin->snapshot_id()] = {name, Expected(modules_[name]), modules_[name].version};
  EXPECT_EQ(VersionKey(pin->version()), VersionKey(modules_[name].version));
  if (pins_.size() < 6) return;
  v1::ReleaseSnapshotRequest release;
  auto released = pins_.begin();
  std::advance(released, Draw(static_cast<int>(pins_.size())));
  release.set_snapshot_id(released->first);
  EXPECT_TRUE(Call(&v1::ModelState::Stub::ReleaseSnapshot, release).ok());
  pins_.erase(released);
}

void NnModuleModelTest::CheckPins() {
  for (const auto& [id, pin] : pins_) {
    v1::StreamStateDictRequest request;
    request.set_module(pin.module);
    request.set_snapshot_id(id);
    const Fetched fetched = Fetch(request);
    ASSERT_TRUE(fetched.status.ok()) << fetched.status;
    EXPECT_EQ(Seen(fetched), pin.state);
    EXPECT_EQ(VersionKey(fetched.header.version()), VersionKey(pin.version));
  }
}

// A checkpoint is the module without its non-persistent buffers.
void NnModuleModelTest::SaveAndLoad(const std::string& name) {
  v1::SaveCheckpointRequest save;
  save.set_module(name);
  save.set_path(absl::StrCat("saved", saved_++));
  grpc::ClientContext save_context;
  auto saving = stub_->SaveCheckpoint(&save_context, save);
  v1::SaveCheckpointResponse saved;
  while (saving->Read(&saved)) {
  }
  ASSERT_TRUE(saving->Finish().ok());

  const std::string copy = absl::StrCat("copy", saved_);
  v1::LoadCheckpointRequest load;
  load.set_module(copy);
  load.set_path(save.path());
  load.set_create_module(true);
  grpc::ClientContext load_context;
  auto loading = stub_->LoadCheckpoint(&load_context, load);
  v1::LoadCheckpointResponse loaded;
  while (loading->Read(&loaded)) {
  }
  ASSERT_TRUE(loading->Finish().ok());
  EXPECT_EQ(loaded.result().load().module().step(), modules_[name].step);

  ModelModule module;
  std::map<std::string, int> place;
  for (const ModelTensor& tensor : modules_[name].tensors) {
    if (!tensor.persistent) continue;
    place[tensor.name] = static_cast<int>(module.tensors.size());
    module.tensors.push_back(tensor);
    if (tensor.owner >= 0) module.tensors.back().owner = place[Owner(modules_[name], tensor).name];
  }
  module.version = loaded.result().load().module().version();
  module.step = modules_[name].step;
  history_[VersionKey(module.version)] = Expected(module);
  modules_[copy] = std::move(module);
}

void NnModuleModelTest::CheckAll(const std::string& name) {
  const ModelModule& module = modules_[name];
  v1::StreamStateDictRequest request;
  request.set_module(name);
  request.mutable_selection()->set_include_non_persistent(true);
  const Fetched fetched = Fetch(request);
  ASSERT_TRUE(fetched.status.ok()) << fetched.status;
  EXPECT_EQ(Seen(fetched), Expected(module, true));
  EXPECT_EQ(VersionKey(fetched.header.version()), VersionKey(module.version));
  EXPECT_EQ(fetched.header.step(), module.step);
  for (bool parameters : {true, false}) {
    v1::ListTensorsRequest list;
    list.set_module(name);
    const auto answer = Call(
        parameters ? &v1::ModelState::Stub::ListParameters : &v1::ModelState::Stub::ListBuffers,
        list);
    ASSERT_TRUE(answer.ok()) << answer.status();
    int i = 0;
    for (const ModelTensor& tensor : module.tensors) {
      if (tensor.parameter != parameters) continue;
      ASSERT_LT(i, answer->tensors_size());
      const v1::TensorInfo& info = answer->tensors(i++);
      const ModelTensor& owner = Owner(module, tensor);
      EXPECT_EQ(info.name(), tensor.name);
      EXPECT_EQ(info.dtype(), owner.dtype) << tensor.name;
      EXPECT_EQ(info.alias_of(), tensor.owner >= 0 ? owner.name : "");
      EXPECT_EQ(info.requires_grad(), parameters && owner.requires_grad) << tensor.name;
      EXPECT_EQ(info.persistent(), !parameters && tensor.persistent) << tensor.name;
    }
    EXPECT_EQ(i, answer->tensors_size());
  }
}

void NnModuleModelTest::ReadUntilStopped(uint32_t seed) {
  std::mt19937 random(seed);
  while (!stop_.load()) {
    v1::ListModulesRequest list;
    const auto modules = Call(&v1::ModelState::Stub::ListModules, list);
    if (!modules.ok() || modules->modules_size() == 0) continue;
    const std::string& name =
        modules
            ->modules(static_cast<int>(random() % static_cast<uint32_t>(modules->modules_size())))
            .name();
    const Fetched fetched = FetchAll(name);
    if (!fetched.status.ok()) continue;  // deleted meanwhile
    absl::MutexLock lock(&seen_mutex_);
    seen_.emplace_back(VersionKey(fetched.header.version()), Seen(fetched));
  }
}

TEST_P(NnModuleModelTest, EveryOperationLeavesWhatTheModelHas) {
  SCOPED_TRACE(absl::StrCat("seed ", GetParam()));
  std::vector<std::thread> readers;
  for (uint32_t i = 0; i < 2; ++i) readers.emplace_back([this, i] { ReadUntilStopped(i); });
  for (int operation = 0; operation < 400 && !HasFailure(); ++operation) {
    SCOPED_TRACE(absl::StrCat("operation ", operation));
    if (modules_.empty() || (modules_.size() < 5 && Chance(5))) {
      CreateOne();
      continue;
    }
    auto chosen = modules_.begin();
    std::advance(chosen, Draw(static_cast<int>(modules_.size())));
    const std::string name = chosen->first;
    const int what = Draw(100);
    if (what < 40) {
      Step(name);
    } else if (what < 52) {
      Freeze(name);
    } else if (what < 68) {
      Load(name);
    } else if (what < 80) {
      Move(name);
    } else if (what < 88) {
      Pin(name);
    } else if (what < 91) {
      SaveAndLoad(name);
    } else if (what < 94) {
      DeleteOne(name);
    } else {
      CheckPins();
    }
    if (modules_.contains(name)) CheckAll(name);
  }
  stop_ = true;
  for (std::thread& reader : readers) reader.join();
  absl::MutexLock lock(&seen_mutex_);
  EXPECT_GT(seen_.size(), 20u);
  for (const auto& [version, state] : seen_) {
    ASSERT_TRUE(history_.contains(version)) << version;
    EXPECT_EQ(state, history_[version]) << version;
  }
}

INSTANTIATE_TEST_SUITE_P(Seeds, NnModuleModelTest, testing::Values(1u, 2u, 3u, 4u));

}  // namespace
}  // namespace modelstate
