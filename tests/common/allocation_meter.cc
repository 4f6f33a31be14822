#include "tests/common/allocation_meter.h"

#include <malloc.h>

#include <atomic>
#include <cstdlib>
#include <new>

namespace {

std::atomic<size_t> held{0};
std::atomic<size_t> held_at_reset{0};
std::atomic<size_t> peak{0};

void* Allocate(size_t size) {
  void* place = std::malloc(size);
  if (place == nullptr) throw std::bad_alloc();
  const size_t bytes = malloc_usable_size(place);
  const size_t now = held.fetch_add(bytes, std::memory_order_relaxed) + bytes;
  size_t seen = peak.load(std::memory_order_relaxed);
  while (now > seen && !peak.compare_exchange_weak(seen, now, std::memory_order_relaxed)) {
  }
  return place;
}

void Free(void* place) {
  held.fetch_sub(malloc_usable_size(place), std::memory_order_relaxed);
  std::free(place);
}

}  // namespace

void* operator new(size_t size) { return Allocate(size); }
void* operator new[](size_t size) { return Allocate(size); }
void operator delete(void* place) noexcept { Free(place); }
void operator delete[](void* place) noexcept { Free(place); }
void operator delete(void* place, size_t) noexcept { Free(place); }
void operator delete[](void* place, size_t) noexcept { Free(place); }

namespace modelstate {

void ResetPeakAllocation() {
  held_at_reset = held.load();
  peak = held.load();
}

size_t PeakAllocation() {
  const size_t most = peak.load();
  const size_t before = held_at_reset.load();
  return most > before ? most - before : 0;
}

}  // namespace modelstate
