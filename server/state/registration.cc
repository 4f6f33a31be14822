#include "server/state/registration.h"

#include <algorithm>
#include <iterator>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
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

bool IsBelow(absl::string_view name, absl::string_view module) {
  return name.size() > module.size() && name[module.size()] == '.' &&
         absl::StartsWith(name, module);
}

}  // namespace

bool Registrar::DotFirst::operator()(absl::string_view a, absl::string_view b) const {
  const auto rank = [](char c) { return c == '.' ? 0 : 1 + static_cast<unsigned char>(c); };
  return std::lexicographical_compare(a.begin(), a.end(), b.begin(), b.end(),
                                      [rank](char x, char y) { return rank(x) < rank(y); });
}

absl::Status Registrar::AddName(absl::string_view name, TensorKind kind) {
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
  if (name.front() == '.' || absl::StrContains(name, "..")) {
    return Refuse(name, "module name can't be empty string \"\"",
                  "dots stand between the names of modules: leave out the one too many");
  }
  // In this order all names below a module come right after it. No earlier name lies below another,
  // so a module of this name, or one that this name is in, can only be a neighbour.
  const auto next = names_.lower_bound(name);
  if (next != names_.end() && *next == name) {
    return Refuse(name, absl::StrCat("attribute '", Shown(leaf), "' already exists"),
                  "two tensors have this name: rename one (a tied tensor is a second name, with "
                  "alias_of)");
  }
  if (next != names_.end() && IsBelow(*next, name)) {
    return Refuse(name, absl::StrCat("attribute '", Shown(leaf), "' already exists"),
                  absl::StrCat("\"", Shown(*next), "\" makes it a module: rename one"));
  }
  if (next != names_.begin() && IsBelow(name, *std::prev(next))) {
    const absl::string_view tensor = *std::prev(next);
    return Refuse(
        name, absl::StrCat("attribute '", Shown(LastPart(tensor)), "' already exists"),
        absl::StrCat("\"", Shown(tensor), "\" is a tensor and cannot be a module too: rename one"));
  }
  names_.insert(next, name);
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
