#include "client/files/optimizer_file.h"

#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/base/tensor_cast.h"
#include "common/format/torch_optimizer.h"

namespace modelstate::client {
namespace {

// Files of tests/data/make_optimizer_files.py.
std::string Golden(const std::string& name, const std::string& torch = "2.15.0") {
  return absl::StrCat(MODELSTATE_SOURCE_DIR, "/tests/data/optimizer-torch-", torch, "/", name,
                      ".pt");
}

TensorInfo Parameter(const std::string& name, const std::vector<int64_t>& shape,
                     std::optional<uint32_t> group = std::nullopt) {
  TensorInfo info;
  info.spec.name = name;
  info.spec.shape = *Shape::Create(shape);
  info.group = group;
  return info;
}

// The module that the script trains, in the order of its named_parameters().
std::vector<TensorInfo> Module() {
  return {Parameter("fc1.weight", {4, 3}), Parameter("fc1.bias", {4}), Parameter("scale", {}),
          Parameter("fc2.weight", {2, 4}), Parameter("fc2.bias", {2})};
}

const std::vector<std::string> kTwoGroups = {"fc1.weight", "fc2.weight", "fc1.bias", "scale",
                                             "fc2.bias"};

// With the script's two groups.
std::vector<TensorInfo> GroupedModule() {
  std::vector<TensorInfo> module = Module();
  for (TensorInfo& parameter : module) {
    parameter.group = parameter.spec.shape.rank() == 2 ? 0 : 1;
  }
  return module;
}

OptimizerInfo Info(const std::vector<std::string>& groups) {
  OptimizerInfo info;
  for (const std::string& name : groups) info.groups.emplace_back().name = name;
  return info;
}

double Scalar(const TensorRef& ref) {
  EXPECT_EQ(ref.spec.shape.num_elements(), 1);
  double value = 0;
  CastElements(ref.spec.dtype, ref.bytes.data(), DType::kF64, reinterpret_cast<uint8_t*>(&value),
               1);
  return value;
}

// "name/slot": the elements, scalars as numbers.
std::map<std::string, std::string> Contents(absl::Span<const TensorRef> refs) {
  std::map<std::string, std::string> contents;
  for (const TensorRef& ref : refs) {
    EXPECT_EQ(ref.spec.kind, TensorKind::kOptimizerState);
    EXPECT_EQ(ref.bytes.size(), ref.spec.nbytes());
    const bool scalar = ref.spec.slot == "step" || ref.spec.slot == "mu_product";
    const bool is_new = contents
                            .emplace(absl::StrCat(ref.spec.name, "/", ref.spec.slot),
                                     scalar ? absl::StrCat(Scalar(ref))
                                            : std::string(ref.bytes.begin(), ref.bytes.end()))
                            .second;
    EXPECT_TRUE(is_new) << ref.spec.name << " " << ref.spec.slot;
  }
  return contents;
}

// The elements of state[position][key] of a file.
std::string Stored(const std::string& path, uint64_t position, const std::string& key) {
  const auto file = TorchOptimizerFile::Open(*OpenForRead(path));
  EXPECT_EQ(file.status(), absl::OkStatus());
  for (size_t i = 0; i < file->tensors().size(); ++i) {
    const TorchOptimizerTensor& tensor = file->tensors()[i];
    if (tensor.position != position || tensor.key != key) continue;
    std::string bytes(tensor.nbytes(), '\0');
    EXPECT_EQ(file->Read(i, {reinterpret_cast<uint8_t*>(bytes.data()), bytes.size()}),
              absl::OkStatus());
    return bytes;
  }
  ADD_FAILURE() << path << " has no state[" << position << "][" << key << "]";
  return "";
}

void ExpectError(const absl::Status& status, Reason reason, absl::string_view text) {
  EXPECT_EQ(GetReason(status), reason) << status;
  EXPECT_NE(status.message().find(text), absl::string_view::npos) << status << "\nlacks " << text;
}

TEST(OptimizerFileTest, OneGroupOfAllParametersNeedsNoGroups) {
  const auto file = OptimizerFile::Read(Golden("adam"), Module());
  ASSERT_EQ(file.status(), absl::OkStatus());
  const OptimizerConfig& config = file->config();
  EXPECT_EQ(config.algorithm, Algorithm::kAdam);
  EXPECT_TRUE(config.groups.empty());
  EXPECT_FALSE(config.no_default_group);
  EXPECT_EQ(config.hyperparameters.lr, 0.01);
  EXPECT_EQ(config.hyperparameters.beta1, 0.8);
  EXPECT_EQ(config.hyperparameters.beta2, 0.95);
  EXPECT_EQ(config.hyperparameters.amsgrad, true);
  EXPECT_EQ(file->step(), 3u);
  const auto contents = Contents(file->refs());
  EXPECT_EQ(contents.size(), 16u);  // fc2.bias has not stepped
  EXPECT_EQ(contents.at("fc1.weight/step"), "3");
  EXPECT_EQ(contents.at("fc2.weight/max_exp_avg_sq"), Stored(Golden("adam"), 3, "max_exp_avg_sq"));
}

TEST(OptimizerFileTest, PositionsCountAcrossGroupsInTheOrderGiven) {
  ReadOptimizerOptions options;
  options.order = kTwoGroups;
  const auto file = OptimizerFile::Read(Golden("adamw"), Module(), options);
  ASSERT_EQ(file.status(), absl::OkStatus());
  const OptimizerConfig& config = file->config();
  EXPECT_EQ(config.algorithm, Algorithm::kAdamW);
  EXPECT_TRUE(config.no_default_group);
  ASSERT_EQ(config.groups.size(), 2u);
  EXPECT_EQ(config.groups[0].selection.names,
            (std::vector<std::string>{"fc1.weight", "fc2.weight"}));
  EXPECT_EQ(config.groups[1].selection.names,
            (std::vector<std::string>{"fc1.bias", "scale", "fc2.bias"}));
  EXPECT_EQ(config.groups[0].hyperparameters.weight_decay, 0.1);
  EXPECT_EQ(config.groups[1].hyperparameters.lr, 0.02);
  // AdamW is decoupled by itself: the server has no such hyper-parameter for it.
  EXPECT_FALSE(config.groups[0].hyperparameters.decoupled_weight_decay.has_value());
  const auto contents = Contents(file->refs());
  EXPECT_EQ(contents.at("fc2.weight/exp_avg"), Stored(Golden("adamw"), 1, "exp_avg"));
  EXPECT_EQ(contents.at("fc1.bias/exp_avg"), Stored(Golden("adamw"), 2, "exp_avg"));
}

TEST(OptimizerFileTest, SeveralGroupsGoByTheModulesOwn) {
  ReadOptimizerOptions options;
  options.current = Info({"decayed", "others"});
  options.current->config.max_grad_norm = 2;
  options.current->config.rounds.quorum = 3;
  options.current->config.hyperparameters.momentum = 0.5;
  const auto file = OptimizerFile::Read(Golden("adamw"), GroupedModule(), options);
  ASSERT_EQ(file.status(), absl::OkStatus());
  ASSERT_EQ(file->config().groups.size(), 2u);
  EXPECT_EQ(file->config().groups[1].name, "others");
  EXPECT_EQ(file->config().groups[1].selection.names,
            (std::vector<std::string>{"fc1.bias", "scale", "fc2.bias"}));
  EXPECT_EQ(file->config().max_grad_norm, 2);
  EXPECT_EQ(file->config().rounds.quorum, 3u);
  EXPECT_EQ(file->config().hyperparameters, Hyperparameters());

  std::vector<TensorInfo> other = GroupedModule();
  other[2].group = 0;
  ExpectError(OptimizerFile::Read(Golden("adamw"), other, options).status(), Reason::kInvalidField,
              "loaded state dict contains a parameter group that doesn't match the size of "
              "optimizer's group: group 0 of the file has 2 parameters, that of the module 3");
  options.current = Info({"one"});
  ExpectError(OptimizerFile::Read(Golden("adamw"), Module(), options).status(),
              Reason::kInvalidField,
              "loaded state dict has a different number of parameter groups");
}

TEST(OptimizerFileTest, NamesOfTheFileWinOverTheModulesOrder) {
  std::vector<TensorInfo> module = Module();
  std::swap(module[0], module[4]);
  const auto file = OptimizerFile::Read(Golden("nested"), module);
  ASSERT_EQ(file.status(), absl::OkStatus());
  EXPECT_EQ(file->config().hyperparameters.lr, 0.5);  // a tensor in the file
  EXPECT_EQ(Contents(file->refs()).at("fc1.weight/exp_avg"),
            Stored(Golden("nested"), 0, "exp_avg"));
}

TEST(OptimizerFileTest, AGroupOfAsManyAsRequireGradIsThose) {
  std::vector<TensorInfo> module = Module();
  module.insert(module.begin() + 1, Parameter("frozen", {7}));
  module[1].spec.requires_grad = false;
  const auto file = OptimizerFile::Read(Golden("adam"), module);
  ASSERT_EQ(file.status(), absl::OkStatus());
  EXPECT_TRUE(file->config().no_default_group);
  ASSERT_EQ(file->config().groups.size(), 1u);
  EXPECT_EQ(file->config().groups[0].selection.names.size(), 5u);
  EXPECT_EQ(file->config().groups[0].hyperparameters.lr, 0.01);

  module.push_back(Parameter("another", {}));
  ExpectError(OptimizerFile::Read(Golden("adam"), module).status(), Reason::kInvalidField,
              "the file has 5 parameters, the module 7, of which 6 require grad");
}

TEST(OptimizerFileTest, AnOrderThatDoesNotFitIsRefused) {
  ReadOptimizerOptions options;
  options.order = kTwoGroups;
  options.order[1] = "fc2.wieght";
  ExpectError(OptimizerFile::Read(Golden("adamw"), Module(), options).status(), Reason::kUnknownKey,
              "\"fc2.wieght\"");
  options.order[1] = "fc1.weight";
  ExpectError(OptimizerFile::Read(Golden("adamw"), Module(), options).status(),
              Reason::kInvalidField, "the order has \"fc1.weight\" twice");
  options.order = {"fc1.weight"};
  ExpectError(OptimizerFile::Read(Golden("adamw"), Module(), options).status(),
              Reason::kInvalidField, "the file has 5 parameters and the order 1");
  options.order = kTwoGroups;
  std::swap(options.order[0], options.order[1]);
  ExpectError(OptimizerFile::Read(Golden("adamw"), Module(), options).status(),
              Reason::kShapeMismatch,
              "of the file has shape [4, 3], but parameter 0 in the order is \"fc2.weight\" of "
              "shape [2, 4]");
}

TEST(OptimizerFileTest, TheAlgorithmThatIsGivenDecidesWhatTheFileLeavesOpen) {
  ReadOptimizerOptions options;
  options.order = kTwoGroups;
  ExpectError(OptimizerFile::Read(Golden("adamw", "1.13.1"), Module(), options).status(),
              Reason::kInvalidField, "give the algorithm");
  options.algorithm = Algorithm::kAdamW;
  const auto file = OptimizerFile::Read(Golden("adamw", "1.13.1"), Module(), options);
  ASSERT_EQ(file.status(), absl::OkStatus());
  EXPECT_EQ(file->config().algorithm, Algorithm::kAdamW);
  options.algorithm = Algorithm::kRAdam;
  ExpectError(OptimizerFile::Read(Golden("adamw"), Module(), options).status(),
              Reason::kInvalidField, "the algorithm that is given is radam");
}

TEST(OptimizerFileTest, EveryParameterHasAStepAndOnlyThoseThatHaveStepped) {
  // A Python number in 1.13.
  auto file = OptimizerFile::Read(Golden("rmsprop", "1.13.1"), Module());
  ASSERT_EQ(file.status(), absl::OkStatus());
  EXPECT_EQ(Contents(file->refs()).at("scale/step"), "3");
  // Adagrad has state of what never had a gradient.
  file = OptimizerFile::Read(Golden("adagrad"), Module());
  ASSERT_EQ(file.status(), absl::OkStatus());
  EXPECT_EQ(file->step(), 3u);
  EXPECT_EQ(Contents(file->refs()).count("fc2.bias/sum"), 0u);
  EXPECT_EQ(Contents(file->refs()).count("fc1.bias/sum"), 1u);
  // SGD counts no steps.
  ReadOptimizerOptions options;
  options.order = kTwoGroups;
  file = OptimizerFile::Read(Golden("sgd"), Module(), options);
  ASSERT_EQ(file.status(), absl::OkStatus());
  EXPECT_EQ(file->step(), std::nullopt);
  EXPECT_EQ(Contents(file->refs()).at("scale/step"), "1");
  options.step = 12;
  file = OptimizerFile::Read(Golden("sgd"), Module(), options);
  ASSERT_EQ(file.status(), absl::OkStatus());
  EXPECT_EQ(file->step(), 12u);
  EXPECT_EQ(Contents(file->refs()).at("scale/step"), "12");
  EXPECT_EQ(file->refs().size(), 8u);
}

// The optimizer as a server has it after an import.
OptimizerInfo AfterImport(const OptimizerFile& file) {
  OptimizerInfo info;
  info.config = file.config();
  if (info.config.groups.empty()) {
    info.groups.push_back({"default", 0, info.config.hyperparameters});
  }
  for (const ParameterGroup& group : info.config.groups) {
    info.groups.push_back({group.name, 0, group.hyperparameters});
  }
  return info;
}

TEST(OptimizerFileTest, AnExportIsReadAsWhatWasImported) {
  const std::string path = ::testing::TempDir() + "export.pt";
  for (const char* name : {"sgd", "sgd-plain", "adam", "adamw", "adagrad", "rmsprop", "nadam",
                           "radam", "adamax", "adadelta", "bfloat16"}) {
    SCOPED_TRACE(name);
    const bool grouped = absl::string_view(name) == "sgd" || absl::string_view(name) == "adamw";
    ReadOptimizerOptions options;
    if (grouped) options.order = kTwoGroups;
    std::vector<TensorInfo> module = grouped ? GroupedModule() : Module();
    const auto file = OptimizerFile::Read(Golden(name), module, options);
    ASSERT_EQ(file.status(), absl::OkStatus());
    for (TensorInfo& parameter : module) {
      if (!parameter.group) parameter.group = 0;
    }
    // What a server has besides.
    std::vector<TensorRef> state(file->refs().begin(), file->refs().end());
    const std::string master(48, 'x');
    TensorRef more = {module[0].spec, {reinterpret_cast<const uint8_t*>(master.data()), 48}};
    state.push_back(more);  // the parameter itself
    more.spec.kind = TensorKind::kOptimizerState;
    more.spec.slot = "master";
    state.push_back(more);

    const auto written = WriteOptimizerFile(path, AfterImport(*file), module, state);
    ASSERT_EQ(written.status(), absl::OkStatus());
    EXPECT_EQ(written->groups, grouped ? 2u : 1u);
    EXPECT_EQ(written->parameters, 5u);
    const auto before = TorchOptimizerFile::Open(*OpenForRead(Golden(name)));
    const auto after = TorchOptimizerFile::Open(*OpenForRead(path));
    ASSERT_EQ(after.status(), absl::OkStatus());
    ASSERT_EQ(after->tensors().size(), before->tensors().size());
    for (size_t i = 0; i < after->tensors().size(); ++i) {
      const TorchOptimizerTensor& tensor = after->tensors()[i];
      EXPECT_EQ(Stored(path, tensor.position, tensor.key),
                Stored(Golden(name), tensor.position, tensor.key))
          << tensor.position << " " << tensor.key;
      EXPECT_EQ(tensor.key == "step" ? DType::kF32 : tensor.dtype, tensor.dtype);
    }
    for (size_t i = 0; i < after->groups().size(); ++i) {
      EXPECT_EQ(after->groups()[i].size, before->groups()[i].size);
      EXPECT_EQ(after->groups()[i].hyperparameters, before->groups()[i].hyperparameters);
    }
  }
}

TEST(OptimizerFileTest, AnExportTakesTheOrderWithinEachGroup) {
  const std::string path = ::testing::TempDir() + "order.pt";
  ReadOptimizerOptions options;
  options.order = kTwoGroups;
  const auto file = OptimizerFile::Read(Golden("adamw"), Module(), options);
  ASSERT_EQ(file.status(), absl::OkStatus());
  std::vector<TensorInfo> module = GroupedModule();
  const std::vector<std::string> reversed = {"fc2.bias", "fc2.weight", "scale", "fc1.bias",
                                             "fc1.weight"};
  auto written = WriteOptimizerFile(path, AfterImport(*file), module, file->refs(), reversed);
  ASSERT_EQ(written.status(), absl::OkStatus());
  EXPECT_EQ(written->order, (std::vector<std::string>{"fc2.weight", "fc1.weight", "fc2.bias",
                                                      "scale", "fc1.bias"}));
  EXPECT_EQ(Stored(path, 0, "exp_avg"), Stored(Golden("adamw"), 1, "exp_avg"));
  EXPECT_EQ(Stored(path, 4, "exp_avg"), Stored(Golden("adamw"), 2, "exp_avg"));

  const std::vector<std::string> short_order = {"fc1.weight", "fc2.weight"};
  ExpectError(
      WriteOptimizerFile(path, AfterImport(*file), module, file->refs(), short_order).status(),
      Reason::kMissingKey, "the order lacks \"fc1.bias\", \"scale\", \"fc2.bias\"");
  // What is in no group needs no place, and gets none.
  for (size_t i : {1, 2, 4}) module[i].group.reset();
  OptimizerInfo one = AfterImport(*file);
  one.groups.pop_back();
  written = WriteOptimizerFile(path, one, module, file->refs(), short_order);
  ASSERT_EQ(written.status(), absl::OkStatus());
  EXPECT_EQ(written->order, short_order);
}

TEST(OptimizerFileTest, TiedNamesCountOnce) {
  std::vector<TensorInfo> module = Module();
  module.insert(module.begin() + 1, Parameter("tied", {4, 3}));
  module[1].spec.alias_of = "fc1.weight";
  auto file = OptimizerFile::Read(Golden("adam"), module);
  ASSERT_EQ(file.status(), absl::OkStatus());
  EXPECT_TRUE(file->config().groups.empty());
  EXPECT_EQ(Contents(file->refs()).count("tied/exp_avg"), 0u);
  // Under its second name too.
  ReadOptimizerOptions options;
  options.order = {"tied", "fc1.bias", "scale", "fc2.weight", "fc2.bias", "fc1.weight"};
  file = OptimizerFile::Read(Golden("adam"), module, options);
  ASSERT_EQ(file.status(), absl::OkStatus());
  EXPECT_EQ(Contents(file->refs()).at("fc1.weight/exp_avg"), Stored(Golden("adam"), 0, "exp_avg"));
}

TEST(OptimizerFileTest, ABrokenFileIsNamed) {
  const std::string path = ::testing::TempDir() + "broken.pt";
  std::ifstream in(Golden("adam"), std::ios::binary);
  std::ostringstream whole;
  whole << in.rdbuf();
  std::ofstream(path, std::ios::binary) << whole.str().substr(0, 1000);
  ExpectError(OptimizerFile::Read(path, Module()).status(), Reason::kCheckpointCorrupt, path);
}

}  // namespace
}  // namespace modelstate::client
