#include <bit>
#include <cmath>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "common/base/bytes.h"
#include "common/base/digest.h"
#include "common/base/status.h"
#include "server/checkpoint/manifest.h"

namespace modelstate {
namespace {

using Json = nlohmann::ordered_json;

// The shortest decimal text that reads back to the same bits; what JSON has no number for is a
// string of its 64 bits.
Json FromDouble(double value) {
  if (std::isfinite(value)) return value;
  return DigestToHex(std::bit_cast<uint64_t>(value));
}

template <typename T>
void Set(Json& json, const char* key, const std::optional<T>& value) {
  if (!value) return;
  if constexpr (std::is_same_v<T, double>) {
    json[key] = FromDouble(*value);
  } else {
    json[key] = *value;
  }
}

Json FromVersion(const Version& version) {
  return {{"incarnation", DigestToHex(version.incarnation)}, {"number", version.number}};
}

Json FromHyperparameters(const Hyperparameters& h) {
  Json json = Json::object();
  for (const HyperparameterField& field : HyperparameterFields()) {
    if (field.number != nullptr) {
      Set(json, field.name, h.*field.number);
    } else {
      Set(json, field.name, h.*field.flag);
    }
  }
  return json;
}

Json FromOptimizer(const OptimizerConfig& config) {
  Json groups = Json::array();
  for (const ParameterGroup& group : config.groups) {
    groups.push_back({{"name", group.name},
                      {"names", group.selection.names},
                      {"prefixes", group.selection.prefixes},
                      {"globs", group.selection.globs},
                      {"hyperparameters", FromHyperparameters(group.hyperparameters)}});
  }
  Json json{{"algorithm", AlgorithmName(config.algorithm)},
            {"hyperparameters", FromHyperparameters(config.hyperparameters)},
            {"groups", std::move(groups)},
            {"quorum", config.rounds.quorum}};
  Set(json, "max_grad_norm", config.max_grad_norm);
  Set(json, "max_staleness", config.max_staleness);
  // Only where they say something: so manifests without them are as they always were.
  Set(json, "max_grad_value", config.max_grad_value);
  if (!config.master_weights) json["master_weights"] = false;
  if (config.no_default_group) json["no_default_group"] = true;
  if (config.rounds.min_contributions > 0) {
    json["min_contributions"] = config.rounds.min_contributions;
    json["round_timeout_seconds"] = absl::ToDoubleSeconds(config.rounds.round_timeout);
  }
  return json;
}

Json FromTensor(const Manifest::TensorEntry& entry) {
  Json shape = Json::array();
  for (int64_t dim : entry.spec.shape.dims()) shape.push_back(dim);
  Json json{{"name", entry.spec.name},
            {"kind", TensorKindName(entry.spec.kind)},
            {"dtype", std::string(DTypeName(entry.spec.dtype))},
            {"shape", std::move(shape)}};
  if (entry.spec.kind == TensorKind::kParameter) json["requires_grad"] = entry.spec.requires_grad;
  if (entry.spec.is_alias()) json["alias_of"] = entry.spec.alias_of;
  json["xxh3"] = DigestToHex(entry.xxh3);
  return json;
}

Json FromWorker(const std::string& worker, const WorkerRecord& record) {
  const StepAnswer& answer = record.answer;
  Json json = {{"worker", worker},
               {"sequence", record.sequence},
               {"payload_digest", record.payload_digest},
               {"outcome",
                answer.outcome == StepOutcome::kSkippedNonfinite ? "skipped_nonfinite" : "applied"},
               {"version", FromVersion(answer.version)},
               {"step", answer.step},
               {"contributions", answer.contributions},
               {"quorum", answer.quorum},
               {"grad_norm", FromDouble(answer.grad_norm)},
               {"clip_coef", FromDouble(answer.clip_coef)},
               {"nonfinite", answer.nonfinite},
               {"updated", answer.updated},
               {"skipped", answer.skipped}};
  // Only where it says something: so manifests without it are as they always were.
  if (answer.ignored != 0) json["ignored"] = answer.ignored;
  return json;
}

// One member per line, and one item per line of a list: so that a person can read and compare it.
void AppendMember(std::string* text, const char* key, const Json& value) {
  absl::StrAppend(text, "\"", key, "\": ", value.dump(), ",\n");
}

template <typename T, typename F>
void AppendList(std::string* text, const char* key, const T& items, F to_json) {
  absl::StrAppend(text, "\"", key, "\": [");
  const char* separator = "\n  ";
  for (const auto& item : items) {
    absl::StrAppend(text, separator, to_json(item).dump());
    separator = ",\n  ";
  }
  absl::StrAppend(text, "],\n");
}

std::string ToText(const Manifest& m) {
  std::string text = "{\n";
  AppendMember(&text, "format", kManifestFormat);
  AppendMember(&text, "format_version", kManifestFormatVersion);
  AppendMember(&text, "module", m.module);
  AppendMember(&text, "version", FromVersion(m.version));
  AppendMember(&text, "step", m.step);
  const int64_t create_seconds = absl::ToUnixSeconds(m.create_time);
  AppendMember(&text, "create_seconds", create_seconds);
  AppendMember(&text, "create_nanos",
               absl::ToInt64Nanoseconds(m.create_time - absl::FromUnixSeconds(create_seconds)));
  AppendMember(&text, "weights_only", m.weights_only);
  AppendMember(&text, "metadata", Json(m.metadata));
  AppendList(&text, "files", m.files, [](const Manifest::FileEntry& file) {
    Json json{{"name", file.name}, {"nbytes", file.nbytes}};
    if (file.header_xxh3) json["header_xxh3"] = DigestToHex(*file.header_xxh3);
    return json;
  });
  AppendList(&text, "tensors", m.tensors, FromTensor);
  AppendMember(&text, "optimizer", m.optimizer ? FromOptimizer(*m.optimizer) : Json());
  AppendList(&text, "optimizer_state", m.optimizer_state, [](const Manifest::ParameterEntry& p) {
    Json json{{"parameter", p.parameter}, {"step", p.step}, {"slots", p.slots}};
    if (p.product != 1) json["product"] = p.product;
    return json;
  });
  AppendList(&text, "workers", m.workers,
             [](const auto& worker) { return FromWorker(worker.first, worker.second); });
  return text;
}

}  // namespace

absl::StatusOr<std::string> ManifestToText(const Manifest& manifest) {
  std::string text;
  try {
    text = ToText(manifest);
  } catch (const nlohmann::json::exception&) {  // dump() of text that is not UTF-8
    return MakeError(Reason::kNotRepresentable,
                     absl::StrCat("module \"", manifest.module,
                                  "\": a tensor name, worker name or metadata text is not valid "
                                  "UTF-8, so the manifest cannot hold it; rename it"));
  }
  const uint64_t digest = Xxh3(AsBytes(text));
  absl::StrAppend(&text, kManifestTailBegin, DigestToHex(digest), kManifestTailEnd);
  if (text.size() > kMaxManifestBytes) {
    return MakeError(Reason::kNotRepresentable,
                     absl::StrCat("the manifest takes ", text.size(), " bytes; at most ",
                                  kMaxManifestBytes, " are read: use shorter names"));
  }
  const absl::Status readable = JsonView::Parse(text).status();
  if (!readable.ok()) {
    return MakeError(Reason::kNotRepresentable,
                     absl::StrCat("the manifest could not be read again: ", readable.message(),
                                  ": use shorter names"));
  }
  return text;
}

}  // namespace modelstate
