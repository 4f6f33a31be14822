#ifndef MODELSTATE_BENCH_TURNS_H_
#define MODELSTATE_BENCH_TURNS_H_

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace modelstate {

// Runs things in turns, so that each round compares them under the same conditions, and keeps what
// every round measured.
class Turns {
 public:
  // `run` gives a measurement, usually seconds; what it checks afterwards is not in it.
  void Add(std::string name, std::function<double()> run);
  // A further measurement of the round under way.
  void Record(const std::string& name, double value);
  // One round that is thrown away, to warm up pools and pages, then `rounds`. Every other one runs
  // in the opposite order. `only` not empty: that one alone.
  void Run(int rounds, const std::string& only = "");

  void PrintMedians() const;
  // {"row", "bytes", "values": {name: [one per round]}}
  void WriteJson(const std::string& path, const std::string& row, uint64_t bytes) const;

 private:
  struct Subject {
    std::string name;
    std::function<double()> run;
  };
  std::vector<Subject> subjects_;
  std::map<std::string, std::vector<double>> values_;
  bool recording_ = false;
};

}  // namespace modelstate

#endif  // MODELSTATE_BENCH_TURNS_H_
