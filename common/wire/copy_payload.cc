#include "common/wire/copy_payload.h"

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace modelstate {

#if defined(__x86_64__)
namespace {

constexpr size_t kLine = 64;
// What is shorter is a small tensor, soon read again, or the rest of a slice.
constexpr size_t kStreamFrom = 4096;

// Whole lines to an aligned place. A line that is written by one instruction never leaves half
// full; in a receiver that costs a tenth of the throughput.
using StreamLines = void (*)(uint8_t* to, const uint8_t* from, size_t size);

void StreamLinesV2(uint8_t* to, const uint8_t* from, size_t size) {
  for (size_t i = 0; i < size; i += sizeof(__m128i)) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
  }
}

[[gnu::target("avx2")]] void StreamLinesV3(uint8_t* to, const uint8_t* from, size_t size) {
  for (size_t i = 0; i < size; i += sizeof(__m256i)) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
  }
}

[[gnu::target("avx512f")]] void StreamLinesV4(uint8_t* to, const uint8_t* from, size_t size) {
  for (size_t i = 0; i < size; i += sizeof(__m512i)) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
  }
}

StreamLines BestStreamLines() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) return StreamLinesV4;
  if (__builtin_cpu_supports("avx2")) return StreamLinesV3;
  return StreamLinesV2;
}

}  // namespace

void CopyPayload(uint8_t* destination, const uint8_t* source, size_t size) {
  if (size >= kStreamFrom) {
    static const StreamLines stream_lines = BestStreamLines();
    const size_t head = -reinterpret_cast<uintptr_t>(destination) % kLine;
    std::memcpy(destination, source, head);
    const size_t lines = (size - head) / kLine * kLine;
    stream_lines(destination + head, source + head, lines);
    _mm_sfence();
    destination += head + lines;
    source += head + lines;
    size -= head + lines;
  }
  std::memcpy(destination, source, size);
}
#else
void CopyPayload(uint8_t* destination, const uint8_t* source, size_t size) {
  std::memcpy(destination, source, size);
}
#endif

}  // namespace modelstate
