#include "common/format/torch_zip_reader.h"

#include <cstdint>
#include <string>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/format/pickle.h"
#include "common/format/text.h"
#include "common/format/zip_directory.h"

namespace modelstate {
namespace {

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
      "of torch.save or a .safetensors file");
}

}  // namespace

bool TorchZipReader::Matches(absl::string_view head) {
  return absl::StartsWith(head, "PK\x03\x04") || absl::StartsWith(head, "PK\x05\x06") ||
         absl::StartsWith(head, "PK\x06\x06");
}

absl::StatusOr<std::unique_ptr<TorchTensorReader>> TorchZipReader::Open(File file,
                                                                        Extract extract) {
  MS_ASSIGN_OR_RETURN(const ZipDirectory directory, ZipDirectory::Open(file));
  MS_RETURN_IF_ERROR(CheckIsStateDictArchive(directory));
  std::unique_ptr<TorchZipReader> reader(new TorchZipReader(std::move(file)));

  MS_ASSIGN_OR_RETURN(std::string version, ReadText(reader->file(), directory, "version", 64));
  int number = 0;
  if (!absl::SimpleAtoi(version, &number) || number < 1 || number > kMaxTorchVersion) {
    return Unsupported(absl::StrCat("the archive has the format version ", ShowName(version),
                                    "; 1 to ", kMaxTorchVersion, " are supported"));
  }
  MS_ASSIGN_OR_RETURN(const std::string order,
                      ReadText(reader->file(), directory, "byteorder", 64));
  if (order != "" && order != "little" && order != "big") {
    return Corrupt(
        absl::StrCat("the byteorder record says ", ShowName(order), "; it must say little or big"));
  }
  reader->set_big_endian(order == "big");

  MS_ASSIGN_OR_RETURN(std::string pickle,
                      ReadText(reader->file(), directory, "data.pkl", PickleTree::kMaxBytes));
  MS_ASSIGN_OR_RETURN(const PickleTree tree, PickleTree::Parse(std::move(pickle)));
  MS_ASSIGN_OR_RETURN(TorchStateDict state_dict, extract(tree));
  MS_RETURN_IF_ERROR(reader->SetStateDict(
      std::move(state_dict), [&](const TorchTensor& torch) -> absl::StatusOr<StoragePlace> {
        const std::string& key = torch.view.storage_key;
        const ZipRecord* record = directory.Find(absl::StrCat("data/", key));
        if (record == nullptr) {
          return Corrupt(absl::StrCat("tensor ", ShowName(torch.tensor.name),
                                      ": the archive has no record data/", ShowName(key)));
        }
        StoragePlace place{absl::StrCat("record ", ShowName(record->name)), record->offset,
                           record->size, std::nullopt};
        if (directory.has_crc()) place.crc32 = record->crc32;
        return place;
      }));
  return std::unique_ptr<TorchTensorReader>(std::move(reader));
}

}  // namespace modelstate
