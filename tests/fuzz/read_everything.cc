#include "tests/fuzz/read_everything.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

#include "common/base/status.h"
#include "tests/common/allocation_meter.h"

namespace modelstate::fuzz {
namespace {

constexpr size_t kSlack = size_t{16} << 20;
constexpr uint64_t kMaxTensor = uint64_t{1} << 20;

void CheckError(const absl::Status& status) {
  Require(status.ok() || GetReason(status).has_value(), "an error has no reason");
  Require(status.ok() || !status.message().empty(), "an error has no text");
}

}  // namespace

void Require(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::abort();
}

File MakeFile(const std::string& content) {
  File file(memfd_create("input", MFD_CLOEXEC), "input");
  const absl::Status written = file.WriteAt(
      0, absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(content.data()), content.size()));
  Require(written.ok(), "the input cannot be put into a file");
  return file;
}

void ReadEverything(const std::string& content, const OpenOptions& options) {
  File file = MakeFile(content);
  ResetPeakAllocation();
  const auto reader = OpenCheckpoint(std::move(file), options);
  CheckError(reader.status());
  if (reader.ok()) {
    ReadPass pass;
    for (size_t i = 0; i < (*reader)->tensors().size(); ++i) {
      CheckError((*reader)->Verify(i, pass));
      const uint64_t nbytes = (*reader)->tensors()[i].nbytes();
      if (nbytes > kMaxTensor) continue;
      std::vector<uint8_t> bytes(nbytes);
      CheckError((*reader)->Read(i, absl::MakeSpan(bytes)));
    }
  }
  Require(PeakAllocation() <= content.size() + kSlack, "more memory than the file and 16 MiB");
}

}  // namespace modelstate::fuzz
