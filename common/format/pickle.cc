#include "common/format/pickle.h"

#include "common/format/pickle_globals.h"

namespace modelstate {
namespace {

using G = PickleGlobal;

}  // namespace

std::vector<PickleTree::Id> PickleTree::Storages() const {
  std::vector<Id> found;
  for (size_t i = 0; i < nodes_.size(); ++i) {
    if (nodes_[i].kind == Kind::kStorage) found.push_back(static_cast<Id>(i));
  }
  return found;
}

absl::Span<const PickleTree::Id> PickleTree::items(Id id) const {
  const Node& node = nodes_[id];
  switch (node.kind) {
    case Kind::kTuple:
    case Kind::kStorage:
      return absl::MakeConstSpan(items_).subspan(static_cast<size_t>(node.number), node.a);
    case Kind::kList:
    case Kind::kDict:
      return absl::MakeConstSpan(items_).subspan(static_cast<uint32_t>(node.number),
                                                 static_cast<uint64_t>(node.number) >> 32);
    default:
      return {};
  }
}

std::optional<PickleTree::Id> PickleTree::attributes(Id id) const {
  const auto found = attributes_.find(id);
  if (found == attributes_.end()) return std::nullopt;
  return found->second;
}

std::optional<DType> PickleTree::dtype(Id id) const { return PickleGlobals()[nodes_[id].a].dtype; }

uint64_t PickleTree::item_bytes(Id id) const {
  const PickleGlobalRow& row = PickleGlobals()[nodes_[id].a];
  return row.dtype ? DTypeSize(*row.dtype) : row.item_bytes;
}

absl::string_view PickleTree::global_name(Id id) const {
  return PickleGlobals()[nodes_[id].a].torch_name;
}

const char* PickleTree::KindName(Id id) const {
  switch (kind(id)) {
    case Kind::kNone:
      return "None";
    case Kind::kBool:
      return "a bool";
    case Kind::kInt:
    case Kind::kBigInt:
      return "an int";
    case Kind::kFloat:
      return "a float";
    case Kind::kString:
      return "a str";
    case Kind::kBytes:
      return "bytes";
    case Kind::kTuple:
      return "a tuple";
    case Kind::kList:
      return "a list";
    case Kind::kDict:
      return "a dict";
    case Kind::kSet:
      return "a set";
    case Kind::kGlobal:
      return "a type or function";
    case Kind::kStorage:
      return "a storage";
    case Kind::kCall:
      break;
  }
  switch (global(id)) {
    case G::kRebuildTensor:
    case G::kRebuildTensorV2:
    case G::kRebuildTensorV3:
    case G::kRebuildParameter:
    case G::kRebuildParameterWithState:
      return "a tensor";
    default:
      return "an object";
  }
}

}  // namespace modelstate
