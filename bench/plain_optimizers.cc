#include "bench/plain_optimizers.h"

#include <cmath>
#include <cstdlib>
#include <cstring>

#include "server/device/cpu/host_memory_source.h"

#if defined(__x86_64__)
#define MODELSTATE_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "arch=x86-64-v2", "default")))
#else
#define MODELSTATE_CLONES
#endif

namespace modelstate {
namespace {

constexpr float kLr = 1e-3F;
constexpr float kBeta1 = 0.9F;
constexpr float kBeta2 = 0.999F;
constexpr float kEps = 1e-8F;
constexpr float kWeightDecay = 1e-2F;
constexpr float kMomentum = 0.9F;
// Of some step in the middle.
constexpr float kBias1 = 0.6F;
constexpr float kSqrtBias2 = 0.1F;

}  // namespace

MODELSTATE_CLONES void PlainAdamW(const PlainArrays& x, size_t begin, size_t end) {
  float* __restrict__ p = x.p;
  const float* __restrict__ g = x.g;
  float* __restrict__ m = x.a;
  float* __restrict__ v = x.b;
  for (size_t i = begin; i < end; ++i) {
    p[i] *= 1 - kLr * kWeightDecay;
    m[i] = kBeta1 * m[i] + (1 - kBeta1) * g[i];
    v[i] = kBeta2 * v[i] + (1 - kBeta2) * g[i] * g[i];
    p[i] -= kLr / kBias1 * m[i] / (std::sqrt(v[i]) / kSqrtBias2 + kEps);
  }
}

MODELSTATE_CLONES void PlainAdam(const PlainArrays& x, size_t begin, size_t end) {
  float* __restrict__ p = x.p;
  const float* __restrict__ g = x.g;
  float* __restrict__ m = x.a;
  float* __restrict__ v = x.b;
  for (size_t i = begin; i < end; ++i) {
    m[i] = kBeta1 * m[i] + (1 - kBeta1) * g[i];
    v[i] = kBeta2 * v[i] + (1 - kBeta2) * g[i] * g[i];
    p[i] -= kLr / kBias1 * m[i] / (std::sqrt(v[i]) / kSqrtBias2 + kEps);
  }
}

MODELSTATE_CLONES void PlainSgdMomentum(const PlainArrays& x, size_t begin, size_t end) {
  float* __restrict__ p = x.p;
  const float* __restrict__ g = x.g;
  float* __restrict__ buffer = x.a;
  for (size_t i = begin; i < end; ++i) {
    buffer[i] = kMomentum * buffer[i] + g[i];
    p[i] -= kLr * buffer[i];
  }
}

MODELSTATE_CLONES void PlainTriad(const PlainArrays& x, size_t begin, size_t end) {
  const float* __restrict__ p = x.p;
  const float* __restrict__ g = x.g;
  float* __restrict__ a = x.a;
  for (size_t i = begin; i < end; ++i) a[i] = p[i] + 3.0F * g[i];
}

PlainModel::PlainModel(size_t elements) : elements_(elements) {
  HostMemorySource memory;
  for (float*& array : arrays_) {
    array = static_cast<float*>(memory.Allocate(elements * sizeof(float)));
    if (array == nullptr) std::exit(1);
    std::memset(array, 0, elements * sizeof(float));
  }
}

PlainModel::~PlainModel() {
  HostMemorySource memory;
  for (float* array : arrays_) memory.Free(array, elements_ * sizeof(float));
}

void PlainModel::Step(PlainLoop loop, const float* gradients, ComputePool& compute) {
  const PlainArrays arrays = {arrays_[0], gradients, arrays_[1], arrays_[2]};
  const size_t threads = compute.threads();
  compute.ParallelFor(threads, [&](size_t t) {
    loop(arrays, elements_ * t / threads, elements_ * (t + 1) / threads);
  });
}

}  // namespace modelstate
