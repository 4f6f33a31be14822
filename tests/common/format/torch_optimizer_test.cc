#include "common/format/torch_optimizer.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/escaping.h"
#include "common/base/status.h"
#include "common/format/zip_directory.h"
#include "common/format/zip_writer.h"
#include "tests/common/format/test_files.h"

namespace modelstate {
namespace {

using Json = nlohmann::json;

std::vector<std::string> Goldens() {
  std::vector<std::string> names;
  for (const char* torch : {"optimizer-torch-1.13.1", "optimizer-torch-2.15.0"}) {
    for (const auto& entry : std::filesystem::directory_iterator(DataPath(torch))) {
      if (entry.path().extension() == ".pt") {
        names.push_back(absl::StrCat(torch, "/", entry.path().stem().string()));
      }
    }
  }
  std::sort(names.begin(), names.end());
  return names;
}

absl::StatusOr<TorchOptimizerFile> OpenText(const std::string& content) {
  return TorchOptimizerFile::Open(MemoryFile(content));
}

std::vector<uint8_t> Elements(const TorchOptimizerFile& file, size_t index) {
  std::vector<uint8_t> bytes(file.tensors()[index].nbytes());
  EXPECT_EQ(file.Read(index, absl::MakeSpan(bytes)), absl::OkStatus());
  return bytes;
}

// As the script that made the golden files describes one.
Json Describe(const TorchOptimizerFile& file) {
  Json groups = Json::array();
  for (const TorchOptimizerGroup& group : file.groups()) {
    Json h = Json::object();
    for (const HyperparameterField& field : HyperparameterFields()) {
      if (!field.is_set(group.hyperparameters)) continue;
      if (field.number != nullptr) {
        h[field.name] = *(group.hyperparameters.*field.number);
      } else {
        h[field.name] = *(group.hyperparameters.*field.flag);
      }
    }
    groups.push_back(
        {{"size", group.size}, {"names", group.parameter_names}, {"hyperparameters", h}});
  }
  Json tensors = Json::array();
  for (size_t i = 0; i < file.tensors().size(); ++i) {
    const TorchOptimizerTensor& tensor = file.tensors()[i];
    const std::vector<uint8_t> bytes = Elements(file, i);
    const std::vector<int64_t> shape(tensor.shape.dims().begin(), tensor.shape.dims().end());
    tensors.push_back({{"position", tensor.position},
                       {"key", tensor.key},
                       {"dtype", std::string(DTypeName(tensor.dtype))},
                       {"shape", shape},
                       {"hex", absl::BytesToHexString(absl::string_view(
                                   reinterpret_cast<const char*>(bytes.data()), bytes.size()))}});
  }
  const absl::StatusOr<Algorithm> guess = file.GuessAlgorithm();
  return {{"algorithm", guess.ok() ? Json(AlgorithmName(*guess)) : Json()},
          {"groups", groups},
          {"tensors", tensors}};
}

TEST(TorchOptimizerTest, ReadsWhatTorchWrites) {
  ASSERT_EQ(Goldens().size(), 26u);
  for (const std::string& name : Goldens()) {
    SCOPED_TRACE(name);
    const auto file = OpenText(ReadWholeFile(DataPath(name + ".pt")));
    ASSERT_EQ(file.status(), absl::OkStatus());
    EXPECT_EQ(Describe(*file), Json::parse(ReadWholeFile(DataPath(name + ".json"))));
  }
}

struct Written {
  TorchOptimizerContent content;
  std::vector<std::vector<uint8_t>> bytes;
};

// What it takes to write `file` again. REQUIRES: its algorithm can be guessed.
Written ContentOf(const TorchOptimizerFile& file) {
  Written written;
  written.content.algorithm = *file.GuessAlgorithm();
  for (TorchOptimizerGroup group : file.groups()) {
    group.parameter_names.clear();
    // torch 1.13 has not all of them.
    if (!group.hyperparameters.maximize) group.hyperparameters.maximize = false;
    if (!group.hyperparameters.decoupled_weight_decay) {
      group.hyperparameters.decoupled_weight_decay = written.content.algorithm == Algorithm::kAdamW;
    }
    written.content.groups.push_back(group);
  }
  for (size_t i = 0; i < file.tensors().size(); ++i) {
    written.content.tensors.push_back(file.tensors()[i]);
    written.bytes.push_back(Elements(file, i));
  }
  return written;
}

std::string TemporaryPath(const std::string& name) { return ::testing::TempDir() + name; }

absl::Status Write(const Written& written, const std::string& path) {
  return WriteTorchOptimizer(path, written.content, [&](size_t i) {
    return absl::StatusOr<absl::Span<const uint8_t>>(written.bytes[i]);
  });
}

TEST(TorchOptimizerTest, WritesWhatItReads) {
  const std::string path = TemporaryPath("again.pt");
  for (const std::string& name : Goldens()) {
    SCOPED_TRACE(name);
    const auto file = OpenText(ReadWholeFile(DataPath(name + ".pt")));
    ASSERT_EQ(file.status(), absl::OkStatus());
    if (!file->GuessAlgorithm().ok()) continue;
    const Written written = ContentOf(*file);
    ASSERT_EQ(Write(written, path), absl::OkStatus());
    EXPECT_FALSE(std::filesystem::exists(path + ".partial"));
    const auto again = OpenText(ReadWholeFile(path));
    ASSERT_EQ(again.status(), absl::OkStatus());
    Json expected = Describe(*file);
    const Json got = Describe(*again);
    for (size_t i = 0; i < expected["groups"].size(); ++i) {
      expected["groups"][i]["names"] = Json::array();
      Hyperparameters all = written.content.groups[i].hyperparameters;
      if (written.content.algorithm != Algorithm::kAdamW) {
        all = TorchHyperparameters(written.content.algorithm, all);
        EXPECT_EQ(again->groups()[i].hyperparameters, all);
      }
      expected["groups"][i]["hyperparameters"] = got["groups"][i]["hyperparameters"];
    }
    EXPECT_EQ(got, expected);
  }
}

TEST(TorchOptimizerTest, EveryRecordIsStoredAtAMultipleOf64) {
  const std::string path = TemporaryPath("aligned.pt");
  const auto file = OpenText(ReadWholeFile(DataPath("optimizer-torch-2.15.0/adam.pt")));
  ASSERT_EQ(file.status(), absl::OkStatus());
  ASSERT_EQ(Write(ContentOf(*file), path), absl::OkStatus());
  const auto zip = OpenForRead(path);
  ASSERT_EQ(zip.status(), absl::OkStatus());
  const auto directory = ZipDirectory::Open(*zip);
  ASSERT_EQ(directory.status(), absl::OkStatus());
  EXPECT_TRUE(directory->has_crc());
  EXPECT_EQ(directory->records().size(), file->tensors().size() + 3);
  for (const ZipRecord& record : directory->records()) {
    EXPECT_EQ(record.offset % 64, 0u) << record.name;
  }
}

// More records than the old end record can count.
TEST(TorchOptimizerTest, SeventyThousandRecordsNeedZip64) {
  const File file = MemoryFile("");
  ZipWriter zip(file);
  constexpr size_t kRecords = 70'000;
  for (size_t i = 0; i < kRecords; ++i) {
    const std::string text = absl::StrCat(i);
    ASSERT_EQ(zip.Add(absl::StrCat("archive/", i), AsBytes(text)), absl::OkStatus());
  }
  ASSERT_EQ(zip.Finish(), absl::OkStatus());
  const auto directory = ZipDirectory::Open(file);
  ASSERT_EQ(directory.status(), absl::OkStatus());
  EXPECT_EQ(directory->records().size(), kRecords);
  const ZipRecord* last = directory->Find("69999");
  ASSERT_NE(last, nullptr);
  std::vector<uint8_t> bytes(last->size);
  ASSERT_EQ(file.ReadAt(last->offset, absl::MakeSpan(bytes)), absl::OkStatus());
  EXPECT_EQ(absl::MakeConstSpan(bytes), AsBytes("69999"));
}

TEST(TorchOptimizerTest, AFailedWriteLeavesTheFileAsItWas) {
  const std::string path = TemporaryPath("kept.pt");
  const auto file = OpenText(ReadWholeFile(DataPath("optimizer-torch-2.15.0/adam.pt")));
  ASSERT_EQ(file.status(), absl::OkStatus());
  Written written = ContentOf(*file);
  ASSERT_EQ(Write(written, path), absl::OkStatus());
  const std::string before = ReadWholeFile(path);

  const absl::Status broken = WriteTorchOptimizer(
      path, written.content, [&](size_t i) -> absl::StatusOr<absl::Span<const uint8_t>> {
        if (i == 3) return absl::UnavailableError("the server is gone");
        return absl::MakeConstSpan(written.bytes[i]);
      });
  EXPECT_EQ(broken, absl::UnavailableError("the server is gone"));
  written.bytes[2].pop_back();
  EXPECT_EQ(GetReason(Write(written, path)), Reason::kInvalidField);
  written = ContentOf(*file);
  written.content.groups[0].hyperparameters.eps.reset();
  EXPECT_EQ(GetReason(Write(written, path)), Reason::kInvalidField);

  EXPECT_EQ(ReadWholeFile(path), before);
  EXPECT_FALSE(std::filesystem::exists(path + ".partial"));
}

// Pickles by hand.
std::string Dict(const std::vector<std::string>& keys_and_values) {
  std::string text = "}(";
  for (const std::string& item : keys_and_values) text += item;
  return text + "u";
}
std::string List(const std::vector<std::string>& items) {
  std::string text = "](";
  for (const std::string& item : items) text += item;
  return text + "e";
}
std::string Sgd(const std::string& params, const std::string& more = "") {
  return Dict({PickleString("dampening"), PickleInt(0), PickleString("params"), params, more});
}
std::string OptimizerZip(const std::string& state, const std::string& groups,
                         const std::string& data = std::string(16, '\x3f')) {
  return TorchZip(
      absl::StrCat("\x80\x02",
                   Dict({PickleString("state"), state, PickleString("param_groups"), groups}), "."),
      data);
}

TEST(TorchOptimizerTest, HostileStateIsRefused) {
  const std::string one = Sgd(List({PickleInt(0)}));
  const std::string buffer = Dict({PickleString("momentum_buffer"), Pickle(PickledTensor())});
  ASSERT_EQ(OpenText(OptimizerZip(Dict({PickleInt(0), buffer}), List({one}))).status(),
            absl::OkStatus());
  // Ids that are no positions, as old versions of torch wrote, count by their order.
  const auto by_id =
      OpenText(OptimizerZip(Dict({PickleInt(140737353867264), buffer}),
                            List({Sgd(List({PickleInt(7), PickleInt(140737353867264)}))})));
  ASSERT_EQ(by_id.status(), absl::OkStatus());
  EXPECT_EQ(by_id->tensors()[0].position, 1u);

  PickledTensor beyond;
  beyond.size = {5};
  const struct {
    std::string zip;
    Reason reason;
    const char* text;
  } cases[] = {
      {TorchZip("\x80\x02}(" + PickleString("w") + Pickle(PickledTensor()) + "u."),
       Reason::kCheckpointUnsupported, "no state and param_groups"},
      {OptimizerZip("}", "}"), Reason::kCheckpointCorrupt, "param_groups is a dict"},
      {OptimizerZip("}", "]"), Reason::kCheckpointUnsupported, "0 parameter groups"},
      {OptimizerZip("}", List({Dict({PickleString("lr"), PickleInt(1)})})),
       Reason::kCheckpointCorrupt, "param_groups[0] has no params"},
      {OptimizerZip("}", List({one, one})), Reason::kCheckpointCorrupt,
       "some parameters appear in more than one parameter group"},
      {OptimizerZip("}", List({Sgd(List({PickleString("fc.weight")}))})),
       Reason::kCheckpointUnsupported, "where optimizer.state_dict() has a position"},
      {OptimizerZip("}", List({Sgd(List({PickleInt(0)}),
                                   PickleString("param_names") +
                                       List({PickleString("a"), PickleString("b")}))})),
       Reason::kCheckpointCorrupt, "1 params and 2 param_names"},
      {OptimizerZip("}", List({Sgd(List({PickleInt(0)}), PickleString("lr") + PickleString("x"))})),
       Reason::kCheckpointUnsupported, "param_groups[0][lr] is a str"},
      {OptimizerZip(
           "}", List({Sgd(List({PickleInt(0)}), PickleString("lr") + Pickle(PickledTensor()))})),
       Reason::kCheckpointUnsupported, "shape [4]"},
      {OptimizerZip(Dict({PickleInt(1), buffer}), List({one})), Reason::kCheckpointCorrupt,
       "state[1] is there twice, or of no parameter group"},
      {OptimizerZip(Dict({PickleInt(0), buffer, PickleInt(0), buffer}), List({one})),
       Reason::kCheckpointCorrupt, "state[0] is there twice"},
      {OptimizerZip(Dict({PickleString("fc"), buffer}), List({one})),
       Reason::kCheckpointUnsupported, "a str as a key"},
      {OptimizerZip(Dict({PickleInt(0), Dict({PickleString("x"), PickleString("y")})}),
                    List({one})),
       Reason::kCheckpointUnsupported, "state[0][x] is a str"},
      {OptimizerZip(Dict({PickleInt(0), Dict({PickleString("x"), Pickle(beyond)})}), List({one})),
       Reason::kCheckpointCorrupt, "reach past its storage"},
      {OptimizerZip("cos\nsystem\n", List({one})), Reason::kCheckpointUnsupported, "os.system"},
  };
  for (const auto& c : cases) {
    const absl::Status status = OpenText(c.zip).status();
    EXPECT_EQ(GetReason(status), c.reason) << status;
    EXPECT_NE(status.message().find(c.text), absl::string_view::npos) << status << "\n" << c.text;
  }
}

// A small pickle that mentions one large storage for each of many parameters.
TEST(TorchOptimizerTest, OneStorageForManyParametersDoesNotGrowWithoutBound) {
  std::vector<std::string> params;
  std::vector<std::string> state;
  PickledTensor large;
  large.count = 1 << 20;
  large.size = {1 << 20};
  for (int i = 0; i < 1000; ++i) {
    params.push_back(PickleInt(i));
    state.push_back(PickleInt(i));
    state.push_back(Dict({PickleString("momentum_buffer"),
                          i == 0 ? absl::StrCat(Pickle(large), "r", LittleEndian(0, 4))
                                 : absl::StrCat("j", LittleEndian(0, 4))}));
  }
  const absl::Status status = OpenText(OptimizerZip(Dict(state), List({Sgd(List(params))}),
                                                    std::string(size_t{4} << 20, '\0')))
                                  .status();
  EXPECT_EQ(GetReason(status), Reason::kCheckpointUnsupported) << status;
  EXPECT_NE(status.message().find("expanded views"), absl::string_view::npos) << status;
}

TEST(TorchOptimizerTest, AdamOfAnOldTorchWithWeightDecayIsNotGuessed) {
  const auto file = OpenText(ReadWholeFile(DataPath("optimizer-torch-1.13.1/adamw.pt")));
  ASSERT_EQ(file.status(), absl::OkStatus());
  const absl::Status status = file->GuessAlgorithm().status();
  EXPECT_EQ(GetReason(status), Reason::kInvalidField);
  EXPECT_NE(status.message().find("give the algorithm"), absl::string_view::npos) << status;
}

// Of all algorithms those that a file can be of.
std::vector<Algorithm> CanBeOf(const TorchOptimizerFile& file) {
  std::vector<Algorithm> possible;
  for (Algorithm algorithm : AllAlgorithms()) {
    const absl::Status status = file.CheckAlgorithm(algorithm);
    if (status.ok()) possible.push_back(algorithm);
    EXPECT_TRUE(status.ok() || GetReason(status).has_value()) << status;
  }
  return possible;
}

TEST(TorchOptimizerTest, AFileIsOfNoAlgorithmThatItsKeysSpeakAgainst) {
  using A = Algorithm;
  const std::vector<std::pair<std::string, std::vector<A>>> files = {
      {"2.15.0/sgd", {A::kSgd}},         {"2.15.0/adamw", {A::kAdamW, A::kAdam}},
      {"2.15.0/nadam", {A::kNAdam}},     {"2.15.0/radam", {A::kRAdam}},
      {"2.15.0/adamax", {A::kAdamax}},   {"2.15.0/lion", {A::kLion}},
      {"2.15.0/rmsprop", {A::kRmsprop}}, {"2.15.0/adadelta", {A::kAdadelta}},
      {"2.15.0/adagrad", {A::kAdagrad}}, {"1.13.1/adamw", {A::kAdamW, A::kAdam}},
      {"1.13.1/radam", {A::kRAdam}},
  };
  for (const auto& [name, expected] : files) {
    const auto file =
        OpenText(ReadWholeFile(DataPath(absl::StrCat("optimizer-torch-", name, ".pt"))));
    ASSERT_EQ(file.status(), absl::OkStatus());
    EXPECT_EQ(CanBeOf(*file), expected) << name;
  }
  const auto adam = OpenText(ReadWholeFile(DataPath("optimizer-torch-2.15.0/adam.pt")));
  ASSERT_EQ(adam.status(), absl::OkStatus());
  const bool decays = adam->groups()[0].hyperparameters.weight_decay.value_or(0) != 0;
  EXPECT_EQ(adam->CheckAlgorithm(A::kAdamW).ok(), !decays);
  const absl::Status status = adam->CheckAlgorithm(A::kRAdam);
  EXPECT_EQ(GetReason(status), Reason::kInvalidField);
  EXPECT_NE(status.message().find("of adam by the keys"), absl::string_view::npos) << status;
  EXPECT_NE(status.message().find("leave the algorithm out"), absl::string_view::npos) << status;
}

// AdamW of another library: keys of torch's RAdam, but for what only torch writes.
TEST(TorchOptimizerTest, AnOptimizerThatIsNotTorchsIsWhatItsUserSays) {
  const auto file = [](const std::vector<std::string>& keys) {
    std::vector<std::string> group;
    for (const std::string& key : keys) {
      group.push_back(PickleString(key));
      group.push_back(PickleInt(0));
    }
    group.push_back(PickleString("betas"));
    group.push_back(List({PickleInt(0), PickleInt(0)}));
    group.push_back(PickleString("params"));
    group.push_back(List({PickleInt(0)}));
    return OpenText(
        OptimizerZip(Dict({PickleInt(0), Dict({PickleString("exp_avg_sq"), PickleInt(1)})}),
                     List({Dict(group)})));
  };
  const auto others = file({"lr", "eps", "weight_decay", "correct_bias"});
  ASSERT_EQ(others.status(), absl::OkStatus());
  EXPECT_EQ(CanBeOf(*others),
            (std::vector<Algorithm>{Algorithm::kAdamW, Algorithm::kAdam, Algorithm::kRAdam}));
  const auto torchs = file({"lr", "eps", "weight_decay", "foreach"});
  ASSERT_EQ(torchs.status(), absl::OkStatus());
  EXPECT_EQ(CanBeOf(*torchs), (std::vector<Algorithm>{Algorithm::kRAdam}));
}

TEST(TorchOptimizerTest, AnOptimizerThatIsNotSupportedIsNamed) {
  const auto file = OpenText(OptimizerZip(
      Dict({}), List({Dict({PickleString("lambd"), PickleInt(0), PickleString("t0"), PickleInt(1),
                            PickleString("params"), List({PickleInt(0)})})})));
  ASSERT_EQ(file.status(), absl::OkStatus());
  const absl::Status status = file->GuessAlgorithm().status();
  EXPECT_EQ(GetReason(status), Reason::kCheckpointUnsupported);
  EXPECT_NE(status.message().find("of ASGD"), absl::string_view::npos) << status;
  EXPECT_NE(status.message().find("none that is supported (sgd, adamw"), absl::string_view::npos)
      << status;
  EXPECT_EQ(status.message().find("give the algorithm"), absl::string_view::npos) << status;
  EXPECT_EQ(GetReason(file->CheckAlgorithm(Algorithm::kSgd)), Reason::kCheckpointUnsupported);
}

// What a caller does with a file that may be anything.
void Try(const std::string& content, size_t* accepted) {
  const auto file = OpenText(content);
  if (!file.ok()) {
    ASSERT_TRUE(GetReason(file.status()).has_value()) << file.status();
    return;
  }
  ++*accepted;
  file->GuessAlgorithm().IgnoreError();
  file->CheckAlgorithm(Algorithm::kAdam).IgnoreError();
  for (size_t i = 0; i < file->tensors().size(); ++i) {
    if (file->tensors()[i].nbytes() > (size_t{1} << 20)) continue;
    std::vector<uint8_t> bytes(file->tensors()[i].nbytes());
    file->Read(i, absl::MakeSpan(bytes)).IgnoreError();
  }
}

TEST(TorchOptimizerTest, TruncatedAndFlippedFilesNeverCrash) {
  constexpr uint32_t kSeed = 11;
  std::mt19937 random(kSeed);
  size_t accepted = 0;
  for (const std::string& name : Goldens()) {
    SCOPED_TRACE(absl::StrCat(name, ", seed ", kSeed));
    const std::string good = ReadWholeFile(DataPath(name + ".pt"));
    for (size_t size = 0; size < good.size(); size += 97) Try(good.substr(0, size), &accepted);
    // The pickle behind a right CRC, so that the flips reach what reads it.
    const auto directory = ZipDirectory::Open(MemoryFile(good));
    ASSERT_EQ(directory.status(), absl::OkStatus());
    std::vector<ZipEntry> entries;
    for (const ZipRecord& record : directory->records()) {
      entries.emplace_back(record.name, good.substr(record.offset, record.size));
    }
    for (int round = 0; round < 300; ++round) {
      std::vector<ZipEntry> bad = entries;
      std::string pickle = bad[0].data;
      for (uint32_t flips = 1 + random() % 3; flips > 0; --flips) {
        pickle[random() % pickle.size()] = static_cast<char>(random());
      }
      bad[0] = ZipEntry(bad[0].name, pickle);
      Try(Zip(bad), &accepted);
      if (HasFatalFailure()) return;
    }
  }
  EXPECT_GT(accepted, 100u);
}

}  // namespace
}  // namespace modelstate
