#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <thread>

#include "absl/strings/escaping.h"
#include "common/base/status.h"
#include "common/format/pickle.h"
#include "tests/common/allocation_meter.h"
#include "tests/common/format/test_files.h"

namespace modelstate {
namespace {

using testing::HasSubstr;

constexpr Reason kCorrupt = Reason::kCheckpointCorrupt;
constexpr Reason kUnsupported = Reason::kCheckpointUnsupported;

std::string Floats(const std::vector<float>& values) {
  std::string text(values.size() * 4, '\0');
  std::memcpy(text.data(), values.data(), text.size());
  return text;
}

TEST(TorchZipTest, RefusesMalformedArchives) {
  const std::string pickle = PickledStateDict({});
  const std::string data(16, 'x');
  ASSERT_EQ(OpenAndReadAll(TorchZip(pickle, data)), absl::OkStatus());
  const auto changed = [&](size_t entry, auto change) {
    std::vector<ZipEntry> entries = TorchEntries(pickle, data);
    change(entries[entry]);
    return Zip(entries);
  };
  ExpectError(changed(1, [](ZipEntry& e) { e.method = 8; }), kUnsupported, "compressed");
  ExpectError(changed(1, [](ZipEntry& e) { e.flags |= 1; }), kUnsupported, "encrypted");
  ExpectError(changed(1, [](ZipEntry& e) { e.crc ^= 1; }), kCorrupt, "CRC");
  ExpectError(changed(1, [](ZipEntry& e) { e.crc = 0; }), kCorrupt, "CRC");
  ExpectError(changed(0, [](ZipEntry& e) { e.crc ^= 1; }), kCorrupt, "data.pkl");
  ExpectError(changed(1, [](ZipEntry& e) { e.data[3] ^= 1; }), kCorrupt, "CRC");
  ExpectError(changed(1, [](ZipEntry& e) { e.local_name = "archive/data/1"; }), kCorrupt,
              "another name");
  ExpectError(changed(1, [](ZipEntry& e) { e.local_name = "archive/data/00"; }), kCorrupt,
              "another name");
  ExpectError(changed(1, [](ZipEntry& e) { e.stored_size = 15; }), kCorrupt, "two sizes");
  ExpectError(changed(1, [](ZipEntry& e) { e.size = e.stored_size = 1u << 30; }), kCorrupt,
              "reaches past");
  ExpectError(changed(1, [](ZipEntry& e) { e.size = e.stored_size = 60; }), kCorrupt, "overlap");
  ExpectError(changed(1, [](ZipEntry& e) { e.size = e.stored_size = 8; }), kCorrupt, "has 8");
  ExpectError(changed(1, [](ZipEntry& e) { e.header_shift = -1; }), kCorrupt, "local header");
  ExpectError(changed(1, [](ZipEntry& e) { e.header_shift = 1 << 30; }), kCorrupt, "outside");
  ExpectError(changed(1, [](ZipEntry& e) { e.name = e.local_name = "other/data/0"; }), kUnsupported,
              "several top folders");
  ExpectError(changed(1, [](ZipEntry& e) { e.name = e.local_name = "0"; }), kUnsupported,
              "no folder");
  ExpectError(changed(1, [](ZipEntry& e) { e.name = e.local_name = "archive/data/5"; }), kCorrupt,
              "no record data/\"0\"");
  ExpectError(changed(0, [](ZipEntry& e) { e.name = e.local_name = "archive/other"; }),
              kUnsupported, "no data.pkl");
  std::vector<ZipEntry> twice = TorchEntries(pickle, data);
  twice.push_back(twice[1]);
  ExpectError(Zip(twice), kCorrupt, "twice");
  std::vector<ZipEntry> version = TorchEntries(pickle, data);
  version[2] = ZipEntry("archive/version", "11\n");
  ExpectError(Zip(version), kUnsupported, "format version");
  version.pop_back();
  ExpectError(Zip(version), kUnsupported, "format version");
  ExpectError(Zip({}), kUnsupported, "no data.pkl");
  ExpectError(TorchZip(pickle, data) + "x", kCorrupt, "no end record");
}

TEST(TorchZipTest, AnArchiveWithoutAnyCrcIsRead) {
  std::vector<ZipEntry> entries = TorchEntries(PickledStateDict({}), std::string(16, 'x'));
  for (ZipEntry& entry : entries) entry.crc = 0;
  EXPECT_EQ(OpenAndReadAll(Zip(entries)), absl::OkStatus());
}

TEST(TorchZipTest, TruncationAnywhereIsRefused) {
  const std::string small = ReadWholeFile(DataPath("torch-2.15.0/batchnorm.pt"));
  for (size_t size = 0; size < small.size(); ++size) {
    ASSERT_EQ(GetReason(OpenAndReadAll(small.substr(0, size))), kCorrupt) << "cut at " << size;
  }
  const std::string real = ReadWholeFile(DataPath("crepe-tiny.pth"));
  for (int i = 0; i < 100; ++i) {
    const size_t size = real.size() * static_cast<size_t>(i) / 100;
    ASSERT_EQ(GetReason(OpenBytes(real.substr(0, size)).status()), kCorrupt) << "cut at " << size;
  }
}

TEST(TorchZipTest, BigEndianFilesAreSwapped) {
  std::vector<ZipEntry> entries = TorchEntries(
      PickledStateDict({}), std::string("\x3f\x80\0\0\x40\0\0\0\xc0\x40\0\0\0\0\0\0", 16));
  entries.emplace_back("archive/byteorder", "big");
  const auto reader = OpenBytes(Zip(entries));
  ASSERT_TRUE(reader.ok()) << reader.status();
  EXPECT_EQ(ReadFloats(**reader, 0), (std::vector<float>{1, 2, -3, 0}));
  entries.back() = ZipEntry("archive/byteorder", "pdp");
  ExpectError(Zip(entries), kCorrupt, "byteorder");
}

std::string Evil(const std::string& body) { return TorchZip("\x80\x02" + body); }

TEST(TorchZipTest, APickleThatNamesOsSystemIsNamedAndNotRun) {
  for (const char* module : {"os", "posix"}) {
    const std::string body =
        "c" + std::string(module) + "\nsystem\n" + PickleString("exit 1") + "\x85R.";
    const absl::Status status = OpenAndReadAll(Evil(body));
    EXPECT_EQ(GetReason(status), kUnsupported) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(std::string(module) + ".system"));
    EXPECT_EQ(GetErrorMetadata(status)["global"], std::string(module) + ".system");
  }
  // A name split in another place, or in a state_dict that nobody asks for.
  ExpectError(Evil("cos.system\n\n."), kUnsupported, "os.system");
  ExpectError(Evil("}(" + PickleString("x") + "cbuiltins\neval\n" + PickleString("w") +
                   Pickle(PickledTensor()) + "u."),
              kUnsupported, "builtins.eval");
  ExpectError(Evil("ctorch.storage\nUntypedStorage\n" + PickleInt(int64_t{1} << 36) + "\x85R."),
              kUnsupported, "calls torch.storage UntypedStorage");
  ExpectError(Evil("ctorch\nFloatStorage\n)\x81."), kUnsupported, "calls torch FloatStorage");
}

TEST(TorchZipTest, RefusesMalformedPickles) {
  struct Case {
    std::string body;
    Reason reason;
    std::string text;
  };
  const std::vector<Case> cases = {
      {"", kCorrupt, "STOP"},
      {"}", kCorrupt, "STOP"},
      {"}.}", kCorrupt, "goes on"},
      {"}}.", kCorrupt, "one object"},
      {"(}.", kCorrupt, "one object"},
      {".", kCorrupt, "one object"},
      {"t.", kCorrupt, "MARK"},
      {"\x85.", kCorrupt, "empty stack"},
      {"(\x85.", kCorrupt, "empty stack"},
      {"}(R.", kCorrupt, "empty stack"},
      {"})R.", kCorrupt, "no function"},
      {"ccollections\nOrderedDict\n}R.", kCorrupt, "no function"},
      {"ccollections\nOrderedDict\n}\x85R.", kCorrupt, "list of pairs"},
      {"ccollections\nOrderedDict", kCorrupt, "line"},
      {"](" + PickleString("a") + PickleString("b") + "u.", kCorrupt, "adds items to a list"},
      {")" + PickleString("a") + PickleString("b") + "s.", kCorrupt, "adds items to a tuple"},
      {"}" + PickleString("a") + "a.", kCorrupt, "adds items to a dict"},
      {"}(" + PickleString("a") + "u.", kCorrupt, "without a value"},
      {"h\x05.", kCorrupt, "recalls"},
      {"}r" + LittleEndian(0xFFFFFFF0, 4) + ".", kCorrupt, "memo"},
      {"q" + std::string(1, '\0') + ".", kCorrupt, "empty stack"},
      {"X" + LittleEndian(0xFFFFFFFF, 4) + "ab.", kCorrupt, "cut off"},
      {"X" + LittleEndian(1, 4) + "\xff.", kCorrupt, "UTF-8"},
      {"J" + std::string(2, '\0'), kCorrupt, "cut off"},
      {"\x8a\xff" + std::string(3, '\0'), kCorrupt, "cut off"},
      {"]b.", kCorrupt, "empty stack"},
      {"]}b.", kCorrupt, "sets attributes"},
      {PickleString("x") + "Q.", kCorrupt, "persistent id"},
      {"(" + PickleString("storage") + "tQ.", kCorrupt, "persistent id"},
      {"\x95" + LittleEndian(0, 8) + ".", kUnsupported, "0x95"},
      {"\x80\x04}.", kUnsupported, "protocol 4"},
      {"I1\n.", kUnsupported, "0x49"},
      {"N.", kUnsupported, "None"},
      {PickleInt(3) + ".", kUnsupported, "an int"},
      {"}(" + PickleInt(1) + Pickle(PickledTensor()) + "u.", kUnsupported, "as a key"},
      {"}(" + PickleString("w") + Pickle(PickledTensor()) + PickleString("w") +
           Pickle(PickledTensor()) + "u.",
       kCorrupt, "twice"},
      {"}(" + PickleString("") + Pickle(PickledTensor()) + "u.", kUnsupported, "is empty"},
      {std::string(100'000, '('), kUnsupported, "deep"},
      {")" + std::string(100'000, '\x85') + ".", kUnsupported, "deep"},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(testing::PrintToString(c.body.substr(0, 80)));
    ExpectError(Evil(c.body), c.reason, c.text);
  }
}

TEST(TorchZipTest, SelfReferencesEnd) {
  // A dict that is its own "model", and a list in itself.
  ExpectError(
      Evil("}q" + std::string(1, '\0') + PickleString("model") + "h" + std::string(1, '\0') + "s."),
      kUnsupported, "no state_dict");
  ExpectError(Evil("]q" + std::string(1, '\0') + "h" + std::string(1, '\0') + "a."), kUnsupported,
              "a list");
  ExpectError(
      Evil("}q" + std::string(1, '\0') + PickleString("a") + "h" + std::string(1, '\0') + "s."),
      kUnsupported, "has no \"b\"", "a.a.a.a.b");
}

TEST(TorchZipTest, RefusesTensorsThatLieAboutTheirStorage) {
  const auto expect = [](const PickledTensor& tensor, Reason reason, const std::string& text) {
    ExpectError(TorchZip(PickledStateDict(tensor)), reason, text);
  };
  PickledTensor t;
  t.count = 5;
  expect(t, kCorrupt, "has 20 bytes by the pickle");
  t.count = -1;
  expect(t, kCorrupt, "persistent id");
  t.count = std::numeric_limits<int64_t>::max();
  expect(t, kCorrupt, "2^63");
  t = {};
  t.size = {5};
  expect(t, kCorrupt, "reach past");
  t = {};
  t.offset = 1;
  expect(t, kCorrupt, "reach past");
  t.offset = -1;
  expect(t, kCorrupt, "offset is negative");
  t.offset = std::numeric_limits<int64_t>::max();
  expect(t, kCorrupt, "reach past");
  t = {};
  t.stride = {-1};
  expect(t, kCorrupt, "negative stride");
  t.stride = {2};
  expect(t, kCorrupt, "reach past");
  t.stride = {std::numeric_limits<int64_t>::max()};
  expect(t, kCorrupt, "reach past");
  t = {};
  t.size = {-4};
  expect(t, kCorrupt, "negative");
  t.size = {4, 1};
  expect(t, kCorrupt, "2 dimensions and 1 strides");
  t.size = {int64_t{1} << 62, 4};
  t.stride = {0, 1};
  expect(t, kCorrupt, "no valid shape");
  t.size = {1'000'000'000'000};
  t.stride = {0};
  expect(t, kUnsupported, "expanded view");
  t = {};
  t.size = {0};
  t.offset = 5;
  expect(t, kCorrupt, "past its storage");
  t = {};
  t.storage_class = "torch.storage\nUntypedStorage\n";
  expect(t, kCorrupt, "untyped");
  t.storage_class = "torch\nComplexDoubleStorage\n";
  expect(t, kUnsupported, "complex128");
  t.storage_class = "torch\nQInt8Storage\n";
  expect(t, kUnsupported, "qint8");
  t.storage_class = "torch\nTensor\n";
  expect(t, kCorrupt, "persistent id");
  t = {};
  t.more = "}" + PickleString("mystery") + "\x88s";
  expect(t, kUnsupported, "mystery");
  t.more = "}" + PickleString("conj") + "\x88s";
  expect(t, kCorrupt, "no sense");
  t.more = "}" + PickleString("neg") + "\x88s";
  EXPECT_EQ(OpenAndReadAll(TorchZip(PickledStateDict(t))), absl::OkStatus());
}

TEST(TorchZipTest, ExpandedViewsAreBoundedInSum) {
  std::string pickle = "\x80\x02}(";
  PickledTensor t;
  t.size = {int64_t{4} << 20};
  t.stride = {0};
  for (int i = 0; i < 100; ++i) {
    t.offset = i % 4;
    t.size[0] -= 1;  // not an alias of another
    pickle += PickleString(absl::StrCat("w", i)) + Pickle(t);
  }
  ExpectError(TorchZip(pickle + "u."), kUnsupported, "expanded views are limited");
}

TEST(TorchZipTest, ReadsOldFormsOfPickles) {
  // OrderedDict([[name, tensor]]) through REDUCE, a short byte string as a name, and
  // _rebuild_tensor with four arguments.
  std::string tensor = Pickle(PickledTensor());
  tensor.replace(tensor.find("_v2"), 3, "");
  tensor.replace(tensor.rfind("\x89}tR"), 4, "tR");
  const std::string body = "ccollections\nOrderedDict\n](](U\x01w" + tensor + "ee\x85R.";
  const auto reader = OpenBytes(Evil(body));
  ASSERT_TRUE(reader.ok()) << reader.status();
  ASSERT_EQ((*reader)->tensors().size(), 1u);
  EXPECT_EQ((*reader)->tensors()[0].name, "w");
  EXPECT_EQ((*reader)->tensors()[0].shape.ToString(), "[4]");
}

// {"": {"version": 1}, "bn": {"version": 2}} and the like, by opcodes.
std::string PickledVersions(const std::vector<std::pair<std::string, std::string>>& versions) {
  std::string text = "ccollections\nOrderedDict\n)R(";
  for (const auto& [module, version] : versions) {
    absl::StrAppend(&text, PickleString(module), "}", PickleString("version"), version, "s");
  }
  return text + "u";
}

std::string WithAttributes(const std::string& attributes) {
  return "\x80\x02"
         "ccollections\nOrderedDict\n)R(" +
         PickleString("w") + Pickle(PickledTensor()) + "u}" + attributes + "b.";
}

TEST(TorchZipTest, ModuleVersionsOfMetadataAreRead) {
  using Versions = std::map<std::string, int64_t>;
  for (const char* torch : {"torch-1.13.1", "torch-2.15.0"}) {
    const auto plain = OpenBytes(ReadWholeFile(DataPath(absl::StrCat(torch, "/batchnorm.pt"))));
    ASSERT_TRUE(plain.ok()) << plain.status();
    EXPECT_EQ((*plain)->module_versions(),
              (Versions{{"", 1}, {"0", 1}, {"1", 2}, {"2", 1}, {"3", 1}}));
    const auto nested =
        OpenBytes(ReadWholeFile(DataPath(absl::StrCat(torch, "/nested.pt"))), "ema.state_dict");
    ASSERT_TRUE(nested.ok()) << nested.status();
    EXPECT_EQ((*nested)->module_versions().at("1"), 2) << "of the dict inside";
  }
  const auto none = OpenBytes(TorchZip(PickledStateDict({})));
  ASSERT_TRUE(none.ok());
  EXPECT_TRUE((*none)->module_versions().empty());
}

TEST(TorchZipTest, OddMetadataIsInert) {
  const auto versions = [](const std::string& attributes) {
    const auto reader = OpenBytes(TorchZip(WithAttributes(attributes)));
    EXPECT_TRUE(reader.ok()) << reader.status();
    return reader.ok() ? (*reader)->module_versions() : std::map<std::string, int64_t>();
  };
  const std::string key = PickleString("_metadata");
  EXPECT_EQ(versions(key + PickledVersions({{"", "K\x01"}, {"a", "N"}, {"b", PickleInt(7)}}) + "s"),
            (std::map<std::string, int64_t>{{"", 1}, {"b", 7}}));
  EXPECT_TRUE(versions("").empty());
  EXPECT_TRUE(versions(key + "Ns").empty());
  EXPECT_TRUE(versions(key + "]s").empty());
  EXPECT_TRUE(versions(key + "}NNss").empty()) << "a key that is no text";
  EXPECT_TRUE(versions(PickleString("other") + PickledVersions({{"", "K\x01"}}) + "s").empty());
  // A dict of many entries that is mentioned many times is not looked through each time.
  std::string huge = "}(" + PickleString("version") + "K\x01";
  for (int i = 0; i < 20000; ++i) huge += PickleString(std::to_string(i)) + "N";
  std::string mentions = key + "}(" + PickleString("first") + huge + "ur" + LittleEndian(7, 4);
  for (int i = 0; i < 20000; ++i) mentions += PickleString(absl::StrCat("m", i)) + "h\x07";
  EXPECT_TRUE(versions(mentions + "us").empty());
  // A prefix that is mentioned twice ends it.
  EXPECT_EQ(versions(key + PickledVersions({{"a", "K\x01"}, {"a", "K\x02"}}) + "s").at("a"), 1);
}

TEST(TorchZipTest, StateDictKeyIsExplained) {
  const std::string file = ReadWholeFile(DataPath("torch-2.15.0/nested.pt"));
  ExpectError(file, kUnsupported, "state_dict_key");
  ExpectError(file, kUnsupported, "it has \"state_dict\", \"decay\"", "ema.model");
  ExpectError(file, kUnsupported, "leads to a float", "ema.decay");
  EXPECT_EQ(OpenAndReadAll(file, "ema.state_dict"), absl::OkStatus());
  ExpectError(ReadWholeFile(DataPath("torch-2.15.0/batchnorm.safetensors")), kUnsupported,
              "leave the key out", "model");
}

TEST(TorchZipTest, OtherFormatsAreNamed) {
  ExpectError("GGUF" + LittleEndian(3, 4), kUnsupported, "GGUF");
  ExpectError("{\"metadata\":{},\"weight_map\":{\"a\":\"model-00001-of-00002.safetensors\"}}",
              kUnsupported, "index of a sharded");
  ExpectError("\x93NUMPY\x01" + std::string(20, ' '), kUnsupported, "NumPy");
  ExpectError(std::string(257, '\0') + "ustar" + std::string(250, '\0'), kUnsupported, "tar");
  ExpectError(Zip({{"w.npy", "\x93NUMPY"}}), kUnsupported, "NumPy archive");
  ExpectError(Zip({{"w.txt", "text"}}), kUnsupported, "torch.save");
  ExpectError(std::string("\x1f\x8b\x08\0", 4) + "rest", kUnsupported, "gzip");
  ExpectError("version https://git-lfs.github.com/spec/v1\n", kUnsupported, "git lfs pull");
  ExpectError("<!DOCTYPE html><html>", kUnsupported, "web page");
  ExpectError("plain text that is longer than eight bytes", kCorrupt, "neither");
  ExpectError("\x80\x04" + std::string(20, 'N'), kUnsupported, "bare pickle");
}

TEST(TorchZipTest, ManyViewsOfOneStorageAreReadFromManyThreads) {
  // A flat parameter: 1000 views; with columns of a matrix among them, which are scattered.
  constexpr int kViews = 1000;
  std::vector<float> values(kViews * 16);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i);
  std::string pickle = "\x80\x02}(";
  PickledTensor t;
  t.count = static_cast<int64_t>(values.size());
  for (int i = 0; i < kViews; ++i) {
    t.offset = i * 16;
    t.size = {16};
    t.stride = {1};
    pickle += PickleString(absl::StrCat("flat", i)) + Pickle(t);
  }
  for (int i = 0; i < 16; ++i) {
    t.offset = i;
    t.size = {kViews};
    t.stride = {16};
    pickle += PickleString(absl::StrCat("column", i)) + Pickle(t);
  }
  const std::string file = TorchZip(pickle + "u.", Floats(values));
  const auto reader = OpenBytes(file);
  ASSERT_TRUE(reader.ok()) << reader.status();
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 4; ++thread) {
    threads.emplace_back([&, thread] {
      for (size_t i = static_cast<size_t>(thread); i < (*reader)->tensors().size(); i += 4) {
        const std::vector<float> read = ReadFloats(**reader, i);
        const bool flat = i < kViews;
        const size_t first = flat ? i * 16 : i - kViews;
        for (size_t j = 0; j < read.size(); ++j) {
          ASSERT_EQ(read[j], values[first + j * (flat ? 1 : 16)]);
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();

  // A view of a storage whose CRC is wrong is refused, wherever the flipped byte lies.
  std::string flipped = file;
  flipped[flipped.find(Floats({5, 6, 7}))] ^= 1;
  const auto bad = OpenBytes(flipped);
  ASSERT_TRUE(bad.ok()) << bad.status();
  std::vector<uint8_t> bytes(64);
  EXPECT_EQ(GetReason((*bad)->Read(900, absl::MakeSpan(bytes))), kCorrupt);
  EXPECT_EQ(GetReason((*bad)->Read(901, absl::MakeSpan(bytes))), kCorrupt);
}

TEST(TorchZipTest, StridesInAnyOrderAreMaterialised) {
  PickledTensor t;
  t.count = 24;
  t.size = {2, 3, 4};
  t.stride = {1, 2, 6};  // dimensions reversed
  std::vector<float> values(24);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i);
  const auto reader = OpenBytes(TorchZip(PickledStateDict(t), Floats(values)));
  ASSERT_TRUE(reader.ok()) << reader.status();
  const std::vector<float> read = ReadFloats(**reader, 0);
  size_t at = 0;
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 3; ++j) {
      for (int k = 0; k < 4; ++k) EXPECT_EQ(read[at++], static_cast<float>(i + 2 * j + 6 * k));
    }
  }
}

// Of a storage that is too large to be held whole.
TEST(TorchZipTest, ViewsOfALargeStorageAreGatheredAsItIsRead) {
  constexpr int64_t kCount = 3'000'000;
  std::vector<float> values(kCount);
  for (int64_t i = 0; i < kCount; ++i) values[i] = static_cast<float>(i);
  struct View {
    int64_t offset;
    std::vector<int64_t> size;
    std::vector<int64_t> stride;
  };
  const View views[] = {
      {0, {1500, 2000}, {1, 1500}},                 // all of it, transposed
      {7, {20, 30, 40, 50}, {1, 1000, 20, 60000}},  // dimensions in any order
      {3, {2}, {2'999'000}},                        // hardly anything of it
      {5, {700}, {4000}},                           // a column
      {0, {3, 1200, 2}, {0, 1, 2'500'000}},         // expanded
      {0, {1'500'000}, {2}},
      {2'999'999, {1, 1}, {9, 9}},
  };
  std::string pickle = "\x80\x02}(";
  for (const View& view : views) {
    PickledTensor t;
    t.count = kCount;
    t.offset = view.offset;
    t.size = view.size;
    t.stride = view.stride;
    pickle += PickleString(absl::StrCat("view", &view - views)) + Pickle(t);
  }
  std::string file = TorchZip(pickle + "u.", Floats(values));
  const auto reader = OpenBytes(file);
  ASSERT_TRUE(reader.ok()) << reader.status();
  for (size_t v = 0; v < std::size(views); ++v) {
    SCOPED_TRACE(v);
    const View& view = views[v];
    std::vector<uint8_t> bytes((*reader)->tensors()[v].nbytes());
    ResetPeakAllocation();
    ASSERT_EQ((*reader)->Read(v, absl::MakeSpan(bytes)), absl::OkStatus());
    EXPECT_LE(PeakAllocation(), size_t{5} << 20);
    std::vector<int64_t> index(view.size.size());
    for (size_t at = 0; at < bytes.size(); at += sizeof(float)) {
      int64_t place = view.offset;
      for (size_t i = 0; i < index.size(); ++i) place += index[i] * view.stride[i];
      float read;
      std::memcpy(&read, bytes.data() + at, sizeof(read));
      ASSERT_EQ(read, values[place]) << at;
      for (size_t i = index.size(); i-- > 0;) {
        if (++index[i] < view.size[i]) break;
        index[i] = 0;
      }
    }
  }
  // One flipped byte of it is seen, also where no view has it.
  file[file.find(Floats({1'234'567, 1'234'568}))] ^= 1;
  const auto bad = OpenBytes(file);
  ASSERT_TRUE(bad.ok()) << bad.status();
  std::vector<uint8_t> two(8);
  EXPECT_EQ(GetReason((*bad)->Read(2, absl::MakeSpan(two))), kCorrupt);

  PickledTensor windows;  // each begins within the one before
  windows.count = kCount;
  windows.size = {2, 2'000'000};
  windows.stride = {1000, 1};
  const auto overlapping = OpenBytes(TorchZip(PickledStateDict(windows), Floats(values)));
  ASSERT_TRUE(overlapping.ok()) << overlapping.status();
  std::vector<uint8_t> bytes((*overlapping)->tensors()[0].nbytes());
  const absl::Status status = (*overlapping)->Read(0, absl::MakeSpan(bytes));
  EXPECT_EQ(GetReason(status), kUnsupported);
  EXPECT_THAT(std::string(status.message()), HasSubstr("tensor.contiguous()"));
}

TEST(TorchZipTest, HundredThousandTensors) {
  std::string pickle = "\x80\x02}(";
  std::vector<ZipEntry> entries = {{"archive/data.pkl", ""}, {"archive/version", "3\n"}};
  PickledTensor t;
  t.count = 1;
  t.size = {1};
  for (int i = 0; i < 60'000; ++i) {  // below 65,535, where this test's archives would need zip64
    t.key = std::to_string(i);
    pickle += PickleString(absl::StrCat("layer.", i, ".weight")) + Pickle(t);
    entries.emplace_back(absl::StrCat("archive/data/", i), "abcd");
  }
  for (int i = 60'000; i < 100'000; ++i) {
    pickle += PickleString(absl::StrCat("layer.", i, ".weight")) + Pickle(t);
  }
  entries[0] = ZipEntry("archive/data.pkl", pickle + "u.");
  const auto reader = OpenBytes(Zip(entries));
  ASSERT_TRUE(reader.ok()) << reader.status();
  ASSERT_EQ((*reader)->tensors().size(), 100'000u);
  EXPECT_EQ((*reader)->tensors()[99'999].alias_of, "layer.59999.weight");
}

// Objects of one byte each would take fifty times the file.
TEST(TorchZipTest, NoPickleTakesMoreThanFourteenTimesItself) {
  using std::string_literals::operator""s;
  constexpr size_t kBytes = size_t{12} << 20;
  for (const std::string& part :
       {"}"s, "]"s, ")"s, "N"s, "K\x01"s, "M\xff\xff"s, "J\xff\xff\xff\xff"s,
        "]K\x01"
        "a"s,
        "]q\0"s, "}q\0K\x01K\x01s"s, "K\x01\x85"s, "K\x01K\x01K\x01\x87q\x01"s, "(K\x01l"s,
        "(]]]t"s, "U\0"s, "](h\0h\0h\0h\0h\0h\0h\0h\0e0"s}) {
    for (const bool in_list : {false, true}) {
      std::string pickle = "\x80\x02]q\0"s;
      if (part.find('h') == std::string::npos) pickle += "](";
      // In a list a thousand at a time, as Python's pickler has them.
      for (size_t i = 0; pickle.size() < kBytes; ++i) {
        pickle += part;
        if (in_list && i % 1000 == 999) pickle += "e(";
      }
      pickle += in_list ? "e." : "t.";
      const size_t bytes = pickle.size();
      ResetPeakAllocation();
      const auto tree = PickleTree::Parse(std::move(pickle));
      EXPECT_LT(PeakAllocation(), 14 * bytes + (size_t{16} << 20))
          << absl::CHexEscape(part) << " " << in_list << " " << tree.status();
    }
  }
}

TEST(TorchZipTest, ReadOfALargeTensorEndsBetweenPieces) {
  constexpr int64_t kElements = CheckpointReader::kPieceBytes / 4 * 5 / 2;  // three pieces
  PickledTensor t;
  t.count = kElements;
  t.size = {kElements};
  const std::string data(kElements * 4, 'x');
  const std::string safetensors =
      Safetensors(absl::StrCat(R"({"w":{"dtype":"F32","shape":[)", kElements,
                               R"(],"data_offsets":[0,)", kElements * 4, "]}}"),
                  data);
  for (const std::string& file : {TorchZip(PickledStateDict(t), data), safetensors}) {
    const auto reader = OpenBytes(file);
    ASSERT_TRUE(reader.ok()) << reader.status();
    std::vector<uint8_t> bytes(kElements * 4);
    int asked = 0;
    ReadPass second(
        [&asked] { return ++asked == 2 ? absl::CancelledError("stop") : absl::OkStatus(); });
    EXPECT_EQ((*reader)->ReadWith(0, absl::MakeSpan(bytes), second).code(),
              absl::StatusCode::kCancelled);
    EXPECT_EQ(asked, 2);
    EXPECT_EQ(bytes[CheckpointReader::kPieceBytes - 1], 'x');
    EXPECT_EQ(bytes[CheckpointReader::kPieceBytes], 0);
    EXPECT_EQ((*reader)->ReadWith(0, absl::MakeSpan(bytes), second), absl::OkStatus());
    EXPECT_EQ(asked, 5) << "three pieces";
  }
}

}  // namespace
}  // namespace modelstate
