#include "server/checkpoint/tensor_file.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "common/base/bytes.h"
#include "common/base/digest.h"
#include "common/base/direct_writer.h"
#include "common/base/status.h"
#include "common/format/safetensors_writer.h"
#include "server/state/storage_blocks.h"

namespace modelstate {
namespace {

// What is digested and then copied while it is in the cache.
constexpr uint64_t kPieceBytes = uint64_t{256} << 10;

// The header with the digests that the storages have; with any in the place of those that they do
// not have yet, which is as long.
absl::StatusOr<std::string> Header(const TensorFile& content) {
  std::vector<uint64_t> digests;
  digests.reserve(content.storages.size());
  for (const StorageRef& storage : content.storages) {
    digests.push_back(storage->CachedDigest().value_or(0));
  }
  std::map<std::string, std::string> metadata = content.metadata;
  metadata[kDigestsMetadataKey] = DigestsMetadata(content.specs, digests);
  return SafetensorsHeader(content.specs, *content.layout, metadata, {}, DirectWriter::kAlignment);
}

}  // namespace

absl::StatusOr<Manifest::FileEntry> WriteTensorFile(const RootDirectory& root,
                                                    const std::string& path, TensorFile content,
                                                    ProgressMeter& meter,
                                                    const JobControl& control) {
  MS_ASSIGN_OR_RETURN(const std::string draft, Header(content));
  const uint64_t size = draft.size() + content.layout->total_bytes();
  // Offset order has no gaps, so appending in it makes the layout's data region.
  std::vector<const TensorStorage*> storages;
  std::vector<bool> known;
  for (const uint32_t index : content.layout->by_offset()) {
    storages.push_back(content.storages[index].get());
    known.push_back(storages.back()->CachedDigest().has_value());
  }
  MS_ASSIGN_OR_RETURN(File file, root.CreateFile(path));
  MS_ASSIGN_OR_RETURN(const std::unique_ptr<DirectWriter> writer,
                      DirectWriter::Start(std::move(file), draft.size(), size));
  StorageDigester digester;
  const auto append = [&](BlockPart part, absl::Span<const uint8_t> bytes) -> absl::Status {
    do {
      part.bytes = std::min<uint64_t>(kPieceBytes, bytes.size());
      const absl::Span<const uint8_t> piece = bytes.subspan(0, part.bytes);
      if (!known[part.storage]) digester.Take(*storages[part.storage], part, piece);
      MS_RETURN_IF_ERROR(writer->Append(piece));
      bytes.remove_prefix(part.bytes);
      part.begin += part.bytes;
    } while (!bytes.empty());
    return absl::OkStatus();
  };
  MS_RETURN_IF_ERROR(ReadBlocks(
      storages,
      [&](absl::Span<const BlockPart> parts, absl::Span<const uint8_t> bytes) -> absl::Status {
        MS_RETURN_IF_ERROR(control.CheckNotCancelled());
        meter.Add(bytes.size());
        for (const BlockPart& part : parts) {
          MS_RETURN_IF_ERROR(append(part, bytes.subspan(0, part.bytes)));
          bytes.remove_prefix(part.bytes);
        }
        return absl::OkStatus();
      }));
  MS_ASSIGN_OR_RETURN(const std::string header, Header(content));
  if (header.size() != draft.size() || writer->offset() != size) {
    return absl::InternalError("the storages of a checkpoint do not fit its layout");
  }
  MS_RETURN_IF_ERROR(writer->Finish(AsBytes(header)));
  return Manifest::FileEntry{path.substr(path.rfind('/') + 1), size, Xxh3(AsBytes(header))};
}

}  // namespace modelstate
