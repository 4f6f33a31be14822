#include "bench/rows.h"

#include <algorithm>
#include <cstdio>

#include "absl/strings/match.h"
#include "bench/support.h"

namespace modelstate {

void RunRows(std::vector<Row>& rows, int rounds, const std::string& only) {
  for (int round = -1; round < rounds; ++round) {
    for (Row& row : rows) {
      if (!absl::StrContains(row.name, only)) continue;
      row.before();
      const double seconds = Seconds(row.run);
      if (round >= 0) row.seconds.push_back(seconds);
      row.after();
    }
  }
}

void PrintRows(const std::vector<Row>& rows, size_t bytes) {
  std::printf("%-40s %8s %8s %8s\n", "", "GB/s", "fastest", "ratio");
  const double gigabytes = static_cast<double>(bytes) / 1e9;
  for (const Row& row : rows) {
    if (row.seconds.empty()) continue;
    std::printf("%-40s %8.2f %8.2f", row.name.c_str(), gigabytes / Median(row.seconds),
                gigabytes / *std::min_element(row.seconds.begin(), row.seconds.end()));
    const std::vector<double>& baseline = rows[row.baseline].seconds;
    std::vector<double> ratios;
    for (size_t i = 0; i < baseline.size(); ++i) ratios.push_back(baseline[i] / row.seconds[i]);
    if (ratios.empty()) {
      std::printf("\n");
    } else {
      std::printf(" %8.2f\n", Median(ratios));
    }
  }
}

}  // namespace modelstate
