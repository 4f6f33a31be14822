// The pickle in a zip of torch.save, around which the zip is always right.
#include "tests/common/format/test_files.h"
#include "tests/fuzz/read_everything.h"

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string pickle(reinterpret_cast<const char*>(data), size);
  modelstate::fuzz::ReadEverything(modelstate::TorchZip(pickle, std::string(64, '\x3f')));
  return 0;
}
