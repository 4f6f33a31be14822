#ifndef MODELSTATE_TESTS_SERVER_TEST_ENVIRONMENT_H_
#define MODELSTATE_TESTS_SERVER_TEST_ENVIRONMENT_H_

#include <cstdlib>
#include <string>

namespace modelstate {

// The device that the suites run on: $MODELSTATE_TEST_DEVICE, or the host. The same tests run on a
// GPU, and on the CUDA runtime of tests/fake_cuda.
inline std::string TestDevice() {
  const char* name = std::getenv("MODELSTATE_TEST_DEVICE");
  return name != nullptr ? name : "cpu";
}

// The folder of tests/data: $MODELSTATE_SOURCE_DIR where the tests run elsewhere than they were
// built.
inline std::string DataFolder() {
  const char* source = std::getenv("MODELSTATE_SOURCE_DIR");
  return std::string(source != nullptr ? source : MODELSTATE_SOURCE_DIR) + "/tests/data/";
}

}  // namespace modelstate

#endif  // MODELSTATE_TESTS_SERVER_TEST_ENVIRONMENT_H_
