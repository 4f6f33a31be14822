#ifndef MODELSTATE_BENCH_PROCESS_STATS_H_
#define MODELSTATE_BENCH_PROCESS_STATS_H_

#include <sys/types.h>

#include <cstdint>

// What /proc says of another process. Each ends the program when it cannot be read.
namespace modelstate {

// Processor time of all its threads, in user and kernel mode.
double CpuSeconds(pid_t pid);
uint64_t ResidentBytes(pid_t pid);
// Since the start of the process or the last reset.
uint64_t PeakResidentBytes(pid_t pid);
void ResetPeakResidentBytes(pid_t pid);

}  // namespace modelstate

#endif  // MODELSTATE_BENCH_PROCESS_STATS_H_
