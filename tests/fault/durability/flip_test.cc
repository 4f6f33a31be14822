// Flipped bits and torn files: a load is refused or equal, and takes no memory out of proportion.

#include <fcntl.h>
#include <unistd.h>

#include <cstdio>
#include <random>

#include "tests/common/allocation_meter.h"
#include "tests/common/format/test_files.h"
#include "tests/fault/durability/durability_fixture.h"

namespace modelstate::fault {
namespace {

constexpr uint32_t kSeed = 20240612;
constexpr size_t kSlack = size_t{16} << 20;

struct Counts {
  size_t refused = 0;
  size_t equal = 0;
};

class FlipTest : public DurabilityFixture {
 protected:
  static constexpr char kPath[] = "run/step";

  void SetUp() override {
    ASSERT_NO_FATAL_FAILURE(Train(200));
    ASSERT_TRUE(SaveState(1, kPath, false).ok());
    for (const char* name : {"model.safetensors", "optimizer.safetensors", "manifest.json"}) {
      files_[name] = ReadWhole(root_ / kPath / name);
      total_ += files_[name].size();
    }
    ASSERT_EQ(LoadedState(kPath), 1);
  }

  size_t HeaderBytes(const std::string& name) const {
    uint64_t size = 0;
    std::memcpy(&size, files_.at(name).data(), sizeof(size));
    return 8 + size;
  }

  // To the next byte of a header that is looked at: of the spaces that pad it, only some.
  size_t Stride(const std::string& name, size_t offset) const {
    return offset <= files_.at(name).find_last_of('}', HeaderBytes(name)) ? 1 : 61;
  }

  void Put(const std::string& name, size_t offset, char byte) const {
    const int fd = open((root_ / kPath / name).c_str(), O_WRONLY | O_CLOEXEC);
    EXPECT_EQ(pwrite(fd, &byte, 1, static_cast<off_t>(offset)), 1);
    close(fd);
  }

  // Loads over a module in training: it is refused and the module stays as it was, or becomes what
  // was saved.
  bool IsRefused() {
    const auto specs = trained_->Current()->schema->specs();
    auto module = MakeModule({specs.begin(), specs.end()});
    EXPECT_TRUE(Configure(*module, AdamW()).ok());
    const VersionRef before = module->Current();
    ResetPeakAllocation();
    const auto loaded = Load(*module, kPath);
    EXPECT_LT(PeakAllocation(), total_ + kSlack);
    if (!loaded.ok()) {
      EXPECT_TRUE(GetReason(loaded.status()).has_value()) << loaded.status();
      EXPECT_EQ(&*module->Current(), &*before);
      return true;
    }
    EXPECT_EQ(Fingerprint(*Capture(*module)), prints_[1]);
    return false;
  }

  // Flips `bits` of a byte, loads, and puts it right again.
  void Flip(const std::string& name, size_t offset, uint8_t bits, Counts* counts) {
    const char good = files_[name][offset];
    Put(name, offset, static_cast<char>(good ^ static_cast<char>(bits)));
    ++(IsRefused() ? counts->refused : counts->equal);
    Put(name, offset, good);
    if (HasFailure()) {
      FAIL() << name << ", byte " << offset << ", bits " << static_cast<int>(bits) << ", seed "
             << kSeed;
    }
  }

  std::map<std::string, std::string> files_;
  size_t total_ = 0;
};

TEST_F(FlipTest, AFlippedBitOfAHeaderIsAlwaysRefused) {
  for (const char* name : {"model.safetensors", "optimizer.safetensors"}) {
    Counts counts;
    for (size_t offset = 0; offset < HeaderBytes(name); offset += Stride(name, offset)) {
      for (size_t bit = 0; bit < 8; ++bit) {
        if (!IsFull() && bit != offset % 8) continue;
        ASSERT_NO_FATAL_FAILURE(Flip(name, offset, static_cast<uint8_t>(1U << bit), &counts));
      }
    }
    std::printf("header of %s: %zu flips refused\n", name, counts.refused);
    EXPECT_EQ(counts.equal, 0u);
  }
}

TEST_F(FlipTest, AFlippedBitOfThePayloadOrTheManifestIsAlwaysRefused) {
  std::mt19937 random(kSeed);
  Counts counts;
  const size_t rounds = IsFull() ? 10'000 : 1'000;
  for (size_t i = 0; i < rounds; ++i) {
    const std::string name = std::next(files_.begin(), static_cast<ptrdiff_t>(random() % 3))->first;
    const size_t first = name == "manifest.json" ? 0 : HeaderBytes(name);
    const size_t offset = first + random() % (files_[name].size() - first);
    ASSERT_NO_FATAL_FAILURE(Flip(name, offset, static_cast<uint8_t>(1U << random() % 8), &counts));
  }
  std::printf("%zu of %zu flips refused\n", counts.refused, rounds);
  EXPECT_EQ(counts.refused, rounds);
}

TEST_F(FlipTest, AFileThatIsCutOffAnywhereInItsHeaderOrAfterIsRefused) {
  size_t cuts = 0;
  for (const auto& [name, content] : files_) {
    const bool is_manifest = name == "manifest.json";
    for (size_t size = 0; size < content.size(); size += is_manifest ? 1
                                                         : size < HeaderBytes(name)
                                                             ? Stride(name, size)
                                                             : 97) {
      WriteWhole(root_ / kPath / name, content.substr(0, size));
      ++cuts;
      ASSERT_TRUE(IsRefused()) << name << " cut at " << size;
    }
    WriteWhole(root_ / kPath / name, content);
  }
  std::printf("%zu cuts refused\n", cuts);
}

// Plain files, in memory.
struct Tensor {
  std::string name;
  std::string dtype;
  std::vector<int64_t> shape;
  std::vector<uint8_t> bytes;
  bool operator==(const Tensor&) const = default;
};

absl::StatusOr<std::vector<Tensor>> ReadTensors(const std::string& content) {
  MS_ASSIGN_OR_RETURN(const auto reader, OpenBytes(content));
  std::vector<Tensor> tensors;
  for (size_t i = 0; i < reader->tensors().size(); ++i) {
    const StoredTensor& stored = reader->tensors()[i];
    Tensor& tensor = tensors.emplace_back();
    tensor.name = stored.name;
    tensor.dtype = std::string(stored.dtype_name());
    tensor.shape.assign(stored.shape.dims().begin(), stored.shape.dims().end());
    // Expanded views may be larger than the file; nobody needs them here.
    if (stored.nbytes() > (size_t{1} << 20)) continue;
    tensor.bytes.resize(stored.nbytes());
    MS_RETURN_IF_ERROR(reader->Read(i, absl::MakeSpan(tensor.bytes)));
  }
  return tensors;
}

// Random flips of a file; how many loads were refused, equal, and other than the good one.
struct PlainCounts {
  size_t refused = 0;
  size_t equal = 0;
  size_t other = 0;
};

PlainCounts FlipPlain(const std::string& good, size_t begin, size_t rounds) {
  const auto expected = ReadTensors(good);
  EXPECT_TRUE(expected.ok()) << expected.status();
  std::mt19937 random(kSeed);
  PlainCounts counts;
  for (size_t i = 0; i < rounds; ++i) {
    std::string bad = good;
    const size_t offset = begin + random() % (good.size() - begin);
    bad[offset] = static_cast<char>(bad[offset] ^ static_cast<char>(1U << random() % 8));
    ResetPeakAllocation();
    const auto read = ReadTensors(bad);
    EXPECT_LT(PeakAllocation(), good.size() + kSlack) << "byte " << offset;
    if (!read.ok()) {
      EXPECT_TRUE(GetReason(read.status()).has_value()) << read.status();
      ++counts.refused;
    } else {
      ++(*read == *expected ? counts.equal : counts.other);
    }
  }
  return counts;
}

TEST_F(FlipTest, AFlippedBitOfAPlainFileIsSeenWhereTheFormatHasADigest) {
  const size_t rounds = IsFull() ? 10'000 : 1'000;
  const auto report = [](const char* what, const PlainCounts& counts) {
    std::printf("%s: %zu refused, %zu equal, %zu other\n", what, counts.refused, counts.equal,
                counts.other);
  };
  const PlainCounts ours =
      FlipPlain(files_["model.safetensors"], HeaderBytes("model.safetensors"), rounds);
  report("safetensors of ours, payload", ours);
  EXPECT_EQ(ours.refused, rounds);

  report("safetensors of ours, everywhere", FlipPlain(files_["model.safetensors"], 0, rounds));

  const PlainCounts zip =
      FlipPlain(ReadWholeFile(DataPath("torch-2.15.0/batchnorm.pt")), 0, rounds);
  report("torch zip", zip);
  EXPECT_EQ(zip.other, 0u);

  // Has neither digests nor CRCs.
  report("torch legacy", FlipPlain(Legacy().Text(), 0, rounds));
}

}  // namespace
}  // namespace modelstate::fault
