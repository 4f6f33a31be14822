#include "bench/model_file.h"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>

#include "absl/strings/str_cat.h"
#include "bench/support.h"
#include "common/base/digest.h"
#include "common/base/state_layout.h"
#include "common/format/safetensors_writer.h"

namespace modelstate {

std::vector<TensorSpec> TransformerSpecs(uint64_t bytes) {
  constexpr uint64_t kSizes[] = {64 << 20, 16 << 20, 16 << 20, 4 << 20, 1 << 20, 16 << 10, 4 << 10};
  std::vector<TensorSpec> specs;
  uint64_t sum = 0;
  for (size_t i = 0; sum < bytes; ++i) {
    const uint64_t size = std::min(kSizes[i % std::size(kSizes)], bytes - sum);
    TensorSpec& spec = specs.emplace_back();
    spec.name = absl::StrCat("layer", i / std::size(kSizes), ".part", i % std::size(kSizes));
    spec.shape = OrDie(Shape::Create({static_cast<int64_t>(size / sizeof(float))}));
    sum += size;
  }
  return specs;
}

void WriteModelFile(const std::string& path, const std::vector<TensorSpec>& specs,
                    bool with_digests) {
  const StateLayout layout(specs);
  std::vector<uint8_t> data(layout.total_bytes());
  uint64_t state = 1;
  for (size_t i = 0; i + 8 <= data.size(); i += 8) {
    state = state * 6364136223846793005U + 1442695040888963407U;
    std::memcpy(data.data() + i, &state, sizeof(state));
  }
  std::map<std::string, std::string> metadata = {{"format", "pt"}};
  if (with_digests) {
    std::vector<uint64_t> digests;
    for (size_t i = 0; i < specs.size(); ++i) {
      const ByteRange range = layout.range(i);
      digests.push_back(Xxh3(absl::MakeConstSpan(data).subspan(range.begin, range.size())));
    }
    metadata.emplace(kDigestsMetadataKey, DigestsMetadata(specs, digests));
  }
  const std::string header = OrDie(SafetensorsHeader(specs, layout, metadata));
  std::ofstream file(path, std::ios::binary);
  file.write(header.data(), static_cast<std::streamsize>(header.size()));
  file.write(reinterpret_cast<const char*>(data.data()), static_cast<std::streamsize>(data.size()));
}

}  // namespace modelstate
