#include "client/files/transfer_record.h"

#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "common/base/status.h"

namespace modelstate::client {
namespace {

using Json = nlohmann::json;

constexpr int kFormat = 1;
constexpr uint64_t kMaxRecordBytes = uint64_t{16} << 20;

std::string Dump(const Json& json) {
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

absl::Status Corrupt(const std::string& path) {
  return MakeError(
      Reason::kCheckpointCorrupt,
      absl::StrCat("\"", path, "\" is not a record of a transfer; fetch without resuming"));
}

bool IsConsistent(const TransferRecord& record) {
  uint64_t end = 0;
  for (const ByteRange& range : record.done) {
    if (range.begin < end || range.begin >= range.end || range.end > record.total_bytes) {
      return false;
    }
    end = range.end;
  }
  return !record.snapshot_id.empty() || !record.own_pin;
}

}  // namespace

std::string SelectionKey(const Selection& selection, bool optimizer_state) {
  Json kinds = Json::array();
  for (TensorKind kind : selection.kinds) kinds.push_back(static_cast<int>(kind));
  const int dtype = selection.float_dtype ? static_cast<int>(*selection.float_dtype) : 0;
  return Dump(Json::array({selection.names, selection.prefixes, selection.globs, kinds, dtype,
                           selection.include_non_persistent, optimizer_state}));
}

void AddRange(const ByteRange& range, std::vector<ByteRange>* done) {
  std::vector<ByteRange> merged;
  ByteRange added = range;
  bool placed = false;
  for (const ByteRange& old : *done) {
    if (old.end < added.begin) {
      merged.push_back(old);
    } else if (old.begin > added.end) {
      if (!placed) merged.push_back(added);
      placed = true;
      merged.push_back(old);
    } else {
      added = {std::min(old.begin, added.begin), std::max(old.end, added.end)};
    }
  }
  if (!placed) merged.push_back(added);
  *done = std::move(merged);
}

std::vector<ByteRange> MissingRanges(const std::vector<ByteRange>& done, uint64_t total_bytes) {
  std::vector<ByteRange> missing;
  uint64_t pos = 0;
  for (const ByteRange& range : done) {
    if (range.begin > pos) missing.push_back({pos, range.begin});
    pos = range.end;
  }
  if (pos < total_bytes) missing.push_back({pos, total_bytes});
  return missing;
}

absl::Status WriteTransferRecord(const TransferRecord& record, const std::string& path) {
  Json done = Json::array();
  for (const ByteRange& range : record.done) done.push_back({range.begin, range.end});
  const std::string text = Dump({{"format", kFormat},
                                 {"module", record.module},
                                 {"selection", record.selection},
                                 {"snapshot_id", record.snapshot_id},
                                 {"own_pin", record.own_pin},
                                 {"incarnation", record.version.incarnation},
                                 {"version", record.version.number},
                                 {"layout_digest", record.layout_digest},
                                 {"header_bytes", record.header_bytes},
                                 {"total_bytes", record.total_bytes},
                                 {"done", done}});
  const std::string temporary = path + ".tmp";
  ::unlink(temporary.c_str());
  {
    MS_ASSIGN_OR_RETURN(const File file, CreateForWrite(temporary));
    MS_RETURN_IF_ERROR(file.WriteAt(
        0, absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(text.data()), text.size())));
  }
  if (std::rename(temporary.c_str(), path.c_str()) != 0) {
    return ErrnoError(errno, absl::StrCat("rename ", temporary));
  }
  return absl::OkStatus();
}

absl::StatusOr<TransferRecord> ReadTransferRecord(const std::string& path) {
  if (::access(path.c_str(), F_OK) != 0) {
    return absl::NotFoundError(absl::StrCat("there is no \"", path, "\""));
  }
  MS_ASSIGN_OR_RETURN(const File file, OpenForRead(path));
  MS_ASSIGN_OR_RETURN(const uint64_t size, file.Size());
  if (size > kMaxRecordBytes) return Corrupt(path);
  std::string text(size, '\0');
  MS_RETURN_IF_ERROR(
      file.ReadAt(0, absl::MakeSpan(reinterpret_cast<uint8_t*>(text.data()), text.size())));
  // Its own file, but a file: exceptions of the JSON library stop here.
  try {
    const Json json = Json::parse(text);
    if (json.at("format").get<int>() != kFormat) return Corrupt(path);
    TransferRecord record;
    record.module = json.at("module").get<std::string>();
    record.selection = json.at("selection").get<std::string>();
    record.snapshot_id = json.at("snapshot_id").get<std::string>();
    record.own_pin = json.value("own_pin", true);
    record.version = {json.at("incarnation").get<uint64_t>(), json.at("version").get<uint64_t>()};
    record.layout_digest = json.at("layout_digest").get<std::string>();
    record.header_bytes = json.at("header_bytes").get<uint64_t>();
    record.total_bytes = json.at("total_bytes").get<uint64_t>();
    for (const Json& range : json.at("done")) {
      record.done.push_back({range.at(0).get<uint64_t>(), range.at(1).get<uint64_t>()});
    }
    if (!IsConsistent(record)) return Corrupt(path);
    return record;
  } catch (const Json::exception&) {
    return Corrupt(path);
  }
}

}  // namespace modelstate::client
