#include "bench/turns.h"

#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <utility>

#include "bench/support.h"

namespace modelstate {

void Turns::Add(std::string name, std::function<double()> run) {
  subjects_.push_back({std::move(name), std::move(run)});
}

void Turns::Record(const std::string& name, double value) {
  if (recording_) values_[name].push_back(value);
}

void Turns::Run(int rounds, const std::string& only) {
  for (int round = -1; round < rounds; ++round) {
    recording_ = round >= 0;
    for (size_t i = 0; i < subjects_.size(); ++i) {
      const Subject& subject = subjects_[round % 2 == 0 ? i : subjects_.size() - 1 - i];
      if (!only.empty() && subject.name != only) continue;
      const double value = subject.run();
      Record(subject.name, value);
    }
  }
}

void Turns::PrintMedians() const {
  for (const auto& [name, values] : values_) {
    std::printf("%-36s %12.6g\n", name.c_str(), Median(values));
  }
}

void Turns::WriteJson(const std::string& path, const std::string& row, uint64_t bytes) const {
  std::ofstream(path) << nlohmann::json({{"row", row}, {"bytes", bytes}, {"values", values_}});
}

}  // namespace modelstate
