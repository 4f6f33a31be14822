// PickleTree::Parse.
#include <optional>
#include <utility>

#include "absl/container/inlined_vector.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/format/pickle.h"
#include "common/format/pickle_globals.h"
#include "common/format/pickle_lists.h"
#include "common/format/text.h"

namespace modelstate {
namespace {

using G = PickleGlobal;

// torch.save writes more bytes for each object that is a node: a list takes 3 with its place in the
// memo. Beside that only small files need nodes.
constexpr size_t kBytesPerNode = 3;
constexpr size_t kFreeNodes = size_t{1} << 16;
// Python's pickler appends in batches of 1000; a tuple is pushed whole.
constexpr size_t kMaxStack = size_t{1} << 20;
constexpr size_t kMaxMarks = 256;
// Integers up to here are one node each, however often they occur.
constexpr size_t kSharedInts = 1024;
constexpr uint16_t kMaxDepth = 256;

}  // namespace

// A stack machine over the opcodes that torch.save writes.
class PickleParser {
 public:
  using Id = PickleTree::Id;
  using Kind = PickleTree::Kind;

  PickleParser(PickleTree* tree, const PickleTree::Options& options)
      : tree_(*tree),
        text_(tree->pickle_),
        options_(options),
        max_nodes_(kFreeNodes + tree->pickle_.size() / kBytesPerNode),
        lists_(&tree->items_) {}

  absl::Status Run() {
    if (text_.size() < 2) return CutOff("is cut off");
    if (text_[0] != '\x80') {
      return Unsupported(absl::StrCat(
          options_.what,
          " has no pickle protocol number; save the checkpoint again with torch.save"));
    }
    while (true) {
      start_ = at_;
      if (at_ >= text_.size()) return CutOff("ends before its STOP opcode");
      const char opcode = text_[at_++];
      if (opcode == '.') break;
      MS_RETURN_IF_ERROR(Step(opcode));
      if (tree_.nodes_.size() > max_nodes_ || stack_.size() > kMaxStack) return TooMany();
    }
    if (options_.consumed != nullptr) {
      *options_.consumed = at_;
    } else if (at_ != text_.size()) {
      return Fail("goes on after its STOP opcode");
    }
    if (stack_.size() != 1 || !marks_.empty()) return Fail("does not end with one object");
    tree_.root_ = stack_[0];
    for (Id id = 0; lists_.scattered() && id < tree_.nodes_.size(); ++id) {
      MS_RETURN_IF_ERROR(Join(id));
    }
    return absl::OkStatus();
  }

 private:
  absl::Status Fail(absl::string_view what) const {
    return Corrupt(absl::StrCat(options_.what, " ", what, " (at byte ", start_, ")"));
  }

  absl::Status CutOff(absl::string_view what) const {
    if (options_.cut_off != nullptr) *options_.cut_off = true;
    return Fail(what);
  }

  absl::Status TooMany() const {
    return Unsupported(absl::StrCat(options_.what, " holds more objects in ", text_.size(),
                                    " bytes than torch.save writes; save the tensors alone"));
  }

  absl::StatusOr<uint64_t> Unsigned(size_t width) {
    if (text_.size() - at_ < width) return CutOff("is cut off");
    uint64_t value = 0;
    for (size_t i = width; i > 0; --i) {
      value = value << 8 | static_cast<unsigned char>(text_[at_ + i - 1]);
    }
    at_ += width;
    return value;
  }

  size_t Floor() const { return marks_.empty() ? 0 : marks_.back(); }

  absl::StatusOr<Id> Pop() {
    if (stack_.size() <= Floor()) return Fail("takes an object from an empty stack");
    const Id id = stack_.back();
    stack_.pop_back();
    return id;
  }

  absl::StatusOr<Id> Top() const {
    if (stack_.size() <= Floor()) return Fail("uses an object of an empty stack");
    return stack_.back();
  }

  // The objects since the last MARK, which is removed with them. Valid until the next push.
  absl::StatusOr<absl::Span<const Id>> PopToMark() {
    if (marks_.empty()) return Fail("looks for a MARK that is not there");
    const size_t mark = marks_.back();
    marks_.pop_back();
    popped_.assign(stack_.begin() + static_cast<ptrdiff_t>(mark), stack_.end());
    stack_.resize(mark);
    return absl::Span<const Id>(popped_);
  }

  Id Add(Kind kind, int64_t number = 0, uint32_t a = 0) {
    PickleTree::Node node;
    node.kind = kind;
    node.number = number;
    node.a = a;
    tree_.nodes_.push_back(node);
    return static_cast<Id>(tree_.nodes_.size() - 1);
  }

  absl::Status Push(Kind kind, int64_t number = 0, uint32_t a = 0) {
    stack_.push_back(Add(kind, number, a));
    return absl::OkStatus();
  }

  // What nothing changes is one node for all places: `place` remembers it.
  absl::Status PushShared(Id* place, Kind kind, int64_t number = 0) {
    if (*place == kNone) *place = Add(kind, number);
    stack_.push_back(*place);
    return absl::OkStatus();
  }

  absl::Status PushInt(int64_t value) {
    if (value < 0 || value >= static_cast<int64_t>(kSharedInts)) return Push(Kind::kInt, value);
    if (ints_.empty()) ints_.resize(kSharedInts, kNone);
    return PushShared(&ints_[static_cast<size_t>(value)], Kind::kInt, value);
  }

  absl::Status Deepen(Id container, Id child) {
    PickleTree::Node& node = tree_.nodes_[container];
    const uint16_t depth = tree_.nodes_[child].depth;
    if (depth >= kMaxDepth) {
      return Unsupported(absl::StrCat(options_.what, " nests objects more than ", kMaxDepth,
                                      " deep; save the tensors alone"));
    }
    if (node.depth < depth + 1) node.depth = static_cast<uint16_t>(depth + 1);
    return absl::OkStatus();
  }

  absl::StatusOr<Id> AddTuple(absl::Span<const Id> items, Kind kind = Kind::kTuple) {
    const std::optional<uint32_t> begin = lists_.Add(items);
    if (!begin) return TooMany();
    const Id id = Add(kind, *begin, static_cast<uint32_t>(items.size()));
    for (Id item : items) MS_RETURN_IF_ERROR(Deepen(id, item));
    return id;
  }

  absl::Status AppendTo(Id container, absl::Span<const Id> items) {
    if (items.empty()) return absl::OkStatus();
    for (Id item : items) MS_RETURN_IF_ERROR(Deepen(container, item));
    PickleTree::Node& list = tree_.nodes_[container];
    return lists_.Append(items, &list.number, &list.a) ? absl::OkStatus() : TooMany();
  }

  absl::Status Join(Id id) {
    PickleTree::Node& list = tree_.nodes_[id];
    if (list.kind != Kind::kList && list.kind != Kind::kDict) return absl::OkStatus();
    return lists_.Join(&list.number, &list.a) ? absl::OkStatus() : TooMany();
  }

  absl::Status Text(Kind kind, size_t width) {
    MS_ASSIGN_OR_RETURN(const uint64_t length, Unsigned(width));
    if (length > text_.size() - at_) return CutOff("has a text that is cut off");
    const absl::string_view value = text_.substr(at_, length);
    if (kind == Kind::kString && !IsValidUtf8(value)) return Fail("has a text that is not UTF-8");
    MS_RETURN_IF_ERROR(Push(kind, static_cast<int64_t>(at_), static_cast<uint32_t>(length)));
    at_ += length;
    return absl::OkStatus();
  }

  absl::StatusOr<absl::string_view> Line() {
    const size_t end = text_.find('\n', at_);
    if (end == absl::string_view::npos) return CutOff("has a line that does not end");
    const absl::string_view line = text_.substr(at_, end - at_);
    at_ = end + 1;
    return line;
  }

  absl::Status Global() {
    MS_ASSIGN_OR_RETURN(const absl::string_view module, Line());
    MS_ASSIGN_OR_RETURN(const absl::string_view name, Line());
    for (uint32_t row = 0; row < PickleGlobals().size(); ++row) {
      absl::string_view known = PickleGlobals()[row].name;
      if (known.size() != module.size() + 1 + name.size() || known[module.size()] != ' ' ||
          known.substr(0, module.size()) != module || known.substr(module.size() + 1) != name) {
        continue;
      }
      MS_RETURN_IF_ERROR(Push(Kind::kGlobal, 0, row));
      tree_.nodes_.back().global = static_cast<uint8_t>(PickleGlobals()[row].global);
      return absl::OkStatus();
    }
    return MakeError(Reason::kCheckpointUnsupported,
                     absl::StrCat("the file's pickle names ",
                                  ShowName(absl::StrCat(module.substr(0, 100), ".", name)),
                                  ", which is no tensor constructor; nothing was run. Save only "
                                  "tensors: torch.save(module.state_dict(), path)"),
                     {{"global", absl::StrCat(module.substr(0, 100), ".", name.substr(0, 100))}});
  }

  absl::Status Call() {
    MS_ASSIGN_OR_RETURN(const Id arguments, Pop());
    MS_ASSIGN_OR_RETURN(const Id function, Pop());
    if (tree_.kind(function) != Kind::kGlobal || tree_.kind(arguments) != Kind::kTuple) {
      return Fail("calls what is no function");
    }
    const absl::Span<const Id> args = tree_.items(arguments);
    switch (tree_.global(function)) {
      case G::kOrderedDict:
        return NewOrderedDict(args);
      case G::kDefaultDict:  // its argument makes what is missing, which nothing here asks for
        return Push(Kind::kDict, 0, PickleTree::kNoList);
      case G::kSize:
        if (args.size() == 1 && tree_.kind(args[0]) == Kind::kTuple) {
          stack_.push_back(args[0]);
          return absl::OkStatus();
        }
        return Fail("makes a torch.Size of other than a tuple");
      case G::kUntypedStorage:
      case G::kStorage:
      case G::kDType:
      case G::kTensorClass:
      case G::kParameterClass:
        return Unsupported(absl::StrCat("the file's pickle calls ",
                                        PickleGlobals()[tree_.nodes_[function].a].name,
                                        ", which a state_dict never does; nothing was run"));
      case G::kRebuildFromType: {
        // (function, type, arguments, state): what it would call, without the Python attributes.
        if (args.size() != 4 || tree_.kind(args[0]) != Kind::kGlobal ||
            tree_.kind(args[1]) != Kind::kGlobal || tree_.kind(args[2]) != Kind::kTuple) {
          return Fail("has a malformed _rebuild_from_type_v2");
        }
        switch (tree_.global(args[0])) {
          case G::kRebuildTensor:
          case G::kRebuildTensorV2:
          case G::kRebuildTensorV3:
          case G::kRebuildParameter:
          case G::kRebuildParameterWithState:
            return PushCall(args[0], args[2]);
          default:
            return Fail("rebuilds a tensor by other than a tensor constructor");
        }
      }
      default:
        return PushCall(function, arguments);
    }
  }

  absl::Status PushCall(Id function, Id arguments) {
    const uint8_t global = tree_.nodes_[function].global;
    MS_RETURN_IF_ERROR(Push(Kind::kCall, 0, arguments));
    tree_.nodes_.back().global = global;
    return Deepen(stack_.back(), arguments);
  }

  absl::Status NewOrderedDict(absl::Span<const Id> args) {
    const Id dict = Add(Kind::kDict, 0, PickleTree::kNoList);
    if (args.size() > 1) return Fail("has an OrderedDict of more than one argument");
    if (args.size() == 1) {
      if (tree_.kind(args[0]) != Kind::kList && tree_.kind(args[0]) != Kind::kTuple) {
        return Fail("has an OrderedDict of other than a list of pairs");
      }
      const Id list = args[0];  // `args` ends where items are moved
      MS_RETURN_IF_ERROR(Join(list));
      std::vector<Id> flat;
      for (size_t i = 0; i < tree_.items(list).size(); ++i) {
        const Id pair = tree_.items(list)[i];
        const bool sequence = tree_.kind(pair) == Kind::kList || tree_.kind(pair) == Kind::kTuple;
        MS_RETURN_IF_ERROR(Join(pair));
        if (!sequence || tree_.items(pair).size() != 2) {
          return Fail("has an OrderedDict of other than pairs");
        }
        flat.push_back(tree_.items(pair)[0]);
        flat.push_back(tree_.items(pair)[1]);
      }
      MS_RETURN_IF_ERROR(AppendTo(dict, flat));
    }
    stack_.push_back(dict);
    return absl::OkStatus();
  }

  absl::Status Build() {
    MS_ASSIGN_OR_RETURN(const Id state, Pop());
    MS_ASSIGN_OR_RETURN(const Id object, Top());
    // Attributes, such as the `_metadata` of a state_dict: there is no object to set them on, so
    // those of a dict are kept beside it, as one more node that nothing walks by itself.
    if (tree_.kind(object) != Kind::kDict && tree_.kind(object) != Kind::kCall) {
      return Fail("sets attributes of what has none");
    }
    if (tree_.kind(object) == Kind::kDict && tree_.kind(state) == Kind::kDict) {
      tree_.attributes_[object] = state;
    }
    return absl::OkStatus();
  }

  bool IsString(Id id) const { return tree_.kind(id) == Kind::kString; }
  bool IsCount(Id id) const { return tree_.kind(id) == Kind::kInt && tree_.int_value(id) >= 0; }
  bool IsPartOfStorage(Id id) const {
    if (tree_.kind(id) == Kind::kNone) return true;
    const absl::Span<const Id> items = tree_.items(id);
    return tree_.kind(id) == Kind::kTuple && items.size() == 3 && IsString(items[0]) &&
           IsCount(items[1]) && IsCount(items[2]);
  }

  absl::Status PersistentId() {
    MS_ASSIGN_OR_RETURN(const Id id, Pop());
    if (tree_.kind(id) != Kind::kTuple) return Fail("has a persistent id that is no tuple");
    const absl::Span<const Id> items = tree_.items(id);
    const size_t size = options_.legacy_storages ? 6 : 5;
    const bool valid =
        items.size() == size && IsString(items[0]) && tree_.string_value(items[0]) == "storage" &&
        tree_.kind(items[1]) == Kind::kGlobal &&
        (tree_.global(items[1]) == G::kStorage || tree_.global(items[1]) == G::kUntypedStorage) &&
        IsString(items[2]) && IsString(items[3]) && IsCount(items[4]) &&
        (size == 5 || IsPartOfStorage(items[5]));
    if (!valid) {
      return Fail(
          absl::StrCat("has a persistent id that is not (\"storage\", class, key, location, ",
                       size == 5 ? "count)" : "count, None or part)"));
    }
    // A copy: AddTuple grows the vector that `items` points into.
    const absl::InlinedVector<Id, 5> parts(items.begin() + 1, items.end());
    MS_ASSIGN_OR_RETURN(const Id storage, AddTuple(parts, Kind::kStorage));
    stack_.push_back(storage);
    return absl::OkStatus();
  }

  absl::Status Memoize(uint64_t index) {
    // Pickles number their objects from 0.
    if (index >= max_nodes_) return Fail("has a memo index beyond its own size");
    MS_ASSIGN_OR_RETURN(const Id id, Top());
    if (index >= memo_.size()) memo_.resize(index + 1, PickleTree::kNoList);
    memo_[index] = id;
    return absl::OkStatus();
  }

  absl::Status Recall(uint64_t index) {
    if (index >= memo_.size() || memo_[index] == PickleTree::kNoList) {
      return Fail("recalls an object that it never stored");
    }
    stack_.push_back(memo_[index]);
    return absl::OkStatus();
  }

  absl::Status SmallTuple(size_t size) {
    Id items[3];
    for (size_t i = size; i > 0; --i) {
      MS_ASSIGN_OR_RETURN(items[i - 1], Pop());
    }
    MS_ASSIGN_OR_RETURN(const Id tuple, AddTuple(absl::MakeConstSpan(items, size)));
    stack_.push_back(tuple);
    return absl::OkStatus();
  }

  absl::Status AppendItems(absl::Span<const Id> items, Kind kind) {
    MS_ASSIGN_OR_RETURN(const Id container, Top());
    const bool counter =
        tree_.kind(container) == Kind::kCall && tree_.global(container) == G::kCounter;
    if (kind == Kind::kDict && counter) return absl::OkStatus();
    if (tree_.kind(container) != kind) {
      return Fail(absl::StrCat("adds items to ", tree_.KindName(container)));
    }
    if (kind == Kind::kDict && items.size() % 2 != 0) return Fail("sets a key without a value");
    return AppendTo(container, items);
  }

  absl::Status Long() {
    MS_ASSIGN_OR_RETURN(const uint64_t width, Unsigned(1));
    if (width > text_.size() - at_) return CutOff("is cut off");
    if (width > 8) {
      at_ += width;
      return Push(Kind::kBigInt);
    }
    MS_ASSIGN_OR_RETURN(uint64_t value, Unsigned(width));
    if (width > 0 && width < 8 && (value >> (8 * width - 1)) != 0)
      value |= ~uint64_t{0} << 8 * width;
    return PushInt(static_cast<int64_t>(value));
  }

  absl::Status Step(char opcode) {
    switch (opcode) {
      case '\x80': {
        MS_ASSIGN_OR_RETURN(const uint64_t protocol, Unsigned(1));
        if (protocol == 2 || protocol == 3) return absl::OkStatus();
        return Unsupported(absl::StrCat(
            options_.what, " uses pickle protocol ", protocol,
            "; save the checkpoint again with torch.save's default, pickle_protocol=2"));
      }
      case '(':
        if (marks_.size() >= kMaxMarks) {
          return Unsupported(absl::StrCat(options_.what, " nests objects more than ", kMaxMarks,
                                          " deep; save the tensors alone"));
        }
        marks_.push_back(stack_.size());
        return absl::OkStatus();
      case 'c':
        return Global();
      case 'R':
      case '\x81':
        return Call();
      case 'b':
        return Build();
      case 'Q':
        return PersistentId();
      case 'N':
        return PushShared(&none_, Kind::kNone);
      case '\x88':
        return PushShared(&true_, Kind::kBool, 1);
      case '\x89':
        return PushShared(&false_, Kind::kBool, 0);
      case 'J': {
        MS_ASSIGN_OR_RETURN(const uint64_t value, Unsigned(4));
        return PushInt(static_cast<int32_t>(static_cast<uint32_t>(value)));
      }
      case 'K': {
        MS_ASSIGN_OR_RETURN(const uint64_t value, Unsigned(1));
        return PushInt(static_cast<int64_t>(value));
      }
      case 'M': {
        MS_ASSIGN_OR_RETURN(const uint64_t value, Unsigned(2));
        return PushInt(static_cast<int64_t>(value));
      }
      case '\x8a':
        return Long();
      case 'G': {  // big-endian, unlike the rest
        MS_ASSIGN_OR_RETURN(const uint64_t bits, Unsigned(8));
        return Push(Kind::kFloat, static_cast<int64_t>(__builtin_bswap64(bits)));
      }
      case 'X':
        return Text(Kind::kString, 4);
      case 'U':
        return Text(Kind::kString, 1);
      case 'T':
        return Text(Kind::kString, 4);
      case 'B':
        return Text(Kind::kBytes, 4);
      case 'C':
        return Text(Kind::kBytes, 1);
      case '}':
        return Push(Kind::kDict, 0, PickleTree::kNoList);
      case ']':
        return Push(Kind::kList, 0, PickleTree::kNoList);
      case '\x8f':
        return Push(Kind::kSet, 0, PickleTree::kNoList);
      case ')':
        return PushShared(&empty_tuple_, Kind::kTuple);
      case 't': {
        MS_ASSIGN_OR_RETURN(const absl::Span<const Id> items, PopToMark());
        MS_ASSIGN_OR_RETURN(const Id tuple, AddTuple(items));
        stack_.push_back(tuple);
        return absl::OkStatus();
      }
      case '\x85':
        return SmallTuple(1);
      case '\x86':
        return SmallTuple(2);
      case '\x87':
        return SmallTuple(3);
      case 'a': {
        MS_ASSIGN_OR_RETURN(const Id item, Pop());
        return AppendItems({item}, Kind::kList);
      }
      case 'e': {
        MS_ASSIGN_OR_RETURN(const absl::Span<const Id> items, PopToMark());
        return AppendItems(items, Kind::kList);
      }
      case 's': {
        MS_ASSIGN_OR_RETURN(const Id value, Pop());
        MS_ASSIGN_OR_RETURN(const Id key, Pop());
        return AppendItems({key, value}, Kind::kDict);
      }
      case 'u': {
        MS_ASSIGN_OR_RETURN(const absl::Span<const Id> items, PopToMark());
        return AppendItems(items, Kind::kDict);
      }
      case 'q': {
        MS_ASSIGN_OR_RETURN(const uint64_t index, Unsigned(1));
        return Memoize(index);
      }
      case 'r': {
        MS_ASSIGN_OR_RETURN(const uint64_t index, Unsigned(4));
        return Memoize(index);
      }
      case 'h': {
        MS_ASSIGN_OR_RETURN(const uint64_t index, Unsigned(1));
        return Recall(index);
      }
      case 'j': {
        MS_ASSIGN_OR_RETURN(const uint64_t index, Unsigned(4));
        return Recall(index);
      }
      default:
        return Unsupported(
            absl::StrCat(options_.what, " uses the pickle opcode 0x",
                         absl::Hex(static_cast<unsigned char>(opcode)), " at byte ", start_,
                         ", which torch.save with its default protocol does not write"));
    }
  }

  static constexpr Id kNone = 0xFFFFFFFF;

  PickleTree& tree_;
  absl::string_view text_;
  const PickleTree::Options& options_;
  const size_t max_nodes_;
  Id none_ = kNone;
  Id true_ = kNone;
  Id false_ = kNone;
  Id empty_tuple_ = kNone;
  std::vector<Id> ints_;
  size_t at_ = 0;
  size_t start_ = 0;  // of the opcode at hand
  std::vector<Id> stack_;
  std::vector<size_t> marks_;
  std::vector<Id> popped_;
  std::vector<Id> memo_;
  PickleLists lists_;
};

absl::StatusOr<PickleTree> PickleTree::Parse(std::string pickle, const Options& options) {
  if (pickle.size() > kMaxBytes) {
    return Unsupported(absl::StrCat(options.what, " has ", pickle.size(),
                                    " bytes, over the limit of ", kMaxBytes,
                                    "; save the tensors alone"));
  }
  PickleTree tree;
  tree.pickle_ = std::move(pickle);
  MS_RETURN_IF_ERROR(PickleParser(&tree, options).Run());
  return tree;
}

}  // namespace modelstate
