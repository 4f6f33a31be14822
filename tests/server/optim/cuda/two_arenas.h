#ifndef MODELSTATE_TESTS_SERVER_OPTIM_CUDA_TWO_ARENAS_H_
#define MODELSTATE_TESTS_SERVER_OPTIM_CUDA_TWO_ARENAS_H_

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/base/dtype.h"
#include "common/base/float_cast.h"
#include "common/base/status.h"
#include "server/device/cuda/cuda_memory.h"
#include "server/device/cuda/cuda_status.h"
#include "server/device/cuda/cuda_stream.h"

namespace modelstate {

// The same tensors at the same offsets of host and GPU memory, so that all that a kernel wrote can
// be compared with what the CPU wrote, and what it should not have written too.
class TwoArenas {
 public:
  static constexpr uint8_t kGuard = 0xA5;

  // Reserves a tensor that begins `shift` bytes after a multiple of 256; returns its offset.
  uint64_t Add(DType dtype, uint64_t elements, uint64_t shift) {
    const uint64_t offset = size_ + shift;
    regions_.push_back({offset, dtype, elements});
    size_ = (offset + elements * DTypeSize(dtype) + 64 + 255) / 256 * 256;
    return offset;
  }

  absl::Status Allocate() {
    host_.assign(size_ + 256, kGuard);
    base_ = host_.data() + (256 - reinterpret_cast<uintptr_t>(host_.data()) % 256) % 256;
    MS_ASSIGN_OR_RETURN(device_, CudaMemory::Allocate(0, size_));
    return absl::OkStatus();
  }

  uint8_t* host() { return base_; }
  uint8_t* device() { return device_.data(); }

  absl::Status Upload(const CudaStream& stream) {
    MS_RETURN_IF_ERROR(CudaStatus(
        cudaMemcpyAsync(device_.data(), base_, size_, cudaMemcpyHostToDevice, stream.handle()),
        "upload the arena"));
    return stream.Synchronize();
  }

  // What differs between both, in words; empty: nothing. A NaN equals any other.
  std::string Compare(const CudaStream& stream) {
    std::vector<uint8_t> there(size_);
    absl::Status status = CudaStatus(cudaMemcpyAsync(there.data(), device_.data(), size_,
                                                     cudaMemcpyDeviceToHost, stream.handle()),
                                     "download the arena");
    if (status.ok()) status = stream.Synchronize();
    if (!status.ok()) return std::string(status.message());
    if (std::memcmp(there.data(), base_, size_) == 0) return "";
    std::vector<uint8_t> here(base_, base_ + size_);
    for (const Region& region : regions_) {
      const size_t width = DTypeSize(region.dtype);
      for (uint64_t i = 0; i < region.elements; ++i) {
        const uint64_t at = region.offset + i * width;
        if (std::memcmp(&here[at], &there[at], width) == 0) continue;
        if (!IsNan(region.dtype, &here[at]) || !IsNan(region.dtype, &there[at])) {
          return absl::StrCat(DTypeName(region.dtype), " tensor of ", region.elements,
                              " elements at offset ", region.offset, ", element ", i, ": ",
                              Hex(&here[at], width), " on the CPU, ", Hex(&there[at], width),
                              " on the GPU");
        }
        std::memcpy(&there[at], &here[at], width);
      }
    }
    for (uint64_t at = 0; at < size_; ++at) {
      if (here[at] != there[at]) return absl::StrCat("byte ", at, ", which is in no tensor");
    }
    return "";
  }

 private:
  struct Region {
    uint64_t offset;
    DType dtype;
    uint64_t elements;
  };

  static std::string Hex(const uint8_t* data, size_t width) {
    std::string text = "0x";
    for (size_t i = width; i-- > 0;) absl::StrAppend(&text, absl::Hex(data[i], absl::kZeroPad2));
    return text;
  }

  static bool IsNan(DType dtype, const uint8_t* data) {
    switch (dtype) {
      case DType::kF64: {
        double value;
        std::memcpy(&value, data, sizeof(value));
        return value != value;
      }
      case DType::kF32: {
        float value;
        std::memcpy(&value, data, sizeof(value));
        return value != value;
      }
      case DType::kF16:
      case DType::kBF16: {
        uint16_t bits;
        std::memcpy(&bits, data, sizeof(bits));
        const float value = dtype == DType::kF16 ? HalfToFloat(bits) : BFloat16ToFloat(bits);
        return value != value;
      }
      case DType::kF8E4M3:
        return F8E4M3ToFloat(*data) != F8E4M3ToFloat(*data);
      default:
        return F8E5M2ToFloat(*data) != F8E5M2ToFloat(*data);
    }
  }

  std::vector<Region> regions_;
  uint64_t size_ = 0;
  std::vector<uint8_t> host_;
  uint8_t* base_ = nullptr;
  CudaMemory device_;
};

// Numbers of many magnitudes, zeros and subnormals among them; the same for the same seed.
class Numbers {
 public:
  explicit Numbers(uint64_t seed) : state_(seed * 2 + 1) {}

  double Next() {
    const uint64_t bits = Bits();
    if (bits % 61 == 0) return 0;
    const double unit = static_cast<double>(bits >> 11) * 0x1p-53 * 2 - 1;
    if (bits % 97 == 0) return unit * 1e-40;
    static constexpr double kScales[] = {1, 1, 1, 0.1, 1e-2, 1e-3, 1e-5, 30};
    return unit * kScales[(bits >> 3) % 8];
  }

  void Fill(DType dtype, uint64_t elements, double scale, uint8_t* to) {
    for (uint64_t i = 0; i < elements; ++i) Store(dtype, Next() * scale, to, i);
  }

  static void Store(DType dtype, double value, uint8_t* to, uint64_t i) {
    const float narrow = static_cast<float>(value);
    const auto store = [&](auto stored) {
      std::memcpy(to + i * sizeof(stored), &stored, sizeof(stored));
    };
    switch (dtype) {
      case DType::kF64:
        return store(value);
      case DType::kF32:
        return store(narrow);
      case DType::kF16:
        return store(FloatToHalf(narrow));
      case DType::kBF16:
        return store(FloatToBFloat16(narrow));
      case DType::kF8E4M3:
        return store(FloatToF8E4M3(narrow));
      default:
        return store(FloatToF8E5M2(narrow));
    }
  }

 private:
  uint64_t Bits() {  // splitmix64
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  uint64_t state_;
};

}  // namespace modelstate

#endif  // MODELSTATE_TESTS_SERVER_OPTIM_CUDA_TWO_ARENAS_H_
