// LoadStateDict and LoadCheckpoint with what torch's load_state_dict means.
#include <fstream>

#include "tests/server/rpc/checkpoint_calls.h"

namespace modelstate {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::SizeIs;
using Stub = v1::ModelState::Stub;

class LoadRpcsTest : public CheckpointCalls {
 protected:
  // Header, table, chunk and trailer; offsets in table order. Tensors with values or an initializer
  // have no bytes.
  static std::vector<v1::LoadPart> LoadParts(
      const std::string& module,
      const std::vector<std::pair<v1::TensorInfo, std::string>>& tensors) {
    std::vector<v1::LoadPart> parts(2);
    std::string region;
    for (const auto& [info, bytes] : tensors) {
      v1::TensorInfo* entry = parts[1].mutable_tensors()->add_tensors();
      *entry = info;
      entry->set_offset(region.size());
      region += bytes;
    }
    parts[0].mutable_header()->set_module(module);
    parts[0].mutable_header()->set_tensor_count(tensors.size());
    parts[0].mutable_header()->set_total_bytes(region.size());
    if (!region.empty()) parts.emplace_back().mutable_chunk()->set_data(region);
    parts.emplace_back().mutable_trailer()->set_total_bytes(region.size());
    return parts;
  }
  static std::vector<v1::LoadPart> WithOptions(std::vector<v1::LoadPart> parts,
                                               const v1::LoadOptions& options) {
    *parts[0].mutable_header()->mutable_options() = options;
    return parts;
  }
  static v1::LoadOptions NotStrict() {
    v1::LoadOptions options;
    options.set_strict(false);
    return options;
  }
  static v1::LoadOptions DryRun(uint64_t skip = 0) {
    v1::LoadOptions options;
    options.set_dry_run(true);
    options.set_skip_keys(skip);
    return options;
  }

  void CopyData(const std::string& name) {
    std::filesystem::copy(absl::StrCat(DataFolder(), name), root_);
  }

  // The elements of one tensor as raw bytes, non-persistent buffers too.
  std::string Bytes(const std::string& module, const std::string& tensor) {
    v1::StreamStateDictRequest request;
    request.set_module(module);
    request.mutable_selection()->add_names(tensor);
    Fetched fetched = Fetch(request);
    EXPECT_TRUE(fetched.status.ok()) << fetched.status;
    return fetched.Bytes()[tensor];
  }
  std::vector<float> Floats(const std::string& module, const std::string& tensor) {
    return FloatsOf(Bytes(module, tensor));
  }
};

std::string TinyBytes(float first) {
  return FloatBytes({first, first, first, first, first, first});
}

TEST_F(LoadRpcsTest, DryRunReportsEverythingAndChangesNothing) {
  CreateTiny();
  const std::string before = StateOf("tiny");
  auto parts = WithOptions(LoadParts("tiny", {{Tensor("weight", v1::PARAMETER, {3, 2}), ""},
                                              {Tensor("x", v1::PARAMETER, {1}), ""},
                                              {Tensor("bias", v1::PARAMETER, {2}), ""}}),
                           DryRun());
  // The table says where the elements would be; they need not come.
  v1::TensorTable* table = parts[1].mutable_tensors();
  table->mutable_tensors(1)->set_offset(24);
  table->mutable_tensors(2)->set_offset(28);
  parts[0].mutable_header()->set_total_bytes(36);
  parts.resize(2);
  const auto result = Load(parts);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_THAT(result->missing_keys(), ElementsAre("running_mean"));
  EXPECT_THAT(result->unexpected_keys(), ElementsAre("x"));
  EXPECT_THAT(result->size_mismatches(),
              ElementsAre("size mismatch for weight: copying a param with shape torch.Size([3, 2]) "
                          "from checkpoint, the shape in current model is torch.Size([2, 3])."));
  EXPECT_EQ(result->missing_count(), 1);
  EXPECT_EQ(result->unexpected_count(), 1);
  EXPECT_EQ(result->size_mismatch_count(), 1);
  EXPECT_EQ(result->loaded(), 1);
  EXPECT_EQ(result->module().version().number(), 1);
  EXPECT_EQ(StateOf("tiny"), before);
  EXPECT_EQ(Info().limits().push_memory_used_bytes(), 0);

  // Who sends chunks all the same gets the same answer.
  parts.emplace_back().mutable_chunk()->set_data(std::string(36, 'x'));
  parts.emplace_back().mutable_trailer()->set_total_bytes(36);
  const auto again = Load(parts);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->SerializeAsString(), result->SerializeAsString());
  EXPECT_EQ(StateOf("tiny"), before);
}

TEST_F(LoadRpcsTest, DryRunOfMoreThanTheBudgetIsAnswered) {
  CreateTiny();
  const int64_t elements = int64_t{1} << 40;
  std::vector<v1::LoadPart> parts(2);
  *parts[1].mutable_tensors()->add_tensors() = Tensor("weight", v1::PARAMETER, {elements});
  v1::LoadHeader* header = parts[0].mutable_header();
  header->set_module("tiny");
  header->set_tensor_count(1);
  header->set_total_bytes(static_cast<uint64_t>(elements) * 4);
  EXPECT_THAT(Load(parts), FailsWith(Reason::kPushMemory));
  *header->mutable_options() = DryRun();
  const auto result = Load(parts);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->size_mismatch_count(), 1);
}

TEST_F(LoadRpcsTest, DryRunOfAFileReadsItsHeaderOnlyAndMakesNoModule) {
  CopyData("crepe-tiny.pth");
  auto result = LoadFile("crepe", "crepe-tiny.pth", DryRun(), true);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->load().loaded(), 44);
  EXPECT_EQ(result->read_bytes(), 0);
  EXPECT_FALSE(result->load().has_module());
  EXPECT_EQ(Info().module_count(), 0);
  EXPECT_THAT(LoadFile("crepe", "crepe-tiny.pth", DryRun()), FailsWith(Reason::kModuleNotFound));
  EXPECT_THAT(LoadFile("a/b c", "crepe-tiny.pth", DryRun(), true),
              FailsWith(Reason::kInvalidField));
  CreateTiny();
  result = LoadFile("tiny", "crepe-tiny.pth", DryRun());
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->load().missing_count(), 3);
  EXPECT_EQ(result->load().unexpected_count(), 44);
  EXPECT_EQ(result->load().module().version().number(), 1);
}

TEST_F(LoadRpcsTest, AHundredThousandMissingKeysAreAReadableErrorAndAreAllListed) {
  constexpr int kTensors = 100000;
  std::vector<v1::TensorInfo> tensors;
  for (int i = 0; i < kTensors; ++i) {
    tensors.push_back(
        Tensor(absl::StrCat("encoder.block.with.a.long.name.", i, ".weight"), v1::PARAMETER, {1}));
  }
  // In parts: one message would be too long.
  std::vector<v1::LoadPart> parts(1);
  parts[0].mutable_header()->set_module("large");
  parts[0].mutable_header()->set_tensor_count(kTensors);
  parts[0].mutable_header()->set_total_bytes(uint64_t{4} * kTensors);
  for (int i = 0; i < kTensors; ++i) {
    if (i % 10000 == 0) parts.emplace_back();
    tensors[static_cast<size_t>(i)].set_offset(static_cast<uint64_t>(i) * 4);
    *parts.back().mutable_tensors()->add_tensors() = tensors[static_cast<size_t>(i)];
  }
  parts.emplace_back().mutable_chunk()->set_data(std::string(4 * kTensors, '\0'));
  parts.emplace_back().mutable_trailer();
  Create("large", {});
  ASSERT_TRUE(Load(parts).ok());

  const auto other = LoadParts("large", {{WithValues(Tensor("w", v1::PARAMETER, {1}), {1}), ""}});
  const absl::Status error = Load(other).status();
  EXPECT_THAT(error, FailsWith(Reason::kMissingKey));
  const std::string text(error.message());
  EXPECT_LE(text.size(), 1024u);
  EXPECT_THAT(text, HasSubstr("Missing key(s) in state_dict: "
                              "\"encoder.block.with.a.long.name.0.weight\", "));
  EXPECT_THAT(text, HasSubstr(" more. "));
  EXPECT_THAT(text, HasSubstr("dry_run lists all"));
  EXPECT_EQ(GetErrorMetadata(error)["missing"], "100000");

  std::vector<std::string> missing;
  std::vector<std::string> unexpected;
  int answers = 0;
  do {
    const auto result = Load(WithOptions(other, DryRun(missing.size())));
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_LE(result->ByteSizeLong(), (size_t{2} << 20) + 4096);
    EXPECT_EQ(result->missing_count(), 100000);
    missing.insert(missing.end(), result->missing_keys().begin(), result->missing_keys().end());
    unexpected.insert(unexpected.end(), result->unexpected_keys().begin(),
                      result->unexpected_keys().end());
    ASSERT_LT(++answers, 10);
  } while (missing.size() < kTensors);
  EXPECT_GT(answers, 1);
  ASSERT_THAT(missing, SizeIs(kTensors));
  for (size_t i = 0; i < missing.size(); ++i) ASSERT_EQ(missing[i], tensors[i].name());
  EXPECT_THAT(unexpected, ElementsAre("w"));
}

TEST_F(LoadRpcsTest, NotStrictLoadsWhatFitsAndListsTheRest) {
  CreateTiny();
  const auto result = Load(
      WithOptions(LoadParts("tiny", {{Tensor("running_mean", v1::BUFFER, {2}), FloatBytes({1, 2})},
                                     {Tensor("x", v1::PARAMETER, {1}), FloatBytes({9})}}),
                  NotStrict()));
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_THAT(result->missing_keys(), ElementsAre("weight", "bias"));
  EXPECT_THAT(result->unexpected_keys(), ElementsAre("x"));
  EXPECT_EQ(result->loaded(), 1);
  EXPECT_THAT(Floats("tiny", "running_mean"), ElementsAre(1, 2));
  EXPECT_THAT(Floats("tiny", "bias"), ElementsAre(0.5, -0.5));
}

TEST_F(LoadRpcsTest, AnyErrorLeavesStateOptimizerAndBudgetsAsTheyWere) {
  CreateTiny();
  ASSERT_TRUE(Configure("tiny", v1::ADAMW, 0.1).ok());
  const auto step = StepParts("tiny", {{Tensor("bias", v1::GRADIENT, {2}), FloatBytes({1, -1})}});
  ASSERT_TRUE(Push(step).ok());
  const std::string before = StateOf("tiny");
  const uint64_t device = Info().devices(0).memory_used_bytes();
  const auto optimizer = [this] {
    v1::GetOptimizerRequest request;
    request.set_module("tiny");
    return Call(&Stub::GetOptimizer, request)->SerializeAsString();
  };
  const std::string optimizer_before = optimizer();
  const v1::TensorInfo weight = Tensor("weight", v1::PARAMETER, {2, 3});
  const v1::TensorInfo bias = Tensor("bias", v1::PARAMETER, {2});
  const v1::TensorInfo mean = Tensor("running_mean", v1::BUFFER, {2});
  const std::string two = FloatBytes({1, 1});
  const auto whole = [&](v1::TensorInfo last, const std::string& bytes) {
    return LoadParts("tiny", {{weight, TinyBytes(1)}, {bias, two}, {last, bytes}});
  };
  ASSERT_THAT(Load(LoadParts("tiny", {{weight, TinyBytes(1)}})), FailsWith(Reason::kMissingKey));
  ASSERT_THAT(
      Load(LoadParts(
          "tiny",
          {{weight, TinyBytes(1)}, {bias, two}, {mean, two}, {Tensor("x", v1::BUFFER, {2}), two}})),
      FailsWith(Reason::kUnknownKey));
  const auto wrong = whole(Tensor("running_mean", v1::BUFFER, {3}), FloatBytes({1, 1, 1}));
  ASSERT_THAT(Load(wrong), FailsWith(Reason::kShapeMismatch));
  ASSERT_THAT(Load(WithOptions(wrong, NotStrict())), FailsWith(Reason::kShapeMismatch));
  auto bad = whole(mean, two);
  bad[1].mutable_tensors()->mutable_tensors(0)->set_xxh3("0123456789abcdef");
  ASSERT_THAT(Load(bad), FailsWith(Reason::kDigestMismatch));
  bad = whole(mean, two);
  bad.pop_back();
  ASSERT_THAT(Load(bad), FailsWith(Reason::kChunkInvalid)) << "no trailer";
  bad = whole(mean, two);
  bad[0].mutable_header()->mutable_base()->set_incarnation(
      FetchAll("tiny").header.version().incarnation());
  bad[0].mutable_header()->mutable_base()->set_number(1);
  ASSERT_THAT(Load(bad), FailsWith(Reason::kStaleBase));
  CopyData("crepe-tiny.pth");
  ASSERT_THAT(LoadFile("tiny", "crepe-tiny.pth"), FailsWith(Reason::kMissingKey));
  EXPECT_EQ(Info().devices(0).memory_used_bytes(), device);
  // A damaged element is found when it is read, after others have been.
  std::string file;
  {
    std::ifstream in(root_ / "crepe-tiny.pth", std::ios::binary);
    file.assign(std::istreambuf_iterator<char>(in), {});
  }
  ASSERT_TRUE(LoadFile("crepe", "crepe-tiny.pth", {}, true).ok());
  const std::string crepe = StateOf("crepe");
  const uint64_t with_crepe = Info().devices(0).memory_used_bytes();
  for (size_t i = file.size() / 2; i < file.size() / 2 + 4096; ++i) file[i] ^= 1;
  std::ofstream(root_ / "damaged.pth", std::ios::binary) << file;
  ASSERT_THAT(LoadFile("crepe", "damaged.pth"), FailsWith(Reason::kCheckpointCorrupt));
  EXPECT_EQ(StateOf("crepe"), crepe);
  ASSERT_TRUE(WaitUntilIdle());
  EXPECT_EQ(Info().devices(0).memory_used_bytes(), with_crepe);

  EXPECT_EQ(StateOf("tiny"), before);
  EXPECT_EQ(optimizer(), optimizer_before);
  EXPECT_EQ(Info().limits().push_memory_used_bytes(), 0);
  // And it still works.
  EXPECT_TRUE(Load(whole(mean, two)).ok());
}

v1::TensorInfo Uniform(v1::TensorInfo info, std::optional<uint64_t> seed = {}) {
  info.mutable_initializer()->mutable_uniform()->set_low(-1);
  if (seed) info.mutable_initializer()->set_seed(*seed);
  return info;
}

TEST_F(LoadRpcsTest, TableThatRegistersKeepsTheRulesOfRegistrationButAFileNeedNot) {
  Create("empty", {});
  const auto parts = [](const std::string& second) {
    return LoadParts("empty", {{Uniform(Tensor("a", v1::PARAMETER, {2})), ""},
                               {Uniform(Tensor(second, v1::PARAMETER, {2})), ""}});
  };
  for (const char* name : {"a.weight", "b..weight", ".b", "b."}) {
    const auto result = Load(parts(name));
    EXPECT_THAT(result, FailsWith(Reason::kInvalidField)) << name;
  }
  EXPECT_THAT(std::string(Load(parts("a.weight")).status().message()),
              testing::HasSubstr("attribute 'a' already exists"));
  const auto file =
      Load(LoadParts("empty", {{Tensor("a", v1::PARAMETER, {1}), FloatBytes({1})},
                               {Tensor("a.b", v1::PARAMETER, {1}), FloatBytes({2})}}));
  EXPECT_TRUE(file.ok()) << file.status();
}

TEST_F(LoadRpcsTest, TableRegistersAModuleWithInitializers) {
  v1::TensorInfo frozen = Tensor("frozen", v1::PARAMETER, {2});
  frozen.set_requires_grad(false);
  frozen.mutable_initializer()->set_constant(1.5);
  v1::TensorInfo hidden = Tensor("hidden", v1::BUFFER, {3});
  hidden.set_persistent(false);
  hidden.mutable_initializer()->set_ones(true);
  v1::TensorInfo tied = Tensor("head", v1::PARAMETER, {5}, v1::BF16);
  tied.set_alias_of("embed");
  v1::TensorInfo count = Tensor("count", v1::BUFFER, {}, v1::I64);
  count.mutable_initializer()->set_zeros(true);
  const v1::TensorInfo embed = Uniform(Tensor("embed", v1::PARAMETER, {5}, v1::BF16));
  const v1::TensorInfo own = Uniform(Tensor("own", v1::PARAMETER, {3, 2}), 99);
  const v1::TensorInfo sent = Tensor("sent", v1::BUFFER, {2});
  auto parts = LoadParts("empty", {{embed, ""},
                                   {frozen, ""},
                                   {hidden, ""},
                                   {count, ""},
                                   {tied, ""},
                                   {own, ""},
                                   {sent, FloatBytes({3, 4})}});
  parts[0].mutable_header()->set_seed(7);
  // The table comes in two messages.
  v1::LoadPart second;
  for (int i = 3; i < 7; ++i) {
    *second.mutable_tensors()->add_tensors() = parts[1].tensors().tensors(i);
  }
  parts[1].mutable_tensors()->mutable_tensors()->DeleteSubrange(3, 4);
  parts.insert(parts.begin() + 2, second);
  Create("empty", {});
  const auto result = Load(parts);
  ASSERT_TRUE(result.ok()) << result.status();
  ASSERT_EQ(result->decisions_size(), 1);
  EXPECT_EQ(result->decisions(0).rule(), "request");
  EXPECT_EQ(result->decisions(0).parameters(), 3);
  EXPECT_EQ(result->decisions(0).buffers(), 3);
  EXPECT_EQ(result->loaded(), 6);
  EXPECT_EQ(Info().limits().push_memory_used_bytes(), 0);

  // As CreateModule makes it from the same spec.
  v1::CreateModuleRequest request;
  request.set_name("made");
  request.mutable_spec()->set_seed(7);
  for (const v1::TensorInfo& tensor : {embed, frozen, hidden, count, tied, own}) {
    *request.mutable_spec()->add_tensors() = tensor;
  }
  *request.mutable_spec()->add_tensors() = WithValues(sent, {3, 4});
  ASSERT_TRUE(Call(&Stub::CreateModule, request).ok());
  EXPECT_EQ(FetchAll("empty").Region(), FetchAll("made").Region());
  EXPECT_EQ(FetchAll("empty").header.layout_digest(), FetchAll("made").header.layout_digest());
  EXPECT_THAT(Floats("empty", "hidden"), ElementsAre(1, 1, 1));
  EXPECT_NE(Bytes("empty", "own"), std::string(24, '\0'));
  for (const v1::TensorInfo& tensor : FetchAll("empty").tensors) {
    EXPECT_NE(tensor.name(), "hidden") << "not in the state_dict";
    EXPECT_EQ(tensor.alias_of(), tensor.name() == "head" ? "embed" : "");
    if (tensor.kind() == v1::PARAMETER) {
      EXPECT_EQ(tensor.requires_grad(), tensor.name() != "frozen");
    }
  }
}

TEST_F(LoadRpcsTest, InitializerFillsAnExistingTensorInItsOwnDtype) {
  Create("half", {Tensor("w", v1::PARAMETER, {4, 4}, v1::BF16), Tensor("b", v1::BUFFER, {2})});
  ASSERT_TRUE(Configure("half", v1::SGD, 0.1).ok());
  auto parts = WithOptions(
      LoadParts("half", {{Uniform(Tensor("w", v1::TENSOR_KIND_UNSPECIFIED, {4, 4})), ""}}),
      NotStrict());
  parts[0].mutable_header()->set_seed(5);
  const auto result = Load(parts);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_THAT(result->missing_keys(), ElementsAre("b"));
  v1::CreateModuleRequest request;
  request.set_name("made");
  *request.mutable_spec()->add_tensors() = Uniform(Tensor("w", v1::PARAMETER, {4, 4}, v1::BF16), 5);
  ASSERT_TRUE(Call(&Stub::CreateModule, request).ok());
  EXPECT_EQ(Bytes("half", "w"), Bytes("made", "w"));
  EXPECT_THAT(Floats("half", "b"), ElementsAre(0, 0));
  EXPECT_EQ(result->module().version().number(), 3);
}

TEST_F(LoadRpcsTest, WrongInitializersAreRefusedWithoutTrace) {
  Create("m", {Tensor("w", v1::PARAMETER, {4}), Tensor("n", v1::BUFFER, {2}, v1::I64)});
  const std::string before = StateOf("m");
  const auto refused = [this](const v1::TensorInfo& tensor) {
    return Load(WithOptions(LoadParts("m", {{tensor, ""}}), NotStrict())).status();
  };
  EXPECT_THAT(refused(Uniform(Tensor("n", v1::BUFFER, {2}, v1::I64))),
              FailsWith(Reason::kInvalidField));
  v1::TensorInfo xavier = Tensor("w", v1::PARAMETER, {4});
  xavier.mutable_initializer()->mutable_xavier_normal();
  EXPECT_THAT(refused(xavier), FailsWith(Reason::kInvalidField)) << "needs two dimensions";
  EXPECT_THAT(refused(WithValues(Uniform(Tensor("w", v1::PARAMETER, {4})), {1, 2, 3, 4})),
              FailsWith(Reason::kInvalidField));
  EXPECT_THAT(refused(Uniform(Tensor("w", v1::PARAMETER, {5}))), FailsWith(Reason::kShapeMismatch));
  v1::TensorInfo tied = Uniform(Tensor("tied", v1::PARAMETER, {4}));
  tied.set_alias_of("w");
  EXPECT_THAT(Load(LoadParts("m", {{Uniform(Tensor("w", v1::PARAMETER, {4})), ""}, {tied, ""}})),
              FailsWith(Reason::kInvalidField));
  EXPECT_EQ(StateOf("m"), before);
  ASSERT_TRUE(Configure("m", v1::SGD, 0.1).ok());
  EXPECT_THAT(Push(StepParts("m", {{Uniform(Tensor("w", v1::GRADIENT, {4})), ""}})),
              FailsWith(Reason::kInvalidField))
      << "a step takes none";
}

// An old file is one without its count: by the version that _metadata gives its module.
TEST_F(LoadRpcsTest, BatchCountMayBeMissingByTheVersionInTheFile) {
  for (const char* torch : {"torch-1.13.1", "torch-2.15.0"}) {
    for (const char* name :
         {"batchnorm.pt", "no_count_version2.pt", "no_count_version1.pt", "no_count_plain.pt"}) {
      std::filesystem::copy(absl::StrCat(DataFolder(), torch, "/", name), root_,
                            std::filesystem::copy_options::overwrite_existing);
    }
    const std::string module = absl::StrCat("m-", torch);
    ASSERT_TRUE(LoadFile(module, "batchnorm.pt", {}, true).ok());
    ASSERT_TRUE(Load(WithOptions(LoadParts(module, {{WithValues(Tensor("1.num_batches_tracked",
                                                                       v1::BUFFER, {}, v1::I64),
                                                                {12}),
                                                     ""}}),
                                 NotStrict()))
                    .ok());
    const absl::Status error = LoadFile(module, "no_count_version2.pt").status();
    EXPECT_THAT(error, FailsWith(Reason::kMissingKey));
    EXPECT_THAT(std::string(error.message()),
                HasSubstr("Missing key(s) in state_dict: \"1.num_batches_tracked\". "));
    for (const char* name : {"no_count_version1.pt", "no_count_plain.pt"}) {
      const auto result = LoadFile(module, name);
      ASSERT_TRUE(result.ok()) << name << result.status();
      EXPECT_THAT(result->load().missing_keys(), IsEmpty());
      EXPECT_EQ(Bytes(module, "1.num_batches_tracked"), std::string("\x0c\0\0\0\0\0\0\0", 8))
          << "keeps its count";
    }
  }
}

TEST_F(LoadRpcsTest, NonPersistentBufferIsListedStreamedOnRequestAndNeverSaved) {
  v1::TensorInfo hidden = WithValues(Tensor("hidden", v1::BUFFER, {1}), {5});
  hidden.set_persistent(false);
  const v1::TensorInfo w = WithValues(Tensor("w", v1::PARAMETER, {1}), {1});
  Create("m", {w, hidden});
  v1::ListTensorsRequest list;
  list.set_module("m");
  const auto buffers = Call(&Stub::ListBuffers, list);
  ASSERT_EQ(buffers->tensors_size(), 1);
  EXPECT_FALSE(buffers->tensors(0).persistent());
  EXPECT_THAT(FetchAll("m").tensors, SizeIs(1));
  EXPECT_THAT(Floats("m", "hidden"), ElementsAre(5));
  v1::SaveCheckpointRequest save;
  save.set_module("m");
  save.set_path("saved");
  grpc::ClientContext context;
  auto reader = stub_->SaveCheckpoint(&context, save);
  v1::SaveCheckpointResponse event;
  while (reader->Read(&event)) {
  }
  ASSERT_TRUE(reader->Finish().ok());
  const auto fresh = LoadFile("fresh", "saved", {}, true);
  ASSERT_TRUE(fresh.ok()) << fresh.status();
  EXPECT_EQ(fresh->load().module().buffer_count(), 0);
  const auto same = LoadFile("m", "saved");
  ASSERT_TRUE(same.ok()) << same.status();
  EXPECT_THAT(same->load().missing_keys(), IsEmpty());
  EXPECT_THAT(Floats("m", "hidden"), ElementsAre(5));
}

TEST_F(LoadRpcsTest, CheckpointOfOursIsWholeSoAMissingCountIsMissing) {
  const v1::TensorInfo w = WithValues(Tensor("bn.weight", v1::PARAMETER, {1}), {1});
  Create("without", {w});
  Create("with", {w, Tensor("bn.num_batches_tracked", v1::BUFFER, {}, v1::I64)});
  v1::SaveCheckpointRequest save;
  save.set_module("without");
  save.set_path("saved");
  grpc::ClientContext context;
  auto reader = stub_->SaveCheckpoint(&context, save);
  v1::SaveCheckpointResponse event;
  while (reader->Read(&event)) {
  }
  ASSERT_TRUE(reader->Finish().ok());
  EXPECT_THAT(LoadFile("with", "saved"), FailsWith(Reason::kMissingKey));
  // From a caller nothing is said of versions.
  EXPECT_TRUE(Load(LoadParts("with", {{w, ""}})).ok());
}

TEST_F(LoadRpcsTest, PrefixesAreStrippedAndAddedBeforeKeysAreMatched) {
  CreateTiny();
  const auto parts = [](const std::string& prefix) {
    return LoadParts("tiny",
                     {{Tensor(prefix + "weight", v1::PARAMETER, {2, 3}), TinyBytes(1)},
                      {Tensor(prefix + "bias", v1::PARAMETER, {2}), FloatBytes({2, 3})},
                      {Tensor(prefix + "running_mean", v1::BUFFER, {2}), FloatBytes({4, 5})}});
  };
  EXPECT_THAT(Load(parts("module.")), FailsWith(Reason::kMissingKey)) << "never by itself";
  v1::LoadOptions options;
  options.set_strip_prefix("module.");
  ASSERT_TRUE(Load(WithOptions(parts("module."), options)).ok());
  EXPECT_THAT(Floats("tiny", "bias"), ElementsAre(2, 3));
  options.set_strip_prefix("running_");  // of one key alone
  EXPECT_THAT(Load(WithOptions(parts(""), options)), FailsWith(Reason::kMissingKey));
  options.clear_strip_prefix();
  options.set_add_prefix("net.");
  EXPECT_THAT(Load(WithOptions(parts(""), options)), FailsWith(Reason::kMissingKey));
  options.set_strip_prefix("a.");
  options.set_add_prefix("");
  EXPECT_TRUE(Load(WithOptions(parts("a."), options)).ok());
}

TEST_F(LoadRpcsTest, PrefixThatMakesNamesTooLongIsRefused) {
  CreateTiny();
  const auto parts = LoadParts("tiny", {{Tensor("bias", v1::PARAMETER, {2}), FloatBytes({2, 3})}});
  v1::LoadOptions options;
  options.set_dry_run(true);
  options.set_add_prefix(std::string(1025, 'p'));
  EXPECT_THAT(Load(WithOptions(parts, options)), FailsWith(Reason::kInvalidField));
  options.set_add_prefix(std::string(1021, 'p'));  // with "bias" 1025
  EXPECT_THAT(Load(WithOptions(parts, options)), FailsWith(Reason::kInvalidField));
  options.set_add_prefix(std::string(1020, 'p'));
  EXPECT_TRUE(Load(WithOptions(parts, options)).ok());
}

TEST_F(LoadRpcsTest, LoadKeepsMomentumAndMakesTheMasterCopyAnew) {
  Create("m", {Tensor("w", v1::PARAMETER, {1}, v1::BF16)});
  v1::ConfigureOptimizerRequest configure;
  configure.set_module("m");
  configure.mutable_optimizer()->set_algorithm(v1::SGD);
  configure.mutable_optimizer()->mutable_hyperparameters()->set_lr(1);
  configure.mutable_optimizer()->mutable_hyperparameters()->set_momentum(0.5);
  ASSERT_TRUE(Call(&Stub::ConfigureOptimizer, configure).ok());
  const auto step =
      StepParts("m", {{WithValues(Tensor("w", v1::GRADIENT, {1}, v1::BF16), {1}), ""}});
  ASSERT_TRUE(Push(step).ok());  // momentum 1, w -1
  ASSERT_TRUE(Load(LoadParts("m", {{WithValues(Tensor("w", v1::PARAMETER, {1}), {8}), ""}})).ok());
  ASSERT_TRUE(Push(step).ok());  // momentum 1.5
  // 8 - 1.5 in bfloat16; without the momentum 7, with the old master copy -2.5.
  EXPECT_EQ(Bytes("m", "w"), std::string("\xd0\x40", 2));
}

}  // namespace
}  // namespace modelstate
