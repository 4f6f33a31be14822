#ifndef MODELSTATE_COMMON_BASE_TUNE_MALLOC_H_
#define MODELSTATE_COMMON_BASE_TUNE_MALLOC_H_

namespace modelstate {

// Tells glibc's malloc to keep what it has: gRPC allocates 64 KiB for each read, and by default
// such memory goes back to the kernel and is faulted in again all the time, which costs more than
// half of the throughput. It is for the whole process: a program calls it before it starts threads,
// a library does not.
void TuneMalloc();

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_BASE_TUNE_MALLOC_H_
