#include "common/format/torch_optimizer.h"

#include <algorithm>
#include <cstring>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/base/tensor_cast.h"
#include "common/format/text.h"
#include "common/format/torch_group_keys.h"

namespace modelstate {
namespace {

using Id = PickleTree::Id;
using Kind = PickleTree::Kind;

// Where training scripts put an optimizer's state beside the module's.
constexpr const char* kUsualKeys[] = {"optimizer", "optimizer_state_dict", "optimizer_state",
                                      "optim",     "optim_state_dict",     "opt"};

// Objects of a pickle may be shared, so what is walked again for each mention has a bound.
constexpr size_t kMaxGroups = 1000;  // as many as an optimizer may be configured with
constexpr size_t kMaxGroupKeys = 64;
constexpr size_t kMaxStateKeys = 32;

constexpr char kSaveState[] = "; save it with torch.save(optimizer.state_dict(), path)";

std::string ValueName(uint64_t position, absl::string_view key) {
  return absl::StrCat("state[", position, "][", key, "]");
}

absl::Status NotClear(absl::string_view what) {
  return MakeError(Reason::kInvalidField, absl::StrCat(what, "; give the algorithm"),
                   {{"field", "algorithm"}});
}

}  // namespace

class TorchOptimizerParser {
 public:
  TorchOptimizerParser(const PickleTree& tree, TorchOptimizerFile* file)
      : tree_(tree), file_(*file) {}

  absl::StatusOr<TorchStateDict> Run() {
    MS_ASSIGN_OR_RETURN(const Id optimizer, Find());
    const Id groups = *LookupKey(tree_, optimizer, "param_groups");
    const Id state = *LookupKey(tree_, optimizer, "state");
    if (tree_.kind(groups) != Kind::kList || tree_.kind(state) != Kind::kDict) {
      return Corrupt(absl::StrCat("the optimizer's param_groups is ", tree_.KindName(groups),
                                  " and its state ", tree_.KindName(state),
                                  ", where torch has a list and a dict"));
    }
    MS_RETURN_IF_ERROR(ReadGroups(tree_.items(groups)));
    MS_RETURN_IF_ERROR(ReadState(tree_.items(state)));
    MS_RETURN_IF_ERROR(CheckTensorTotals(tensors_));
    TorchStateDict result;
    result.tensors = std::move(tensors_);
    return result;
  }

  // Once the tensors can be read.
  absl::Status FillIn() {
    for (const Pending& pending : pending_) {
      const StoredTensor& tensor = file_.reader_->tensors()[pending.index];
      std::vector<uint8_t> bytes(tensor.nbytes());
      MS_RETURN_IF_ERROR(file_.reader_->Read(pending.index, absl::MakeSpan(bytes)));
      double value = 0;
      uint8_t converted[sizeof(value)];
      CastElements(tensor.dtype, bytes.data(), DType::kF64, converted, 1);
      std::memcpy(&value, converted, sizeof(value));
      Set(*pending.field, value, &file_.groups_[pending.group].hyperparameters);
    }
    return absl::OkStatus();
  }

 private:
  // A hyper-parameter that is a tensor.
  struct Pending {
    size_t group;
    const HyperparameterField* field;
    size_t index;  // in tensors_
  };

  bool IsOptimizer(Id id) const {
    return LookupKey(tree_, id, "param_groups") && LookupKey(tree_, id, "state");
  }

  absl::StatusOr<Id> Find() const {
    if (IsOptimizer(tree_.root())) return tree_.root();
    for (const char* key : kUsualKeys) {
      const std::optional<Id> inner = LookupKey(tree_, tree_.root(), key);
      if (inner && IsOptimizer(*inner)) return *inner;
    }
    return Unsupported(absl::StrCat(
        "the file has no state and param_groups of an optimizer, at its top level or under ",
        "\"optimizer\" and the other usual keys", kSaveState));
  }

  absl::Status ReadGroups(absl::Span<const Id> groups) {
    if (groups.empty() || groups.size() > kMaxGroups) {
      return Unsupported(absl::StrCat("the optimizer has ", groups.size(),
                                      " parameter groups; 1 to ", kMaxGroups, " are supported"));
    }
    for (Id group : groups) {
      MS_RETURN_IF_ERROR(ReadGroup(group));
    }
    return absl::OkStatus();
  }

  absl::Status ReadGroup(Id group) {
    const size_t index = file_.groups_.size();
    const std::string name = absl::StrCat("param_groups[", index, "]");
    if (tree_.kind(group) != Kind::kDict || tree_.items(group).size() > 2 * kMaxGroupKeys) {
      return Corrupt(absl::StrCat(name, " is not a dict of at most ", kMaxGroupKeys, " keys"));
    }
    TorchOptimizerGroup& out = file_.groups_.emplace_back();
    const absl::Span<const Id> items = tree_.items(group);
    for (size_t i = 0; i + 1 < items.size(); i += 2) {
      if (tree_.kind(items[i]) != Kind::kString) continue;
      const std::string key(tree_.string_value(items[i]));
      const Id value = items[i + 1];
      if (index == 0) file_.group_keys_.push_back(key);
      absl::Status read;
      if (key == "params") {
        read = ReadPositions(name, value, &out);
      } else if (key == "param_names") {
        read = ReadNames(name, value, &out);
      } else if (key == "betas") {
        read = ReadBetas(name, value);
      } else if (const HyperparameterField* field = FindHyperparameter(key)) {
        read = ReadHyperparameter(name, *field, value);
      }
      MS_RETURN_IF_ERROR(read);
    }
    if (!LookupKey(tree_, group, "params")) return Corrupt(absl::StrCat(name, " has no params"));
    if (!out.parameter_names.empty() && out.parameter_names.size() != out.size) {
      return Corrupt(absl::StrCat(name, " has ", out.size, " params and ",
                                  out.parameter_names.size(), " param_names"));
    }
    return absl::OkStatus();
  }

  absl::Status ReadPositions(const std::string& group, Id value, TorchOptimizerGroup* out) {
    if (tree_.kind(value) != Kind::kList) {
      return Corrupt(absl::StrCat(group, "[params] is ", tree_.KindName(value), ", not a list"));
    }
    for (Id id : tree_.items(value)) {
      if (tree_.kind(id) != Kind::kInt) {
        return Unsupported(absl::StrCat(group, "[params] has ", tree_.KindName(id),
                                        " where optimizer.state_dict() has a position",
                                        kSaveState));
      }
      if (!positions_.emplace(tree_.int_value(id), positions_.size()).second) {
        return Corrupt(absl::StrCat(group, "[params] has ", tree_.int_value(id),
                                    ": some parameters appear in more than one parameter group"));
      }
      ++out->size;
    }
    return absl::OkStatus();
  }

  absl::Status ReadNames(const std::string& group, Id value, TorchOptimizerGroup* out) {
    if (tree_.kind(value) == Kind::kNone) return absl::OkStatus();
    if (tree_.kind(value) != Kind::kList) {
      return Corrupt(
          absl::StrCat(group, "[param_names] is ", tree_.KindName(value), ", not a list"));
    }
    for (Id id : tree_.items(value)) {
      if (tree_.kind(id) != Kind::kString) {
        return Corrupt(absl::StrCat(group, "[param_names] has ", tree_.KindName(id)));
      }
      const std::string name(tree_.string_value(id));
      if (!names_.insert(name).second) {
        return Corrupt(
            absl::StrCat(group, "[param_names] has ", ShowName(name), ", which was there before"));
      }
      out->parameter_names.push_back(name);
    }
    return absl::OkStatus();
  }

  absl::Status ReadBetas(const std::string& group, Id value) {
    const bool pair = (tree_.kind(value) == Kind::kTuple || tree_.kind(value) == Kind::kList) &&
                      tree_.items(value).size() == 2;
    if (!pair) return Corrupt(absl::StrCat(group, "[betas] is not a pair"));
    MS_RETURN_IF_ERROR(
        ReadHyperparameter(group, *FindHyperparameter("beta1"), tree_.items(value)[0]));
    return ReadHyperparameter(group, *FindHyperparameter("beta2"), tree_.items(value)[1]);
  }

  absl::Status ReadHyperparameter(const std::string& group, const HyperparameterField& field,
                                  Id value) {
    const size_t index = file_.groups_.size() - 1;
    if (tree_.kind(value) == Kind::kNone) return absl::OkStatus();
    if (const std::optional<double> number = Number(value)) {
      Set(field, *number, &file_.groups_[index].hyperparameters);
      return absl::OkStatus();
    }
    const std::string name = absl::StrCat(group, "[", field.name, "]");
    if (!IsTorchTensor(tree_, value)) {
      return Unsupported(
          absl::StrCat(name, " is ", tree_.KindName(value), ", not a number", kSaveState));
    }
    MS_ASSIGN_OR_RETURN(TorchTensor tensor, ExtractTensor(tree_, value, name));
    if (tensor.tensor.shape.num_elements() != 1 || tensor.tensor.dtype == DType::kC64) {
      return Unsupported(absl::StrCat(name, " is a tensor of shape ",
                                      tensor.tensor.shape.ToString(), " and dtype ",
                                      DTypeName(tensor.tensor.dtype), ", not of one number"));
    }
    pending_.push_back({index, &field, tensors_.size()});
    tensors_.push_back(std::move(tensor));
    return absl::OkStatus();
  }

  std::optional<double> Number(Id id) const {
    switch (tree_.kind(id)) {
      case Kind::kFloat:
        return tree_.float_value(id);
      case Kind::kInt:
        return static_cast<double>(tree_.int_value(id));
      case Kind::kBool:
        return tree_.bool_value(id) ? 1 : 0;
      default:
        return std::nullopt;
    }
  }

  static void Set(const HyperparameterField& field, double value, Hyperparameters* h) {
    if (field.number != nullptr) {
      h->*field.number = value;
    } else {
      h->*field.flag = value != 0;
    }
  }

  absl::Status ReadState(absl::Span<const Id> items) {
    absl::flat_hash_set<uint64_t> seen;
    for (size_t i = 0; i + 1 < items.size(); i += 2) {
      if (tree_.kind(items[i]) != Kind::kInt) {
        return Unsupported(absl::StrCat("the optimizer's state has ", tree_.KindName(items[i]),
                                        " as a key, where optimizer.state_dict() has a position",
                                        kSaveState));
      }
      const int64_t key = tree_.int_value(items[i]);
      const auto position = positions_.find(key);
      if (position == positions_.end() || !seen.insert(position->second).second) {
        return Corrupt(absl::StrCat("state[", key, "] is there twice, or of no parameter group"));
      }
      MS_RETURN_IF_ERROR(ReadParameterState(position->second, items[i + 1]));
    }
    return absl::OkStatus();
  }

  absl::Status ReadParameterState(uint64_t position, Id dict) {
    if (tree_.kind(dict) != Kind::kDict || tree_.items(dict).size() > 2 * kMaxStateKeys) {
      return Corrupt(
          absl::StrCat("state[", position, "] is not a dict of at most ", kMaxStateKeys, " keys"));
    }
    const absl::Span<const Id> items = tree_.items(dict);
    absl::flat_hash_set<absl::string_view> keys;
    for (size_t i = 0; i + 1 < items.size(); i += 2) {
      const bool text = tree_.kind(items[i]) == Kind::kString;
      const absl::string_view key = text ? tree_.string_value(items[i]) : "";
      if (key.empty() || key.size() > 64 || !keys.insert(key).second) {
        return Corrupt(absl::StrCat("state[", position, "] has ", ShowName(key),
                                    " as a key: empty, longer than 64 bytes or there twice"));
      }
      MS_RETURN_IF_ERROR(ReadValue(position, std::string(key), items[i + 1]));
    }
    return absl::OkStatus();
  }

  absl::Status ReadValue(uint64_t position, std::string key, Id value) {
    if (tree_.kind(value) == Kind::kNone) return absl::OkStatus();
    TorchOptimizerTensor out;
    out.position = position;
    TorchOptimizerFile::Source source;
    if (const std::optional<double> number = Number(value)) {
      out.dtype = DType::kF64;
      source.number = *number;
    } else if (IsTorchTensor(tree_, value)) {
      MS_ASSIGN_OR_RETURN(TorchTensor tensor,
                          ExtractTensor(tree_, value, ValueName(position, key)));
      out.dtype = tensor.tensor.dtype;
      out.shape = tensor.tensor.shape;
      source.index = tensors_.size();
      tensors_.push_back(std::move(tensor));
    } else {
      return Unsupported(absl::StrCat(ValueName(position, key), " is ", tree_.KindName(value),
                                      ", not a tensor or a number"));
    }
    out.key = std::move(key);
    file_.tensors_.push_back(std::move(out));
    file_.sources_.push_back(source);
    return absl::OkStatus();
  }

  const PickleTree& tree_;
  TorchOptimizerFile& file_;
  std::vector<TorchTensor> tensors_;
  std::vector<Pending> pending_;
  absl::flat_hash_map<int64_t, uint64_t> positions_;  // by what `params` says
  absl::flat_hash_set<std::string> names_;
};

absl::StatusOr<TorchOptimizerFile> TorchOptimizerFile::Open(File file) {
  TorchOptimizerFile result;
  std::optional<TorchOptimizerParser> parser;
  MS_ASSIGN_OR_RETURN(result.reader_,
                      TorchTensorReader::Open(std::move(file), [&](const PickleTree& tree) {
                        return parser.emplace(tree, &result).Run();
                      }));
  MS_RETURN_IF_ERROR(parser->FillIn());
  return result;
}

uint64_t TorchOptimizerFile::parameter_count() const {
  uint64_t count = 0;
  for (const TorchOptimizerGroup& group : groups_) count += group.size;
  return count;
}

absl::Status TorchOptimizerFile::Read(size_t index, absl::Span<uint8_t> out) const {
  const Source& source = sources_[index];
  if (!source.number) return reader_->Read(source.index, out);
  std::memcpy(out.data(), &*source.number, sizeof(double));
  return absl::OkStatus();
}

bool TorchOptimizerFile::HasGroupKey(absl::string_view key) const {
  return std::find(group_keys_.begin(), group_keys_.end(), key) != group_keys_.end();
}

bool TorchOptimizerFile::HasStateKey(absl::string_view key) const {
  return std::any_of(tensors_.begin(), tensors_.end(),
                     [&](const TorchOptimizerTensor& tensor) { return tensor.key == key; });
}

bool TorchOptimizerFile::Decays() const {
  return std::any_of(groups_.begin(), groups_.end(), [](const TorchOptimizerGroup& group) {
    return group.hyperparameters.weight_decay.value_or(0) != 0;
  });
}

absl::StatusOr<Algorithm> TorchOptimizerFile::GuessAlgorithm() const {
  if (HasGroupKey("dampening")) return Algorithm::kSgd;
  if (HasGroupKey("momentum_decay")) return Algorithm::kNAdam;
  if (HasGroupKey("lr_decay")) return Algorithm::kAdagrad;
  if (HasGroupKey("rho")) return Algorithm::kAdadelta;
  if (HasGroupKey("centered")) return Algorithm::kRmsprop;
  if (HasGroupKey("amsgrad")) {
    bool decoupled = true;
    for (const TorchOptimizerGroup& group : groups_) {
      decoupled &= group.hyperparameters.decoupled_weight_decay.value_or(false);
    }
    if (decoupled) return Algorithm::kAdamW;
    if (HasGroupKey("decoupled_weight_decay") || !Decays()) return Algorithm::kAdam;
    return NotClear(
        "the file is of Adam or AdamW, of a torch that wrote both alike, and their weight_decay "
        "means different things");
  }
  if (HasGroupKey("betas")) {
    if (HasStateKey("exp_inf")) return Algorithm::kAdamax;
    if (!HasGroupKey("eps")) return Algorithm::kLion;
    if (HasStateKey("exp_avg_sq") || HasGroupKey("decoupled_weight_decay")) {
      return Algorithm::kRAdam;
    }
    return NotClear("the file is of Adamax or RAdam, and no parameter of it has any state");
  }
  std::string supported;
  for (Algorithm algorithm : AllAlgorithms()) {
    absl::StrAppend(&supported, supported.empty() ? "" : ", ", AlgorithmName(algorithm));
  }
  return Unsupported(absl::StrCat(HasGroupKey("lambd") ? "the file is of ASGD: it has the keys "
                                                       : "the optimizer of the file has the keys ",
                                  QuotedList(group_keys_),
                                  ", which are those of none that is supported (", supported, ")"));
}

absl::Status TorchOptimizerFile::CheckAlgorithm(Algorithm algorithm) const {
  const absl::StatusOr<Algorithm> guess = GuessAlgorithm();
  if (guess.ok() && *guess == algorithm) return absl::OkStatus();
  const bool adam = algorithm == Algorithm::kAdam || algorithm == Algorithm::kAdamW;
  bool may_be = false;
  if (GetReason(guess.status()) == Reason::kCheckpointUnsupported) {
    may_be = !HasGroupKey("lambd");  // ASGD; else the keys say nothing
  } else if (guess.ok() && (*guess == Algorithm::kAdam || *guess == Algorithm::kAdamW)) {
    // Adam can have AdamW's decoupled decay, AdamW no other. Without any they are the same.
    may_be = adam && (*guess == Algorithm::kAdamW || !Decays());
  } else if (!guess.ok() && HasGroupKey("amsgrad")) {
    may_be = adam;
  } else if (!guess.ok() || *guess == Algorithm::kRAdam) {
    const bool not_clear =
        !guess.ok() && (algorithm == Algorithm::kAdamax || algorithm == Algorithm::kRAdam);
    const bool torchs = HasGroupKey("foreach") || HasGroupKey("decoupled_weight_decay");
    may_be = not_clear || (adam && !torchs);
  }
  if (may_be) return absl::OkStatus();
  if (!guess.ok()) {
    return Annotate(guess.status(), absl::StrCat("not of ", AlgorithmName(algorithm)));
  }
  return MakeError(Reason::kInvalidField,
                   absl::StrCat("the file is of ", AlgorithmName(*guess),
                                " by the keys of its groups, and the algorithm that is given is ",
                                AlgorithmName(algorithm), ": leave the algorithm out"),
                   {{"field", "algorithm"},
                    {"algorithm", AlgorithmName(algorithm)},
                    {"file_algorithm", AlgorithmName(*guess)}});
}

Hyperparameters TorchHyperparameters(Algorithm algorithm, const Hyperparameters& h) {
  Hyperparameters result;
  for (const TorchGroupKey& key : TorchGroupKeys(algorithm)) {
    if (key.value == TorchGroupKey::Value::kBetas) {
      result.beta1 = h.beta1;
      result.beta2 = h.beta2;
    } else if (key.value == TorchGroupKey::Value::kHyperparameter) {
      const HyperparameterField& field = *FindHyperparameter(key.name);
      if (field.number != nullptr) {
        result.*field.number = h.*field.number;
      } else {
        result.*field.flag = h.*field.flag;
      }
    }
  }
  return result;
}

}  // namespace modelstate
