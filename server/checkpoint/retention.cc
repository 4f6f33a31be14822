#include "server/checkpoint/retention.h"

#include <algorithm>
#include <set>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"
#include "server/checkpoint/checkpoint_path.h"

namespace modelstate {
namespace {

constexpr char kPrefix[] = "step-";

std::string PeriodicName(uint64_t step) { return absl::StrFormat("%s%08d", kPrefix, step); }

}  // namespace

std::string PeriodicPath(absl::string_view module, uint64_t step) {
  return absl::StrCat(module, "/", PeriodicName(step));
}

std::optional<uint64_t> PeriodicStep(absl::string_view path) {
  const absl::string_view name = LastPart(path);
  absl::string_view digits = name;
  uint64_t step = 0;
  if (!absl::ConsumePrefix(&digits, kPrefix) || !absl::SimpleAtoi(digits, &step) ||
      name != PeriodicName(step)) {
    return std::nullopt;
  }
  return step;
}

std::vector<std::string> NotKept(std::vector<CheckpointInfo> checkpoints,
                                 const RetentionPolicy& policy) {
  std::set<std::string> kept;
  if (policy.keep_every > 0) {
    std::sort(checkpoints.begin(), checkpoints.end(),
              [](const CheckpointInfo& a, const CheckpointInfo& b) { return a.step < b.step; });
    uint64_t last = 0;
    for (const CheckpointInfo& each : checkpoints) {
      const uint64_t multiple = each.step / policy.keep_every;
      if (multiple > last) kept.insert(each.path);
      last = multiple;
    }
  }
  std::sort(checkpoints.begin(), checkpoints.end(), IsNewer);
  std::vector<std::string> removed;
  for (size_t i = policy.keep_last; policy.keep_last > 0 && i < checkpoints.size(); ++i) {
    if (!kept.contains(checkpoints[i].path)) removed.push_back(checkpoints[i].path);
  }
  return removed;
}

}  // namespace modelstate
