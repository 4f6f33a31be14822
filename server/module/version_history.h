#ifndef MODELSTATE_SERVER_MODULE_VERSION_HISTORY_H_
#define MODELSTATE_SERVER_MODULE_VERSION_HISTORY_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "common/base/tensor_spec.h"
#include "server/state/module_version.h"

namespace modelstate {

// What a mutation changed, gathered while it runs. Costs no more for 100,000 tensors than for ten,
// but for three additions each. Value type.
class VersionChange {
 public:
  // The elements of `spec`, an owner, changed.
  void AddElements(const TensorSpec& spec) {
    ++(spec.kind == TensorKind::kParameter ? parameters_ : buffers_);
    bytes_ += spec.nbytes();
    AddName(spec);
  }
  // Something else of it changed.
  void AddName(const TensorSpec& spec) {
    if (names_.size() < kMaxNames) names_.push_back(spec.name);
  }
  // By whom or with what, for people; cut to kMaxDetailBytes.
  void set_detail(std::string detail);

  uint64_t parameters() const { return parameters_; }
  uint64_t buffers() const { return buffers_; }

 private:
  friend class VersionHistory;
  static constexpr size_t kMaxNames = 10;
  static constexpr size_t kMaxDetailBytes = 512;

  uint64_t parameters_ = 0;
  uint64_t buffers_ = 0;
  uint64_t bytes_ = 0;
  std::vector<std::string> names_;
  std::string detail_;
};

// One published mutation. Immutable.
struct VersionRecord {
  Version version;
  MutationKind mutation = MutationKind::kCreate;
  absl::Time time;
  uint64_t step = 0;
  uint64_t schema_revision = 0;
  // Tensors whose elements changed, tied ones once, and their bytes.
  uint64_t changed_parameters = 0;
  uint64_t changed_buffers = 0;
  uint64_t changed_bytes = 0;
  // The first 10 of them, or of those whose requires_grad changed; never null.
  std::shared_ptr<const std::vector<std::string>> tensors;
  std::string detail;
};

// The last versions of a module: what changed in each, and why. Bounded; it keeps no version, so it
// holds no tensor's memory. Steps of the same tensors share their list of names. Thread-compatible.
class VersionHistory {
 public:
  explicit VersionHistory(size_t max_records = 256) : max_records_(max_records) {}

  // REQUIRES: numbers of versions grow by one.
  void Add(const ModuleVersion& version, absl::Time time, VersionChange change);

  // Those with a number below `before` (0: all), the newest first, at most `limit`.
  std::vector<VersionRecord> Before(uint64_t before, size_t limit) const;

 private:
  size_t max_records_;
  std::deque<VersionRecord> records_;  // by number
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_MODULE_VERSION_HISTORY_H_
