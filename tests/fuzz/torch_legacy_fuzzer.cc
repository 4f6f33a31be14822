// A stream of torch.save from before 1.6; without the magic number it is put before.
#include "tests/common/format/test_files.h"
#include "tests/fuzz/read_everything.h"

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::string content(reinterpret_cast<const char*>(data), size);
  const std::string magic = modelstate::LegacyStream().magic;
  if (content.compare(0, magic.size(), magic) != 0) content = magic + content;
  modelstate::fuzz::ReadEverything(content);
  return 0;
}
