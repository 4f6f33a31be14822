#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <fstream>
#include <random>
#include <set>

#include "common/base/digest.h"
#include "common/base/state_layout.h"
#include "common/base/status.h"
#include "common/format/safetensors_writer.h"
#include "tests/common/allocation_meter.h"
#include "tests/common/format/test_files.h"

namespace modelstate {
namespace {

using testing::HasSubstr;

std::string Entry(const std::string& name, const std::string& dtype, const std::string& shape,
                  const std::string& offsets) {
  return "\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":" + shape +
         ",\"data_offsets\":" + offsets + "}";
}

TensorSpec Spec(std::string name, DType dtype, const std::vector<int64_t>& dims,
                std::string alias_of = "") {
  TensorSpec spec;
  spec.name = std::move(name);
  spec.dtype = dtype;
  spec.shape = *Shape::Create(dims);
  spec.alias_of = std::move(alias_of);
  return spec;
}

struct BadFile {
  std::string content;
  Reason reason;
  std::string text;
};

TEST(SafetensorsReaderTest, RefusesMalformedFiles) {
  const std::string ok = Entry("w", "U8", "[4]", "[0,4]");
  const std::string four = "abcd";
  ASSERT_EQ(OpenAndReadAll(Safetensors("{" + ok + "}", four)), absl::OkStatus());
  const auto header = [&](const std::string& json) { return Safetensors(json, four); };
  const Reason corrupt = Reason::kCheckpointCorrupt;
  const std::vector<BadFile> cases = {
      {"", corrupt, "at least 8 bytes"},
      {std::string("\x02\0\0", 3), corrupt, "at least 8 bytes"},
      {header(""), corrupt, "does not begin with"},
      {header(" {" + ok + "}"), corrupt, "does not begin with"},
      {header("\xef\xbb\xbf{" + ok + "}"), corrupt, "does not begin with"},
      {header("{" + ok), corrupt, "not JSON"},
      {header("{" + ok + "} x"), corrupt, "not JSON"},
      {header("{" + ok + "}{}"), corrupt, "not JSON"},
      {header("{" + ok + "}" + std::string(1, '\0') + "junk"), corrupt, "NUL"},
      {header("{" + ok + "," + ok + "}"), corrupt, "\"w\" occurs twice"},
      {header("{" + ok + "," + Entry("\\u0077", "U8", "[0]", "[4,4]") + "}"), corrupt,
       "\"w\" occurs twice"},
      {header("{" + Entry("", "U8", "[4]", "[0,4]") + "}"), corrupt, "is empty"},
      {header("{" + Entry("a\\u0000b", "U8", "[4]", "[0,4]") + "}"), corrupt, "NUL"},
      {header("{" + Entry("\\ud800", "U8", "[4]", "[0,4]") + "}"), corrupt, "not JSON"},
      {header("{" + Entry("\xff", "U8", "[4]", "[0,4]") + "}"), corrupt, "not JSON"},
      {header("{" + Entry("w", "U8", "[4.0]", "[0,4]") + "}"), corrupt, "fraction"},
      {header("{" + Entry("w", "U8", "[4]", "[0,4e0]") + "}"), corrupt, "fraction"},
      {header("{" + Entry("w", "U8", "[-4]", "[0,4]") + "}"), corrupt, "negative"},
      {header("{" + Entry("w", "U8", "[99999999999999999999]", "[0,4]") + "}"), corrupt, "2^64"},
      {header("{" + Entry("w", "U8", "[[4]]", "[0,4]") + "}"), corrupt, "an array"},
      {header("{" + Entry("w", "U8", "4", "[0,4]") + "}"), corrupt, "a number"},
      {header("{" + Entry("w", "U8", "[4]", "[0,4,4]") + "}"), corrupt, "more than two"},
      {header("{" + Entry("w", "U8", "[4]", "[4]") + "}"), corrupt, "two data_offsets"},
      {header("{" + Entry("w", "U8", "[4]", "[4,0]") + "}"), corrupt, "takes 4 bytes"},
      {header("{" + Entry("w", "U8", "[3]", "[0,4]") + "}"), corrupt, "takes 3 bytes"},
      {header("{" + Entry("w", "F32", "[2]", "[0,4]") + "}"), corrupt, "takes 8 bytes"},
      {header("{" + Entry("w", "U8", "[18446744073709551615,2,0]", "[0,0]") + "}"), corrupt,
       "2^63"},
      {header("{" + Entry("w", "U8", "[0,9223372036854775807,2]", "[0,0]") + "}"), corrupt,
       "overflows"},
      {header("{" + Entry("w", "U8", "[4]", "[1,5]") + "}"), corrupt, "no hole"},
      {header("{" + Entry("w", "U8", "[3]", "[0,3]") + "}"), corrupt, "trailing bytes"},
      {header("{" + Entry("w", "U8", "[5]", "[0,5]") + "}"), corrupt, "truncated"},
      {header("{" + Entry("v", "U8", "[2]", "[0,2]") + "," + Entry("w", "U8", "[3]", "[1,4]") +
              "}"),
       corrupt, "no overlap"},
      {header("{" + Entry("v", "U8", "[1]", "[0,1]") + "," + Entry("w", "U8", "[2]", "[2,4]") +
              "}"),
       corrupt, "no hole"},
      {header("{\"w\":{\"dtype\":\"U8\",\"shape\":[4]}}"), corrupt, "all of dtype"},
      {header("{\"w\":{\"dtype\":\"U8\",\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]}}"),
       corrupt, "dtype twice"},
      {header("{\"w\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4],\"x\":1}}"), corrupt,
       "unknown field \"x\""},
      {header("{\"w\":{\"dtype\":{},\"shape\":[4],\"data_offsets\":[0,4]}}"), corrupt, "an object"},
      {header("{\"w\":null}"), corrupt, "null"},
      {header("{\"w\":[]}"), corrupt, "an array"},
      {header("{\"__metadata__\":{\"a\":1}," + ok + "}"), corrupt, "strings only"},
      {header("{\"__metadata__\":{\"a\":{}}," + ok + "}"), corrupt, "strings only"},
      {header("{\"__metadata__\":[]," + ok + "}"), corrupt, "strings only"},
      {header("{\"__metadata__\":{\"a\":\"1\",\"a\":\"2\"}," + ok + "}"), corrupt, "twice"},
      {header("{\"__metadata__\":{},\"__metadata__\":{}," + ok + "}"), corrupt, "twice"},
      {header("{" + Entry("w", "F4", "[8]", "[0,4]") + "}"), Reason::kCheckpointUnsupported,
       "\"F4\""},
      {header("{" + Entry("w", "X9", "[4]", "[0,4]") + "}"), Reason::kCheckpointUnsupported,
       "does not know"},
      {header("{\"metadata\":{\"modelstate.kinds\":1}}"), corrupt, "unknown field"},
      {header("{\"__metadata__\":{\"modelstate.kinds\":\"[\"}," + ok + "}"), corrupt,
       "modelstate.kinds"},
      {header("{\"__metadata__\":{\"modelstate.xxh3\":\"{\\\"w\\\":\\\"12\\\"}\"}," + ok + "}"),
       corrupt, "modelstate.xxh3"},
  };
  for (const BadFile& bad : cases) {
    SCOPED_TRACE(bad.content);
    const absl::Status status = OpenAndReadAll(bad.content);
    EXPECT_EQ(GetReason(status), bad.reason) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(bad.text));
  }
}

TEST(SafetensorsReaderTest, DeepNestingIsRefused) {
  const std::string json = "{\"w\":" + std::string(1'000'000, '[');
  EXPECT_EQ(GetReason(OpenAndReadAll(Safetensors(json, ""))), Reason::kCheckpointCorrupt);
  std::string objects = "{\"__metadata__\":{\"modelstate.kinds\":\"";
  objects += std::string(500'000, '[') + "\"}}";
  EXPECT_EQ(GetReason(OpenAndReadAll(Safetensors(objects, ""))), Reason::kCheckpointCorrupt);
}

TEST(SafetensorsReaderTest, AcceptsLegalOddities) {
  for (const std::string& json : {
           std::string("{\"__metadata__\":null," + Entry("w", "U8", "[4]", "[0,4]") + "}"),
           std::string("{\"__metadata__\":{}," + Entry("w", "U8", "[4]", "[0,4]") + "}   "),
           std::string("{" + Entry("z", "F64", "[0,3]", "[0,0]") + "," +
                       Entry("w", "F32", "[]", "[0,4]") + "," + Entry("y", "U8", "[0]", "[4,4]") +
                       "}"),
           std::string("{" + Entry("b", "U8", "[2]", "[2,4]") + "," +
                       Entry("a", "U8", "[2]", "[0,2]") + "}"),
       }) {
    EXPECT_EQ(OpenAndReadAll(Safetensors(json, "abcd")), absl::OkStatus()) << json;
  }
  EXPECT_EQ(OpenAndReadAll(Safetensors("{}", "")), absl::OkStatus());
}

// The peak since ResetPeak; what is freed again counts too.
long PeakResidentKilobytes() {
  std::ifstream in("/proc/self/status");
  std::string word;
  long kilobytes = 0;
  while (in >> word) {
    if (word == "VmHWM:") in >> kilobytes;
  }
  EXPECT_GT(kilobytes, 0);
  return kilobytes;
}

void ResetPeak() {
  std::ofstream out("/proc/self/clear_refs");
  out << "5";
}

TEST(SafetensorsReaderTest, LyingHeaderSizeTakesNoMemory) {
  const std::string json = "{" + Entry("w", "U8", "[4]", "[0,4]") + "}";
  ASSERT_EQ(OpenAndReadAll(Safetensors(json, "abcd")), absl::OkStatus());
  ResetPeak();
  const long before = PeakResidentKilobytes();
  for (uint64_t lie : {uint64_t{1} << 40, uint64_t{99'999'999}, ~uint64_t{0}, uint64_t{1} << 63}) {
    const absl::Status status = OpenAndReadAll(LittleEndian(lie, 8) + json + "abcd");
    EXPECT_EQ(GetReason(status), Reason::kCheckpointCorrupt);
    EXPECT_THAT(std::string(status.message()), HasSubstr(std::to_string(lie)));
  }
  // A tensor that claims 1 TB.
  const std::string big = "{" + Entry("w", "U8", "[1099511627776]", "[0,1099511627776]") + "}";
  EXPECT_EQ(GetReason(OpenAndReadAll(Safetensors(big, "abcd"))), Reason::kCheckpointCorrupt);
  const long growth = PeakResidentKilobytes() - before;
  RecordProperty("resident_growth_kib", static_cast<int>(growth));
  EXPECT_LT(growth, 1024);
}

// What is short in the text and long in memory.
TEST(SafetensorsReaderTest, NoHeaderTakesMoreThanTenTimesItself) {
  constexpr int kTensors = 200'000;
  constexpr size_t kText = size_t{8} << 20;
  const auto repeated = [](const std::string& part) {
    std::string text;
    while (text.size() < kText) text += part;
    return text;
  };
  const auto metadata = [](const std::string& pairs) {
    return "{\"__metadata__\":{" + pairs + "}," + Entry("w", "U8", "[4]", "[0,4]") + "}";
  };
  std::string tensors = "{" + Entry("w", "U8", "[4]", "[0,4]");
  std::string pairs = "\"a\":\"\"";
  for (int i = 0; i < kTensors; ++i) {
    tensors += "," + Entry(std::to_string(i), "U8", "[0]", "[4,4]");
    pairs += ",\"" + std::to_string(i) + "\":\"\"";
  }
  struct Header {
    std::string json;
    size_t most;
    bool good;
  };
  const std::string kinds = "\"modelstate.kinds\":\"{\\\"frozen\\\":[],\\\"buffers\\\":[";
  std::vector<Header> headers = {
      {tensors + "}", 5 * tensors.size(), true},
      {metadata(pairs), size_t{32} << 20, true},
      {metadata(kinds + repeated("\\\"\\\",") + "\\\"w\\\"]}\""), 10 * kText, true},
      {metadata("\"modelstate.xxh3\":\"" + repeated("[") + "\""), 10 * kText, false},
      {"{" + Entry(repeated("{"), "U8", "[4]", "[0,4]") + "}", 10 * kText, true},
  };
  for (int i = kTensors; i < 300'000; ++i) pairs += ",\"" + std::to_string(i) + "\":\"\"";
  headers.push_back({metadata(pairs), size_t{64} << 20, false});
  for (const Header& header : headers) {
    SCOPED_TRACE(header.json.substr(0, 100));
    File file = MemoryFile(Safetensors(header.json, "abcd"));
    ResetPeakAllocation();
    const absl::Status status = OpenCheckpoint(std::move(file)).status();
    EXPECT_LE(PeakAllocation(), header.most);
    EXPECT_EQ(status.ok(), header.good) << status.ToString().substr(0, 300);
  }
}

TEST(SafetensorsReaderTest, TruncationAnywhereIsRefused) {
  const std::string whole = ReadWholeFile(DataPath("torch-2.15.0/dtypes.safetensors"));
  ASSERT_EQ(OpenAndReadAll(whole), absl::OkStatus());
  // Every byte of the header, and so more than 100 places in all.
  for (size_t size = 0; size < whole.size(); ++size) {
    const std::optional<Reason> reason = GetReason(OpenAndReadAll(whole.substr(0, size)));
    ASSERT_EQ(reason, Reason::kCheckpointCorrupt) << "cut at " << size;
  }
  const std::string real = ReadWholeFile(DataPath("silero-vad-16k.safetensors"));
  for (int i = 0; i < 100; ++i) {
    const size_t size = real.size() * static_cast<size_t>(i) / 100;
    ASSERT_EQ(GetReason(OpenBytes(real.substr(0, size)).status()), Reason::kCheckpointCorrupt);
  }
}

std::string Write(const std::vector<TensorSpec>& specs, const std::string& data,
                  const std::map<std::string, std::string>& metadata = {}) {
  const auto header = SafetensorsHeader(specs, StateLayout(specs), metadata);
  EXPECT_TRUE(header.ok()) << header.status();
  EXPECT_EQ(header->size() % 8, 0u);
  return *header + data;
}

TEST(SafetensorsWriterTest, WritesTheLiteralBytes) {
  const std::vector<TensorSpec> specs = {Spec("b", DType::kU8, {2}), Spec("a", DType::kF32, {1}),
                                         Spec("tied", DType::kF32, {1}, "a")};
  const std::string json =
      "{\"__metadata__\":{\"format\":\"pt\",\"tied\":\"a\"},"
      "\"b\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[4,6]},"
      "\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}";
  std::string padded = json;
  while (padded.size() % 8 != 0) padded += ' ';
  EXPECT_EQ(Write(specs, "", {{"format", "pt"}}), LittleEndian(padded.size(), 8) + padded);
}

TEST(SafetensorsWriterTest, KindsDigestsAndAliasesComeBack) {
  std::vector<TensorSpec> specs = {Spec("w", DType::kU8, {2}), Spec("frozen", DType::kU8, {1}),
                                   Spec("stat", DType::kU8, {1}),
                                   Spec("tied", DType::kU8, {2}, "w")};
  specs[1].requires_grad = false;
  specs[2].kind = TensorKind::kBuffer;
  const std::string data = "fsww";  // by name: frozen, stat, w
  const std::vector<uint64_t> digests = {Xxh3(AsBytes("ww")), Xxh3(AsBytes("f")),
                                         Xxh3(AsBytes("s")), 0};
  const std::map<std::string, std::string> metadata = {
      {kKindsMetadataKey, KindsMetadata(specs)},
      {kDigestsMetadataKey, DigestsMetadata(specs, digests)}};
  const std::string file = Write(specs, data, metadata);
  const auto reader = OpenBytes(file);
  ASSERT_TRUE(reader.ok()) << reader.status();
  const auto tensors = (*reader)->tensors();
  ASSERT_EQ(tensors.size(), 4u);
  EXPECT_EQ(tensors[0].name, "w");
  EXPECT_EQ(tensors[0].kind, TensorKind::kParameter);
  EXPECT_EQ(tensors[0].requires_grad, true);
  EXPECT_EQ(tensors[1].name, "tied");
  EXPECT_EQ(tensors[1].alias_of, "w");
  EXPECT_EQ(tensors[1].xxh3, digests[0]);
  EXPECT_EQ(tensors[2].requires_grad, false);
  EXPECT_EQ(tensors[3].kind, TensorKind::kBuffer);
  EXPECT_EQ(tensors[3].requires_grad, std::nullopt);
  EXPECT_EQ(OpenAndReadAll(file), absl::OkStatus());

  std::string flipped = file;
  flipped.back() ^= 1;
  const absl::Status status = OpenAndReadAll(flipped);
  EXPECT_EQ(GetReason(status), Reason::kDigestMismatch);
  EXPECT_THAT(std::string(status.message()), HasSubstr("\"w\""));
}

TEST(SafetensorsReaderTest, MetadataThatNamesNoEntryIsFreeText) {
  const std::string json =
      "{\"__metadata__\":{\"format\":\"pt\",\"note\":\"other\",\"w\":\"pt\",\"tied\":\"pt\"}," +
      Entry("w", "U8", "[2]", "[0,2]") + "," + Entry("pt", "U8", "[2]", "[2,4]") + "}";
  const auto reader = OpenBytes(Safetensors(json, "abcd"));
  ASSERT_TRUE(reader.ok()) << reader.status();
  ASSERT_EQ((*reader)->tensors().size(), 3u);
  EXPECT_EQ((*reader)->tensors()[2].name, "tied");
  EXPECT_EQ((*reader)->tensors()[2].alias_of, "pt");
  EXPECT_EQ((*reader)->metadata().at("note"), "other");
}

TEST(SafetensorsWriterTest, RefusesWhatTheFormatCannotHold) {
  const auto reason = [](const std::vector<TensorSpec>& specs,
                         const std::map<std::string, std::string>& metadata) {
    return GetReason(SafetensorsHeader(specs, StateLayout(specs), metadata).status());
  };
  const Reason no = Reason::kNotRepresentable;
  EXPECT_EQ(reason({Spec("\xff", DType::kU8, {1})}, {}), no);
  EXPECT_EQ(reason({Spec("", DType::kU8, {1})}, {}), no);
  EXPECT_EQ(reason({Spec("__metadata__", DType::kU8, {1})}, {}), no);
  EXPECT_EQ(reason({Spec("a", DType::kU8, {1})}, {{"k", "\xc3"}}), no);
  EXPECT_EQ(reason({Spec("a", DType::kU8, {1})}, {{"k", "a"}}), no);
  EXPECT_EQ(reason({Spec("a", DType::kU8, {1}), Spec("b", DType::kU8, {1}, "a")}, {{"b", "x"}}),
            no);
  EXPECT_EQ(reason({Spec(std::string(100'000'000, 'n'), DType::kU8, {1})}, {}), no);
  EXPECT_EQ(reason({Spec("a", DType::kU8, {1})}, {{"format", "pt"}}), std::nullopt);
}

TEST(SafetensorsWriterTest, RandomStatesRoundTrip) {
  for (uint32_t seed = 1; seed <= 200; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937 random(seed);
    const auto below = [&random](uint32_t n) { return random() % n; };
    std::vector<TensorSpec> specs;
    std::set<std::string> names;
    for (uint32_t i = below(20); i > 0; --i) {
      static const char* const kParts[] = {"layer", ".", "вес", "\"", "\\", "\n", " ", "0", "\x7f"};
      std::string name = "n";
      for (uint32_t j = below(6); j > 0; --j) name += kParts[below(std::size(kParts))];
      if (!names.insert(name).second) continue;
      std::vector<int64_t> dims;
      for (uint32_t j = below(4); j > 0; --j) dims.push_back(below(5));
      TensorSpec spec = Spec(name, kAllDTypes[below(std::size(kAllDTypes))], dims);
      if (!specs.empty() && below(5) == 0) {
        const TensorSpec owner = specs[below(static_cast<uint32_t>(specs.size()))];
        spec = owner;
        spec.name = name;
        spec.alias_of = owner.is_alias() ? owner.alias_of : owner.name;
      } else {
        spec.kind = below(2) == 0 ? TensorKind::kBuffer : TensorKind::kParameter;
        spec.requires_grad = spec.kind == TensorKind::kParameter && below(2) == 0;
      }
      specs.push_back(spec);
    }
    const StateLayout layout(specs);
    std::string data;
    for (uint64_t i = 0; i < layout.total_bytes(); ++i) data.push_back(static_cast<char>(random()));
    std::vector<uint64_t> digests;
    for (size_t i = 0; i < specs.size(); ++i) {
      digests.push_back(Xxh3(AsBytes(data.substr(layout.range(i).begin, layout.range(i).size()))));
    }
    const std::string file = Write(specs, data,
                                   {{"note", "free text"},
                                    {kKindsMetadataKey, KindsMetadata(specs)},
                                    {kDigestsMetadataKey, DigestsMetadata(specs, digests)}});
    const auto reader = OpenBytes(file);
    ASSERT_TRUE(reader.ok()) << reader.status();
    ASSERT_EQ((*reader)->tensors().size(), specs.size());
    std::vector<std::string> owners_written;
    std::vector<std::string> owners_read;
    for (const TensorSpec& spec : specs) {
      if (!spec.is_alias()) owners_written.push_back(spec.name);
    }
    for (size_t i = 0; i < specs.size(); ++i) {
      const StoredTensor& tensor = (*reader)->tensors()[i];
      size_t at = 0;
      while (at < specs.size() && specs[at].name != tensor.name) ++at;
      ASSERT_LT(at, specs.size()) << tensor.name;
      if (tensor.alias_of.empty()) owners_read.push_back(tensor.name);
      EXPECT_EQ(tensor.dtype, specs[at].dtype);
      EXPECT_EQ(tensor.shape, specs[at].shape);
      EXPECT_EQ(tensor.alias_of, specs[at].alias_of);
      EXPECT_EQ(tensor.kind, specs[at].kind);
      EXPECT_EQ(tensor.requires_grad.value_or(false), specs[at].requires_grad);
      EXPECT_EQ(tensor.xxh3, digests[at]);
      std::vector<uint8_t> bytes(tensor.nbytes());
      ASSERT_EQ((*reader)->Read(i, absl::MakeSpan(bytes)), absl::OkStatus());
      EXPECT_EQ(Xxh3(bytes), digests[at]);
    }
    EXPECT_EQ(owners_read, owners_written);  // state_dict order
  }
}

TEST(SafetensorsReaderTest, HundredThousandTensors) {
  std::vector<TensorSpec> specs;
  for (int i = 0; i < 100'000; ++i) {
    specs.push_back(Spec("model.layers." + std::to_string(i) + ".weight", DType::kU8, {1}));
  }
  const std::string file =
      Write(specs, std::string(100'000, 'x'), {{kKindsMetadataKey, KindsMetadata(specs)}});
  const auto begin = std::chrono::steady_clock::now();
  const auto reader = OpenBytes(file);
  const auto took = std::chrono::steady_clock::now() - begin;
  ASSERT_TRUE(reader.ok()) << reader.status();
  EXPECT_EQ((*reader)->tensors().size(), 100'000u);
  EXPECT_EQ((*reader)->tensors()[99'999].name, "model.layers.99999.weight");
  RecordProperty(
      "open_ms",
      static_cast<int>(std::chrono::duration_cast<std::chrono::milliseconds>(took).count()));
}

TEST(SafetensorsReaderTest, ReadChecksItsArguments) {
  const auto reader = OpenBytes(Safetensors("{" + Entry("w", "U8", "[4]", "[0,4]") + "}", "abcd"));
  ASSERT_TRUE(reader.ok());
  std::vector<uint8_t> bytes(3);
  EXPECT_EQ(GetReason((*reader)->Read(0, absl::MakeSpan(bytes))), Reason::kInvalidField);
  EXPECT_EQ(GetReason((*reader)->Read(1, absl::MakeSpan(bytes))), Reason::kInvalidField);
}

}  // namespace
}  // namespace modelstate
