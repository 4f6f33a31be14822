#ifndef MODELSTATE_COMMON_FORMAT_PICKLE_H_
#define MODELSTATE_COMMON_FORMAT_PICKLE_H_

#include <bit>
#include <cstdint>
#include <deque>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "common/base/dtype.h"

namespace modelstate {

// The globals that a state_dict or an optimizer state, or what training scripts save beside them,
// may name. Anything else is refused.
enum class PickleGlobal : uint8_t {
  kOrderedDict,
  kDefaultDict,
  kPlainObject,  // argparse.Namespace, NumPy's scalars: nothing of it is ever read
  kCounter,
  kSet,
  kComplex,
  kByteArray,
  kCodecsEncode,
  kRebuildTensor,
  kRebuildTensorV2,
  kRebuildTensorV3,
  kRebuildParameter,
  kRebuildParameterWithState,
  kRebuildFromType,
  kTensorClass,
  kParameterClass,
  kSize,
  kDevice,
  kUntypedStorage,
  kStorage,  // of one dtype
  kDType,
};

// An inert tree that a pickle describes. Nothing is called: a call that the pickle asks for is a
// node with the function and its arguments. Nodes refer to each other by index, and may be shared
// or cyclic; nothing here walks them recursively. What parsing allocates is at most 14 times the
// pickle and 16 MiB. Immutable after Parse.
class PickleTree {
 public:
  using Id = uint32_t;

  enum class Kind : uint8_t {
    kNone,
    kBool,
    kInt,
    kBigInt,  // does not fit in int64
    kFloat,
    kString,  // valid UTF-8
    kBytes,
    kTuple,
    kList,
    kDict,
    kSet,
    kGlobal,
    kStorage,  // a persistent id: items are class, key, location, count; of the legacy stream also
               // None, or the part of the storage that is meant: (key of the view, offset, count)
    kCall,     // an allowed function and its arguments, never run
  };

  // Far above any state_dict: a file of 100,000 tensors has 15 MB of pickle.
  static constexpr uint64_t kMaxBytes = uint64_t{128} << 20;

  struct Options {
    absl::string_view what = "data.pkl";  // for messages
    // The persistent ids are those of the legacy stream, which have one item more.
    bool legacy_storages = false;
    // Not null: the text may go on after the pickle; how many bytes of it the pickle takes.
    size_t* consumed = nullptr;
    // Not null: set where Parse fails because the text ends too early.
    bool* cut_off = nullptr;
  };

  // Takes the text of a pickle, protocol 2 or 3.
  static absl::StatusOr<PickleTree> Parse(std::string pickle, const Options& options);
  static absl::StatusOr<PickleTree> Parse(std::string pickle) {
    return Parse(std::move(pickle), Options());
  }

  Id root() const { return root_; }
  // All nodes of kind kStorage, as the pickle mentions them.
  std::vector<Id> Storages() const;
  Kind kind(Id id) const { return nodes_[id].kind; }
  // "a tuple": for messages.
  const char* KindName(Id id) const;

  bool bool_value(Id id) const { return nodes_[id].number != 0; }
  int64_t int_value(Id id) const { return nodes_[id].number; }
  double float_value(Id id) const { return std::bit_cast<double>(nodes_[id].number); }
  absl::string_view string_value(Id id) const {
    return absl::string_view(pickle_).substr(static_cast<size_t>(nodes_[id].number), nodes_[id].a);
  }
  // Items of a tuple, list or storage; keys and values in turn of a dict.
  absl::Span<const Id> items(Id id) const;
  // The last dict of attributes that was set on a dict, such as the `_metadata` of a state_dict.
  std::optional<Id> attributes(Id id) const;
  // Of a global, or the function of a call.
  PickleGlobal global(Id id) const { return static_cast<PickleGlobal>(nodes_[id].global); }
  // Of a global that is a storage class or a dtype: its place in the table, for dtype().
  std::optional<DType> dtype(Id id) const;
  // Bytes of an item of a global that is a storage class, also where there is no DType; an untyped
  // storage counts bytes.
  uint64_t item_bytes(Id id) const;
  // How PyTorch calls the dtype, also where there is no DType: "complex128".
  absl::string_view global_name(Id id) const;
  // Arguments of a call.
  absl::Span<const Id> arguments(Id id) const { return items(nodes_[id].a); }

 private:
  friend class PickleParser;

  static constexpr Id kNoList = 0xFFFFFFFF;

  struct Node {
    Kind kind = Kind::kNone;
    uint8_t global = 0;  // PickleGlobal
    uint16_t depth = 0;  // of nesting below this node
    uint32_t a = 0;      // text: length; tuple: item count; list, dict: kNoList (while it is parsed
                     // also where its later items are); call: arguments; global: row of the table
    int64_t number = 0;  // value, of a float its bits; text: offset in pickle_; tuple: offset in
                         // items_; list, dict: the same, and above 32 bits how many
  };

  std::string pickle_;
  std::deque<Node> nodes_;  // grows without a second copy of what is there
  std::vector<Id> items_;
  absl::flat_hash_map<Id, Id> attributes_;
  Id root_ = 0;
};

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_FORMAT_PICKLE_H_
