#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>

#include "common/base/status.h"
#include "common/format/sharded_index.h"
#include "tests/common/allocation_meter.h"
#include "tests/common/format/test_files.h"

namespace modelstate {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

constexpr Reason kCorrupt = Reason::kCheckpointCorrupt;
constexpr Reason kUnsupported = Reason::kCheckpointUnsupported;

using Folder = std::map<std::string, std::string>;

OpenOptions Options(const Folder& folder) {
  OpenOptions options;
  options.open_sibling = [&folder](const std::string& name) -> absl::StatusOr<File> {
    const auto it = folder.find(name);
    if (it == folder.end()) return MakeError(Reason::kCheckpointNotFound, "there is no " + name);
    return MemoryFile(it->second);
  };
  return options;
}

absl::StatusOr<std::unique_ptr<CheckpointReader>> OpenIndex(const std::string& index,
                                                            const Folder& folder) {
  return OpenCheckpoint(MemoryFile(index), Options(folder));
}

std::string OneTensor(const std::string& name, const std::string& metadata = "") {
  return Safetensors(absl::StrCat("{", metadata, "\"", name,
                                  R"(":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}})"),
                     "ab");
}

std::string Index(const std::string& map, const std::string& metadata = R"({"total_size": 4})") {
  return absl::StrCat(R"({"metadata": )", metadata, R"(, "weight_map": )", map, "}");
}

const char kMap[] = R"({"b": "2.safetensors", "a": "1.safetensors"})";

Folder Good() { return {{"1.safetensors", OneTensor("a")}, {"2.safetensors", OneTensor("b")}}; }

void ExpectError(const std::string& index, const Folder& folder, Reason reason,
                 const std::string& text) {
  const absl::Status status = OpenIndex(index, folder).status();
  EXPECT_EQ(GetReason(status), reason) << index << "\n" << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(text)) << index;
}

std::vector<std::string> Names(const CheckpointReader& reader) {
  std::vector<std::string> names;
  for (const StoredTensor& tensor : reader.tensors()) names.push_back(tensor.name);
  return names;
}

TEST(ShardedTest, TensorsComeInTheOrderOfTheIndex) {
  const auto reader = OpenIndex(Index(kMap), Good());
  ASSERT_TRUE(reader.ok()) << reader.status();
  EXPECT_STREQ(CheckpointFormatName((*reader)->format()), "sharded safetensors");
  EXPECT_THAT(Names(**reader), ElementsAre("b", "a"));
  std::vector<uint8_t> bytes(2);
  EXPECT_EQ((*reader)->Read(1, absl::MakeSpan(bytes)), absl::OkStatus());
  EXPECT_THAT(bytes, ElementsAre('a', 'b'));
  EXPECT_EQ(GetReason((*reader)->Read(2, absl::MakeSpan(bytes))), Reason::kInvalidField);
}

TEST(ShardedTest, MetadataIsAdvisory) {
  for (const char* metadata :
       {R"({"total_size": 999999})", R"({"total_size": -1.5e300})", "null", "{}",
        R"({"x": [{"y": [1]}], "total_size": "many", "format": "pt"})"}) {
    EXPECT_EQ(OpenIndex(Index(kMap, metadata), Good()).status(), absl::OkStatus()) << metadata;
  }
  EXPECT_EQ(OpenIndex(absl::StrCat(R"({"weight_map": )", kMap, "}"), Good()).status(),
            absl::OkStatus());
}

TEST(ShardedTest, TiedNamesOfTheMetadataAreAliases) {
  const auto reader = OpenIndex(Index(kMap, R"({"head": "a", "note": "of nothing"})"), Good());
  ASSERT_TRUE(reader.ok()) << reader.status();
  ASSERT_THAT(Names(**reader), ElementsAre("b", "a", "head"));
  EXPECT_EQ((*reader)->tensors()[2].alias_of, "a");
  Folder folder = Good();
  folder["1.safetensors"] = OneTensor("a", R"("__metadata__":{"head":"a"},)");
  EXPECT_THAT(Names(**OpenIndex(Index(kMap), folder)), ElementsAre("b", "a", "head"));
  folder["2.safetensors"] = OneTensor("b", R"("__metadata__":{"head":"b"},)");
  ExpectError(Index(kMap), folder, kCorrupt, "two shards have the tied name \"head\"");
}

TEST(ShardedTest, RefusesMalformedIndexes) {
  const auto expect = [](const std::string& index, Reason reason, const std::string& text) {
    ExpectError(index, Good(), reason, text);
  };
  expect("{", kCorrupt, "not JSON");
  expect(std::string("{\0}", 3), kCorrupt, "not JSON at byte 1");
  expect("{} x", kCorrupt, "not JSON");
  expect(R"({"architectures": ["x"], "hidden_size": 3})", kUnsupported, "without a \"weight_map\"");
  expect(Index("[]"), kCorrupt, "\"weight_map\" is an array");
  expect(Index("null"), kCorrupt, "\"weight_map\" is null");
  expect(Index("\"x\""), kCorrupt, "\"weight_map\" is a string");
  expect(Index(R"({"a": 1})"), kCorrupt, "the file of \"a\" is a number");
  expect(Index(R"({"a": null})"), kCorrupt, "the file of \"a\" is null");
  expect(Index(R"({"a": {"b": "c"}})"), kCorrupt, "the file of \"a\" is an object");
  expect(Index(R"({"a": ["1.safetensors"]})"), kCorrupt, "the file of \"a\" is an array");
  expect(Index(R"({"a": "1.safetensors", "\u0061": "1.safetensors"})"), kCorrupt,
         "the tensor \"a\" occurs twice");
  expect(Index(R"({"": "1.safetensors"})"), kCorrupt, "is empty");
  expect(Index(R"({"\u0000": "1.safetensors"})"), kCorrupt, "has a NUL");
  expect(R"({"weight_map": {}, "weight_map": {}})", kCorrupt, "occurs twice");
  expect(R"({"weight_map": {}, "weight\u005fmap": {}})", kCorrupt, "occurs twice");
  for (const char* name : {"../secret.safetensors", "/etc/passwd", "a/../1.safetensors"}) {
    expect(Index(absl::StrCat(R"({"a": ")", name, "\"}")), kCorrupt, "leads out of the folder");
  }
  for (const char* name : {"sub/1.safetensors", "1.safetensors/"}) {
    expect(Index(absl::StrCat(R"({"a": ")", name, "\"}")), kCorrupt, "is in another folder");
  }
  expect(Index(R"({"a": ".."})"), kCorrupt, "is a folder");
  expect(Index(R"({"a": "."})"), kCorrupt, "is a folder");
  expect(Index(R"({"a": ""})"), kCorrupt, "is empty");
  expect(Index(R"({"a": "1.safetensors\u0000"})"), kCorrupt, "has a NUL");
  expect(Index(absl::StrCat(R"({"a": ")", std::string(256, 'x'), "\"}")), kCorrupt,
         "longer than 255");
  std::string many = "{";
  for (size_t i = 0; i <= kMaxShards; ++i) {
    absl::StrAppend(&many, i == 0 ? "" : ",", "\"", i, "\":\"", i, "\"");
  }
  expect(Index(many + "}"), kUnsupported, "more than 1000 files");
  expect(Index(std::string(100'000, '[')), kCorrupt, "brackets within brackets");
  expect(R"({"x": )" + std::string(100'000, '['), kCorrupt, "brackets within brackets");
}

TEST(ShardedTest, RefusesShardsThatAreNotAsTheIndexSays) {
  Folder folder = Good();
  folder.erase("2.safetensors");
  ExpectError(Index(kMap), folder, Reason::kCheckpointNotFound, "the shard \"2.safetensors\"");
  folder = Good();
  folder["2.safetensors"] = OneTensor("c");
  ExpectError(Index(kMap), folder, kCorrupt, "has the tensor \"c\", which the index does not have");
  folder["2.safetensors"] = OneTensor("a");
  ExpectError(Index(kMap), folder, kCorrupt,
              "the shard \"2.safetensors\" has the tensor \"a\", but the index has it in "
              "\"1.safetensors\"");
  folder["2.safetensors"] = Safetensors("{}", "");
  ExpectError(Index(kMap), folder, kCorrupt,
              "the index has the tensor \"b\" in the shard \"2.safetensors\", which does not");
  folder["2.safetensors"] = OneTensor("b").substr(0, 20);
  ExpectError(Index(kMap), folder, kCorrupt, "truncated");
  folder["2.safetensors"] = Index(kMap);
  ExpectError(Index(kMap), folder, kUnsupported, "where one file of tensors is due");
  folder["2.safetensors"] = TorchZip(PickledStateDict({}));
  ExpectError(Index(kMap), folder, kUnsupported, "of one kind");
  // Without a folder there is no index.
  EXPECT_THAT(std::string(OpenBytes(Index(kMap)).status().message()), HasSubstr("index"));
}

TEST(ShardedTest, ShardsOfPyTorchFilesAreRead) {
  const Folder folder = {{"1.bin", TorchZip(PickledStateDict({}))}};
  const auto reader = OpenIndex(Index(R"({"w": "1.bin"})"), folder);
  ASSERT_TRUE(reader.ok()) << reader.status();
  EXPECT_STREQ(CheckpointFormatName((*reader)->format()), "sharded torch");
}

TEST(ShardedTest, TheIndexOfAFolderIsFound) {
  EXPECT_EQ(FindShardedIndex({"config.json", "x.safetensors.index.json"}),
            "x.safetensors.index.json");
  EXPECT_EQ(FindShardedIndex({"pytorch_model.bin.index.json", "model.safetensors.index.json"}),
            "model.safetensors.index.json");
  EXPECT_EQ(FindShardedIndex({"a.index.json", "b.index.json"}), std::nullopt);
  EXPECT_EQ(FindShardedIndex({"config.json"}), std::nullopt);
}

TEST(ShardedTest, ATextThatIsWrittenIsReadBack) {
  ShardedIndex index;
  index.shards = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"};
  index.entries = {{"b", 0}, {"a \"quoted\"", 1}};
  index.metadata = {{"head", "b"}};
  const auto read = StoredShardedIndex::Parse(ShardedIndexText(index, 17));
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(read->shards(), index.shards);
  EXPECT_EQ(read->metadata(), index.metadata);
  std::vector<std::pair<std::string, size_t>> entries;
  ASSERT_TRUE(read->ForEachEntry([&entries](ShardedIndex::Entry entry) {
                    entries.emplace_back(entry.name, entry.shard);
                    return absl::OkStatus();
                  })
                  .ok());
  EXPECT_THAT(entries, ElementsAre(std::pair("b", 0), std::pair("a \"quoted\"", 1)));
}

TEST(ShardedTest, NoIndexTakesMoreMemoryThanItselfAnd16MiB) {
  std::string pairs;
  std::string texts;
  for (int i = 0; pairs.size() < 24 << 20; ++i) {
    absl::StrAppend(&pairs, "\"", i, "\":\"1.safetensors\",");
    absl::StrAppend(&texts, "\"", i, "\":\"\",");
  }
  const std::string zeros = [] {
    std::string text;
    while (text.size() < 24 << 20) text += "0,";
    return text;
  }();
  const std::string indexes[] = {
      Index(absl::StrCat("{", pairs, "\"a\":\"1.safetensors\"}")),
      Index(kMap, absl::StrCat("{", texts, "\"\":\"\"}")),
      Index(kMap, absl::StrCat("[", zeros, "0]")),
      Index(std::string(24 << 20, '[')),
      Index(kMap, absl::StrCat("\"", std::string(24 << 20, 'x'), "\"")),
      Index(std::string(24 << 20, ' ') + kMap),
      absl::StrCat("{", texts, "\"weight_map\":", kMap, "}"),
  };
  for (const std::string& index : indexes) {
    SCOPED_TRACE(index.substr(0, 100));
    const Folder folder = Good();
    File file = MemoryFile(index);
    ResetPeakAllocation();
    const absl::Status status = OpenCheckpoint(std::move(file), Options(folder)).status();
    EXPECT_LE(PeakAllocation(), index.size() + (size_t{16} << 20)) << status;
  }
}

}  // namespace
}  // namespace modelstate
