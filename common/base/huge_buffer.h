#ifndef MODELSTATE_COMMON_BASE_HUGE_BUFFER_H_
#define MODELSTATE_COMMON_BASE_HUGE_BUFFER_H_

#include <cstddef>
#include <cstdint>
#include <utility>

namespace modelstate {

inline constexpr size_t kHugePageBytes = size_t{2} << 20;

// `bytes` of new memory, zero, that begins at a huge page and consists of them where the kernel has
// some. Null where there is no room. Memory of the heap may have been split into small pages before
// it is asked for, and then stays so. Thread-safe.
void* MapHugePages(size_t bytes);
void UnmapHugePages(void* memory, size_t bytes);  // what MapHugePages returned for `bytes`

// Owns such memory, which suits O_DIRECT: a disk takes 4 MiB of it in two pieces, and of small
// pages in a thousand. Thread-compatible.
class HugeBuffer {
 public:
  HugeBuffer() = default;
  explicit HugeBuffer(size_t bytes)
      : data_(static_cast<uint8_t*>(MapHugePages(bytes))), bytes_(bytes) {}
  ~HugeBuffer() { Reset(); }
  HugeBuffer(HugeBuffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}
  HugeBuffer& operator=(HugeBuffer&& other) noexcept {
    if (this == &other) return *this;
    Reset();
    data_ = std::exchange(other.data_, nullptr);
    bytes_ = other.bytes_;
    return *this;
  }

  uint8_t* data() const { return data_; }  // null: none was asked for, or there was no room

 private:
  void Reset() {
    if (data_ != nullptr) UnmapHugePages(std::exchange(data_, nullptr), bytes_);
  }

  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_BASE_HUGE_BUFFER_H_
