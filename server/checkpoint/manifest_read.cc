#include <bit>
#include <limits>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "common/base/digest.h"
#include "common/base/status.h"
#include "server/checkpoint/manifest.h"

namespace modelstate {
namespace {

using Json = nlohmann::json;

absl::Status Corrupt(absl::string_view text) {
  return MakeError(Reason::kCheckpointCorrupt,
                   absl::StrCat(kManifestFile, ": ", text, "; use another checkpoint"));
}

// Reads the members of one JSON object. The first that is missing or of another type makes status()
// an error that names it; what is read after that is zero.
class ObjectReader {
 public:
  // `where` is for messages: "tensors[3]".
  ObjectReader(const Json& json, std::string where) : json_(json), where_(std::move(where)) {
    if (!json_.is_object()) Fail("", "an object");
  }

  const absl::Status& status() const { return status_; }

  const Json* Find(const char* key) {
    if (!json_.is_object()) return nullptr;
    const auto it = json_.find(key);
    return it == json_.end() ? nullptr : &*it;
  }
  bool Has(const char* key) { return Find(key) != nullptr; }

  std::string String(const char* key) {
    const Json* value = Find(key);
    if (value != nullptr && value->is_string()) return value->get_ref<const std::string&>();
    Fail(key, "text");
    return "";
  }
  uint64_t Uint(const char* key, uint64_t max = std::numeric_limits<uint64_t>::max()) {
    const Json* value = Find(key);
    if (value != nullptr && value->is_number_unsigned() && value->get<uint64_t>() <= max) {
      return value->get<uint64_t>();
    }
    Fail(key, "a whole number in its range");
    return 0;
  }
  bool Bool(const char* key) {
    const Json* value = Find(key);
    if (value != nullptr && value->is_boolean()) return value->get<bool>();
    Fail(key, "true or false");
    return false;
  }
  double Double(const char* key) {
    const Json* value = Find(key);
    if (value != nullptr && value->is_number()) return value->get<double>();
    if (value != nullptr && value->is_string()) {
      if (const auto bits = DigestFromHex(value->get_ref<const std::string&>())) {
        return std::bit_cast<double>(*bits);
      }
    }
    Fail(key, "a number, or 16 hex digits of one");
    return 0;
  }
  uint64_t Hex(const char* key) {
    const Json* value = Find(key);
    if (value != nullptr && value->is_string()) {
      if (const auto bits = DigestFromHex(value->get_ref<const std::string&>())) return *bits;
    }
    Fail(key, "16 hex digits");
    return 0;
  }
  std::vector<std::string> Strings(const char* key) {
    std::vector<std::string> strings;
    for (const Json& item : List(key)) {
      if (!item.is_string()) {
        Fail(key, "a list of texts");
        break;
      }
      strings.push_back(item.get_ref<const std::string&>());
    }
    return strings;
  }
  // An empty list on failure.
  const Json& List(const char* key) {
    static const Json* const kEmpty = new Json(Json::array());
    const Json* value = Find(key);
    if (value != nullptr && value->is_array()) return *value;
    Fail(key, "a list");
    return *kEmpty;
  }
  ObjectReader Object(const char* key) {
    static const Json* const kNull = new Json();
    const Json* value = Find(key);
    return ObjectReader(value == nullptr ? *kNull : *value, absl::StrCat(where_, key, "."));
  }

  void Fail(absl::string_view key, absl::string_view wanted) {
    if (!status_.ok()) return;
    status_ = Corrupt(absl::StrCat("\"", where_, key, "\" is not ", wanted));
  }
  void Include(const absl::Status& status) { status_.Update(status); }

 private:
  const Json& json_;
  const std::string where_;
  absl::Status status_;
};

Version ToVersion(ObjectReader reader, ObjectReader& parent) {
  Version version{reader.Hex("incarnation"), reader.Uint("number")};
  parent.Include(reader.status());
  return version;
}

Hyperparameters ToHyperparameters(ObjectReader reader, ObjectReader& parent) {
  Hyperparameters h;
  for (const HyperparameterField& field : HyperparameterFields()) {
    if (!reader.Has(field.name)) continue;
    if (field.number != nullptr) {
      h.*field.number = reader.Double(field.name);
    } else {
      h.*field.flag = reader.Bool(field.name);
    }
  }
  parent.Include(reader.status());
  return h;
}

absl::StatusOr<OptimizerConfig> ToOptimizer(const Json& json) {
  ObjectReader reader(json, "optimizer.");
  OptimizerConfig config;
  const std::string algorithm = reader.String("algorithm");
  MS_RETURN_IF_ERROR(reader.status());
  const std::optional<Algorithm> parsed = ParseAlgorithm(algorithm);
  if (!parsed) {
    return MakeError(Reason::kCheckpointUnsupported,
                     absl::StrCat(kManifestFile, ": this server has no optimizer \"",
                                  algorithm.substr(0, 64), "\"; load with weights_only"));
  }
  config.algorithm = *parsed;
  config.hyperparameters = ToHyperparameters(reader.Object("hyperparameters"), reader);
  constexpr uint64_t kMaxCount = std::numeric_limits<uint32_t>::max();
  config.rounds.quorum = static_cast<uint32_t>(reader.Uint("quorum", kMaxCount));
  if (reader.Has("min_contributions")) {
    config.rounds.min_contributions =
        static_cast<uint32_t>(reader.Uint("min_contributions", kMaxCount));
    config.rounds.round_timeout = absl::Seconds(reader.Double("round_timeout_seconds"));
  }
  if (reader.Has("max_grad_value")) config.max_grad_value = reader.Double("max_grad_value");
  if (reader.Has("master_weights")) config.master_weights = reader.Bool("master_weights");
  if (reader.Has("no_default_group")) config.no_default_group = reader.Bool("no_default_group");
  if (reader.Has("max_grad_norm")) config.max_grad_norm = reader.Double("max_grad_norm");
  if (reader.Has("max_staleness")) config.max_staleness = reader.Uint("max_staleness");
  for (const Json& item : reader.List("groups")) {
    ObjectReader group(item, absl::StrCat("optimizer.groups[", config.groups.size(), "]."));
    ParameterGroup& out = config.groups.emplace_back();
    out.name = group.String("name");
    out.selection.names = group.Strings("names");
    out.selection.prefixes = group.Strings("prefixes");
    out.selection.globs = group.Strings("globs");
    out.hyperparameters = ToHyperparameters(group.Object("hyperparameters"), group);
    MS_RETURN_IF_ERROR(group.status());
  }
  MS_RETURN_IF_ERROR(reader.status());
  return config;
}

absl::StatusOr<Manifest::TensorEntry> ToTensor(const Json& json, size_t index) {
  ObjectReader reader(json, absl::StrCat("tensors[", index, "]."));
  Manifest::TensorEntry entry;
  entry.spec.name = reader.String("name");
  const std::string kind = reader.String("kind");
  if (kind == TensorKindName(TensorKind::kBuffer)) {
    entry.spec.kind = TensorKind::kBuffer;
  } else if (kind == TensorKindName(TensorKind::kParameter)) {
    entry.spec.requires_grad = reader.Bool("requires_grad");
  } else {
    reader.Fail("kind", "parameter or buffer");
  }
  const std::optional<DType> dtype = ParseDType(reader.String("dtype"));
  if (!dtype) reader.Fail("dtype", "a dtype of safetensors");
  entry.spec.dtype = dtype.value_or(DType::kF32);
  if (reader.Has("alias_of")) entry.spec.alias_of = reader.String("alias_of");
  entry.xxh3 = reader.Hex("xxh3");
  std::vector<int64_t> dims;
  for (const Json& dim : reader.List("shape")) {
    const bool good = dim.is_number_unsigned() && dims.size() < Shape::kMaxRank &&
                      dim.get<uint64_t>() <= uint64_t{std::numeric_limits<int64_t>::max()};
    if (!good) {
      reader.Fail("shape", "a list of sizes");
      break;
    }
    dims.push_back(dim.get<int64_t>());
  }
  MS_RETURN_IF_ERROR(reader.status());
  absl::StatusOr<Shape> shape = Shape::Create(dims);
  if (!shape.ok()) {
    return Corrupt(absl::StrCat("\"tensors[", index, "].shape\": ", shape.status().message()));
  }
  entry.spec.shape = *std::move(shape);
  return entry;
}

absl::Status AddWorker(const Json& json, size_t index, WorkerRecords& workers) {
  ObjectReader reader(json, absl::StrCat("workers[", index, "]."));
  const std::string worker = reader.String("worker");
  WorkerRecord record;
  record.sequence = reader.Uint("sequence");
  record.payload_digest = reader.String("payload_digest");
  StepAnswer& answer = record.answer;
  const std::string outcome = reader.String("outcome");
  if (outcome == "skipped_nonfinite") {
    answer.outcome = StepOutcome::kSkippedNonfinite;
  } else if (outcome != "applied") {
    reader.Fail("outcome", "applied or skipped_nonfinite");
  }
  answer.version = ToVersion(reader.Object("version"), reader);
  answer.step = reader.Uint("step");
  const uint64_t max_count = std::numeric_limits<uint32_t>::max();
  answer.contributions = static_cast<uint32_t>(reader.Uint("contributions", max_count));
  answer.quorum = static_cast<uint32_t>(reader.Uint("quorum", max_count));
  answer.grad_norm = reader.Double("grad_norm");
  answer.clip_coef = reader.Double("clip_coef");
  answer.nonfinite = reader.Strings("nonfinite");
  answer.updated = reader.Uint("updated");
  answer.skipped = reader.Uint("skipped");
  if (reader.Has("ignored")) answer.ignored = reader.Uint("ignored");
  MS_RETURN_IF_ERROR(reader.status());
  if (worker.empty() || record.sequence == 0 ||
      !workers.emplace(worker, std::move(record)).second) {
    return Corrupt(
        absl::StrCat("\"workers[", index, "]\" has no name, no sequence, or comes twice"));
  }
  return absl::OkStatus();
}

absl::StatusOr<Manifest> FromJson(const Json& json) {
  ObjectReader reader(json, "");
  Manifest m;
  m.module = reader.String("module");
  m.version = ToVersion(reader.Object("version"), reader);
  m.step = reader.Uint("step");
  m.create_seconds = static_cast<int64_t>(
      reader.Uint("create_seconds", uint64_t{std::numeric_limits<int64_t>::max()}));
  m.weights_only = reader.Bool("weights_only");
  if (const Json* metadata = reader.Find("metadata"); metadata && metadata->is_object()) {
    for (const auto& item : metadata->items()) {
      if (!item.value().is_string()) return Corrupt("\"metadata\" has a value that is not text");
      m.metadata.emplace(item.key(), item.value().get_ref<const std::string&>());
    }
  } else {
    reader.Fail("metadata", "an object");
  }
  for (const Json& item : reader.List("files")) {
    ObjectReader file(item, absl::StrCat("files[", m.files.size(), "]."));
    Manifest::FileEntry entry{file.String("name"), file.Uint("nbytes"), file.Hex("xxh3")};
    // Only these two names, so that no manifest leads to another file.
    if (entry.name != kModelFile && entry.name != kOptimizerFile) {
      file.Fail("name", absl::StrCat(kModelFile, " or ", kOptimizerFile));
    } else if (m.FindFile(entry.name) != nullptr) {
      file.Fail("name", "unique");
    }
    MS_RETURN_IF_ERROR(file.status());
    m.files.push_back(std::move(entry));
  }
  const Json& tensors = reader.List("tensors");
  m.tensors.reserve(tensors.size());
  for (const Json& item : tensors) {
    MS_ASSIGN_OR_RETURN(Manifest::TensorEntry entry, ToTensor(item, m.tensors.size()));
    m.tensors.push_back(std::move(entry));
  }
  const Json* optimizer = reader.Find("optimizer");
  if (optimizer == nullptr) {
    reader.Fail("optimizer", "an object or null");
  } else if (!optimizer->is_null()) {
    MS_ASSIGN_OR_RETURN(m.optimizer, ToOptimizer(*optimizer));
  }
  for (const Json& item : reader.List("optimizer_state")) {
    ObjectReader state(item, absl::StrCat("optimizer_state[", m.optimizer_state.size(), "]."));
    const float product = state.Has("product") ? static_cast<float>(state.Double("product")) : 1.0f;
    m.optimizer_state.push_back(
        {state.String("parameter"), state.Uint("step"), product, state.Strings("slots")});
    MS_RETURN_IF_ERROR(state.status());
  }
  size_t worker_index = 0;
  for (const Json& item : reader.List("workers")) {
    MS_RETURN_IF_ERROR(AddWorker(item, worker_index++, m.workers));
  }
  MS_RETURN_IF_ERROR(reader.status());
  if (m.FindFile(kModelFile) == nullptr) {
    return Corrupt(absl::StrCat("\"files\" lacks ", kModelFile));
  }
  return m;
}

}  // namespace

const Manifest::FileEntry* Manifest::FindFile(absl::string_view name) const {
  for (const FileEntry& file : files) {
    if (file.name == name) return &file;
  }
  return nullptr;
}

absl::StatusOr<Manifest> ParseManifest(absl::string_view text) {
  MS_RETURN_IF_ERROR(CheckManifestDigest(text));
  // Every check below is by type before it reads, so only the parser itself can throw: for memory.
  const Json json = Json::parse(text.begin(), text.end(), nullptr, /*allow_exceptions=*/false);
  if (json.is_discarded()) return Corrupt("it is not JSON");
  ObjectReader reader(json, "");
  const std::string format = reader.String("format");
  const uint64_t version = reader.Uint("format_version");
  MS_RETURN_IF_ERROR(reader.status());
  if (format != kManifestFormat) return Corrupt("\"format\" is not that of a checkpoint");
  if (version != kManifestFormatVersion) {
    return MakeError(
        Reason::kCheckpointUnsupported,
        absl::StrCat(kManifestFile, " has format_version ", version, "; this server reads ",
                     kManifestFormatVersion, ": use the server that wrote it, or load ", kModelFile,
                     " in it as a plain file"));
  }
  return FromJson(json);
}

namespace {

absl::StatusOr<Manifest> ReadManifestFile(const File& file) {
  MS_ASSIGN_OR_RETURN(const uint64_t size, file.Size());
  if (size > kMaxManifestBytes) {
    return Corrupt(absl::StrCat("it has ", size, " bytes, more than ", kMaxManifestBytes));
  }
  std::string text(size, '\0');
  MS_RETURN_IF_ERROR(
      file.ReadAt(0, absl::MakeSpan(reinterpret_cast<uint8_t*>(text.data()), text.size())));
  return ParseManifest(text);
}

}  // namespace

absl::StatusOr<Manifest> ReadManifest(const RootDirectory& directory, const std::string& path) {
  absl::StatusOr<File> file = directory.OpenFile(kManifestFile);
  if (!file.ok()) {
    if (GetReason(file.status()) != Reason::kCheckpointNotFound) {
      return Annotate(file.status(), path);
    }
    return MakeError(Reason::kCheckpointNotFound,
                     absl::StrCat("directory \"", path, "\" has no ", kManifestFile,
                                  ": it is no checkpoint, or one that was never complete; name "
                                  "another, or a file in it"),
                     {{"path", path}});
  }
  absl::StatusOr<Manifest> manifest = ReadManifestFile(*file);
  if (!manifest.ok()) return Annotate(manifest.status(), path);
  for (const Manifest::FileEntry& entry : manifest->files) {
    const absl::StatusOr<RootDirectory::Entry> found = directory.Stat(entry.name);
    if (!found.ok() || found->is_directory || found->size != entry.nbytes) {
      return MakeError(
          Reason::kCheckpointCorrupt,
          absl::StrCat(path, "/", entry.name, " has ",
                       found.ok() ? absl::StrCat(found->size, " bytes") : "no readable bytes",
                       "; the manifest records ", entry.nbytes, ": use another checkpoint"),
          {{"file", entry.name}});
    }
  }
  return manifest;
}

absl::Status WithDirectory(const RootDirectory& root, const std::string& path,
                           absl::FunctionRef<absl::Status(const RootDirectory& directory)> use) {
  // Each attempt is lost to a whole save of `path` by somebody else.
  constexpr int kMaxAttempts = 100;
  for (int attempt = 1;; ++attempt) {
    MS_ASSIGN_OR_RETURN(const RootDirectory directory, root.OpenDirectory(path));
    absl::Status status = use(directory);
    if (status.ok() || attempt == kMaxAttempts || directory.IsAt(root, path)) return status;
  }
}

}  // namespace modelstate
