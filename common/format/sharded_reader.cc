#include "common/format/sharded_reader.h"

#include <optional>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
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
  MS_ASSIGN_OR_RETURN(const StoredShardedIndex index, StoredShardedIndex::Read(file));
  std::unique_ptr<ShardedReader> reader(new ShardedReader());
  reader->names_ = index.shards();
  reader->metadata_ = index.metadata();
  MS_RETURN_IF_ERROR(reader->OpenShards(options));
  MS_RETURN_IF_ERROR(reader->TakeTensors(index));
  reader->AddAliases();
  return reader;
}

absl::Status ShardedReader::OpenShards(const OpenOptions& options) {
  OpenOptions of_shards = options;
  of_shards.open_sibling = nullptr;  // an index does not name indexes
  for (const std::string& name : names_) {
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

absl::Status ShardedReader::TakeTensors(const StoredShardedIndex& index) {
  struct Tensor {
    size_t index = 0;
    bool taken = false;
  };
  // What the shards hold, and not what the index says, decides how much memory this takes.
  std::vector<absl::flat_hash_map<absl::string_view, Tensor>> by_name(shards_.size());
  for (size_t shard = 0; shard < shards_.size(); ++shard) {
    const absl::Span<const StoredTensor> tensors = shards_[shard]->tensors();
    for (size_t i = 0; i < tensors.size(); ++i) by_name[shard].emplace(tensors[i].name, Tensor{i});
  }
  std::optional<ShardedIndex::Entry> missing;
  MS_RETURN_IF_ERROR(index.ForEachEntry([&](ShardedIndex::Entry entry) -> absl::Status {
    const auto found = by_name[entry.shard].find(entry.name);
    if (found == by_name[entry.shard].end()) {
      if (!missing) missing = std::move(entry);
      return absl::OkStatus();
    }
    if (std::exchange(found->second.taken, true)) {
      return Corrupt(
          absl::StrCat("the index is invalid: the tensor ", ShowName(entry.name), " occurs twice"));
    }
    places_.push_back({entry.shard, found->second.index});
    return absl::OkStatus();
  }));
  std::vector<Place> tied;  // names that a shard's own metadata ties, and the index need not have
  for (size_t shard = 0; shard < shards_.size(); ++shard) {
    const absl::Span<const StoredTensor> tensors = shards_[shard]->tensors();
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (by_name[shard].at(tensors[i].name).taken) continue;
      if (tensors[i].alias_of.empty()) return NotMapped(index, shard, tensors[i].name);
      tied.push_back({shard, i});
    }
  }
  if (missing) {
    return Corrupt(absl::StrCat("the index has the tensor ", ShowName(missing->name),
                                " in the shard ", ShowName(names_[missing->shard]),
                                ", which does not have it"));
  }
  return AddTensors(tied);
}

absl::Status ShardedReader::NotMapped(const StoredShardedIndex& index, size_t shard,
                                      const std::string& name) const {
  std::string elsewhere = "which the index does not have";
  MS_RETURN_IF_ERROR(index.ForEachEntry([&](ShardedIndex::Entry entry) {
    if (entry.name == name) {
      elsewhere = absl::StrCat("but the index has it in ", ShowName(names_[entry.shard]));
    }
    return absl::OkStatus();
  }));
  return Corrupt(absl::StrCat("the shard ", ShowName(names_[shard]), " has the tensor ",
                              ShowName(name), ", ", elsewhere));
}

absl::Status ShardedReader::AddTensors(const std::vector<Place>& tied) {
  const auto tensor = [this](const Place& place) -> const StoredTensor& {
    return shards_[place.shard]->tensors()[place.index];
  };
  absl::flat_hash_set<absl::string_view> names;
  if (!tied.empty()) {
    for (const Place& place : places_) names.insert(tensor(place).name);
  }
  for (const Place& place : tied) {
    if (!names.insert(tensor(place).name).second) {
      return Corrupt(absl::StrCat("two shards have the tied name ", ShowName(tensor(place).name)));
    }
    places_.push_back(place);
  }
  tensors_.reserve(places_.size());
  for (const Place& place : places_) tensors_.push_back(tensor(place));
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

absl::Status ShardedReader::ReadWith(size_t index, absl::Span<uint8_t> out, ReadPass& pass) const {
  MS_RETURN_IF_ERROR(CheckReadArguments(index, out));
  const Place& place = places_[index];
  return InShard(place, shards_[place.shard]->ReadWith(place.index, out, pass));
}

absl::Status ShardedReader::ReadInto(size_t index, PlaceBytes to, ReadPass& pass) const {
  const Place& place = places_[index];
  return InShard(place, shards_[place.shard]->ReadInto(place.index, to, pass));
}

absl::Status ShardedReader::Verify(size_t index, ReadPass& pass) const {
  const Place& place = places_[index];
  return InShard(place, shards_[place.shard]->Verify(place.index, pass));
}

std::optional<CheckpointReader::Extent> ShardedReader::StoredAt(size_t index) const {
  return shards_[places_[index].shard]->StoredAt(places_[index].index);
}

absl::Status ShardedReader::InShard(const Place& place, absl::Status read) const {
  if (read.ok()) return read;
  return Annotate(read, absl::StrCat("shard ", ShowName(names_[place.shard])));
}

}  // namespace modelstate
