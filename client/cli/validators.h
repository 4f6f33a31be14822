#ifndef MODELSTATE_CLIENT_CLI_VALIDATORS_H_
#define MODELSTATE_CLIENT_CLI_VALIDATORS_H_

#include <CLI/CLI.hpp>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <string>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"

// Checks of option values whose messages a person can read: CLI11's own print their limits, of
// which that of a double has 309 digits. What is no number at all, CLI11 refuses itself.
namespace modelstate::cli {

// The longest google.protobuf.Duration: about 10,000 years.
inline constexpr double kMaxSeconds = 315576000000;

// For every option of an unsigned integer: CLI11 takes -1 for the largest there is, and so what is
// larger. Looks at the digits that the text begins with, so that it also goes before a unit.
template <typename T>
CLI::Validator WholeNumber() {
  return CLI::Validator(
      [](const std::string& text) {
        errno = 0;
        const uint64_t number = std::strtoull(text.c_str(), nullptr, 0);
        const bool fits = errno != ERANGE && number <= std::numeric_limits<T>::max() &&
                          text.find('-') == std::string::npos;
        return fits ? std::string()
                    : absl::StrCat(text, " is not a whole number from 0 to ",
                                   std::numeric_limits<T>::max());
      },
      "");
}

inline CLI::Validator Positive() {
  return CLI::Validator(
      [](const std::string& text) {
        double number = 0;
        const bool valid = !absl::SimpleAtod(text, &number) || number > 0;
        return valid ? std::string() : absl::StrCat(text, " is not more than 0");
      },
      "POSITIVE");
}

inline CLI::Validator SecondsOrNone() {
  return CLI::Validator(
      [](const std::string& text) {
        double number = 0;
        const bool valid =
            !absl::SimpleAtod(text, &number) || (number >= 0 && number <= kMaxSeconds);
        return valid ? std::string() : absl::StrCat(text, " is not 0 to 315576000000 seconds");
      },
      "SECONDS");
}

inline CLI::Validator DurationText() {
  return CLI::Validator(
      [](const std::string& text) {
        absl::Duration duration;
        const bool valid = absl::ParseDuration(text, &duration) &&
                           duration > absl::ZeroDuration() &&
                           duration <= absl::Seconds(kMaxSeconds);
        return valid ? std::string() : "a duration is written as 60s or 5m";
      },
      "DURATION");
}

}  // namespace modelstate::cli

#endif  // MODELSTATE_CLIENT_CLI_VALIDATORS_H_
