#include "client/files/optimizer_file.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/base/tensor_cast.h"
#include "common/format/torch_optimizer.h"

namespace modelstate::client {
namespace {

constexpr char kStepSlot[] = "step";
constexpr char kMasterSlot[] = "master";  // the F32 copy of a narrower parameter

// torch keeps these as one number per parameter.
bool IsScalarSlot(absl::string_view slot) { return slot == kStepSlot || slot == "mu_product"; }

// Whether torch's optimizer counts the steps of each parameter.
bool CountsSteps(Algorithm algorithm) {
  return algorithm != Algorithm::kSgd && algorithm != Algorithm::kLion;
}

double ToDouble(DType dtype, const uint8_t* element) {
  uint8_t converted[sizeof(double)];
  CastElements(dtype, element, DType::kF64, converted, 1);
  double value = 0;
  std::memcpy(&value, converted, sizeof(value));
  return value;
}

absl::Status FieldError(absl::string_view field, absl::string_view text) {
  return MakeError(Reason::kInvalidField, text, {{"field", std::string(field)}});
}

// A module's parameters as torch's optimizers see them: tied names once.
class ParameterNames {
 public:
  explicit ParameterNames(absl::Span<const TensorInfo> parameters) {
    for (const TensorInfo& parameter : parameters) {
      if (!parameter.spec.is_alias()) owners_.push_back(&parameter);
      by_name_.emplace(parameter.spec.name, &parameter);
    }
  }

  // As named_parameters().
  const std::vector<const TensorInfo*>& all() const { return owners_; }

  const TensorInfo* Owner(const std::string& name) const {
    auto it = by_name_.find(name);
    if (it != by_name_.end() && it->second->spec.is_alias()) {
      it = by_name_.find(it->second->spec.alias_of);
    }
    return it == by_name_.end() ? nullptr : it->second;
  }

  // The parameters that `names` names, each once: the second name of a tied one is passed over.
  absl::StatusOr<std::vector<const TensorInfo*>> Resolve(
      absl::Span<const std::string> names) const {
    std::vector<const TensorInfo*> result;
    absl::flat_hash_set<absl::string_view> given;
    absl::flat_hash_set<const TensorInfo*> taken;
    for (const std::string& name : names) {
      const TensorInfo* owner = Owner(name);
      if (owner == nullptr) {
        return MakeError(Reason::kUnknownKey,
                         absl::StrCat("the order names \"", name,
                                      "\", which is no parameter of the module; give the module's "
                                      "names in the order of the optimizer's parameters"),
                         {{"key", name}});
      }
      if (!given.insert(name).second) {
        return FieldError("order", absl::StrCat("the order has \"", name, "\" twice"));
      }
      if (taken.insert(owner).second) result.push_back(owner);
    }
    return result;
  }

 private:
  std::vector<const TensorInfo*> owners_;
  absl::flat_hash_map<std::string, const TensorInfo*> by_name_;
};

// Those of each group, and in no group.
std::vector<const TensorInfo*> InGroup(const std::vector<const TensorInfo*>& parameters,
                                       std::optional<uint32_t> group) {
  std::vector<const TensorInfo*> result;
  std::copy_if(parameters.begin(), parameters.end(), std::back_inserter(result),
               [&](const TensorInfo* parameter) { return parameter->group == group; });
  return result;
}

absl::Status SizeMismatch(absl::string_view what) {
  return FieldError("order",
                    absl::StrCat("loaded state dict contains a parameter group that doesn't match "
                                 "the size of optimizer's group: ",
                                 what,
                                 "; give the order, the names of the parameters as torch's "
                                 "optimizer has them"));
}

}  // namespace

class OptimizerImporter {
 public:
  OptimizerImporter(const TorchOptimizerFile& file, absl::Span<const TensorInfo> parameters,
                    const ReadOptimizerOptions& options)
      : file_(file), names_(parameters), options_(options) {}

  absl::StatusOr<OptimizerFile> Run() {
    if (options_.algorithm) {
      MS_RETURN_IF_ERROR(file_.CheckAlgorithm(*options_.algorithm));
      algorithm_ = *options_.algorithm;
    } else {
      MS_ASSIGN_OR_RETURN(algorithm_, file_.GuessAlgorithm());
    }
    MS_ASSIGN_OR_RETURN(positions_, Positions());
    Configure();
    MS_RETURN_IF_ERROR(CheckShapes());
    MS_RETURN_IF_ERROR(ReadState());
    return std::move(result_);
  }

 private:
  absl::StatusOr<std::vector<const TensorInfo*>> Positions() const {
    std::vector<std::string> order = options_.order;
    if (order.empty()) {
      for (const TorchOptimizerGroup& group : file_.groups()) {
        order.insert(order.end(), group.parameter_names.begin(), group.parameter_names.end());
      }
    }
    const uint64_t count = file_.parameter_count();
    if (!options_.order.empty() || (order.size() == count && count > 0)) {
      MS_ASSIGN_OR_RETURN(std::vector<const TensorInfo*> named, names_.Resolve(order));
      if (named.size() == count) return named;
      return SizeMismatch(
          absl::StrCat("the file has ", count, " parameters and the order ", named.size()));
    }
    return file_.groups().size() == 1 ? OfOneGroup() : OfSeveralGroups();
  }

  absl::StatusOr<std::vector<const TensorInfo*>> OfOneGroup() const {
    std::vector<const TensorInfo*> trainable;
    for (const TensorInfo* parameter : names_.all()) {
      if (parameter->spec.requires_grad) trainable.push_back(parameter);
    }
    const uint64_t count = file_.groups()[0].size;
    if (names_.all().size() == count) return names_.all();
    if (trainable.size() == count) return trainable;
    return SizeMismatch(absl::StrCat("the file has ", count, " parameters, the module ",
                                     names_.all().size(), ", of which ", trainable.size(),
                                     " require grad"));
  }

  absl::StatusOr<std::vector<const TensorInfo*>> OfSeveralGroups() const {
    const size_t groups = options_.current ? options_.current->groups.size() : 0;
    if (groups != file_.groups().size()) {
      return FieldError(
          "order",
          absl::StrCat("loaded state dict has a different number of parameter groups: the file ",
                       file_.groups().size(), ", the module ", groups,
                       ". Which parameters each has is not in the file: give the order, the names "
                       "of the parameters as torch's optimizer has them, group after group"));
    }
    std::vector<const TensorInfo*> result;
    for (size_t i = 0; i < groups; ++i) {
      const auto members = InGroup(names_.all(), static_cast<uint32_t>(i));
      if (members.size() != file_.groups()[i].size) {
        return SizeMismatch(absl::StrCat("group ", i, " of the file has ", file_.groups()[i].size,
                                         " parameters, that of the module ", members.size()));
      }
      result.insert(result.end(), members.begin(), members.end());
    }
    return result;
  }

  void Configure() {
    OptimizerConfig& config = result_.config_;
    if (options_.current) config = options_.current->config;
    config.algorithm = algorithm_;
    config.hyperparameters = Hyperparameters();
    config.groups.clear();
    const bool everything = positions_.size() == names_.all().size();
    const absl::Span<const TorchOptimizerGroup> groups = file_.groups();
    if (everything && groups.size() == 1) {
      config.hyperparameters = TorchHyperparameters(algorithm_, groups[0].hyperparameters);
      config.no_default_group = false;
      return;
    }
    config.no_default_group = true;
    const bool named = options_.current && options_.current->groups.size() == groups.size();
    size_t position = 0;
    for (size_t i = 0; i < groups.size(); ++i) {
      ParameterGroup& group = config.groups.emplace_back();
      if (named) group.name = options_.current->groups[i].name;
      group.hyperparameters = TorchHyperparameters(algorithm_, groups[i].hyperparameters);
      for (uint64_t j = 0; j < groups[i].size; ++j) {
        group.selection.names.push_back(positions_[position++]->spec.name);
      }
    }
  }

  // A wrong order mostly shows here.
  absl::Status CheckShapes() const {
    for (const TorchOptimizerTensor& tensor : file_.tensors()) {
      const TensorSpec& parameter = positions_[tensor.position]->spec;
      const bool fits = IsScalarSlot(tensor.key) ? tensor.shape.num_elements() == 1
                                                 : tensor.shape == parameter.shape;
      if (fits) continue;
      return MakeError(
          Reason::kShapeMismatch,
          absl::StrCat("state[", tensor.position, "][", tensor.key, "] of the file has shape ",
                       tensor.shape.ToString(), ", but parameter ", tensor.position,
                       " in the order is \"", parameter.name, "\" of shape ",
                       parameter.shape.ToString(),
                       "; give the order that the parameters have in torch's optimizer"),
          {{"tensor", parameter.name}});
    }
    return absl::OkStatus();
  }

  struct Entry {
    size_t index = 0;  // in file_.tensors(); of the last ones, that the file lacks: its size
    uint64_t position = 0;
    uint64_t offset = 0;
  };

  absl::Status ReadState() {
    MS_ASSIGN_OR_RETURN(const auto steps, ReadSteps());
    std::vector<Entry> entries;
    uint64_t total = 0;
    const auto add = [&](size_t index, uint64_t position, uint64_t nbytes) {
      entries.push_back({index, position, total});
      total += nbytes;
    };
    const absl::Span<const TorchOptimizerTensor> tensors = file_.tensors();
    absl::flat_hash_set<uint64_t> uncounted;
    for (size_t i = 0; i < tensors.size(); ++i) {
      const uint64_t position = tensors[i].position;
      const auto step = steps.find(position);
      if (step != steps.end() && step->second == 0) continue;
      if (step == steps.end() && uncounted.insert(position).second) {
        add(tensors.size(), position, sizeof(double));
      }
      add(i, position, IsScalarSlot(tensors[i].key) ? sizeof(double) : tensors[i].nbytes());
    }
    result_.data_.reset(new (std::nothrow) uint8_t[total]);
    if (result_.data_ == nullptr) {
      return absl::ResourceExhaustedError(
          absl::StrCat("no memory for the ", total, " bytes of optimizer state"));
    }
    for (size_t i = 0; i < entries.size(); ++i) {
      const uint64_t end = i + 1 < entries.size() ? entries[i + 1].offset : total;
      MS_RETURN_IF_ERROR(ReadEntry(entries[i], end - entries[i].offset));
    }
    return absl::OkStatus();
  }

  // By position, and the largest of them.
  absl::StatusOr<absl::flat_hash_map<uint64_t, double>> ReadSteps() {
    absl::flat_hash_map<uint64_t, double> steps;
    double largest = 0;
    for (size_t i = 0; i < file_.tensors().size(); ++i) {
      if (file_.tensors()[i].key != kStepSlot) continue;
      MS_ASSIGN_OR_RETURN(const double step, ReadScalar(i));
      steps[file_.tensors()[i].position] = step;
      largest = std::max(largest, step);
    }
    // The server holds each to its limits; this is only the module's count.
    if (!steps.empty() && largest < 0x1p53) result_.step_ = static_cast<uint64_t>(largest);
    if (steps.empty()) result_.step_ = options_.step;
    return steps;
  }

  absl::StatusOr<double> ReadScalar(size_t index) const {
    const TorchOptimizerTensor& tensor = file_.tensors()[index];
    std::vector<uint8_t> bytes(tensor.nbytes());
    MS_RETURN_IF_ERROR(file_.Read(index, absl::MakeSpan(bytes)));
    return ToDouble(tensor.dtype, bytes.data());
  }

  absl::Status ReadEntry(const Entry& entry, uint64_t nbytes) {
    const absl::Span<uint8_t> bytes(result_.data_.get() + entry.offset, nbytes);
    TensorRef ref;
    ref.bytes = bytes;
    ref.spec.kind = TensorKind::kOptimizerState;
    ref.spec.name = positions_[entry.position]->spec.name;
    const bool missing = entry.index == file_.tensors().size();
    ref.spec.slot = missing ? kStepSlot : file_.tensors()[entry.index].key;
    if (IsScalarSlot(ref.spec.slot)) {
      ref.spec.dtype = DType::kF64;
      double value = static_cast<double>(std::max<uint64_t>(1, options_.step.value_or(1)));
      if (!missing) {
        MS_ASSIGN_OR_RETURN(value, ReadScalar(entry.index));
      }
      std::memcpy(bytes.data(), &value, sizeof(value));
    } else {
      ref.spec.dtype = file_.tensors()[entry.index].dtype;
      ref.spec.shape = file_.tensors()[entry.index].shape;
      MS_RETURN_IF_ERROR(file_.Read(entry.index, bytes));
    }
    result_.refs_.push_back(std::move(ref));
    return absl::OkStatus();
  }

  const TorchOptimizerFile& file_;
  const ParameterNames names_;
  const ReadOptimizerOptions& options_;
  Algorithm algorithm_ = Algorithm::kUnknown;
  std::vector<const TensorInfo*> positions_;
  OptimizerFile result_;
};

absl::StatusOr<OptimizerFile> OptimizerFile::Read(const std::string& path,
                                                  absl::Span<const TensorInfo> parameters,
                                                  const ReadOptimizerOptions& options) {
  MS_ASSIGN_OR_RETURN(File opened, OpenForRead(path));
  absl::StatusOr<TorchOptimizerFile> file = TorchOptimizerFile::Open(std::move(opened));
  if (!file.ok()) return Annotate(file.status(), path);
  absl::StatusOr<OptimizerFile> result = OptimizerImporter(*file, parameters, options).Run();
  if (!result.ok()) return Annotate(result.status(), path);
  return result;
}

namespace {

class OptimizerExporter {
 public:
  explicit OptimizerExporter(const OptimizerInfo& optimizer) : optimizer_(optimizer) {
    content_.algorithm = optimizer.config.algorithm;
  }

  absl::Status Run(const std::string& path, const std::vector<const TensorInfo*>& order,
                   absl::Span<const TensorRef> state) {
    absl::flat_hash_map<absl::string_view, std::vector<const TensorRef*>> by_name;
    for (const TensorRef& ref : state) {
      if (!ref.spec.slot.empty()) by_name[ref.spec.name].push_back(&ref);
    }
    for (size_t i = 0; i < optimizer_.groups.size(); ++i) {
      const auto members = InGroup(order, static_cast<uint32_t>(i));
      TorchOptimizerGroup& group = content_.groups.emplace_back();
      group.hyperparameters = optimizer_.groups[i].hyperparameters;
      group.size = members.size();
      for (const TensorInfo* parameter : members) {
        const auto found = by_name.find(parameter->spec.name);
        if (found != by_name.end()) {
          AddState(found->second);
        } else if (content_.algorithm == Algorithm::kAdagrad) {
          AddInitialSum(parameter->spec,
                        group.hyperparameters.initial_accumulator_value.value_or(0));
        }
        result_.order.push_back(parameter->spec.name);
      }
    }
    result_.groups = content_.groups.size();
    result_.parameters = result_.order.size();
    result_.tensors = content_.tensors.size();
    return WriteTorchOptimizer(path, content_, [this](size_t index) { return Bytes(index); });
  }

  WriteOptimizerResult result() && { return std::move(result_); }

 private:
  // Either bytes of the state, or elements that are all one value.
  struct Source {
    absl::Span<const uint8_t> bytes;
    double fill = 0;
  };

  void Add(absl::string_view key, DType dtype, const Shape& shape, Source source) {
    TorchOptimizerTensor& tensor = content_.tensors.emplace_back();
    tensor.position = result_.order.size();
    tensor.key = std::string(key);
    tensor.dtype = dtype;
    tensor.shape = shape;
    sources_.push_back(source);
  }

  void AddState(const std::vector<const TensorRef*>& state) {
    for (const TensorRef* ref : state) {
      const std::string& slot = ref->spec.slot;
      if (slot == kMasterSlot) continue;
      if (slot == kStepSlot && !CountsSteps(content_.algorithm)) continue;
      if (IsScalarSlot(slot)) {
        Add(slot, DType::kF32, Shape(), {{}, ToDouble(ref->spec.dtype, ref->bytes.data())});
      } else {
        Add(slot, ref->spec.dtype, ref->spec.shape, {ref->bytes, 0});
      }
    }
  }

  // torch's Adagrad makes its state before the first step, and steps only what has it.
  void AddInitialSum(const TensorSpec& parameter, double value) {
    Add(kStepSlot, DType::kF32, Shape(), {{}, 0});
    const DType dtype = parameter.dtype == DType::kF64 ? DType::kF64 : DType::kF32;
    Add("sum", dtype, parameter.shape, {{}, value});
  }

  absl::StatusOr<absl::Span<const uint8_t>> Bytes(size_t index) {
    const TorchOptimizerTensor& tensor = content_.tensors[index];
    const Source& source = sources_[index];
    if (source.bytes.data() != nullptr) return source.bytes;
    const std::vector<double> values(static_cast<size_t>(tensor.shape.num_elements()), source.fill);
    buffer_.resize(tensor.nbytes());
    CastElements(DType::kF64, reinterpret_cast<const uint8_t*>(values.data()), tensor.dtype,
                 buffer_.data(), tensor.shape.num_elements());
    return absl::MakeConstSpan(buffer_);
  }

  const OptimizerInfo& optimizer_;
  TorchOptimizerContent content_;
  std::vector<Source> sources_;
  std::vector<uint8_t> buffer_;
  WriteOptimizerResult result_;
};

}  // namespace

absl::StatusOr<WriteOptimizerResult> WriteOptimizerFile(const std::string& path,
                                                        const OptimizerInfo& optimizer,
                                                        absl::Span<const TensorInfo> parameters,
                                                        absl::Span<const TensorRef> state,
                                                        absl::Span<const std::string> order) {
  const ParameterNames names(parameters);
  std::vector<const TensorInfo*> ordered = names.all();
  if (!order.empty()) {
    MS_ASSIGN_OR_RETURN(ordered, names.Resolve(order));
    const absl::flat_hash_set<const TensorInfo*> given(ordered.begin(), ordered.end());
    std::vector<std::string> missing;
    for (const TensorInfo* parameter : names.all()) {
      if (parameter->group && !given.contains(parameter)) missing.push_back(parameter->spec.name);
    }
    if (!missing.empty()) {
      return MakeError(Reason::kMissingKey,
                       absl::StrCat("the order lacks ", QuotedList(missing),
                                    ", which the optimizer has in its groups; add them"),
                       {{"key", missing[0]}});
    }
  }
  OptimizerExporter exporter(optimizer);
  MS_RETURN_IF_ERROR(exporter.Run(path, ordered, state));
  return std::move(exporter).result();
}

}  // namespace modelstate::client
