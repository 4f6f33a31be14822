#include "common/format/checkpoint_reader.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "common/base/status.h"
#include "common/format/known_formats.h"
#include "common/format/safetensors_reader.h"
#include "common/format/sharded_index.h"
#include "common/format/sharded_reader.h"
#include "common/format/text.h"
#include "common/format/torch_legacy_reader.h"
#include "common/format/torch_zip_reader.h"

namespace modelstate {
const char* CheckpointFormatName(CheckpointFormat format) {
  switch (format) {
    case CheckpointFormat::kSafetensors:
      return "safetensors";
    case CheckpointFormat::kTorchZip:
      return "torch zip";
    case CheckpointFormat::kTorchLegacy:
      return "torch legacy";
    case CheckpointFormat::kSafetensorsIndex:
      return "sharded safetensors";
    case CheckpointFormat::kTorchIndex:
      return "sharded torch";
  }
  return "checkpoint";
}

bool IsTorchFormat(CheckpointFormat format) {
  return format == CheckpointFormat::kTorchZip || format == CheckpointFormat::kTorchLegacy ||
         format == CheckpointFormat::kTorchIndex;
}

absl::Status CheckpointReader::CheckReadArguments(size_t index, absl::Span<uint8_t> out) const {
  if (index >= tensors_.size()) {
    return MakeError(Reason::kInvalidField, absl::StrCat("there is no tensor ", index,
                                                         "; the file "
                                                         "has ",
                                                         tensors_.size()));
  }
  if (out.size() != tensors_[index].nbytes()) {
    return MakeError(
        Reason::kInvalidField,
        absl::StrCat("tensor ", ShowName(tensors_[index].name), " has ", tensors_[index].nbytes(),
                     " bytes, and the place for it has ", out.size()));
  }
  return absl::OkStatus();
}

absl::Status CheckpointReader::ReadPieces(const File& file, uint64_t offset, uint64_t bytes,
                                          PlaceBytes place, ReadPass& pass,
                                          absl::FunctionRef<void(absl::Span<const uint8_t>)> take) {
  uint64_t done = 0;
  do {
    MS_RETURN_IF_ERROR(pass.GoOn());
    absl::Span<uint8_t> piece;
    if (bytes > 0) {
      MS_ASSIGN_OR_RETURN(piece, place(done, std::min(kPieceBytes, bytes - done)));
    }
    MS_RETURN_IF_ERROR(pass.ReadAt(file, offset + done, piece, offset + bytes));
    take(piece);
    done += piece.size();
  } while (done < bytes);
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<uint8_t[]>> CheckpointReader::ReadWhole(size_t index,
                                                                       ReadPass& pass) const {
  if (index >= tensors_.size()) return CheckReadArguments(index, {});
  const uint64_t nbytes = tensors_[index].nbytes();
  // A small sparse file may ask for any amount.
  std::unique_ptr<uint8_t[]> bytes(new (std::nothrow) uint8_t[nbytes]);
  if (bytes == nullptr) {
    return absl::ResourceExhaustedError(
        absl::StrCat("tensor ", ShowName(tensors_[index].name), " takes ", nbytes,
                     " bytes in memory at once, and there are not so many: use a machine with more "
                     "memory, or a file without that tensor"));
  }
  MS_RETURN_IF_ERROR(ReadWith(index, absl::MakeSpan(bytes.get(), nbytes), pass));
  return bytes;
}

absl::Status CheckpointReader::ReadInto(size_t index, PlaceBytes place, ReadPass& pass) const {
  if (index >= tensors_.size()) return CheckReadArguments(index, {});
  const uint64_t nbytes = tensors_[index].nbytes();
  absl::Span<uint8_t> to;
  if (nbytes > 0) {
    MS_ASSIGN_OR_RETURN(to, place(0, nbytes));
  }
  if (to.size() == nbytes) return ReadWith(index, to, pass);
  MS_ASSIGN_OR_RETURN(const std::unique_ptr<uint8_t[]> bytes, ReadWhole(index, pass));
  for (uint64_t done = 0;;) {
    std::memcpy(to.data(), bytes.get() + done, to.size());
    done += to.size();
    if (done == nbytes) return absl::OkStatus();
    MS_ASSIGN_OR_RETURN(to, place(done, nbytes - done));
  }
}

absl::Status CheckpointReader::ReadStream(size_t index, TakeBytes take, ReadPass& pass,
                                          uint64_t piece_bytes) const {
  if (index >= tensors_.size()) return CheckReadArguments(index, {});
  std::vector<uint8_t> piece(std::min(piece_bytes, tensors_[index].nbytes()));
  absl::Span<uint8_t> filled;
  const auto place = [&](uint64_t, uint64_t max) -> absl::StatusOr<absl::Span<uint8_t>> {
    if (!filled.empty()) MS_RETURN_IF_ERROR(take(filled));
    filled = absl::MakeSpan(piece).first(std::min<uint64_t>(max, piece.size()));
    return filled;
  };
  MS_RETURN_IF_ERROR(ReadInto(index, place, pass));
  return filled.empty() ? absl::OkStatus() : take(filled);
}

absl::Status CheckpointReader::Verify(size_t index, ReadPass& pass) const {
  const auto nothing = [](absl::Span<const uint8_t>) { return absl::OkStatus(); };
  return ReadStream(index, nothing, pass);
}

namespace {

absl::StatusOr<std::unique_ptr<CheckpointReader>> OpenByContent(File file, absl::string_view head,
                                                                const OpenOptions& options) {
  if (LooksLikeShardedIndex(head)) return ShardedReader::Open(file, options);
  const bool legacy = TorchLegacyReader::Matches(head);
  const bool safetensors = head.size() > 8 && head[8] == '{';
  if (!legacy && !safetensors) MS_RETURN_IF_ERROR(RefuseKnownFormat(file.name(), head));
  if (legacy || TorchZipReader::Matches(head)) {
    const auto extract = [&options](const PickleTree& tree) {
      return ExtractStateDict(tree, options.state_dict_key);
    };
    return TorchTensorReader::Open(std::move(file), extract);
  }
  if (!options.state_dict_key.empty()) {
    return Unsupported(absl::StrCat("state_dict_key ", ShowName(options.state_dict_key),
                                    " is for nested PyTorch files; a safetensors file is one "
                                    "state_dict: leave the key out"));
  }
  auto reader = SafetensorsReader::Open(std::move(file), options.allow_opaque);
  if (reader.ok()) return reader;
  if (safetensors) return reader.status();
  return Annotate(reader.status(), "the file is neither safetensors nor of torch.save");
}

}  // namespace

absl::StatusOr<std::unique_ptr<CheckpointReader>> OpenCheckpoint(File file,
                                                                 const OpenOptions& options) {
  const std::string name = file.name();
  MS_ASSIGN_OR_RETURN(const std::string head, ReadHead(file));
  absl::StatusOr<std::unique_ptr<CheckpointReader>> reader =
      OpenByContent(std::move(file), head, options);
  if (!reader.ok()) return Annotate(reader.status(), ShowName(name));
  return reader;
}

}  // namespace modelstate
