#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "common/base/bytes.h"
#include "common/base/digest.h"
#include "common/base/status.h"
#include "tests/common/allocation_meter.h"
#include "tests/server/checkpoint/whole_manifest.h"

namespace modelstate {
namespace {

using testing::HasSubstr;

constexpr size_t kSlack = size_t{16} << 20;

// A text with the digest that it should end with.
std::string Sealed(std::string text) {
  const uint64_t digest = Xxh3(AsBytes(text));
  absl::StrAppend(&text, kManifestTailBegin, DigestToHex(digest), kManifestTailEnd);
  return text;
}

const std::pair<const char*, const char*> kGood[] = {
    {"format", "\"modelstate checkpoint\""},
    {"format_version", "2"},
    {"module", "\"m\""},
    {"version", R"({"incarnation":"00000000000000ff","number":7})"},
    {"step", "3"},
    {"create_seconds", "0"},
    {"weights_only", "false"},
    {"metadata", "{}"},
    {"files", R"([{"name":"model.safetensors","nbytes":9,"header_xxh3":"0000000000000001"}])"},
    {"tensors", R"([{"name":"a","kind":"parameter","dtype":"F32","shape":[1],"requires_grad":true,)"
                R"("xxh3":"0000000000000002"}])"},
    {"optimizer", R"({"algorithm":"sgd","hyperparameters":{},"groups":[],"quorum":1})"},
    {"optimizer_state", R"([{"parameter":"a","step":3,"slots":[]}])"},
    {"workers", "[]"},
};

// A good manifest but for one member.
std::string WithMember(const std::string& key, const std::string& value) {
  std::string text = "{";
  for (const auto& [name, good] : kGood) {
    absl::StrAppend(&text, "\"", name, "\": ", name == key ? value : good, ",\n");
  }
  return Sealed(std::move(text));
}

std::string Repeated(const std::string& text, size_t bytes) {
  std::string out;
  out.reserve(bytes + text.size());
  while (out.size() < bytes) out += text;
  return out;
}

std::string List(const std::string& item, size_t bytes) {
  return absl::StrCat("[", Repeated(item + ",", bytes), item, "]");
}

std::string Worker(const std::string& name) {
  return absl::StrCat(
      R"({"worker":")", name,
      R"(","sequence":1,"payload_digest":"","outcome":"applied","version":)"
      R"({"incarnation":"0000000000000001","number":1},"step":1,"contributions":1,"quorum":1,)"
      R"("grad_norm":0,"clip_coef":1,"nonfinite":[],"updated":0,"skipped":0})");
}

TEST(ManifestTest, FormatOneIsReadAndHasNoDigestsOfHeaders) {
  const auto newest = StoredManifest::Parse(WithMember("", ""));
  ASSERT_TRUE(newest.ok()) << newest.status();
  EXPECT_EQ(newest->head().files[0].header_xxh3, 1u);
  std::string text =
      WithMember("files", R"([{"name":"model.safetensors","nbytes":9,"xxh3":"00"}])");
  text.resize(text.rfind(kManifestTailBegin));
  const auto oldest = StoredManifest::Parse(
      Sealed(absl::StrReplaceAll(text, {{"_version\": 2", "_version\": 1"}})));
  ASSERT_TRUE(oldest.ok()) << oldest.status();
  EXPECT_EQ(oldest->head().files[0].header_xxh3, std::nullopt);
  for (const char* version : {"0", "3"}) {
    EXPECT_EQ(GetReason(StoredManifest::Parse(WithMember("format_version", version)).status()),
              Reason::kCheckpointUnsupported);
  }
}

TEST(ManifestTest, NoTextTakesMoreMemoryThanItselfAnd16MiB) {
  constexpr size_t kBytes = size_t{24} << 20;
  const std::string worker = Worker("w");
  const std::string longest =
      absl::StrCat("\"", Repeated("\\u0061", JsonView::kMaxScalarBytes - 10), "\"");
  const std::string half = worker.substr(0, worker.find("[]") + 1);
  const std::pair<const char*, std::string> members[] = {
      {"step", std::string(kBytes, '[')},
      {"step", List("0", kBytes)},
      {"step", List("[]", kBytes)},
      {"step", List("{\"\":{}}", kBytes)},
      {"step", absl::StrCat("\"", std::string(kBytes, 'x'), "\"")},
      {"step", std::string(kBytes, '1')},
      {"step", std::string(kBytes, ' ') + "3"},
      {"step", absl::StrCat("{", Repeated("\"a\":0,", kBytes), "\"a\":0}")},
      {"module", absl::StrCat("\"", Repeated("\\u0061", kBytes), "\"")},
      {"module", longest},
      {"optimizer_state", absl::StrCat(R"([{"parameter":)", longest, R"(,"step":1,"slots":)",
                                       List(longest, kBytes), "}]")},
      {"metadata", absl::StrCat("{", Repeated("\"\":\"\",", kBytes), "\"\":\"\"}")},
      {"files",
       List(R"({"name":"model.safetensors","nbytes":9,"xxh3":"0000000000000001"})", kBytes)},
      {"tensors",
       List(R"({"name":"","kind":"buffer","dtype":"U8","shape":[],"xxh3":"0000000000000002"})",
            kBytes)},
      {"tensors", absl::StrCat(R"([{"name":"a","shape":)", List("1", kBytes), "}]")},
      {"optimizer",
       absl::StrCat(
           R"({"algorithm":"sgd","hyperparameters":{},"quorum":1,"groups":)",
           List(R"({"name":"","names":[],"prefixes":[],"globs":[],"hyperparameters":{}})", kBytes),
           "}")},
      {"optimizer",
       absl::StrCat(
           R"({"algorithm":"sgd","hyperparameters":{},"quorum":1,"groups":[{"name":"","names":)",
           List("\"\"", kBytes), R"(,"prefixes":[],"globs":[],"hyperparameters":{}}]})")},
      {"optimizer",
       absl::StrCat(
           R"({"algorithm":"sgd","hyperparameters":{},"quorum":1,"groups":[{"name":"","names":[],"globs":)",
           List("\"\"", kBytes), R"(,"prefixes":[],"hyperparameters":{}}]})")},
      {"optimizer_state", List(R"({"parameter":"","step":1,"slots":[]})", kBytes)},
      {"optimizer_state",
       absl::StrCat(R"([{"parameter":"","step":1,"slots":)", List("\"\"", kBytes), "}]")},
      {"workers", List(worker, kBytes)},
      {"workers", absl::StrCat("[", half, Repeated("\"\",", kBytes), "\"\"]}]")},
      {"step", absl::StrCat("3,", Repeated("\"more\": 0,", kBytes), "\"more\": 0")},
  };
  for (const auto& [key, value] : members) {
    SCOPED_TRACE(absl::StrCat(key, ": ", value.substr(0, 200)));
    std::string text = WithMember(key, value);
    const size_t bytes = text.size();
    ResetPeakAllocation();
    // The text is there already: what comes on top of it.
    const absl::Status status = StoredManifest::Parse(std::move(text)).status();
    EXPECT_LE(PeakAllocation(), kSlack) << bytes;
    EXPECT_EQ(GetReason(status).value_or(Reason::kCheckpointCorrupt), Reason::kCheckpointCorrupt)
        << status;
  }
}

TEST(ManifestTest, OneOf300000TensorsWithTheirOptimizerFits) {
  Manifest manifest;
  manifest.module = "m";
  manifest.files.push_back({kModelFile, 1, 2});
  manifest.optimizer.emplace().algorithm = Algorithm::kAdamW;
  ParameterGroup& group = manifest.optimizer->groups.emplace_back();
  for (int i = 0; i < 300'000; ++i) {
    Manifest::TensorEntry& entry = manifest.tensors.emplace_back();
    entry.spec.name = absl::StrCat("model.layers.", i / 100, ".block_sparse_moe.experts.", i % 100,
                                   ".down_proj.weight");
    entry.spec.shape = *Shape::Create({4096, 14336});
    group.selection.names.push_back(entry.spec.name);
    manifest.optimizer_state.push_back(
        {entry.spec.name, 1, 1, {"exp_avg", "exp_avg_sq", "master"}});
  }
  absl::StatusOr<std::string> text = ManifestToText(manifest);
  ASSERT_TRUE(text.ok()) << text.status();
  RecordProperty("bytes", absl::StrCat(text->size()));
  ResetPeakAllocation();
  const auto stored = StoredManifest::Parse(*std::move(text));
  EXPECT_LE(PeakAllocation(), kSlack);
  ASSERT_TRUE(stored.ok()) << stored.status();
  EXPECT_EQ(stored->tensor_count(), 300'000u);
  const auto config = stored->Optimizer();
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ((*config)->groups[0].selection.names, group.selection.names);
}

TEST(ManifestTest, WhatIsWrongIsNamed) {
  const std::tuple<const char*, const char*, const char*> wrong[] = {
      {"step", "-1", "\"step\" is not a whole number in its range"},
      {"step", "3, \"step\": 3", "\"step\" is not there only once"},
      {"step", "1e400", "it is not JSON at byte "},
      {"step", "[[", "it is not JSON at byte "},
      {"metadata", R"({"a": "", "\u0061": ""})", "\"metadata\" has a key twice"},
      {"metadata", "3", "\"metadata\" is not an object"},
      {"files", "[]", "\"files\" lacks model.safetensors"},
      {"tensors", "{}", "\"tensors\" is not a list"},
      {"tensors", "[3]", "\"tensors[0].\" is not an object"},
      // A list has items, which have no names.
      {"version", R"([{"number": 7}])", "\"version.\" is not an object"},
      {"tensors", R"([["a", "b"]])", "\"tensors[0].\" is not an object"},
      {"optimizer", R"(["sgd"])", "\"optimizer.\" is not an object"},
      {"tensors", R"([{"name": "a", "kind": "buffer"}])", "\"tensors[0].dtype\" is not text"},
      {"optimizer",
       R"({"algorithm":"sgd","hyperparameters":{},"quorum":1,"groups":[{"name":"",)"
       R"("names":["a","a"],"prefixes":[],"globs":[],"hyperparameters":{}}]})",
       "\"optimizer.groups[0].names\" is not a list of at most 1 texts"},
      {"optimizer_state", R"([{"parameter":"a","step":3,"slots":[0]}])",
       "\"optimizer_state[0].slots\" is not a list of texts"},
  };
  for (const auto& [key, value, text] : wrong) {
    const absl::Status status = StoredManifest::Parse(WithMember(key, value)).status();
    EXPECT_EQ(GetReason(status), Reason::kCheckpointCorrupt) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(text));
    EXPECT_THAT(std::string(status.message()), HasSubstr("use another checkpoint"));
  }
  EXPECT_TRUE(StoredManifest::Parse(WithMember("step", "3")).ok());
}

TEST(ManifestTest, WorkersComeOnceAndInOrder) {
  const auto parse = [](const std::string& first, const std::string& second) {
    return StoredManifest::Parse(
        WithMember("workers", absl::StrCat("[", Worker(first), ",", Worker(second), "]")));
  };
  const auto good = parse("a", "b");
  ASSERT_TRUE(good.ok()) << good.status();
  EXPECT_EQ(good->Workers()->size(), 2u);
  EXPECT_EQ(GetReason(parse("b", "b").status()), Reason::kCheckpointCorrupt);
  EXPECT_EQ(GetReason(parse("b", "a").status()), Reason::kCheckpointCorrupt);
}

TEST(ManifestTest, DoublesComeBackBitForBit) {
  Manifest manifest;
  manifest.module = "m";
  manifest.files.push_back({kModelFile, 1, 2});
  const uint64_t patterns[] = {0x0000000000000000, 0x8000000000000000, 0x0000000000000001,
                               0x3FB999999999999A, 0x7FEFFFFFFFFFFFFF, 0x7FF0000000000000,
                               0xFFF0000000000000, 0x7FF8000000000001, 0x4340000000000001,
                               0x3FF0000000000000};
  for (uint64_t bits : patterns) {
    WorkerRecord& record = manifest.workers[absl::StrCat("w", bits)];
    record.sequence = 1;
    record.answer.grad_norm = std::bit_cast<double>(bits);
  }
  const auto text = ManifestToText(manifest);
  ASSERT_TRUE(text.ok()) << text.status();
  const auto parsed = ParseWholeManifest(*text);
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  for (uint64_t bits : patterns) {
    const double value = parsed->workers.at(absl::StrCat("w", bits)).answer.grad_norm;
    EXPECT_EQ(std::bit_cast<uint64_t>(value), bits);
  }
}

TEST(ManifestTest, WhatCouldNotBeReadIsNotWritten) {
  Manifest manifest;
  manifest.module = "\xFF";
  EXPECT_EQ(GetReason(ManifestToText(manifest).status()), Reason::kNotRepresentable);
  manifest.module = std::string((size_t{1} << 20) + 1, 'x');
  EXPECT_EQ(GetReason(ManifestToText(manifest).status()), Reason::kNotRepresentable);
}

}  // namespace
}  // namespace modelstate
