#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/format/manifest_object.h"
#include "server/checkpoint/manifest.h"
#include "server/state/registration.h"

namespace modelstate {
namespace {

constexpr uint64_t kMaxInt64 = std::numeric_limits<int64_t>::max();
constexpr uint64_t kMaxTimestampSeconds =
    253402300799;                    // the end of 9999, of google.protobuf.Timestamp
constexpr size_t kMaxGroups = 1000;  // as many as an optimizer may be configured with

Version ToVersion(ManifestObject reader, ManifestObject& parent) {
  Version version{reader.Hex("incarnation"), reader.Uint("number")};
  parent.Include(reader.status());
  return version;
}

Hyperparameters ToHyperparameters(ManifestObject reader, ManifestObject& parent) {
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

// The groups together name at most `max_names` parameters: none is in two. Without `keep_groups`
// they are checked only.
absl::StatusOr<OptimizerConfig> ToOptimizer(JsonView json, size_t max_names, bool keep_groups) {
  ManifestObject reader(json, "optimizer.");
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
  size_t index = 0;
  for (const JsonView::Element item : reader.List("groups")) {
    if (index == kMaxGroups) {
      reader.Fail("groups", absl::StrCat("a list of at most ", kMaxGroups));
      break;
    }
    ManifestObject group(item.value, absl::StrCat("optimizer.groups[", index++, "]."));
    ParameterGroup out;
    out.name = group.String("name");
    group.ForEachText("names", max_names, [&](std::string name) {
      --max_names;
      if (keep_groups) out.selection.names.push_back(std::move(name));
    });
    out.selection.prefixes = group.Texts("prefixes");
    out.selection.globs = group.Texts("globs");
    out.hyperparameters = ToHyperparameters(group.Object("hyperparameters"), group);
    MS_RETURN_IF_ERROR(group.status());
    if (keep_groups) config.groups.push_back(std::move(out));
  }
  MS_RETURN_IF_ERROR(reader.status());
  return config;
}

absl::StatusOr<Manifest::TensorEntry> ToTensor(JsonView json, size_t index) {
  ManifestObject reader(json, absl::StrCat("tensors[", index, "]."));
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
  for (const JsonView::Element dim : reader.List("shape")) {
    const std::optional<uint64_t> size = dim.value.Uint();
    if (!size || *size > kMaxInt64 || dims.size() == Shape::kMaxRank) {
      reader.Fail("shape", "a list of sizes");
      break;
    }
    dims.push_back(static_cast<int64_t>(*size));
  }
  MS_RETURN_IF_ERROR(reader.status());
  absl::StatusOr<Shape> shape = Shape::Create(dims);
  if (!shape.ok()) {
    return CorruptManifest(
        absl::StrCat("\"tensors[", index, "].shape\": ", shape.status().message()));
  }
  entry.spec.shape = *std::move(shape);
  return entry;
}

struct NamedWorker {
  std::string worker;
  WorkerRecord record;
};

absl::StatusOr<NamedWorker> ToWorker(JsonView json, size_t index) {
  ManifestObject reader(json, absl::StrCat("workers[", index, "]."));
  NamedWorker named;
  named.worker = reader.String("worker");
  WorkerRecord& record = named.record;
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
  answer.nonfinite = reader.Texts("nonfinite");
  answer.updated = reader.Uint("updated");
  answer.skipped = reader.Uint("skipped");
  if (reader.Has("ignored")) answer.ignored = reader.Uint("ignored");
  MS_RETURN_IF_ERROR(reader.status());
  if (named.worker.empty() || record.sequence == 0) {
    return CorruptManifest(absl::StrCat("\"workers[", index, "]\" has no name or no sequence"));
  }
  return named;
}

absl::StatusOr<Manifest::ParameterEntry> ToParameter(JsonView json, size_t index) {
  ManifestObject reader(json, absl::StrCat("optimizer_state[", index, "]."));
  Manifest::ParameterEntry entry;
  entry.parameter = reader.String("parameter");
  entry.step = reader.Uint("step");
  if (reader.Has("product")) entry.product = static_cast<float>(reader.Double("product"));
  entry.slots = reader.Texts("slots");
  MS_RETURN_IF_ERROR(reader.status());
  return entry;
}

absl::StatusOr<ModuleMetadata> ToMetadata(JsonView json) {
  ModuleMetadata metadata;
  if (!json.is_object()) return CorruptManifest("\"metadata\" is not an object");
  for (const JsonView::Element member : json) {
    std::optional<std::string> value = member.value.String();
    if (!value) return CorruptManifest("\"metadata\" has a value that is not text");
    if (!metadata.emplace(*member.key.String(), *std::move(value)).second) {
      return CorruptManifest("\"metadata\" has a key twice");
    }
    const absl::Status allowed = CheckMetadata(metadata);
    if (!allowed.ok()) return CorruptManifest(absl::StrCat("\"metadata\": ", allowed.message()));
  }
  return metadata;
}

absl::Status CheckFormat(ManifestObject& reader) {
  const std::string format = reader.String("format");
  const uint64_t version = reader.Uint("format_version");
  MS_RETURN_IF_ERROR(reader.status());
  if (format != kManifestFormat) return CorruptManifest("\"format\" is not that of a checkpoint");
  if (version >= kOldestManifestFormatVersion && version <= kManifestFormatVersion) {
    return absl::OkStatus();
  }
  return MakeError(Reason::kCheckpointUnsupported,
                   absl::StrCat(kManifestFile, " has format_version ", version,
                                "; this server reads ", kOldestManifestFormatVersion, " to ",
                                kManifestFormatVersion, ": use the server that wrote it, or load ",
                                kModelFile, " in it as a plain file"));
}

// Makes each item of a list with `make`, and gives it to `take`.
template <typename Make, typename Take>
absl::Status ForEachItem(JsonView list, Make make, Take take) {
  size_t index = 0;
  for (const JsonView::Element item : list) {
    MS_ASSIGN_OR_RETURN(auto made, make(item.value, index++));
    MS_RETURN_IF_ERROR(take(std::move(made)));
  }
  return absl::OkStatus();
}

}  // namespace

const ManifestHead::FileEntry* ManifestHead::FindFile(absl::string_view name) const {
  for (const FileEntry& file : files) {
    if (file.name == name) return &file;
  }
  return nullptr;
}

absl::StatusOr<StoredManifest> StoredManifest::Parse(std::string text) {
  MS_RETURN_IF_ERROR(CheckManifestDigest(text));
  StoredManifest manifest;
  manifest.text_ = std::make_unique<const std::string>(std::move(text));
  const absl::StatusOr<JsonView> json = JsonView::Parse(*manifest.text_);
  if (!json.ok()) return CorruptManifest(json.status().message());
  MS_RETURN_IF_ERROR(manifest.ReadHead(*json));
  // Whoever asks for the lists later finds them as they are here.
  MS_RETURN_IF_ERROR(manifest.ForEachTensor([&manifest](Manifest::TensorEntry) {
    ++manifest.tensor_count_;
    return absl::OkStatus();
  }));
  if (manifest.has_optimizer()) {
    MS_RETURN_IF_ERROR(
        ToOptimizer(manifest.optimizer_, manifest.tensor_count_, /*keep_groups=*/false).status());
  }
  MS_RETURN_IF_ERROR(
      manifest.ForEachParameter([](Manifest::ParameterEntry) { return absl::OkStatus(); }));
  MS_RETURN_IF_ERROR(
      manifest.ForEachWorker([](std::string, WorkerRecord) { return absl::OkStatus(); }));
  return manifest;
}

absl::Status StoredManifest::ReadHead(JsonView json) {
  ManifestObject reader(json, "");
  MS_RETURN_IF_ERROR(CheckFormat(reader));
  head_.module = reader.String("module");
  head_.version = ToVersion(reader.Object("version"), reader);
  head_.step = reader.Uint("step");
  head_.create_time = absl::FromUnixSeconds(
      static_cast<int64_t>(reader.Uint("create_seconds", kMaxTimestampSeconds)));
  // Older manifests lack it.
  if (reader.Has("create_nanos")) {
    head_.create_time += absl::Nanoseconds(reader.Uint("create_nanos", 999'999'999));
  }
  head_.weights_only = reader.Bool("weights_only");
  tensors_ = reader.List("tensors");
  optimizer_state_ = reader.List("optimizer_state");
  workers_ = reader.List("workers");
  const JsonView files = reader.List("files");
  const JsonView* metadata = reader.Find("metadata");
  const JsonView* optimizer = reader.Find("optimizer");
  if (optimizer == nullptr) reader.Fail("optimizer", "an object or null");
  MS_RETURN_IF_ERROR(reader.status());
  optimizer_ = *optimizer;
  MS_ASSIGN_OR_RETURN(head_.metadata, ToMetadata(metadata == nullptr ? JsonView() : *metadata));
  MS_ASSIGN_OR_RETURN(head_.files, ManifestFiles(files));
  return absl::OkStatus();
}

absl::Status StoredManifest::ForEachTensor(
    absl::FunctionRef<absl::Status(Manifest::TensorEntry entry)> take) const {
  return ForEachItem(tensors_, ToTensor, take);
}

absl::Status StoredManifest::ForEachParameter(
    absl::FunctionRef<absl::Status(Manifest::ParameterEntry entry)> take) const {
  return ForEachItem(optimizer_state_, ToParameter, take);
}

absl::Status StoredManifest::ForEachWorker(
    absl::FunctionRef<absl::Status(std::string worker, WorkerRecord record)> take) const {
  std::string previous;
  return ForEachItem(workers_, ToWorker, [&](NamedWorker named) -> absl::Status {
    // They are written in this order, in which a second one of a name shows at once.
    if (named.worker <= previous) {
      return CorruptManifest("\"workers\" has a worker twice, or not in the order of their names");
    }
    previous = named.worker;
    return take(std::move(named.worker), std::move(named.record));
  });
}

absl::StatusOr<std::optional<OptimizerConfig>> StoredManifest::Optimizer() const {
  if (!has_optimizer()) return std::optional<OptimizerConfig>();
  return ToOptimizer(optimizer_, tensor_count_, /*keep_groups=*/true);
}

absl::StatusOr<WorkerRecords> StoredManifest::Workers() const {
  WorkerRecords workers;
  MS_RETURN_IF_ERROR(ForEachWorker([&workers](std::string worker, WorkerRecord record) {
    workers.emplace(std::move(worker), std::move(record));
    return absl::OkStatus();
  }));
  return workers;
}

absl::StatusOr<StoredManifest> ReadManifest(const RootDirectory& directory,
                                            const std::string& path) {
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
  const auto parse = [&file]() -> absl::StatusOr<StoredManifest> {
    MS_ASSIGN_OR_RETURN(std::string text, ReadManifestText(*file));
    return StoredManifest::Parse(std::move(text));
  };
  absl::StatusOr<StoredManifest> manifest = parse();
  if (!manifest.ok()) return Annotate(manifest.status(), path);
  return manifest;
}

absl::Status CheckManifestSizes(const RootDirectory& directory, const std::string& path,
                                const ManifestHead& head) {
  for (const ManifestFile& entry : head.files) {
    const absl::StatusOr<RootDirectory::Entry> found = directory.Stat(entry.name);
    if (!found.ok() || found->is_directory || found->size != entry.nbytes) {
      return MakeError(
          Reason::kCheckpointCorrupt,
          absl::StrCat(path, "/", entry.name,
                       found.ok() ? absl::StrCat(" has ", found->size, " bytes") : " is not there",
                       "; the manifest records ", entry.nbytes, " bytes: use another checkpoint"),
          {{"file", entry.name}});
    }
  }
  return absl::OkStatus();
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
