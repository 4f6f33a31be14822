#include "server/module/version_history.h"

#include <algorithm>
#include <utility>

namespace modelstate {

void VersionChange::set_detail(std::string detail) {
  if (detail.size() > kMaxDetailBytes) {
    size_t end = kMaxDetailBytes;
    // Not in the middle of a character: the text goes out as UTF-8.
    while (end > 0 && (static_cast<unsigned char>(detail[end]) & 0xC0) == 0x80) --end;
    detail.resize(end);
    detail += "...";
  }
  detail_ = std::move(detail);
}

void VersionHistory::Add(const ModuleVersion& version, absl::Time time, VersionChange change) {
  VersionRecord record;
  record.version = version.version;
  record.mutation = version.last_mutation;
  record.time = time;
  record.step = version.step;
  record.schema_revision = version.schema->revision();
  record.changed_parameters = change.parameters_;
  record.changed_buffers = change.buffers_;
  record.changed_bytes = change.bytes_;
  record.detail = std::move(change.detail_);
  if (!records_.empty() && *records_.back().tensors == change.names_) {
    record.tensors = records_.back().tensors;
  } else {
    record.tensors = std::make_shared<const std::vector<std::string>>(std::move(change.names_));
  }
  records_.push_back(std::move(record));
  if (records_.size() > max_records_) records_.pop_front();
}

std::vector<VersionRecord> VersionHistory::Before(uint64_t before, size_t limit) const {
  size_t end = records_.size();
  if (before != 0) {
    const auto it = std::lower_bound(records_.begin(), records_.end(), before,
                                     [](const VersionRecord& record, uint64_t number) {
                                       return record.version.number < number;
                                     });
    end = static_cast<size_t>(it - records_.begin());
  }
  std::vector<VersionRecord> found;
  found.reserve(std::min(limit, end));
  while (end > 0 && found.size() < limit) found.push_back(records_[--end]);
  return found;
}

}  // namespace modelstate
