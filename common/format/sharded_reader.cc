#include "common/format/sharded_reader.h"

#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/format/safetensors_header.h"
#include "common/format/text.h"

namespace modelstate {

absl::StatusOr<std::unique_ptr<ShardedReader>> ShardedReader::Open(const File& file,
                                                                   const OpenOptions& options) {
  if (!options.open_sibling) {
    return Unsupported(
        "the file is JSON, as the index of a sharded checkpoint, where one file of tensors is due; "
        "give a .safetensors or PyTorch file");
  }
  MS_ASSIGN_OR_RETURN(const uint64_t size, file.Size());
  if (size > kMaxShardedIndexBytes) {
    return Unsupported(
        absl::StrCat("the index has ", size, " bytes, over the limit of ", kMaxShardedIndexBytes));
  }
  std::string json(size, '\0');
  MS_RETURN_IF_ERROR(
      file.ReadAt(0, absl::MakeSpan(reinterpret_cast<uint8_t*>(json.data()), json.size())));
  MS_ASSIGN_OR_RETURN(ShardedIndex index, ParseShardedIndex(json));
  std::unique_ptr<ShardedReader> reader(new ShardedReader());
  MS_RETURN_IF_ERROR(reader->OpenShards(index, options));
  MS_RETURN_IF_ERROR(reader->TakeTensors(index));
  reader->metadata_ = std::move(index.metadata);
  reader->names_ = std::move(index.shards);
  reader->AddAliases();
  return reader;
}

absl::Status ShardedReader::OpenShards(const ShardedIndex& index, const OpenOptions& options) {
  OpenOptions of_shards = options;
  of_shards.open_sibling = nullptr;  // an index does not name indexes
  for (const std::string& name : index.shards) {
    absl::StatusOr<File> file = options.open_sibling(name);
    if (!file.ok()) return Annotate(file.status(), absl::StrCat("the shard ", ShowName(name)));
    MS_ASSIGN_OR_RETURN(std::unique_ptr<CheckpointReader> shard,
                        OpenCheckpoint(*std::move(file), of_shards));
    if (!shards_.empty() && IsTorchFormat(shard->format()) != IsTorchFormat(shards_[0]->format())) {
      return Unsupported(absl::StrCat("the shard ", ShowName(name), " is ",
                                      CheckpointFormatName(shard->format()), ", and others are ",
                                      CheckpointFormatName(shards_[0]->format()),
                                      "; the shards of one index are of one kind"));
    }
    module_versions_.insert(shard->module_versions().begin(), shard->module_versions().end());
    shards_.push_back(std::move(shard));
  }
  if (!shards_.empty() && IsTorchFormat(shards_[0]->format())) {
    format_ = CheckpointFormat::kTorchIndex;
  }
  return absl::OkStatus();
}

absl::Status ShardedReader::TakeTensors(const ShardedIndex& index) {
  constexpr size_t kMissing = static_cast<size_t>(-1);
  absl::flat_hash_map<absl::string_view, size_t> entries;
  for (size_t i = 0; i < index.entries.size(); ++i) entries.emplace(index.entries[i].name, i);
  std::vector<Place> found(index.entries.size(), Place{0, kMissing});
  std::vector<Place> tied;  // names that a shard's own metadata ties, and the index need not have
  for (size_t shard = 0; shard < shards_.size(); ++shard) {
    const absl::Span<const StoredTensor> tensors = shards_[shard]->tensors();
    for (size_t i = 0; i < tensors.size(); ++i) {
      const auto entry = entries.find(tensors[i].name);
      if (entry == entries.end() && !tensors[i].alias_of.empty()) {
        tied.push_back({shard, i});
        continue;
      }
      if (entry == entries.end()) {
        return Corrupt(absl::StrCat("the shard ", ShowName(index.shards[shard]), " has the tensor ",
                                    ShowName(tensors[i].name), ", which the index does not have"));
      }
      const size_t mapped = index.entries[entry->second].shard;
      if (mapped != shard) {
        return Corrupt(absl::StrCat("the shard ", ShowName(index.shards[shard]), " has the tensor ",
                                    ShowName(tensors[i].name), ", but the index has it in ",
                                    ShowName(index.shards[mapped])));
      }
      found[entry->second] = {shard, i};
    }
  }
  tensors_.reserve(found.size() + tied.size());
  places_.reserve(found.size() + tied.size());
  for (size_t i = 0; i < found.size(); ++i) {
    if (found[i].index == kMissing) {
      const ShardedIndex::Entry& entry = index.entries[i];
      return Corrupt(absl::StrCat("the index has the tensor ", ShowName(entry.name),
                                  " in the shard ", ShowName(index.shards[entry.shard]),
                                  ", which does not have it"));
    }
    places_.push_back(found[i]);
  }
  for (const Place& place : tied) {
    const StoredTensor& tensor = shards_[place.shard]->tensors()[place.index];
    if (!entries.emplace(tensor.name, entries.size()).second) {
      return Corrupt(absl::StrCat("two shards have the tied name ", ShowName(tensor.name)));
    }
    places_.push_back(place);
  }
  for (const Place& place : places_) {
    tensors_.push_back(shards_[place.shard]->tensors()[place.index]);
  }
  return absl::OkStatus();
}

void ShardedReader::AddAliases() {
  const AliasRecords aliases = FindAliasRecords(metadata_, tensors_);
  for (const auto& [owner, names] : aliases) {
    for (const std::string& name : names) {
      StoredTensor alias = tensors_[owner];
      // Of a name that is tied itself: its owner's.
      if (alias.alias_of.empty()) alias.alias_of = alias.name;
      alias.name = name;
      tensors_.push_back(std::move(alias));
      places_.push_back(places_[owner]);
    }
  }
}

absl::Status ShardedReader::ReadGated(size_t index, absl::Span<uint8_t> out, Gate gate) const {
  MS_RETURN_IF_ERROR(CheckReadArguments(index, out));
  const Place& place = places_[index];
  return InShard(place, shards_[place.shard]->ReadGated(place.index, out, gate));
}

absl::Status ShardedReader::ReadInto(size_t index, PlaceBytes to, Gate gate) const {
  const Place& place = places_[index];
  return InShard(place, shards_[place.shard]->ReadInto(place.index, to, gate));
}

absl::Status ShardedReader::InShard(const Place& place, absl::Status read) const {
  if (read.ok()) return read;
  return Annotate(read, absl::StrCat("shard ", ShowName(names_[place.shard])));
}

}  // namespace modelstate
