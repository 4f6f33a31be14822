#include "server/byte_size.h"

#include <limits>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"

namespace modelstate {
namespace {

struct Unit {
  const char* suffix;
  int shift;
};
constexpr Unit kUnits[] = {{"GiB", 30}, {"MiB", 20}, {"KiB", 10}};

}  // namespace

bool AbslParseFlag(absl::string_view text, ByteSize* size, std::string* error) {
  absl::string_view digits = text;
  int shift = 0;
  for (const Unit& unit : kUnits) {
    if (absl::ConsumeSuffix(&digits, unit.suffix)) {
      shift = unit.shift;
      break;
    }
  }
  uint64_t number = 0;
  if (digits.empty() || !absl::ascii_isdigit(digits.front()) ||
      !absl::ascii_isdigit(digits.back()) || !absl::SimpleAtoi(digits, &number)) {
    *error = "is not a number of bytes; write 4194304, 4096KiB, 4MiB or 1GiB";
    return false;
  }
  if (number > std::numeric_limits<uint64_t>::max() >> shift) {
    *error = "is more than 2^64 bytes";
    return false;
  }
  size->bytes = number << shift;
  return true;
}

std::string AbslUnparseFlag(ByteSize size) {
  for (const Unit& unit : kUnits) {
    if (size.bytes != 0 && size.bytes % (uint64_t{1} << unit.shift) == 0) {
      return absl::StrCat(size.bytes >> unit.shift, unit.suffix);
    }
  }
  return absl::StrCat(size.bytes);
}

}  // namespace modelstate
