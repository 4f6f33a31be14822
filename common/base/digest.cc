#include "common/base/digest.h"

#if defined(__x86_64__)
#include <xxh_x86dispatch.h>  // picks the widest vectors that the processor has
#else
#include <xxhash.h>
#endif

#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace modelstate {

uint64_t Xxh3(absl::Span<const uint8_t> bytes) { return XXH3_64bits(bytes.data(), bytes.size()); }

std::string Xxh3Hex128(absl::string_view bytes) {
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, XXH3_128bits(bytes.data(), bytes.size()));
  return absl::BytesToHexString(
      absl::string_view(reinterpret_cast<const char*>(canonical.digest), sizeof(canonical.digest)));
}

std::string DigestToHex(uint64_t digest) {
  return absl::StrCat(absl::Hex(digest, absl::kZeroPad16));
}

std::optional<uint64_t> DigestFromHex(absl::string_view hex) {
  uint64_t digest = 0;
  if (hex.size() != 16) return std::nullopt;
  for (char c : hex) {
    const bool digit = c >= '0' && c <= '9';
    const bool letter = c >= 'a' && c <= 'f';
    if (!digit && !letter) return std::nullopt;
    digest = digest * 16 + static_cast<uint64_t>(digit ? c - '0' : c - 'a' + 10);
  }
  return digest;
}

Xxh3Stream::Xxh3Stream() : state_(XXH3_createState()) { Reset(); }
Xxh3Stream::~Xxh3Stream() = default;
Xxh3Stream::Xxh3Stream(Xxh3Stream&&) noexcept = default;
Xxh3Stream& Xxh3Stream::operator=(Xxh3Stream&&) noexcept = default;

void Xxh3Stream::Free::operator()(XXH3_state_s* state) const { XXH3_freeState(state); }

void Xxh3Stream::Reset() { XXH3_64bits_reset(state_.get()); }

void Xxh3Stream::Update(absl::Span<const uint8_t> bytes) {
  XXH3_64bits_update(state_.get(), bytes.data(), bytes.size());
}

uint64_t Xxh3Stream::Digest() const { return XXH3_64bits_digest(state_.get()); }

}  // namespace modelstate
