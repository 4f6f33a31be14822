#ifndef MODELSTATE_TESTS_FUZZ_READ_EVERYTHING_H_
#define MODELSTATE_TESTS_FUZZ_READ_EVERYTHING_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "common/format/checkpoint_reader.h"

namespace modelstate::fuzz {

// What a target does with a file of `content`: opens it by its first bytes and reads all tensors of
// at most 1 MiB. Aborts where an error has no reason, or where more than the file and 16 MiB of
// memory were held.
void ReadEverything(const std::string& content, const OpenOptions& options = {});

// Aborts with a text unless `good`.
void Require(bool good, const char* what);

File MakeFile(const std::string& content);

}  // namespace modelstate::fuzz

// What libFuzzer calls, and the replay of a corpus without it.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

#endif  // MODELSTATE_TESTS_FUZZ_READ_EVERYTHING_H_
