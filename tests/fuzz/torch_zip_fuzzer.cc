// A zip of torch.save, as it comes. Seeds without CRCs let changed records get past them.
#include "tests/fuzz/read_everything.h"

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  modelstate::fuzz::ReadEverything(std::string(reinterpret_cast<const char*>(data), size));
  return 0;
}
