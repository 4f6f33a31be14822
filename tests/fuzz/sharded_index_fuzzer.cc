// The index of a sharded checkpoint; every plain name is a shard with the tensors "a" and "b".
#include "tests/common/format/test_files.h"
#include "tests/fuzz/read_everything.h"

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string shard =
      modelstate::Safetensors(R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
                              R"("b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}})",
                              "xyz");
  modelstate::OpenOptions options;
  options.open_sibling = [&shard](const std::string& name) -> absl::StatusOr<modelstate::File> {
    modelstate::fuzz::Require(
        name.find('/') == std::string::npos && name != ".." && name.find('\0') == std::string::npos,
        "a shard is no plain name");
    return modelstate::fuzz::MakeFile(shard);
  };
  modelstate::fuzz::ReadEverything(std::string(reinterpret_cast<const char*>(data), size), options);
  return 0;
}
