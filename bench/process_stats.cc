#include "bench/process_stats.h"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace modelstate {
namespace {

[[noreturn]] void Fail(const std::string& path) {
  std::fprintf(stderr, "%s: not as expected\n", path.c_str());
  std::exit(1);
}

uint64_t StatusBytes(pid_t pid, const std::string& field) {
  const std::string path = absl::StrCat("/proc/", pid, "/status");
  std::ifstream file(path);
  std::string key;
  uint64_t kibibytes = 0;
  while (file >> key) {
    if (key == field && file >> kibibytes) return kibibytes * 1024;
  }
  Fail(path);
}

}  // namespace

double CpuSeconds(pid_t pid) {
  const std::string path = absl::StrCat("/proc/", pid, "/stat");
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  // The name in parentheses may hold spaces; utime and stime are the 12th and 13th after it.
  const std::vector<std::string> fields =
      absl::StrSplit(line.substr(line.rfind(')') + 1), ' ', absl::SkipEmpty());
  double user = 0;
  double system = 0;
  if (fields.size() < 13 || !absl::SimpleAtod(fields[11], &user) ||
      !absl::SimpleAtod(fields[12], &system)) {
    Fail(path);
  }
  return (user + system) / static_cast<double>(sysconf(_SC_CLK_TCK));
}

uint64_t ResidentBytes(pid_t pid) { return StatusBytes(pid, "VmRSS:"); }

uint64_t PeakResidentBytes(pid_t pid) { return StatusBytes(pid, "VmHWM:"); }

void ResetPeakResidentBytes(pid_t pid) {
  const std::string path = absl::StrCat("/proc/", pid, "/clear_refs");
  std::ofstream file(path);
  file << "5" << std::flush;
  if (!file) Fail(path);
}

}  // namespace modelstate
