#include "common/format/torch_legacy_reader.h"

#include <algorithm>
#include <cstdint>
#include <string>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/format/pickle.h"
#include "common/format/text.h"

namespace modelstate {
namespace {

using Id = PickleTree::Id;
using Kind = PickleTree::Kind;

// After the opcode and the number of the pickle protocol: a long of ten bytes, and the end.
constexpr absl::string_view kMagic("\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.", 13);
constexpr size_t kMagicBytes = 2 + kMagic.size();
constexpr int64_t kProtocolVersion = 1001;
constexpr uint64_t kFirstWindow = uint64_t{64} << 10;
constexpr uint64_t kWindowGrowth = 4;

// Reads pickles that follow each other in a file. Nothing but its STOP says where one ends, so a
// part of the file is parsed, and a larger one if that was too short.
class PickleStream {
 public:
  PickleStream(const File& file, uint64_t offset, uint64_t end)
      : file_(file), offset_(offset), end_(end) {}

  absl::StatusOr<PickleTree> Next(absl::string_view what, bool legacy_storages = false) {
    const uint64_t limit = std::min(end_ - offset_, PickleTree::kMaxBytes);
    for (uint64_t window = kFirstWindow;; window *= kWindowGrowth) {
      std::string text(std::min(window, limit), '\0');
      MS_RETURN_IF_ERROR(file_.ReadAt(
          offset_, absl::MakeSpan(reinterpret_cast<uint8_t*>(text.data()), text.size())));
      const size_t size = text.size();
      size_t consumed = 0;
      bool cut_off = false;
      PickleTree::Options options;
      options.what = what;
      options.legacy_storages = legacy_storages;
      options.consumed = &consumed;
      options.cut_off = &cut_off;
      absl::StatusOr<PickleTree> tree = PickleTree::Parse(std::move(text), options);
      if (tree.ok()) {
        offset_ += consumed;
        return tree;
      }
      if (!cut_off || size == end_ - offset_) return tree;
      if (size == PickleTree::kMaxBytes) {
        return Unsupported(absl::StrCat(what, " has more than ", PickleTree::kMaxBytes,
                                        " bytes; save the tensors alone"));
      }
    }
  }

  uint64_t offset() const { return offset_; }

 private:
  const File& file_;
  uint64_t offset_;
  const uint64_t end_;
};

struct StreamStorage {
  uint64_t count = 0;
  uint64_t item_bytes = 0;
  uint64_t offset = 0;  // of its elements in the file; 0: the list of keys does not have it

  uint64_t bytes() const { return count * item_bytes; }
};

using Storages = absl::flat_hash_map<std::string, StreamStorage>;

// All storages that the object mentions, also where no tensor of the state_dict needs them: their
// sizes say where the others lie.
absl::StatusOr<Storages> FindStorages(const PickleTree& tree, uint64_t file_bytes) {
  Storages storages;
  for (Id id : tree.Storages()) {
    const absl::Span<const Id> items = tree.items(id);  // class, key, location, count, part
    const std::string key(tree.string_value(items[1]));
    const StreamStorage storage{static_cast<uint64_t>(tree.int_value(items[3])),
                                tree.item_bytes(items[0])};
    if (storage.count > file_bytes / storage.item_bytes) {
      return Corrupt(absl::StrCat("the storage ", ShowName(key), " has ", storage.count,
                                  " elements by the pickle, more than the file of ", file_bytes,
                                  " bytes can hold"));
    }
    const auto [place, is_new] = storages.emplace(key, storage);
    if (!is_new &&
        (place->second.count != storage.count || place->second.item_bytes != storage.item_bytes)) {
      return Corrupt(absl::StrCat("the storage ", ShowName(key), " is mentioned with two sizes"));
    }
  }
  return storages;
}

// Follows the elements of the storages in the order of the keys, to the end of the file.
absl::Status PlaceStorages(const File& file, uint64_t offset, uint64_t end, const PickleTree& keys,
                           Storages* storages) {
  if (keys.kind(keys.root()) != Kind::kList) {
    return Corrupt(absl::StrCat("the list of storages is ", keys.KindName(keys.root())));
  }
  for (Id id : keys.items(keys.root())) {
    if (keys.kind(id) != Kind::kString) {
      return Corrupt(absl::StrCat("the list of storages holds ", keys.KindName(id)));
    }
    const absl::string_view key = keys.string_value(id);
    const auto found = storages->find(key);
    if (found == storages->end()) {
      return Corrupt(absl::StrCat("the list of storages has ", ShowName(key),
                                  ", which the object does not mention"));
    }
    StreamStorage& storage = found->second;
    if (storage.offset != 0) {
      return Corrupt(absl::StrCat("the list of storages has ", ShowName(key), " twice"));
    }
    uint8_t bytes[8];
    if (end - offset < sizeof(bytes)) {
      return Corrupt(absl::StrCat("the file ends before the storage ", ShowName(key),
                                  ": it is truncated; copy it again"));
    }
    MS_RETURN_IF_ERROR(file.ReadAt(offset, absl::MakeSpan(bytes)));
    offset += sizeof(bytes);
    uint64_t count = 0;
    for (size_t i = sizeof(bytes); i-- > 0;) count = count << 8 | bytes[i];
    if (count != storage.count) {
      return Corrupt(absl::StrCat("the storage ", ShowName(key), " has ", storage.count,
                                  " elements by the pickle, but ", count, " before its elements"));
    }
    if (storage.bytes() > end - offset) {
      return Corrupt(absl::StrCat("the storage ", ShowName(key), " of ", storage.bytes(),
                                  " bytes reaches past the end of the file: it is truncated; copy "
                                  "it again"));
    }
    storage.offset = offset;
    offset += storage.bytes();
  }
  if (offset == end) return absl::OkStatus();
  return Corrupt(
      absl::StrCat("the file goes on for ", end - offset, " bytes after its last storage"));
}

}  // namespace

bool TorchLegacyReader::Matches(absl::string_view head) {
  return head.size() >= kMagicBytes && head[0] == '\x80' && head.substr(2, kMagic.size()) == kMagic;
}

absl::StatusOr<std::unique_ptr<TorchTensorReader>> TorchLegacyReader::Open(File file,
                                                                           Extract extract) {
  MS_ASSIGN_OR_RETURN(const uint64_t end, file.Size());
  std::unique_ptr<TorchLegacyReader> reader(new TorchLegacyReader(std::move(file)));
  if (end < kMagicBytes) return Corrupt("the stream is cut off in its magic number");
  PickleStream stream(reader->file(), kMagicBytes, end);
  MS_ASSIGN_OR_RETURN(const PickleTree protocol, stream.Next("the protocol number"));
  if (protocol.kind(protocol.root()) != Kind::kInt ||
      protocol.int_value(protocol.root()) != kProtocolVersion) {
    return Unsupported(absl::StrCat(
        "the stream of torch.save has another protocol number than ", kProtocolVersion,
        "; load it with the PyTorch that wrote it, and save it again with torch.save"));
  }
  // The byte order and the widths of C types of the machine that wrote it: of no meaning to the
  // elements.
  MS_ASSIGN_OR_RETURN(const PickleTree machine, stream.Next("the description of the machine"));
  if (machine.kind(machine.root()) != Kind::kDict) {
    return Corrupt(absl::StrCat("the description of the machine is ",
                                machine.KindName(machine.root()), ", not a dict"));
  }
  MS_ASSIGN_OR_RETURN(const PickleTree object,
                      stream.Next("the pickled object", /*legacy_storages=*/true));
  MS_ASSIGN_OR_RETURN(const PickleTree keys, stream.Next("the list of storages"));
  MS_ASSIGN_OR_RETURN(Storages storages, FindStorages(object, end));
  MS_RETURN_IF_ERROR(PlaceStorages(reader->file(), stream.offset(), end, keys, &storages));
  MS_ASSIGN_OR_RETURN(TorchStateDict state_dict, extract(object));
  MS_RETURN_IF_ERROR(reader->SetStateDict(
      std::move(state_dict), [&](const TorchTensor& torch) -> absl::StatusOr<StoragePlace> {
        const std::string& key = torch.view.storage_key;
        const StreamStorage& storage = storages.at(key);
        if (storage.offset == 0) {
          return Corrupt(absl::StrCat("tensor ", ShowName(torch.tensor.name),
                                      ": the list of storages lacks ", ShowName(key),
                                      ", so the file has no elements of it"));
        }
        return StoragePlace{absl::StrCat("storage ", ShowName(key)), storage.offset,
                            storage.bytes(), std::nullopt};
      }));
  return std::unique_ptr<TorchTensorReader>(std::move(reader));
}

}  // namespace modelstate
