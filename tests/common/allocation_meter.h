#ifndef MODELSTATE_TESTS_COMMON_ALLOCATION_METER_H_
#define MODELSTATE_TESTS_COMMON_ALLOCATION_METER_H_

#include <cstddef>

namespace modelstate {

// What a test program holds of memory from operator new, which a file that lies about its sizes
// must not drive up. The program links allocation_meter.cc. Counts all threads together.
void ResetPeakAllocation();
// The most bytes held at once since then, beyond those held at that moment.
size_t PeakAllocation();

}  // namespace modelstate

#endif  // MODELSTATE_TESTS_COMMON_ALLOCATION_METER_H_
