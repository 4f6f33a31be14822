#include <gtest/gtest.h>

#include <cstring>
#include <limits>

#include "common/base/status.h"
#include "tests/common/format/test_files.h"

namespace modelstate {
namespace {

constexpr Reason kCorrupt = Reason::kCheckpointCorrupt;
constexpr Reason kUnsupported = Reason::kCheckpointUnsupported;

std::string Counting(int count) {
  std::string text = LittleEndian(static_cast<uint64_t>(count), 8);
  for (int i = 0; i < count; ++i) {
    const float value = static_cast<float>(i);
    text.append(reinterpret_cast<const char*>(&value), sizeof(value));
  }
  return text;
}

std::string Part(const std::string& key, int64_t offset, int64_t count) {
  return PickleString(key) + PickleInt(offset) + PickleInt(count) + "\x87";
}

TEST(TorchLegacyTest, APublishedFileIsRead) {
  const auto reader = OpenBytes(ReadWholeFile(DataPath("pnet-legacy.pt")));
  ASSERT_TRUE(reader.ok()) << reader.status();
  EXPECT_STREQ(CheckpointFormatName((*reader)->format()), "torch legacy");
  EXPECT_EQ((*reader)->tensors().size(), 13u);
}

TEST(TorchLegacyTest, RefusesMalformedStreams) {
  ASSERT_EQ(OpenAndReadAll(Legacy().Text()), absl::OkStatus());
  const auto expect = [](auto change, Reason reason, const std::string& text) {
    LegacyStream stream = Legacy();
    change(stream);
    ExpectError(stream.Text(), reason, text);
  };
  using S = LegacyStream;
  expect([](S& s) { s.magic[5] ^= 1; }, kUnsupported, "bare pickle");
  expect([](S& s) { s.protocol = "\x80\x02M\xea\x03."; }, kUnsupported, "protocol number");
  expect([](S& s) { s.protocol = "\x80\x02}."; }, kUnsupported, "protocol number");
  expect([](S& s) { s.protocol = "\x80\x04M\xe9\x03."; }, kUnsupported,
         "the protocol number uses pickle protocol 4");
  expect([](S& s) { s.machine = "\x80\x02N."; }, kCorrupt, "description of the machine is None");
  expect([](S& s) { s.machine = "\x80\x02t."; }, kCorrupt, "the description of the machine looks");
  expect([](S& s) { s.object = "\x80\x02N."; }, kCorrupt, "which the object does not mention");
  expect(
      [](S& s) {
        s.object =
            "\x80\x02"
            "cos\nsystem\n.";
      },
      kUnsupported, "os.system");
  expect([](S& s) { s.keys = "\x80\x02}."; }, kCorrupt, "the list of storages is a dict");
  expect(
      [](S& s) {
        s.keys =
            "\x80\x02]K\x01"
            "a.";
      },
      kCorrupt, "holds an int");
  expect([](S& s) { s.keys = "\x80\x02]" + PickleString("1") + "a."; }, kCorrupt,
         "which the object does not mention");
  expect([](S& s) { s.keys = "\x80\x02](" + PickleString("0") + PickleString("0") + "e."; },
         kCorrupt, "twice");
  // PyTorch returns memory that nobody wrote for it.
  expect(
      [](S& s) {
        s.keys = "\x80\x02].";
        s.storages = "";
      },
      kCorrupt, "the list of storages lacks \"0\"");
  expect([](S& s) { s.storages += "x"; }, kCorrupt, "goes on for 1 bytes");
  expect([](S& s) { s.storages.pop_back(); }, kCorrupt, "reaches past the end");
  expect([](S& s) { s.storages.resize(7); }, kCorrupt, "before the storage \"0\"");
  expect([](S& s) { s.storages = LittleEndian(5, 8) + std::string(20, 'x'); }, kCorrupt,
         "has 4 elements by the pickle, but 5");
  expect([](S& s) { s.storages = LittleEndian(~uint64_t{0}, 8) + std::string(20, 'x'); }, kCorrupt,
         "has 4 elements by the pickle, but 18446744073709551615");
}

TEST(TorchLegacyTest, RefusesStoragesThatLie) {
  const auto expect = [](const PickledTensor& tensor, Reason reason, const std::string& text) {
    ExpectError(Legacy(tensor).Text(), reason, text);
  };
  PickledTensor t;
  t.count = std::numeric_limits<int64_t>::max();
  expect(t, kCorrupt, "more than the file");
  t.count = 1'000'000;
  expect(t, kCorrupt, "more than the file");
  t.count = -1;
  expect(t, kCorrupt, "persistent id");
  t = {};
  t.size = {5};
  expect(t, kCorrupt, "reach past its storage of 4");
  t.size = {1'000'000'000'000};
  t.stride = {0};
  expect(t, kUnsupported, "expanded view");
  t = {};
  t.storage_class = "torch\nComplexDoubleStorage\n";
  t.count = 1;
  expect(t, kCorrupt, "has 1 elements by the pickle, but 4");
  t = {};
  t.storage_class = "torch.storage\nUntypedStorage\n";
  expect(t, kCorrupt, "goes on for 12 bytes");
  t = {};
  for (const std::string& part : {PickleString("v"), std::string("}"), PickleTuple({1, 2}),
                                  Part("v", -1, 2), Part("v", 0, -2), std::string("NN")}) {
    t.part = part;
    expect(t, kCorrupt, "persistent id");
  }
  t.part = Part("v", 1, 4);
  expect(t, kCorrupt, "the 4 elements from 1 on that it views reach past");
  t.part = Part("v", 5, 0);
  expect(t, kCorrupt, "reach past");
  t.part = Part("v", 1, std::numeric_limits<int64_t>::max());
  expect(t, kCorrupt, "reach past");
  t.part = Part("v", 1, 3);
  expect(t, kCorrupt, "reach past its storage of 3");
  // A zip may not have the sixth item.
  t = {};
  t.part = "N";
  ExpectError(TorchZip(PickledStateDict(t)), kCorrupt, "persistent id");
}

TEST(TorchLegacyTest, OneStorageOfTwoSizesIsRefused) {
  PickledTensor first;
  first.part = "N";
  PickledTensor second = first;
  second.count = 3;
  second.size = {3};
  LegacyStream stream = Legacy();
  stream.object =
      "\x80\x02}(" + PickleString("a") + Pickle(first) + PickleString("b") + Pickle(second) + "u.";
  ExpectError(stream.Text(), kCorrupt, "mentioned with two sizes");
}

TEST(TorchLegacyTest, PartsOfStoragesAreRead) {
  LegacyStream stream = Legacy();
  stream.object = "\x80\x02}(";
  PickledTensor t;
  t.count = 10;
  t.size = {2};
  t.part = Part("part", 3, 4);
  t.offset = 1;
  stream.object += PickleString("part") + Pickle(t);
  stream.object += PickleString("tied") + Pickle(t);
  t.part = "N";
  t.offset = 4;  // the same elements, seen from the whole storage
  stream.object += PickleString("whole") + Pickle(t);
  t.offset = 0;
  t.size = {5};
  t.stride = {2};
  stream.object += PickleString("strided") + Pickle(t) + "u.";
  stream.storages = Counting(10);
  const auto reader = OpenBytes(stream.Text());
  ASSERT_TRUE(reader.ok()) << reader.status();
  EXPECT_EQ(ReadFloats(**reader, 0), (std::vector<float>{4, 5}));
  EXPECT_EQ((*reader)->tensors()[1].alias_of, "part");
  EXPECT_EQ((*reader)->tensors()[2].alias_of, "part");
  EXPECT_EQ(ReadFloats(**reader, 3), (std::vector<float>{0, 2, 4, 6, 8}));
}

TEST(TorchLegacyTest, StoragesOfWhatIsNotLoadedAreSteppedOver) {
  // The optimizer's storage, of a dtype that no module holds, lies before that of the state_dict.
  PickledTensor other;
  other.storage_class = "torch\nComplexDoubleStorage\n";
  other.key = "9";
  other.count = 2;
  other.size = {2};
  other.part = "N";
  PickledTensor weight;
  weight.part = "N";
  LegacyStream stream;
  stream.object = "\x80\x02}(" + PickleString("model") + "}(" + PickleString("w") + Pickle(weight) +
                  "u" + PickleString("optimizer") + "}(" + PickleString("z") + Pickle(other) +
                  "uu.";
  stream.keys = "\x80\x02](" + PickleString("9") + PickleString("0") + "e.";
  stream.storages = LittleEndian(2, 8) + std::string(32, 'z') + Counting(4);
  const auto reader = OpenBytes(stream.Text());
  ASSERT_TRUE(reader.ok()) << reader.status();
  ASSERT_EQ((*reader)->tensors().size(), 1u);
  EXPECT_EQ(ReadFloats(**reader, 0), (std::vector<float>{0, 1, 2, 3}));
}

TEST(TorchLegacyTest, TruncationAnywhereIsRefused) {
  const std::string real = ReadWholeFile(DataPath("pnet-legacy.pt"));
  // Shorter ones do not have the whole magic number.
  for (size_t size = 15; size < real.size(); size += size < 3000 ? 1 : 101) {
    ASSERT_EQ(GetReason(OpenBytes(real.substr(0, size)).status()), kCorrupt) << "cut at " << size;
  }
}

TEST(TorchLegacyTest, APickleOfManyWindowsIsRead) {
  LegacyStream stream = Legacy();
  PickledTensor t;
  t.part = "N";
  stream.object = "\x80\x02}(";
  for (int i = 0; i < 3000; ++i) {
    stream.object += PickleString(absl::StrCat("layer.", i, ".weight")) + Pickle(t);
  }
  stream.object += "u.";
  ASSERT_GT(stream.object.size(), size_t{256} << 10);
  const auto reader = OpenBytes(stream.Text());
  ASSERT_TRUE(reader.ok()) << reader.status();
  EXPECT_EQ((*reader)->tensors().size(), 3000u);
}

TEST(TorchLegacyTest, AStateDictKeyIsUsed) {
  const auto reader =
      OpenBytes(ReadWholeFile(DataPath("torch-2.15.0/legacy_training.pt")), "model");
  ASSERT_TRUE(reader.ok()) << reader.status();
  EXPECT_EQ((*reader)->module_versions().at("1"), 2);
}

}  // namespace
}  // namespace modelstate
