#ifndef MODELSTATE_BENCH_ROWS_H_
#define MODELSTATE_BENCH_ROWS_H_

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

namespace modelstate {

// What a benchmark measures, and the row of the same table that it is compared with.
struct Row {
  std::string name;
  size_t baseline;
  std::function<void()> run;
  std::function<void()> before = [] {};  // neither of these is in its time
  std::function<void()> after = [] {};
  std::vector<double> seconds = {};
};

// One round that is thrown away, to warm up pools and pages, then `rounds`, each running every row
// once; with `only` those whose name has it.
void RunRows(std::vector<Row>& rows, int rounds, const std::string& only = "");

// Of the rows that ran: GB/s of the median and of the fastest round, and the median of the ratios
// within a round.
void PrintRows(const std::vector<Row>& rows, size_t bytes);

}  // namespace modelstate

#endif  // MODELSTATE_BENCH_ROWS_H_
