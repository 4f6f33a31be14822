#include "common/format/safetensors_reader.h"

#include <optional>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/digest.h"
#include "common/base/status.h"
#include "common/format/json_view.h"
#include "common/format/safetensors_header.h"
#include "common/format/safetensors_writer.h"
#include "common/format/text.h"

namespace modelstate {
namespace {

// The last member of the name, as in Python; null where there is none.
JsonView Member(const JsonView& object, absl::string_view name) {
  JsonView found;
  if (!object.is_object()) return found;
  for (const auto& [key, value] : object) {
    if (key.String() == name) found = value;
  }
  return found;
}

absl::Status BadMetadata(absl::string_view key) {
  return Corrupt(absl::StrCat("__metadata__[", ShowName(key),
                              "] is not as this project writes it; remove the key to load the "
                              "tensors without what it says"));
}

}  // namespace

absl::StatusOr<std::unique_ptr<SafetensorsReader>> SafetensorsReader::Open(File file,
                                                                           bool allow_opaque) {
  MS_ASSIGN_OR_RETURN(const uint64_t size, file.Size());
  if (size < 8) {
    return Corrupt(absl::StrCat("a safetensors file has at least 8 bytes, this one has ", size,
                                ": it is truncated"));
  }
  uint8_t prefix[8];
  MS_RETURN_IF_ERROR(file.ReadAt(0, absl::MakeSpan(prefix)));
  uint64_t header_bytes = 0;
  for (int i = 7; i >= 0; --i) header_bytes = header_bytes << 8 | prefix[i];
  if (header_bytes > kMaxSafetensorsHeaderBytes) {
    return Corrupt(absl::StrCat("the safetensors header says that it has ", header_bytes,
                                " bytes; the format allows ", kMaxSafetensorsHeaderBytes));
  }
  if (header_bytes > size - 8) {
    return Corrupt(absl::StrCat("the safetensors header says that it has ", header_bytes,
                                " bytes, but the file has only ", size - 8,
                                " after its length: it is truncated"));
  }
  const uint64_t data_begin = 8 + header_bytes;
  SafetensorsIndex index;
  {
    std::string json(header_bytes, '\0');
    MS_RETURN_IF_ERROR(
        file.ReadAt(8, absl::MakeSpan(reinterpret_cast<uint8_t*>(json.data()), json.size())));
    MS_ASSIGN_OR_RETURN(index, ParseSafetensorsHeader(json, size - data_begin, allow_opaque));
  }

  std::unique_ptr<SafetensorsReader> reader(new SafetensorsReader(std::move(file)));
  reader->metadata_ = std::move(index.metadata);
  reader->tensors_ = std::move(index.tensors);
  reader->offsets_ = std::move(index.begins);
  for (uint64_t& offset : reader->offsets_) offset += data_begin;
  // Kinds and digests are recorded for owners and aliases alike, so aliases come first.
  reader->AddAliases();
  MS_RETURN_IF_ERROR(reader->ApplyKinds());
  MS_RETURN_IF_ERROR(reader->ApplyDigests());
  return reader;
}

void SafetensorsReader::AddAliases() {
  const AliasRecords aliases = FindAliasRecords(metadata_, tensors_);
  if (aliases.empty()) return;
  std::vector<StoredTensor> tensors;
  std::vector<uint64_t> offsets;
  for (size_t i = 0; i < tensors_.size(); ++i) {
    tensors.push_back(std::move(tensors_[i]));
    offsets.push_back(offsets_[i]);
    const auto followers = aliases.find(i);
    if (followers == aliases.end()) continue;
    StoredTensor alias = tensors.back();
    alias.alias_of = alias.name;
    for (const std::string& name : followers->second) {
      alias.name = name;
      tensors.push_back(alias);
      offsets.push_back(offsets_[i]);
    }
  }
  tensors_ = std::move(tensors);
  offsets_ = std::move(offsets);
}

absl::Status SafetensorsReader::ApplyKinds() {
  const auto text = metadata_.find(kKindsMetadataKey);
  if (text == metadata_.end()) return absl::OkStatus();
  const auto bad = [] { return BadMetadata(kKindsMetadataKey); };
  const absl::StatusOr<JsonView> json = JsonView::Parse(text->second);
  if (!json.ok()) return bad();
  for (StoredTensor& tensor : tensors_) {
    tensor.kind = TensorKind::kParameter;
    tensor.requires_grad = true;
  }
  const auto by_name = TensorsByName();
  for (const char* list : {"buffers", "frozen"}) {
    const JsonView names = Member(*json, list);
    if (!names.is_array()) return bad();
    for (const auto& [unused, item] : names) {
      const std::optional<std::string> name = item.String();
      if (!name) return bad();
      const auto it = by_name.find(*name);
      // A tensor that somebody removed from the file is no reason to refuse the others.
      if (it == by_name.end()) continue;
      StoredTensor& tensor = *it->second;
      if (absl::string_view(list) == "buffers") {
        tensor.kind = TensorKind::kBuffer;
        tensor.requires_grad.reset();
      } else if (tensor.kind == TensorKind::kParameter) {
        tensor.requires_grad = false;
      }
    }
  }
  return absl::OkStatus();
}

absl::Status SafetensorsReader::ApplyDigests() {
  const auto text = metadata_.find(kDigestsMetadataKey);
  if (text == metadata_.end()) return absl::OkStatus();
  const auto bad = [] { return BadMetadata(kDigestsMetadataKey); };
  const absl::StatusOr<JsonView> json = JsonView::Parse(text->second);
  if (!json.ok() || !json->is_object()) return bad();
  const auto by_name = TensorsByName();
  for (const auto& [key, value] : *json) {
    const auto it = by_name.find(key.String().value_or(""));
    if (it == by_name.end()) continue;
    const std::optional<std::string> hex = value.String();
    if (!hex) return bad();
    it->second->xxh3 = DigestFromHex(*hex);
    if (!it->second->xxh3) return bad();
  }
  for (StoredTensor& tensor : tensors_) {
    if (!tensor.alias_of.empty()) tensor.xxh3 = by_name.at(tensor.alias_of)->xxh3;
  }
  return absl::OkStatus();
}

absl::flat_hash_map<absl::string_view, StoredTensor*> SafetensorsReader::TensorsByName() {
  absl::flat_hash_map<absl::string_view, StoredTensor*> by_name;
  by_name.reserve(tensors_.size());
  for (StoredTensor& tensor : tensors_) by_name.emplace(tensor.name, &tensor);
  return by_name;
}

absl::Status SafetensorsReader::ReadWith(size_t index, absl::Span<uint8_t> out,
                                         ReadPass& pass) const {
  MS_RETURN_IF_ERROR(CheckReadArguments(index, out));
  return ReadInto(
      index, [out](uint64_t offset, uint64_t max) { return out.subspan(offset, max); }, pass);
}

std::optional<CheckpointReader::Extent> SafetensorsReader::StoredAt(size_t index) const {
  return Extent{&file_, offsets_[index], offsets_[index] + tensors_[index].nbytes()};
}

absl::Status SafetensorsReader::ReadInto(size_t index, PlaceBytes place, ReadPass& pass) const {
  const StoredTensor& tensor = tensors_[index];
  Xxh3Stream hash;
  const absl::Status read = ReadPieces(file_, offsets_[index], tensor.nbytes(), place, pass,
                                       [&](absl::Span<const uint8_t> piece) {
                                         if (tensor.xxh3) hash.Update(piece);
                                       });
  if (!read.ok()) return Annotate(read, absl::StrCat("tensor ", ShowName(tensor.name)));
  if (tensor.xxh3) {
    const uint64_t digest = hash.Digest();
    if (digest != *tensor.xxh3) {
      return MakeError(
          Reason::kDigestMismatch,
          absl::StrCat("tensor ", ShowName(tensor.name), " has the XXH3 ", DigestToHex(digest),
                       ", but the file records ", DigestToHex(*tensor.xxh3),
                       ": its bytes changed after they were written; use another "
                       "copy of the file"),
          {{"tensor", tensor.name}});
    }
  }
  return absl::OkStatus();
}

}  // namespace modelstate
