#include "tests/common/allocation_meter.h"

#include <malloc.h>

#include <atomic>
#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#define MODELSTATE_ADDRESS_SANITIZER
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define MODELSTATE_ADDRESS_SANITIZER
#endif
#endif
#ifdef MODELSTATE_ADDRESS_SANITIZER
#include <sanitizer/allocator_interface.h>
#endif

namespace {

std::atomic<size_t> held{0};
std::atomic<size_t> held_at_reset{0};
std::atomic<size_t> peak{0};

void Count(size_t bytes) {
  const size_t now = held.fetch_add(bytes, std::memory_order_relaxed) + bytes;
  size_t seen = peak.load(std::memory_order_relaxed);
  while (now > seen && !peak.compare_exchange_weak(seen, now, std::memory_order_relaxed)) {
  }
}

#ifdef MODELSTATE_ADDRESS_SANITIZER

// Its own operator new tells what is freed in another way than it was made, so that one stays.
[[maybe_unused]] const int hooks = __sanitizer_install_malloc_and_free_hooks(
    [](const volatile void*, size_t size) { Count(size); },
    [](const volatile void* place) {
      held.fetch_sub(__sanitizer_get_allocated_size(place), std::memory_order_relaxed);
    });

#else

void* Allocate(size_t size) {
  void* place = std::malloc(size);
  if (place == nullptr) throw std::bad_alloc();
  Count(malloc_usable_size(place));
  return place;
}

void Free(void* place) {
  held.fetch_sub(malloc_usable_size(place), std::memory_order_relaxed);
  std::free(place);
}

#endif

}  // namespace

#ifndef MODELSTATE_ADDRESS_SANITIZER
void* operator new(size_t size) { return Allocate(size); }
void* operator new[](size_t size) { return Allocate(size); }
void operator delete(void* place) noexcept { Free(place); }
void operator delete[](void* place) noexcept { Free(place); }
void operator delete(void* place, size_t) noexcept { Free(place); }
void operator delete[](void* place, size_t) noexcept { Free(place); }
#endif

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
