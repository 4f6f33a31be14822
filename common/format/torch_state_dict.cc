#include "common/format/torch_state_dict.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "common/base/status.h"
#include "common/format/text.h"

namespace modelstate {
namespace {

using Id = PickleTree::Id;
using Kind = PickleTree::Kind;
using G = PickleGlobal;

constexpr const char* kUsualKeys[] = {"model", "state_dict", "module", "model_state_dict",
                                      "model_state"};

// An expanded view may take more bytes than its storage has, but not without bound: 4 bytes seen as
// a tensor of 10^12 elements is an attack. Either limit lets a tensor through.
constexpr uint64_t kExpandedBytes = uint64_t{16} << 20;
constexpr uint64_t kExpandedFactor = 1024;
// The same for the sum over a file.
constexpr uint64_t kTotalExpandedBytes = uint64_t{256} << 20;
constexpr uint64_t kTotalExpandedFactor = 16;

// Of the dict of one module in `_metadata`: "version", and at most a few others.
constexpr size_t kMaxModuleMetadata = 16;

constexpr char kSaveTensors[] = "; save only the tensors: torch.save(module.state_dict(), path)";

std::pair<size_t, size_t> CountTensors(const PickleTree& tree, Id dict) {
  size_t tensors = 0;
  size_t others = 0;
  if (tree.kind(dict) != Kind::kDict) return {0, 0};
  const absl::Span<const Id> items = tree.items(dict);
  for (size_t i = 1; i < items.size(); i += 2) ++(IsTorchTensor(tree, items[i]) ? tensors : others);
  return {tensors, others};
}

std::string ShowKeys(const PickleTree& tree, Id dict) {
  std::vector<std::string> names;
  const absl::Span<const Id> items = tree.items(dict);
  for (size_t i = 0; i < items.size(); i += 2) {
    names.push_back(tree.kind(items[i]) == Kind::kString ? std::string(tree.string_value(items[i]))
                                                         : std::string(tree.KindName(items[i])));
  }
  return names.empty() ? "it has no keys" : absl::StrCat("it has ", QuotedList(names));
}

absl::StatusOr<Id> FindStateDict(const PickleTree& tree, absl::string_view path) {
  Id at = tree.root();
  if (!path.empty()) {
    std::string walked;
    for (absl::string_view part : absl::StrSplit(path, '.')) {
      const std::optional<Id> next = LookupKey(tree, at, part);
      if (!next) {
        return MakeError(
            Reason::kCheckpointUnsupported,
            absl::StrCat("state_dict_key ", ShowName(path), ": the file has no ", ShowName(part),
                         walked.empty() ? " at the top level" : absl::StrCat(" in ", walked), "; ",
                         tree.kind(at) == Kind::kDict ? ShowKeys(tree, at)
                                                      : absl::StrCat("it is ", tree.KindName(at))),
            {{"state_dict_key", std::string(path)}});
      }
      at = *next;
      walked = ShowName(part);
    }
    if (tree.kind(at) != Kind::kDict) {
      return MakeError(Reason::kCheckpointUnsupported,
                       absl::StrCat("state_dict_key ", ShowName(path), " leads to ",
                                    tree.KindName(at), ", not to a state_dict"),
                       {{"state_dict_key", std::string(path)}});
    }
    return at;
  }
  if (tree.kind(at) != Kind::kDict) {
    return Unsupported(
        absl::StrCat("the file holds ", tree.KindName(at), ", not a state_dict", kSaveTensors));
  }
  const auto [tensors, others] = CountTensors(tree, at);
  // Only tensors, or nothing at all, which is the state_dict of a module without any.
  if (others == 0) return at;
  // A training checkpoint may have a tensor or two at its top level, such as the best loss.
  for (const char* key : kUsualKeys) {
    const std::optional<Id> inner = LookupKey(tree, at, key);
    if (inner && CountTensors(tree, *inner).first > 0) return *inner;
  }
  if (tensors > 0) return at;
  if (LookupKey(tree, at, "state") && LookupKey(tree, at, "param_groups")) {
    return Unsupported(
        "the file is an optimizer's state_dict, which holds no module: LoadOptimizerState takes it "
        "(modelstate optim import)");
  }
  return Unsupported(absl::StrCat(
      "no state_dict at the top level of the file or under the usual "
      "keys: ",
      ShowKeys(tree, at), "; name its place by state_dict_key, such as \"ema.model\""));
}

class TensorBuilder {
  struct Part {
    uint64_t begin = 0;
    uint64_t end = 0;
    uint64_t size() const { return end - begin; }
  };

 public:
  TensorBuilder(const PickleTree& tree, std::string name) : tree_(tree) {
    out_.tensor.name = std::move(name);
  }

  absl::StatusOr<TorchTensor> Build(Id id) {
    const G function = tree_.global(id);
    if (function == G::kRebuildParameter || function == G::kRebuildParameterWithState) {
      const absl::Span<const Id> args = tree_.arguments(id);
      if (args.size() < 3 || !IsTorchTensor(tree_, args[0]) || tree_.kind(args[1]) != Kind::kBool) {
        return Malformed("its Parameter is not (tensor, requires_grad, hooks)");
      }
      out_.tensor.kind = TensorKind::kParameter;
      out_.tensor.requires_grad = tree_.bool_value(args[1]);
      id = args[0];
      if (tree_.global(id) == G::kRebuildParameter ||
          tree_.global(id) == G::kRebuildParameterWithState) {
        return Malformed("it is a Parameter of a Parameter");
      }
    }
    MS_RETURN_IF_ERROR(ReadArguments(id));
    MS_RETURN_IF_ERROR(CheckView());
    return std::move(out_);
  }

 private:
  absl::Status Malformed(absl::string_view what) const {
    return Corrupt(absl::StrCat("tensor ", ShowName(out_.tensor.name), ": ", what));
  }

  absl::Status ReadArguments(Id call) {
    const G function = tree_.global(call);
    const absl::Span<const Id> args = tree_.arguments(call);
    const bool v3 = function == G::kRebuildTensorV3;
    const size_t least = v3 ? 7 : function == G::kRebuildTensorV2 ? 6 : 4;
    const size_t most = function == G::kRebuildTensor ? 4 : least + 1;
    if (args.size() < least || args.size() > most || tree_.kind(args[0]) != Kind::kStorage ||
        tree_.kind(args[1]) != Kind::kInt || tree_.kind(args[2]) != Kind::kTuple ||
        tree_.kind(args[3]) != Kind::kTuple) {
      return Malformed("its pickle is not (storage, offset, size, stride, ...)");
    }
    MS_RETURN_IF_ERROR(ReadStorage(args[0], v3 ? std::optional<Id>(args[6]) : std::nullopt));
    MS_RETURN_IF_ERROR(ReadGeometry(args[1], tree_.items(args[2]), tree_.items(args[3])));
    if (args.size() > least) return ReadFlags(args[least]);
    return absl::OkStatus();
  }

  absl::Status ReadStorage(Id storage, std::optional<Id> dtype_argument) {
    const absl::Span<const Id> items = tree_.items(storage);  // class, key, location, count
    const Id storage_class = items[0];
    Id dtype_from = storage_class;
    if (dtype_argument) {
      if (tree_.kind(*dtype_argument) != Kind::kGlobal ||
          tree_.global(*dtype_argument) != G::kDType) {
        return Malformed("its dtype is no torch dtype");
      }
      dtype_from = *dtype_argument;
    } else if (tree_.global(storage_class) == G::kUntypedStorage) {
      return Malformed("it has an untyped storage and no dtype");
    }
    const std::optional<DType> dtype = tree_.dtype(dtype_from);
    if (!dtype) {
      return Unsupported(absl::StrCat("tensor ", ShowName(out_.tensor.name), " has the dtype ",
                                      tree_.global_name(dtype_from),
                                      ", which no module here holds; convert it to one such as "
                                      "float32 or complex64 and save the file again"));
    }
    out_.tensor.dtype = *dtype;
    const bool untyped = tree_.global(storage_class) == G::kUntypedStorage;
    if (!untyped && !tree_.dtype(storage_class)) return Malformed("its storage has another dtype");
    const uint64_t item_bytes = tree_.item_bytes(storage_class);
    const uint64_t count = static_cast<uint64_t>(tree_.int_value(items[3]));
    if (count > static_cast<uint64_t>(std::numeric_limits<int64_t>::max()) / item_bytes) {
      return Malformed("its storage has more than 2^63 bytes");
    }
    out_.view.storage_bytes = count * item_bytes;
    out_.view.storage_key = std::string(tree_.string_value(items[1]));
    if (tree_.string_value(items[2]) == "meta") {
      return Unsupported(absl::StrCat("tensor ", ShowName(out_.tensor.name),
                                      " is on the meta device and has no elements"));
    }
    part_ = {0, out_.view.storage_bytes / DTypeSize(*dtype)};
    if (items.size() == 4 || tree_.kind(items[4]) == Kind::kNone) return absl::OkStatus();
    const absl::Span<const Id> part = tree_.items(items[4]);  // key, offset, count
    const uint64_t begin = static_cast<uint64_t>(tree_.int_value(part[1]));
    const uint64_t size = static_cast<uint64_t>(tree_.int_value(part[2]));
    if (dtype_argument || begin > count || size > count - begin) {
      return Malformed(absl::StrCat("the ", size, " elements from ", begin,
                                    " on that it views reach past its storage of ", count,
                                    " elements"));
    }
    part_ = {begin, begin + size};
    return absl::OkStatus();
  }

  absl::Status ReadGeometry(Id offset, absl::Span<const Id> size, absl::Span<const Id> stride) {
    if (size.size() != stride.size() || size.size() > Shape::kMaxRank) {
      return Malformed(absl::StrCat("it has ", size.size(), " dimensions and ", stride.size(),
                                    " strides; both must be the same number, at most ",
                                    Shape::kMaxRank));
    }
    std::vector<int64_t> dims;
    for (Id id : size) {
      if (tree_.kind(id) != Kind::kInt) return Malformed("a dimension is no int");
      dims.push_back(tree_.int_value(id));
    }
    absl::StatusOr<Shape> shape = Shape::Create(dims);
    if (!shape.ok()) {
      return Malformed(absl::StrCat("it has no valid shape: ", shape.status().message()));
    }
    out_.tensor.shape = *std::move(shape);
    if (tree_.int_value(offset) < 0) return Malformed("its storage offset is negative");
    out_.view.offset = static_cast<uint64_t>(tree_.int_value(offset));
    for (size_t i = 0; i < stride.size(); ++i) {
      if (tree_.kind(stride[i]) != Kind::kInt) return Malformed("a stride is no int");
      if (tree_.int_value(stride[i]) < 0) {
        return Malformed(absl::StrCat("it has the negative stride ", tree_.int_value(stride[i])));
      }
      const bool matters = dims[i] > 1 && out_.tensor.shape.num_elements() > 0;
      out_.view.strides.push_back(matters ? static_cast<uint64_t>(tree_.int_value(stride[i])) : 0);
    }
    return absl::OkStatus();
  }

  absl::Status ReadFlags(Id metadata) {
    if (tree_.kind(metadata) == Kind::kNone) return absl::OkStatus();
    if (tree_.kind(metadata) != Kind::kDict) return Malformed("its metadata is no dict");
    const absl::Span<const Id> items = tree_.items(metadata);
    for (size_t i = 0; i + 1 < items.size(); i += 2) {
      const bool text = tree_.kind(items[i]) == Kind::kString;
      const absl::string_view key = text ? tree_.string_value(items[i]) : "";
      if ((key != "conj" && key != "neg") || tree_.kind(items[i + 1]) != Kind::kBool) {
        return Unsupported(absl::StrCat("tensor ", ShowName(out_.tensor.name),
                                        " has the unknown flag ", ShowName(key),
                                        "; save a plain copy of it: tensor.clone()"));
      }
      (key == "conj" ? out_.view.conjugate : out_.view.negate) = tree_.bool_value(items[i + 1]);
    }
    const DType dtype = out_.tensor.dtype;
    if ((out_.view.conjugate && dtype != DType::kC64) ||
        (out_.view.negate && !CanRequireGrad(dtype))) {
      return Malformed(absl::StrCat("a conj or neg flag makes no sense for ", DTypeName(dtype)));
    }
    return absl::OkStatus();
  }

  absl::Status CheckView() {
    TensorView& view = out_.view;
    const Shape& shape = out_.tensor.shape;
    const uint64_t item_bytes = DTypeSize(out_.tensor.dtype);
    const uint64_t count = part_.size();
    if (view.storage_bytes % item_bytes != 0) {
      return Malformed(absl::StrCat("its storage of ", view.storage_bytes,
                                    " bytes is no whole number of elements"));
    }
    if (shape.num_elements() == 0) {
      if (view.offset > count) return Malformed("its offset lies past its storage");
      view.offset += part_.begin;
      return absl::OkStatus();
    }
    uint64_t last = view.offset;
    for (size_t i = 0; i < shape.rank(); ++i) {
      uint64_t reach = 0;
      if (__builtin_mul_overflow(static_cast<uint64_t>(shape.dims()[i]) - 1, view.strides[i],
                                 &reach) ||
          __builtin_add_overflow(last, reach, &last)) {
        last = std::numeric_limits<uint64_t>::max();
        break;
      }
    }
    if (last >= count) {
      return Malformed(absl::StrCat("shape ", shape.ToString(), ", strides [",
                                    absl::StrJoin(view.strides, ", "), "] and offset ", view.offset,
                                    " reach past its storage of ", count, " elements"));
    }
    const uint64_t nbytes = out_.tensor.nbytes();
    if (nbytes > kExpandedBytes && nbytes / kExpandedFactor > view.storage_bytes) {
      return Unsupported(absl::StrCat(
          "tensor ", ShowName(out_.tensor.name), ": an expanded view of ", view.storage_bytes,
          " bytes would take ", nbytes, " bytes, and the limit is ", kExpandedFactor,
          " times its storage; save a copy: tensor.contiguous()"));
    }
    view.offset += part_.begin;
    return absl::OkStatus();
  }

  const PickleTree& tree_;
  TorchTensor out_;
  // The elements of the storage that the view may reach: all, but for some of the legacy stream.
  Part part_;
};

// What makes two names one tensor: the same elements of the same storage in the same order.
std::string ViewIdentity(const TorchTensor& torch) {
  return absl::StrCat(torch.view.storage_key, "|", torch.view.offset, "|",
                      absl::StrJoin(torch.view.strides, ","), "|", torch.tensor.shape.ToString(),
                      "|", static_cast<int>(torch.tensor.dtype), torch.view.conjugate,
                      torch.view.negate);
}

// {"bn1": {"version": 2}} of the attribute `_metadata`. What is shared in the pickle must not cost
// more than its own size for each mention: a module comes once, and large dicts are passed over.
std::map<std::string, int64_t> ModuleVersions(const PickleTree& tree, Id state_dict) {
  std::map<std::string, int64_t> versions;
  const std::optional<Id> attributes = tree.attributes(state_dict);
  const std::optional<Id> metadata =
      attributes ? LookupKey(tree, *attributes, "_metadata") : std::nullopt;
  if (!metadata || tree.kind(*metadata) != Kind::kDict) return versions;
  const absl::Span<const Id> items = tree.items(*metadata);
  absl::flat_hash_set<absl::string_view> modules;
  for (size_t i = 0; i + 1 < items.size(); i += 2) {
    if (tree.kind(items[i]) != Kind::kString || tree.kind(items[i + 1]) != Kind::kDict) continue;
    const absl::string_view module = tree.string_value(items[i]);
    if (!modules.insert(module).second) break;  // PyTorch does not write that
    if (tree.items(items[i + 1]).size() > 2 * kMaxModuleMetadata) continue;
    const std::optional<Id> version = LookupKey(tree, items[i + 1], "version");
    if (version && tree.kind(*version) == Kind::kInt) {
      versions[std::string(module)] = tree.int_value(*version);
    }
  }
  return versions;
}

}  // namespace

bool IsTorchTensor(const PickleTree& tree, Id id) {
  if (tree.kind(id) != Kind::kCall) return false;
  switch (tree.global(id)) {
    case G::kRebuildTensor:
    case G::kRebuildTensorV2:
    case G::kRebuildTensorV3:
    case G::kRebuildParameter:
    case G::kRebuildParameterWithState:
      return true;
    default:
      return false;
  }
}

std::optional<Id> LookupKey(const PickleTree& tree, Id dict, absl::string_view key) {
  if (tree.kind(dict) != Kind::kDict) return std::nullopt;
  const absl::Span<const Id> items = tree.items(dict);
  for (size_t i = items.size(); i >= 2; i -= 2) {
    if (tree.kind(items[i - 2]) == Kind::kString && tree.string_value(items[i - 2]) == key) {
      return items[i - 1];
    }
  }
  return std::nullopt;
}

absl::StatusOr<TorchTensor> ExtractTensor(const PickleTree& tree, Id id, std::string name) {
  return TensorBuilder(tree, std::move(name)).Build(id);
}

absl::Status CheckTensorTotals(absl::Span<const TorchTensor> tensors) {
  uint64_t total = 0;
  uint64_t stored = 0;
  absl::flat_hash_set<absl::string_view> storages;
  for (const TorchTensor& torch : tensors) {
    const bool overflow = (torch.tensor.alias_of.empty() &&
                           __builtin_add_overflow(total, torch.tensor.nbytes(), &total)) ||
                          (storages.insert(torch.view.storage_key).second &&
                           __builtin_add_overflow(stored, torch.view.storage_bytes, &stored));
    if (overflow) return Corrupt("the tensors of the file take more than 2^64 bytes");
  }
  if (total > kTotalExpandedBytes &&
      (total - kTotalExpandedBytes) / kTotalExpandedFactor > stored) {
    return Unsupported(absl::StrCat("the tensors would take ", total,
                                    " bytes, but their storages have only ", stored,
                                    ": expanded views are limited to ", kTotalExpandedFactor,
                                    " times that; save copies: tensor.contiguous()"));
  }
  return absl::OkStatus();
}

absl::StatusOr<TorchStateDict> ExtractStateDict(const PickleTree& tree,
                                                absl::string_view state_dict_key) {
  MS_ASSIGN_OR_RETURN(const Id dict, FindStateDict(tree, state_dict_key));
  const absl::Span<const Id> items = tree.items(dict);
  std::vector<TorchTensor> tensors;
  tensors.reserve(items.size() / 2);
  absl::flat_hash_set<absl::string_view> names;
  absl::flat_hash_map<std::string, size_t> views;
  for (size_t i = 0; i + 1 < items.size(); i += 2) {
    if (tree.kind(items[i]) != Kind::kString) {
      return Unsupported(absl::StrCat("the state_dict has ", tree.KindName(items[i]),
                                      " as a key, where a tensor's name is due", kSaveTensors));
    }
    const absl::string_view name = tree.string_value(items[i]);
    const absl::string_view problem = TensorNameProblem(name);
    if (!problem.empty()) {
      return Unsupported(absl::StrCat("the tensor name ", ShowName(name), " ", problem));
    }
    if (!names.insert(name).second) {
      return Corrupt(absl::StrCat("the state_dict has the name ", ShowName(name), " twice"));
    }
    if (!IsTorchTensor(tree, items[i + 1])) {
      return Unsupported(absl::StrCat("the state_dict entry ", ShowName(name), " is ",
                                      tree.KindName(items[i + 1]),
                                      ", not a tensor; remove it, or "
                                      "name the state_dict's place by state_dict_key"));
    }
    MS_ASSIGN_OR_RETURN(TorchTensor torch, ExtractTensor(tree, items[i + 1], std::string(name)));
    const auto [owner, first] = views.emplace(ViewIdentity(torch), tensors.size());
    if (!first) {
      StoredTensor& owning = tensors[owner->second].tensor;
      torch.tensor.alias_of = owning.name;
      // One of the two may have been pickled as a plain tensor.
      if (!owning.kind) {
        owning.kind = torch.tensor.kind;
        owning.requires_grad = torch.tensor.requires_grad;
      }
      torch.tensor.kind = owning.kind;
      torch.tensor.requires_grad = owning.requires_grad;
    }
    tensors.push_back(std::move(torch));
  }
  MS_RETURN_IF_ERROR(CheckTensorTotals(tensors));
  return TorchStateDict{std::move(tensors), ModuleVersions(tree, dict)};
}

}  // namespace modelstate
