#ifndef MODELSTATE_SERVER_RULES_POWER_H_
#define MODELSTATE_SERVER_RULES_POWER_H_

#include <cstdint>

namespace modelstate {

// Powers that have the same bits on every machine, which std::pow does not promise: libm has other
// code for CPUs with fused multiply-add, and the two differ in the last bit now and then. Computed
// in pairs of doubles (Dekker, "A floating-point technique for extending the available precision",
// 1971) and rounded once. Below 1e-290 the last bits are not right. Thread-safe.

// REQUIRES: 0 <= base <= 1.
double IntegerPower(double base, uint64_t exponent);

// 0.96^exponent, with the double that is nearest to 0.96, for exponent >= 0: NAdam's decay.
double PowerOf096(double exponent);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_RULES_POWER_H_
