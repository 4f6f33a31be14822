#ifndef MODELSTATE_SERVER_OPTIM_DEFAULT_ARITHMETIC_H_
#define MODELSTATE_SERVER_OPTIM_DEFAULT_ARITHMETIC_H_

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace modelstate {

// The arithmetic that results are defined with, in this thread, as long as it lives: round to
// nearest, subnormals kept. A library that a thread has run may have left it in another.
class DefaultArithmetic {
 public:
#if defined(__x86_64__)
  DefaultArithmetic() : before_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
  ~DefaultArithmetic() { _mm_setcsr(before_); }
#endif
  DefaultArithmetic(const DefaultArithmetic&) = delete;
  DefaultArithmetic& operator=(const DefaultArithmetic&) = delete;

#if defined(__x86_64__)
 private:
  const unsigned before_;
#else
  DefaultArithmetic() = default;
#endif
};

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_OPTIM_DEFAULT_ARITHMETIC_H_
