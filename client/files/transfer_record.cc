#include "client/files/transfer_record.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/base/bytes.h"
#include "common/base/status.h"

namespace modelstate::client {
namespace {

using Json = nlohmann::json;

constexpr int kFormat = 2;
constexpr uint64_t kMaxRecordBytes = uint64_t{16} << 20;
constexpr size_t kMaxRanges = 10000;  // far more than any fetch leaves
// Lines that say what one range says are not kept for ever.
constexpr uint64_t kMaxAddedBytes = uint64_t{1} << 20;

std::string Dump(const Json& json) {
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

absl::Status Corrupt(const std::string& path) {
  return MakeError(
      Reason::kCheckpointCorrupt,
      absl::StrCat("\"", path, "\" is not a record of a transfer; fetch without resuming"));
}

std::string Line(const ByteRange& range) { return absl::StrCat(range.begin, " ", range.end, "\n"); }

bool ParseLine(absl::string_view line, ByteRange* range) {
  const std::pair<absl::string_view, absl::string_view> parts =
      absl::StrSplit(line, absl::MaxSplits(' ', 1));
  return absl::SimpleAtoi(parts.first, &range->begin) &&
         absl::SimpleAtoi(parts.second, &range->end) && range->begin < range->end;
}

// Of ranges in any order.
std::vector<ByteRange> Union(std::vector<ByteRange> ranges) {
  std::sort(ranges.begin(), ranges.end(),
            [](const ByteRange& a, const ByteRange& b) { return a.begin < b.begin; });
  std::vector<ByteRange> merged;
  for (const ByteRange& range : ranges) {
    if (!merged.empty() && range.begin <= merged.back().end) {
      merged.back().end = std::max(merged.back().end, range.end);
    } else {
      merged.push_back(range);
    }
  }
  return merged;
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

void RemoveRange(const ByteRange& range, std::vector<ByteRange>* done) {
  std::vector<ByteRange> left;
  for (const ByteRange& old : *done) {
    const ByteRange before{old.begin, std::min(old.end, range.begin)};
    const ByteRange after{std::max(old.begin, range.end), old.end};
    if (before.begin < before.end) left.push_back(before);
    if (after.begin < after.end) left.push_back(after);
  }
  *done = std::move(left);
}

std::vector<ByteRange> MissingRanges(const std::vector<ByteRange>& done, const ByteRange& part) {
  std::vector<ByteRange> missing = {part};
  if (part.begin == part.end) missing.clear();
  for (const ByteRange& range : done) RemoveRange(range, &missing);
  return missing;
}

absl::Status TransferJournal::Write(TransferRecord record) {
  record_ = std::move(record);
  return WriteAll();
}

absl::Status TransferJournal::WriteAll() {
  std::string text = Dump({{"format", kFormat},
                           {"module", record_.module},
                           {"selection", record_.selection},
                           {"snapshot_id", record_.snapshot_id},
                           {"own_pin", record_.own_pin},
                           {"incarnation", record_.version.incarnation},
                           {"version", record_.version.number},
                           {"layout_digest", record_.layout_digest},
                           {"header_bytes", record_.header_bytes},
                           {"total_bytes", record_.total_bytes}});
  text.push_back('\n');
  for (const ByteRange& range : record_.done) text.append(Line(range));
  const std::string temporary = path_ + ".tmp";
  ::unlink(temporary.c_str());
  MS_ASSIGN_OR_RETURN(File file, CreateForWrite(temporary));
  MS_RETURN_IF_ERROR(file.WriteAt(0, AsBytes(text)));
  if (std::rename(temporary.c_str(), path_.c_str()) != 0) {
    return ErrnoError(errno, absl::StrCat("rename ", temporary));
  }
  file_ = std::move(file);
  size_ = text.size();
  added_bytes_ = 0;
  return absl::OkStatus();
}

absl::Status TransferJournal::Add(const ByteRange& range) {
  AddRange(range, &record_.done);
  const std::string line = Line(range);
  added_bytes_ += line.size();
  if (added_bytes_ > kMaxAddedBytes) return WriteAll();
  MS_RETURN_IF_ERROR(file_.WriteAt(size_, AsBytes(line)));
  size_ += line.size();
  return absl::OkStatus();
}

void TransferJournal::Delete() { ::unlink(path_.c_str()); }

absl::StatusOr<TransferRecord> TransferJournal::Read(const std::string& path) {
  if (::access(path.c_str(), F_OK) != 0) {
    return absl::NotFoundError(absl::StrCat("there is no \"", path, "\""));
  }
  MS_ASSIGN_OR_RETURN(const File file, OpenForRead(path));
  MS_ASSIGN_OR_RETURN(const uint64_t size, file.Size());
  if (size > kMaxRecordBytes) return Corrupt(path);
  std::string text(size, '\0');
  MS_RETURN_IF_ERROR(
      file.ReadAt(0, absl::MakeSpan(reinterpret_cast<uint8_t*>(text.data()), text.size())));
  std::vector<absl::string_view> lines = absl::StrSplit(text, '\n');
  lines.pop_back();  // empty, or cut short by whoever died
  if (lines.empty()) return Corrupt(path);
  // Its own file, but a file: exceptions of the JSON library stop here.
  try {
    const Json json = Json::parse(lines.front());
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
    if (record.snapshot_id.empty() && record.own_pin) return Corrupt(path);
    for (const absl::string_view line : absl::MakeConstSpan(lines).subspan(1)) {
      ByteRange range;
      if (!ParseLine(line, &range) || range.end > record.total_bytes) return Corrupt(path);
      record.done.push_back(range);
    }
    record.done = Union(std::move(record.done));
    if (record.done.size() > kMaxRanges) return Corrupt(path);
    return record;
  } catch (const Json::exception&) {
    return Corrupt(path);
  }
}

}  // namespace modelstate::client
