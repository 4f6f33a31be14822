#include "common/format/torch_tensor_reader.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/format/known_formats.h"
#include "common/format/strided_copy.h"
#include "common/format/text.h"
#include "common/format/torch_legacy_reader.h"
#include "common/format/torch_zip_reader.h"
#include "common/format/zip_directory.h"

namespace modelstate {
namespace {

constexpr uint64_t kCheckChunkBytes = uint64_t{1} << 20;
// Of a storage no more is held in memory at once: larger ones are gathered from as they are read.
constexpr uint64_t kWholeBytes = uint64_t{4} << 20;
// A view is read as its own span where that is at most this many times its bytes, so that reading
// every view of a file stays linear in what is read out; else the whole storage is, once.
constexpr uint64_t kSpanFactor = 4;

void SwapBytes(size_t width, absl::Span<uint8_t> bytes) {
  for (size_t i = 0; i + width <= bytes.size(); i += width) {
    std::reverse(bytes.data() + i, bytes.data() + i + width);
  }
}

// Flips the sign bit of every `step`-th part of `width` little-endian bytes, from part `first` on.
void FlipSigns(size_t width, size_t first, size_t step, absl::Span<uint8_t> bytes) {
  for (size_t i = first * width; i + width <= bytes.size(); i += step * width) {
    bytes[i + width - 1] ^= 0x80;
  }
}

// All of `out`, in turn.
auto PlaceIn(absl::Span<uint8_t> out) {
  return [out](uint64_t offset, uint64_t max) { return out.subspan(offset, max); };
}

bool IsContiguous(const Shape& shape, const TensorView& view) {
  uint64_t expected = 1;
  for (size_t i = shape.rank(); i-- > 0;) {
    if (shape.dims()[i] <= 1) continue;
    if (view.strides[i] != expected) return false;
    expected *= static_cast<uint64_t>(shape.dims()[i]);
  }
  return true;
}

}  // namespace

absl::StatusOr<std::unique_ptr<TorchTensorReader>> TorchTensorReader::Open(File file,
                                                                           Extract extract) {
  MS_ASSIGN_OR_RETURN(const std::string head, ReadHead(file));
  if (TorchLegacyReader::Matches(head)) return TorchLegacyReader::Open(std::move(file), extract);
  if (TorchZipReader::Matches(head)) return TorchZipReader::Open(std::move(file), extract);
  return Unsupported("the file is no file of torch.save");
}

absl::Status TorchTensorReader::SetStateDict(TorchStateDict state_dict, FindStorage find) {
  module_versions_ = std::move(state_dict.module_versions);
  absl::flat_hash_map<std::string, size_t> places;
  for (TorchTensor& torch : state_dict.tensors) {
    const auto [place, is_new] = places.emplace(torch.view.storage_key, storages_.size());
    if (is_new) {
      storages_.push_back(std::make_unique<Storage>());
      MS_ASSIGN_OR_RETURN(storages_.back()->place, find(torch));
    }
    const StoragePlace& found = storages_[place->second]->place;
    if (found.size != torch.view.storage_bytes) {
      return Corrupt(absl::StrCat("tensor ", ShowName(torch.tensor.name), ": its storage has ",
                                  torch.view.storage_bytes, " bytes by the pickle, but the ",
                                  found.name, " has ", found.size));
    }
    torch.tensor.has_crc = found.crc32.has_value();
    storage_of_.push_back(place->second);
    views_.push_back(std::move(torch.view));
    tensors_.push_back(std::move(torch.tensor));
  }
  return absl::OkStatus();
}

absl::Status TorchTensorReader::ReadWith(size_t index, absl::Span<uint8_t> out,
                                         ReadPass& pass) const {
  MS_RETURN_IF_ERROR(CheckReadArguments(index, out));
  if (out.empty()) return absl::OkStatus();
  const StoredTensor& tensor = tensors_[index];
  const TensorView& view = views_[index];
  const size_t width = DTypeSize(tensor.dtype);
  absl::Status read;
  if (IsContiguous(tensor.shape, view)) {
    read = ReadContiguous(*storages_[storage_of_[index]], view.offset * width, out.size(),
                          PlaceIn(out), pass);
  } else {
    uint64_t span = 1;
    for (size_t i = 0; i < tensor.shape.rank(); ++i) {
      span += static_cast<uint64_t>(tensor.shape.dims()[i] - 1) * view.strides[i];
    }
    read = ReadStrided(index, span, out, pass);
  }
  if (!read.ok()) return Annotate(read, absl::StrCat("tensor ", ShowName(tensor.name)));

  const bool complex = tensor.dtype == DType::kC64;
  const size_t part = complex ? width / 2 : width;
  if (big_endian_ && part > 1) SwapBytes(part, out);
  if (view.conjugate) FlipSigns(part, 1, 2, out);
  if (view.negate) FlipSigns(part, 0, 1, out);
  return absl::OkStatus();
}

std::optional<CheckpointReader::Extent> TorchTensorReader::StoredAt(size_t index) const {
  const StoredTensor& tensor = tensors_[index];
  const TensorView& view = views_[index];
  if (tensor.nbytes() == 0 || big_endian_ || view.conjugate || view.negate ||
      !IsContiguous(tensor.shape, view)) {
    return std::nullopt;
  }
  const uint64_t begin =
      storages_[storage_of_[index]]->place.offset + view.offset * DTypeSize(tensor.dtype);
  return Extent{&file_, begin, begin + tensor.nbytes()};
}

absl::Status TorchTensorReader::ReadInto(size_t index, PlaceBytes place, ReadPass& pass) const {
  if (!StoredAt(index)) return CheckpointReader::ReadInto(index, place, pass);
  const StoredTensor& tensor = tensors_[index];
  const absl::Status read =
      ReadContiguous(*storages_[storage_of_[index]], views_[index].offset * DTypeSize(tensor.dtype),
                     tensor.nbytes(), place, pass);
  if (!read.ok()) return Annotate(read, absl::StrCat("tensor ", ShowName(tensor.name)));
  return absl::OkStatus();
}

absl::Status TorchTensorReader::Verify(size_t index, ReadPass& pass) const {
  if (index >= tensors_.size()) return CheckReadArguments(index, {});
  const absl::Status read = ReadStorage(*storages_[storage_of_[index]], pass);
  if (!read.ok()) return Annotate(read, absl::StrCat("tensor ", ShowName(tensors_[index].name)));
  return absl::OkStatus();
}

absl::Status TorchTensorReader::ReadContiguous(const Storage& storage, uint64_t offset,
                                               uint64_t bytes, PlaceBytes place,
                                               ReadPass& pass) const {
  if (bytes == storage.place.size) {
    const bool check = storage.place.crc32.has_value();
    uint32_t crc = 0;
    MS_RETURN_IF_ERROR(ReadPieces(file_, storage.place.offset, bytes, place, pass,
                                  [&](absl::Span<const uint8_t> piece) {
                                    if (check) crc = UpdateCrc32(crc, piece);
                                  }));
    return check ? CompareCrc(storage.place, crc) : absl::OkStatus();
  }
  MS_RETURN_IF_ERROR(CheckStorage(storage, pass));
  return ReadPieces(file_, storage.place.offset + offset, bytes, place, pass);
}

absl::Status TorchTensorReader::ReadStrided(size_t index, uint64_t span_elements,
                                            absl::Span<uint8_t> out, ReadPass& pass) const {
  const StoredTensor& tensor = tensors_[index];
  const TensorView& view = views_[index];
  const size_t width = DTypeSize(tensor.dtype);
  const Storage& storage = *storages_[storage_of_[index]];
  const uint64_t span_bytes = span_elements * width;
  const uint64_t begin = view.offset * width;
  if (span_bytes <= kWholeBytes && span_bytes / kSpanFactor <= out.size()) {
    std::vector<uint8_t> source(span_bytes);
    MS_RETURN_IF_ERROR(
        ReadContiguous(storage, begin, span_bytes, PlaceIn(absl::MakeSpan(source)), pass));
    StridedCopy(tensor.shape, view.strides, width, source.data(), out.data());
    return absl::OkStatus();
  }
  if (storage.place.size <= kWholeBytes) {
    MS_ASSIGN_OR_RETURN(const Bytes bytes, WholeStorage(storage_of_[index], pass));
    StridedCopy(tensor.shape, view.strides, width, bytes->data() + begin, out.data());
    return absl::OkStatus();
  }
  MS_RETURN_IF_ERROR(CheckStorage(storage, pass));
  const auto read = [&](uint64_t offset, absl::Span<uint8_t> to) {
    MS_RETURN_IF_ERROR(pass.GoOn());
    const uint64_t at = storage.place.offset + begin + offset;
    return pass.ReadAt(file_, at, to, at + to.size());
  };
  return StridedGather(tensor.shape, view.strides, width, span_bytes, read, out);
}

absl::Status TorchTensorReader::CheckStorage(const Storage& storage, ReadPass& pass) const {
  return storage.place.crc32 ? ReadStorage(storage, pass) : absl::OkStatus();
}

absl::Status TorchTensorReader::ReadStorage(const Storage& storage, ReadPass& pass) const {
  const StoragePlace& place = storage.place;
  absl::MutexLock lock(&storage.mutex);
  if (storage.checked) return storage.result;
  std::vector<uint8_t> chunk(std::min(place.size, kCheckChunkBytes));
  uint32_t crc = 0;
  for (uint64_t at = 0; at < place.size; at += chunk.size()) {
    const absl::Span<uint8_t> part =
        absl::MakeSpan(chunk).first(std::min<uint64_t>(chunk.size(), place.size - at));
    // A failed read is not remembered: the next one may succeed.
    if (at % kPieceBytes == 0) MS_RETURN_IF_ERROR(pass.GoOn());
    MS_RETURN_IF_ERROR(pass.ReadAt(file_, place.offset + at, part, place.offset + place.size));
    if (place.crc32) crc = UpdateCrc32(crc, part);
  }
  storage.result = place.crc32 ? CompareCrc(place, crc) : absl::OkStatus();
  storage.checked = true;
  return storage.result;
}

absl::Status TorchTensorReader::CompareCrc(const StoragePlace& place, uint32_t crc) {
  if (crc == *place.crc32) return absl::OkStatus();
  return Corrupt(absl::StrCat("the ", place.name, " has the CRC ", absl::Hex(crc, absl::kZeroPad8),
                              ", but the archive says ", absl::Hex(*place.crc32, absl::kZeroPad8),
                              ": its bytes changed; use another copy of the file"));
}

absl::StatusOr<TorchTensorReader::Bytes> TorchTensorReader::WholeStorage(size_t index,
                                                                         ReadPass& pass) const {
  absl::MutexLock lock(&cache_mutex_);
  if (cached_bytes_ != nullptr && cached_storage_ == index) return cached_bytes_;
  cached_bytes_ = nullptr;
  const Storage& storage = *storages_[index];
  auto bytes = std::make_shared<std::vector<uint8_t>>(storage.place.size);
  MS_RETURN_IF_ERROR(
      ReadContiguous(storage, 0, bytes->size(), PlaceIn(absl::MakeSpan(*bytes)), pass));
  cached_storage_ = index;
  cached_bytes_ = std::move(bytes);
  return cached_bytes_;
}

}  // namespace modelstate
