#include "server/state/registration.h"

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace modelstate {
namespace {

constexpr size_t kShownBytes = 100;

std::string Shown(absl::string_view name) {
  return absl::StrCat(absl::Utf8SafeCEscape(name.substr(0, kShownBytes)),
                      name.size() > kShownBytes ? "..." : "");
}

absl::Status Refuse(absl::string_view name, absl::string_view text, absl::string_view way_out) {
  return MakeError(Reason::kInvalidField,
                   absl::StrCat("tensor \"", Shown(name), "\": ", text, "; ", way_out),
                   {{"tensor", std::string(name)}, {"field", "name"}});
}

absl::string_view LastPart(absl::string_view path) {
  const size_t dot = path.rfind('.');
  return dot == absl::string_view::npos ? path : path.substr(dot + 1);
}

}  // namespace

absl::Status Registrar::AddName(absl::string_view name, TensorKind kind) {
  // Before the name is looked into: that takes its length times its dots.
  if (name.size() > kMaxTensorNameBytes) {
    return Refuse(name,
                  absl::StrCat("the name has ", name.size(), " bytes, and at most ",
                               kMaxTensorNameBytes, " are allowed"),
                  "use a shorter one");
  }
  const absl::string_view leaf = LastPart(name);
  if (leaf.empty()) {
    return Refuse(name,
                  absl::StrCat(kind == TensorKind::kBuffer ? "buffer" : "parameter",
                               " name can't be empty string \"\""),
                  name.empty() ? "give it a name" : "put a name after the last dot");
  }
  for (size_t dot = name.find('.'); dot != absl::string_view::npos; dot = name.find('.', dot + 1)) {
    const absl::string_view path = name.substr(0, dot);
    const absl::string_view part = LastPart(path);
    if (part.empty()) {
      return Refuse(name, "module name can't be empty string \"\"",
                    "dots stand between the names of modules: leave out the one too many");
    }
    if (tensors_.contains(path)) {
      return Refuse(
          name, absl::StrCat("attribute '", Shown(part), "' already exists"),
          absl::StrCat("\"", Shown(path), "\" is a tensor and cannot be a module too: rename one"));
    }
    modules_.emplace(path, name);
  }
  if (const auto module = modules_.find(name); module != modules_.end()) {
    return Refuse(name, absl::StrCat("attribute '", Shown(leaf), "' already exists"),
                  absl::StrCat("\"", Shown(module->second), "\" makes it a module: rename one"));
  }
  if (!tensors_.insert(name).second) {
    return Refuse(name, absl::StrCat("attribute '", Shown(leaf), "' already exists"),
                  "two tensors have this name: rename one (a tied tensor is a second name, with "
                  "alias_of)");
  }
  return absl::OkStatus();
}

absl::Status CheckRequiresGrad(const TensorSpec& spec) {
  if (spec.kind != TensorKind::kParameter || !spec.requires_grad || CanRequireGrad(spec.dtype)) {
    return absl::OkStatus();
  }
  return MakeError(
      Reason::kInvalidField,
      absl::StrCat("parameter \"", Shown(spec.name), "\" is ", DTypeName(spec.dtype),
                   ": Only Tensors of floating point and complex dtype can require gradients; set "
                   "requires_grad to false, or make it a buffer"),
      {{"tensor", spec.name}, {"field", "requires_grad"}});
}

absl::Status CheckMetadata(const ModuleMetadata& metadata) {
  const auto refuse = [](absl::string_view text) {
    return MakeError(Reason::kInvalidField,
                     absl::StrCat("spec.metadata: ", text, "; keep long texts elsewhere"),
                     {{"field", "spec.metadata"}});
  };
  if (metadata.size() > kMaxMetadataEntries) {
    return refuse(absl::StrCat("there are ", metadata.size(), " entries; at most ",
                               kMaxMetadataEntries, " are allowed"));
  }
  size_t bytes = 0;
  for (const auto& [key, value] : metadata) bytes += key.size() + value.size();
  if (bytes > kMaxMetadataBytes) {
    return refuse(absl::StrCat("keys and values have ", bytes, " bytes; at most ",
                               kMaxMetadataBytes, " are allowed"));
  }
  return absl::OkStatus();
}

}  // namespace modelstate
