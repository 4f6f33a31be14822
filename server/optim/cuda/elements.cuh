#ifndef MODELSTATE_SERVER_OPTIM_CUDA_ELEMENTS_CUH_
#define MODELSTATE_SERVER_OPTIM_CUDA_ELEMENTS_CUH_

#include <type_traits>

#include "common/base/float_cast.h"
#include "server/device/cuda/launch_kernel.h"
#include "server/optim/cuda/work.h"

// Loads and stores of kWidth neighbouring elements by one thread: kCudaWidth<T>, or 1.
namespace modelstate {

inline constexpr int kCudaThreads = 256;

// What one access moves: at most 16 bytes, more are several.
template <size_t kBytes>
struct CudaWord {
  using Type = uint4;
};
template <>
struct CudaWord<8> {
  using Type = uint2;
};
template <>
struct CudaWord<4> {
  using Type = uint32_t;
};
template <>
struct CudaWord<2> {
  using Type = uint16_t;
};
template <>
struct CudaWord<1> {
  using Type = uint8_t;
};

// Neighbouring elements as they are in memory. The accesses are those of the intrinsics: a compiler
// takes plain ones apart. They pass by the cache of the processor, since nothing is used twice.
template <typename Stored, int kWidth>
struct CudaPack {
  using Word = typename CudaWord<sizeof(Stored) * kWidth>::Type;
  static constexpr int kWords = sizeof(Stored) * kWidth / sizeof(Word);
  union {
    Word words[kWords];
    Stored values[kWidth];
  };
};

template <int kWidth, typename Stored>
__device__ inline CudaPack<Stored, kWidth> LoadPack(const void* from, uint64_t at) {
  using Pack = CudaPack<Stored, kWidth>;
  const auto* words =
      reinterpret_cast<const typename Pack::Word*>(static_cast<const Stored*>(from) + at);
  Pack pack;
#pragma unroll
  for (int k = 0; k < Pack::kWords; ++k) pack.words[k] = __ldcg(words + k);
  return pack;
}

template <int kWidth, typename Stored>
__device__ inline void StorePack(const CudaPack<Stored, kWidth>& pack, void* to, uint64_t at) {
  using Pack = CudaPack<Stored, kWidth>;
  auto* words = reinterpret_cast<typename Pack::Word*>(static_cast<Stored*>(to) + at);
#pragma unroll
  for (int k = 0; k < Pack::kWords; ++k) __stcg(words + k, pack.words[k]);
}

template <typename T>
struct CudaWideCodec {
  using Stored = T;
  __device__ static T Load(T value) { return value; }
  __device__ static T Store(T value) { return value; }
};
template <typename StoredT, float (*kLoad)(StoredT), StoredT (*kStore)(float)>
struct CudaNarrowCodec {
  using Stored = StoredT;
  __device__ static float Load(StoredT value) { return kLoad(value); }
  __device__ static StoredT Store(float value) { return kStore(value); }
};

// `function` with the codec of `element`.
template <typename T, typename Function>
__device__ inline void WithCudaCodec(CudaElement element, Function function) {
  switch (element) {
    case CudaElement::kF16:
      return function(CudaNarrowCodec<uint16_t, HalfToFloat, FloatToHalf>());
    case CudaElement::kBF16:
      return function(CudaNarrowCodec<uint16_t, BFloat16ToFloat, FloatToBFloat16>());
    case CudaElement::kF8E4M3:
      return function(CudaNarrowCodec<uint8_t, F8E4M3ToFloat, FloatToF8E4M3>());
    case CudaElement::kF8E5M2:
      return function(CudaNarrowCodec<uint8_t, F8E5M2ToFloat, FloatToF8E5M2>());
    case CudaElement::kF64:
      // Only a step in double meets them.
      if constexpr (std::is_same_v<T, double>) return function(CudaWideCodec<double>());
      return;
    case CudaElement::kF32:
      return function(CudaWideCodec<float>());
  }
}

template <int kWidth, typename T>
__device__ inline void LoadAs(CudaElement element, const void* from, uint64_t at, T (&to)[kWidth]) {
  WithCudaCodec<T>(element, [&](auto codec) {
    using Codec = decltype(codec);
    const auto pack = LoadPack<kWidth, typename Codec::Stored>(from, at);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) to[k] = static_cast<T>(Codec::Load(pack.values[k]));
  });
}

template <int kWidth, typename T>
__device__ inline void Load(const T* from, uint64_t at, T (&to)[kWidth]) {
  const auto pack = LoadPack<kWidth, T>(from, at);
#pragma unroll
  for (int k = 0; k < kWidth; ++k) to[k] = pack.values[k];
}

template <int kWidth, typename T>
__device__ inline void Store(const T (&from)[kWidth], T* to, uint64_t at) {
  CudaPack<T, kWidth> pack;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) pack.values[k] = from[k];
  StorePack(pack, to, at);
}

// A parameter's: narrow ones are computed with as float.
template <int kWidth, typename T>
__device__ inline void StoreAs(CudaElement element, const T (&from)[kWidth], void* to,
                               uint64_t at) {
  if constexpr (std::is_same_v<T, double>) {
    Store(from, static_cast<double*>(to), at);
  } else {
    WithCudaCodec<T>(element, [&](auto codec) {
      using Codec = decltype(codec);
      CudaPack<typename Codec::Stored, kWidth> pack;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) pack.values[k] = Codec::Store(from[k]);
      StorePack(pack, to, at);
    });
  }
}

// Sets `to` to one part's share of the mean, or adds it.
template <int kWidth, typename T>
__device__ inline void AddShare(const CudaPart<T>& part, uint64_t at, bool add, T (&to)[kWidth]) {
  T values[kWidth] = {};
  LoadAs(part.element, part.data, at, values);
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    const T share = values[k] * part.inverse_scale * part.coefficient;
    to[k] = add ? to[k] + share : share;
  }
}

// The mean of the parts.
template <int kWidth, typename T>
__device__ inline void LoadGradient(const CudaTensor<T>& tensor, const CudaPart<T>* parts,
                                    uint64_t at, T (&to)[kWidth]) {
  if (tensor.in_place) return Load(static_cast<const T*>(tensor.output), at, to);
  for (uint32_t k = 0; k < tensor.part_count; ++k) {
    AddShare(parts[tensor.first_part + k], at, k > 0, to);
  }
}

// The blocks that this thread block computes: visit(block).
template <typename Work, typename Visit>
__device__ inline void ForEachBlock(const Work& work, Visit visit) {
  for (uint64_t i = blockIdx.x; i < work.block_count; i += gridDim.x) visit(work.blocks[i]);
}

// Calls many(at), for kWidth elements, and then one(at), with places that cover [begin, end)
// between this block's threads.
template <int kWidth, typename Many, typename One>
__device__ inline void ForEachElement(uint64_t begin, uint64_t end, bool vectors, Many many,
                                      One one) {
  const uint64_t whole = vectors ? (end - begin) / kWidth * kWidth : 0;
  for (uint64_t i = threadIdx.x * kWidth; i < whole; i += blockDim.x * kWidth) many(begin + i);
  for (uint64_t i = whole + threadIdx.x; i < end - begin; i += blockDim.x) one(begin + i);
}

__device__ inline uint64_t BlockEnd(uint64_t begin, uint64_t elements) {
  return elements - begin < kCudaBlockElements ? elements : begin + kCudaBlockElements;
}

// A thread block for each of the list, as far as a grid can have so many; the rest they stride
// over. Fewer that stay, as many as the device holds at once, are slower by a twentieth.
template <typename Work>
cudaError_t LaunchOverBlocks(void (*kernel)(Work), uint64_t block_count, cudaStream_t stream,
                             const Work& work) {
  constexpr uint64_t kMost = 0x7FFFFFFF;
  if (block_count == 0) return cudaSuccess;
  return LaunchKernel(kernel, static_cast<unsigned>(block_count < kMost ? block_count : kMost),
                      kCudaThreads, stream, work);
}

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_OPTIM_CUDA_ELEMENTS_CUH_
