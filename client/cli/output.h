#ifndef MODELSTATE_CLIENT_CLI_OUTPUT_H_
#define MODELSTATE_CLIENT_CLI_OUTPUT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "client/cli/context.h"
#include "client/types.h"

namespace modelstate::cli {

// A table for people: columns as wide as their widest cell, numbers to the right.
class Table {
 public:
  explicit Table(std::vector<std::string> header) { rows_.push_back(std::move(header)); }
  // Two columns, a key and its value, all to the left.
  static Table OfPairs(std::string key, std::string value);
  // The cells are made Printable.
  void Add(std::vector<std::string> row);
  void Print() const;

 private:
  std::vector<std::vector<std::string>> rows_;
  bool numbers_right_ = true;
};

// Text of the server's or of a file, for a terminal: control characters, those that turn the
// direction of writing, and what is not UTF-8 are escaped, as \n, \x1b or \u202e. What is escaped
// already stays. JSON escapes by itself.
std::string Printable(absl::string_view text);

// "1.2 GiB".
std::string HumanBytes(uint64_t bytes);
std::string HumanTime(absl::Time time);

std::string Joined(const std::vector<std::string>& parts);  // "a, b", Printable
// "26 parameters", "1 buffer".
std::string Counted(uint64_t count, const char* noun);
// "26 parameters (2 tied names)".
std::string CountedParameters(uint64_t parameters, uint64_t tied_names);
// As short as can be for people: "0.5", "-1.25e-07", "nan".
std::string Number(double value);

// lr=0.1,weight_decay=0 into `h`: an empty string, or what is wrong.
std::string ParseSettings(const std::string& text, Hyperparameters* h);

const char* StateName(client::ModuleState state);
Json ToJson(const Version& version);
Json ToJson(const client::ModuleInfo& module);
Json ToJson(const client::TensorInfo& tensor);
Json ToJson(const client::TensorStatistics& statistics);
// JSON has no infinity or NaN: those are "inf", "-inf", "nan".
Json ToJson(double value);

// A bar with rate and time left on stderr, when that is a terminal and JSON is not asked for.
// Thread-compatible.
class ProgressBar {
 public:
  explicit ProgressBar(const Context& context);
  ~ProgressBar() { Clear(); }

  void Update(const client::Progress& progress);
  void Clear();
  client::ProgressCallback callback() {
    return [this](const client::Progress& progress) { Update(progress); };
  }

 private:
  const bool enabled_;
  bool shown_ = false;
  std::string phase_;
  absl::Time phase_start_;
  uint64_t phase_first_ = 0;
  absl::Time next_ = absl::InfinitePast();
};

}  // namespace modelstate::cli

#endif  // MODELSTATE_CLIENT_CLI_OUTPUT_H_
