#ifndef MODELSTATE_BENCH_PAYLOAD_H_
#define MODELSTATE_BENCH_PAYLOAD_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "client/client.h"

namespace modelstate {

// F32 parameters of 4 B to 64 MiB in turn, `bytes` in all (rounded down to 4).
std::vector<TensorSpec> MixedTensors(uint64_t bytes);
// `count` F32 parameters of `bytes_each`.
std::vector<TensorSpec> EqualTensors(uint64_t count, uint64_t bytes_each);

// What a benchmark sends: tensors with elements that tell their place, all finite, in one buffer
// laid out as the data region of a snapshot.
class Payload {
 public:
  explicit Payload(std::vector<TensorSpec> specs);

  const std::vector<TensorSpec>& specs() const { return specs_; }
  absl::Span<const uint8_t> bytes() const;
  std::vector<client::TensorRef> Tensors(TensorKind kind) const;
  // Ends the program when `received` are not these bytes.
  void Check(absl::Span<const uint8_t> received, const char* what) const;

 private:
  std::vector<TensorSpec> specs_;
  std::vector<uint64_t> offsets_;
  std::vector<uint32_t> words_;
};

}  // namespace modelstate

#endif  // MODELSTATE_BENCH_PAYLOAD_H_
