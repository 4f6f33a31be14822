#ifndef MODELSTATE_COMMON_BASE_DIGEST_H_
#define MODELSTATE_COMMON_BASE_DIGEST_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"

struct XXH3_state_s;

namespace modelstate {

// XXH3 with 64 bits and seed 0 over the bytes of a tensor: https://xxhash.com. It finds accidents,
// not attackers.
uint64_t Xxh3(absl::Span<const uint8_t> bytes);

// XXH3 with 128 bits as 32 lower-case hex digits, the canonical big-endian form.
std::string Xxh3Hex128(absl::string_view bytes);

// 16 lower-case hex digits, as `xxhsum -H3` prints, and back; nullopt for any other text.
std::string DigestToHex(uint64_t digest);
std::optional<uint64_t> DigestFromHex(absl::string_view hex);

// The same digest as Xxh3, fed piece by piece. Thread-compatible.
class Xxh3Stream {
 public:
  Xxh3Stream();
  ~Xxh3Stream();
  Xxh3Stream(Xxh3Stream&&) noexcept;
  Xxh3Stream& operator=(Xxh3Stream&&) noexcept;

  void Reset();
  void Update(absl::Span<const uint8_t> bytes);
  uint64_t Digest() const;

 private:
  struct Free {
    void operator()(XXH3_state_s* state) const;
  };
  std::unique_ptr<XXH3_state_s, Free> state_;
};

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_BASE_DIGEST_H_
