// A safetensors file: either whole, or (from a `{`) the header's JSON, a NUL and the data, to which
// the length of the header is put.
#include <algorithm>
#include <utility>

#include "tests/fuzz/read_everything.h"

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::string content(reinterpret_cast<const char*>(data), size);
  if (content[0] == '{') {
    const size_t end = std::min(content.find('\0'), content.size());
    std::string file;
    for (int shift = 0; shift < 64; shift += 8) file.push_back(static_cast<char>(end >> shift));
    file.append(content, 0, end);
    if (end < content.size()) file.append(content, end + 1);
    content = std::move(file);
  }
  modelstate::OpenOptions options;
  options.allow_opaque = true;
  modelstate::fuzz::ReadEverything(content, options);
  return 0;
}
