#include "common/format/torch_zip_reader.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "common/base/status.h"
#include "common/format/pickle.h"
#include "common/format/strided_copy.h"
#include "common/format/text.h"

namespace modelstate {
namespace {

constexpr uint64_t kCheckChunkBytes = uint64_t{1} << 20;
// A view is read as its own span where that is at most this many times its bytes, so that reading
// every view of a file stays linear in what is read out; else the whole storage is, once.
constexpr uint64_t kSpanFactor = 4;

constexpr int kMaxTorchVersion = 10;  // of the zip format; PyTorch's own limit

// The text of a small record; empty when there is none.
absl::StatusOr<std::string> ReadText(const File& file, const ZipDirectory& directory,
                                     absl::string_view name, uint64_t limit) {
  const ZipRecord* record = directory.Find(name);
  if (record == nullptr) return std::string();
  if (record->size > limit) {
    return Unsupported(absl::StrCat("the record ", name, " has ", record->size,
                                    " bytes, over the limit of ", limit));
  }
  std::string text(record->size, '\0');
  const absl::Span<uint8_t> bytes(reinterpret_cast<uint8_t*>(text.data()), text.size());
  MS_RETURN_IF_ERROR(file.ReadAt(record->offset, bytes));
  if (directory.has_crc() && UpdateCrc32(0, bytes) != record->crc32) {
    return Corrupt(absl::StrCat("the record ", name,
                                " has another CRC than the archive says; use "
                                "another copy of the file"));
  }
  return text;
}

absl::Status CheckIsStateDictArchive(const ZipDirectory& directory) {
  if (directory.Find("constants.pkl") != nullptr) {
    return Unsupported(
        "the file is a TorchScript archive; load it with torch.jit.load and save its "
        "state_dict with torch.save");
  }
  if (directory.Find("data.pkl") != nullptr) return absl::OkStatus();
  return Unsupported(
      "the zip archive has no data.pkl, so torch.save did not write it; give a .pt or .pth file "
      "of torch.save or a .safetensors file (an .npz is not supported yet)");
}

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

absl::StatusOr<std::unique_ptr<TorchZipReader>> TorchZipReader::Open(File file,
                                                                     const OpenOptions& options) {
  return Open(std::move(file), [&options](const PickleTree& tree) {
    return ExtractStateDict(tree, options.state_dict_key);
  });
}

absl::StatusOr<std::unique_ptr<TorchZipReader>> TorchZipReader::Open(File file, Extract extract) {
  MS_ASSIGN_OR_RETURN(const ZipDirectory directory, ZipDirectory::Open(file));
  MS_RETURN_IF_ERROR(CheckIsStateDictArchive(directory));
  std::unique_ptr<TorchZipReader> reader(new TorchZipReader(std::move(file)));
  reader->has_crc_ = directory.has_crc();

  MS_ASSIGN_OR_RETURN(std::string version, ReadText(reader->file_, directory, "version", 64));
  int number = 0;
  if (!absl::SimpleAtoi(version, &number) || number < 1 || number > kMaxTorchVersion) {
    return Unsupported(absl::StrCat("the archive has the format version ", ShowName(version),
                                    "; 1 to ", kMaxTorchVersion, " are supported"));
  }
  MS_ASSIGN_OR_RETURN(const std::string order, ReadText(reader->file_, directory, "byteorder", 64));
  if (order != "" && order != "little" && order != "big") {
    return Corrupt(
        absl::StrCat("the byteorder record says ", ShowName(order), "; it must say little or big"));
  }
  reader->big_endian_ = order == "big";

  MS_ASSIGN_OR_RETURN(std::string pickle,
                      ReadText(reader->file_, directory, "data.pkl", uint64_t{256} << 20));
  MS_ASSIGN_OR_RETURN(const PickleTree tree, PickleTree::Parse(std::move(pickle)));
  MS_ASSIGN_OR_RETURN(TorchStateDict state_dict, extract(tree));
  reader->module_versions_ = std::move(state_dict.module_versions);
  MS_RETURN_IF_ERROR(reader->AddTensors(std::move(state_dict.tensors), directory));
  return reader;
}

absl::Status TorchZipReader::AddTensors(std::vector<TorchTensor> tensors,
                                        const ZipDirectory& directory) {
  absl::flat_hash_map<std::string, size_t> places;
  for (TorchTensor& torch : tensors) {
    const std::string& key = torch.view.storage_key;
    const auto [place, is_new] = places.emplace(key, storages_.size());
    if (is_new) {
      const ZipRecord* record = directory.Find(absl::StrCat("data/", key));
      if (record == nullptr) {
        return Corrupt(absl::StrCat("tensor ", ShowName(torch.tensor.name),
                                    ": the archive has no record data/", ShowName(key)));
      }
      storages_.push_back(std::make_unique<Storage>());
      storages_.back()->record = *record;
    }
    const ZipRecord& record = storages_[place->second]->record;
    if (record.size != torch.view.storage_bytes) {
      return Corrupt(absl::StrCat("tensor ", ShowName(torch.tensor.name), ": its storage has ",
                                  torch.view.storage_bytes, " bytes by the pickle, but the record ",
                                  ShowName(record.name), " has ", record.size));
    }
    storage_of_.push_back(place->second);
    views_.push_back(std::move(torch.view));
    tensors_.push_back(std::move(torch.tensor));
  }
  return absl::OkStatus();
}

absl::Status TorchZipReader::ReadGated(size_t index, absl::Span<uint8_t> out, Gate gate) const {
  MS_RETURN_IF_ERROR(CheckReadArguments(index, out));
  if (out.empty()) return absl::OkStatus();
  const StoredTensor& tensor = tensors_[index];
  const TensorView& view = views_[index];
  const size_t width = DTypeSize(tensor.dtype);
  absl::Status read;
  if (IsContiguous(tensor.shape, view)) {
    read = ReadContiguous(*storages_[storage_of_[index]], view.offset * width, out, gate);
  } else {
    uint64_t span = 1;
    for (size_t i = 0; i < tensor.shape.rank(); ++i) {
      span += static_cast<uint64_t>(tensor.shape.dims()[i] - 1) * view.strides[i];
    }
    read = ReadStrided(index, span, out, gate);
  }
  if (!read.ok()) return Annotate(read, absl::StrCat("tensor ", ShowName(tensor.name)));

  const bool complex = tensor.dtype == DType::kC64;
  const size_t part = complex ? width / 2 : width;
  if (big_endian_ && part > 1) SwapBytes(part, out);
  if (view.conjugate) FlipSigns(part, 1, 2, out);
  if (view.negate) FlipSigns(part, 0, 1, out);
  return absl::OkStatus();
}

absl::Status TorchZipReader::ReadContiguous(const Storage& storage, uint64_t offset,
                                            absl::Span<uint8_t> out, Gate gate) const {
  if (out.size() == storage.record.size) {
    MS_RETURN_IF_ERROR(ReadPieces(file_, storage.record.offset, out, gate));
    return has_crc_ ? CompareCrc(storage, UpdateCrc32(0, out)) : absl::OkStatus();
  }
  MS_RETURN_IF_ERROR(CheckRecord(storage, gate));
  return ReadPieces(file_, storage.record.offset + offset, out, gate);
}

absl::Status TorchZipReader::ReadStrided(size_t index, uint64_t span_elements,
                                         absl::Span<uint8_t> out, Gate gate) const {
  const StoredTensor& tensor = tensors_[index];
  const TensorView& view = views_[index];
  const size_t width = DTypeSize(tensor.dtype);
  const Storage& storage = *storages_[storage_of_[index]];
  const uint64_t span_bytes = span_elements * width;
  if (span_bytes / kSpanFactor <= out.size()) {
    std::vector<uint8_t> source(span_bytes);
    MS_RETURN_IF_ERROR(ReadContiguous(storage, view.offset * width, absl::MakeSpan(source), gate));
    StridedCopy(tensor.shape, view.strides, width, source.data(), out.data());
    return absl::OkStatus();
  }
  MS_ASSIGN_OR_RETURN(const Bytes bytes, WholeStorage(storage_of_[index], gate));
  StridedCopy(tensor.shape, view.strides, width, bytes->data() + view.offset * width, out.data());
  return absl::OkStatus();
}

absl::Status TorchZipReader::CheckRecord(const Storage& storage, Gate gate) const {
  if (!has_crc_) return absl::OkStatus();
  absl::MutexLock lock(&storage.mutex);
  if (storage.checked) return storage.result;
  const ZipRecord& record = storage.record;
  std::vector<uint8_t> chunk(std::min(record.size, kCheckChunkBytes));
  uint32_t crc = 0;
  for (uint64_t at = 0; at < record.size; at += chunk.size()) {
    const absl::Span<uint8_t> part =
        absl::MakeSpan(chunk).first(std::min<uint64_t>(chunk.size(), record.size - at));
    // A failed read is not remembered: the next one may succeed.
    if (at % kPieceBytes == 0) MS_RETURN_IF_ERROR(gate());
    MS_RETURN_IF_ERROR(file_.ReadAt(record.offset + at, part));
    crc = UpdateCrc32(crc, part);
  }
  storage.result = CompareCrc(storage, crc);
  storage.checked = true;
  return storage.result;
}

absl::Status TorchZipReader::CompareCrc(const Storage& storage, uint32_t crc) const {
  if (crc == storage.record.crc32) return absl::OkStatus();
  return Corrupt(absl::StrCat("the record ", ShowName(storage.record.name), " has the CRC ",
                              absl::Hex(crc, absl::kZeroPad8), ", but the archive says ",
                              absl::Hex(storage.record.crc32, absl::kZeroPad8),
                              ": its bytes changed; use another copy of the file"));
}

absl::StatusOr<TorchZipReader::Bytes> TorchZipReader::WholeStorage(size_t index, Gate gate) const {
  absl::MutexLock lock(&cache_mutex_);
  if (cached_bytes_ != nullptr && cached_storage_ == index) return cached_bytes_;
  cached_bytes_ = nullptr;
  const Storage& storage = *storages_[index];
  auto bytes = std::make_shared<std::vector<uint8_t>>(storage.record.size);
  MS_RETURN_IF_ERROR(ReadContiguous(storage, 0, absl::MakeSpan(*bytes), gate));
  cached_storage_ = index;
  cached_bytes_ = std::move(bytes);
  return cached_bytes_;
}

}  // namespace modelstate
