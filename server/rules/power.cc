#include "server/rules/power.h"

#include <cmath>

namespace modelstate {
namespace {

// The unevaluated sum of two doubles, of which `low` is below half a unit of the last place of
// `high`. The sums and products below are exact, or lose some 2^-104 of the result.
struct Pair {
  double high = 0;
  double low = 0;
};

// REQUIRES: |a| >= |b|, or a == 0.
Pair QuickSum(double a, double b) {
  const double sum = a + b;
  return {sum, b - (sum - a)};
}

Pair Sum(double a, double b) {
  const double sum = a + b;
  const double of_b = sum - a;
  return {sum, (a - (sum - of_b)) + (b - of_b)};
}

Pair Split(double a) {
  const double shifted = 134217729.0 * a;  // 2^27 + 1
  const double high = shifted - (shifted - a);
  return {high, a - high};
}

Pair Product(double a, double b) {
  const double product = a * b;
  const Pair x = Split(a);
  const Pair y = Split(b);
  const double error =
      ((x.high * y.high - product) + x.high * y.low + x.low * y.high) + x.low * y.low;
  return {product, error};
}

Pair Multiply(const Pair& a, const Pair& b) {
  const Pair product = Product(a.high, b.high);
  return QuickSum(product.high, product.low + (a.high * b.low + a.low * b.high));
}

Pair Add(const Pair& a, const Pair& b) {
  const Pair sum = Sum(a.high, b.high);
  return QuickSum(sum.high, sum.low + (a.low + b.low));
}

// `a` times a power of two.
Pair Scale(const Pair& a, double factor) { return {a.high * factor, a.low * factor}; }

// e^x for x <= 0.
double Exp(Pair x) {
  constexpr Pair kLn2 = {0x1.62e42fefa39efp-1, 0x1.abc9e3b39803fp-56};
  constexpr int kHalvings = 9;
  if (x.high < -745) return 0;
  const double k = std::round(x.high / kLn2.high);
  const Pair whole = Multiply({k, 0}, kLn2);
  const Pair r = Scale(Add(x, {-whole.high, -whole.low}), 1.0 / (1 << kHalvings));
  // e^r - 1 by its series, from the smallest term on: |r| < 0.0007, so that the eleventh is
  // nothing.
  Pair sum;
  for (int n = 10; n >= 1; --n) {
    const Pair inverse = [n] {
      const double high = 1.0 / n;
      const Pair back = Product(high, n);
      return Pair{high, ((1 - back.high) - back.low) / n};
    }();
    sum = Multiply(Multiply(Add({1, 0}, sum), r), inverse);
  }
  // (1 + s)^2 - 1 = 2 s + s^2.
  for (int i = 0; i < kHalvings; ++i) sum = Add(Scale(sum, 2), Multiply(sum, sum));
  return std::ldexp(Add({1, 0}, sum).high, static_cast<int>(k));
}

}  // namespace

double IntegerPower(double base, uint64_t exponent) {
  Pair result = {1, 0};
  for (Pair square = {base, 0}; exponent != 0; exponent >>= 1) {
    if ((exponent & 1) != 0) result = Multiply(result, square);
    square = Multiply(square, square);
  }
  return result.high;
}

double PowerOf096(double exponent) {
  constexpr Pair kLog = {-0x1.4e69ed6d80eb3p-5, -0x1.067d54cb9a84cp-60};
  if (exponent > 1e6) return 0;  // so that products stay in range
  return Exp(Multiply({exponent, 0}, kLog));
}

}  // namespace modelstate
