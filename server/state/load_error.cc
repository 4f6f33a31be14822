#include "server/state/load_error.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace modelstate {
namespace {

constexpr size_t kMaxShownNames = 10;
constexpr size_t kMaxNameBytes = 120;
constexpr size_t kMaxListBytes = 240;  // of names; one is always shown
constexpr size_t kMaxMismatchBytes = 300;
constexpr size_t kMaxModuleDepth = 64;

std::string TorchSize(const Shape& shape) {
  return absl::StrCat("torch.Size(", shape.ToString(), ")");
}

// Cut, where it is long, before the first byte of a character.
std::string Shown(absl::string_view name, size_t limit) {
  if (name.size() <= limit) return std::string(name);
  size_t end = limit;
  while (end > 0 && (static_cast<unsigned char>(name[end]) & 0xC0) == 0x80) --end;
  return absl::StrCat(name.substr(0, end), "...");
}

// `"a", "b" and 12 more`. Sets `cut` when it does not show everything.
std::string KeyList(absl::Span<const std::string> keys, bool* cut) {
  std::string text;
  size_t shown = 0;
  while (shown < std::min(keys.size(), kMaxShownNames)) {
    const std::string key =
        absl::StrCat(shown == 0 ? "" : ", ", "\"", Shown(keys[shown], kMaxNameBytes), "\"");
    if (shown > 0 && text.size() + key.size() > kMaxListBytes) break;
    text += key;
    ++shown;
  }
  if (shown < keys.size()) {
    *cut = true;
    absl::StrAppend(&text, " and ", keys.size() - shown, " more");
  }
  return text;
}

}  // namespace

std::string SizeMismatchText(absl::string_view name, const Shape& incoming, const Shape& own) {
  return absl::StrCat("size mismatch for ", name, ": copying a param with shape ",
                      TorchSize(incoming), " from checkpoint, the shape in current model is ",
                      TorchSize(own), ".");
}

std::string CannotRequireGradText(absl::string_view name, const Shape& incoming, const Shape& own) {
  return absl::StrCat(
      "While copying the parameter named \"", name, "\", whose dimensions in the model are ",
      TorchSize(own), " and whose dimensions in the checkpoint are ", TorchSize(incoming),
      ", an exception occurred : ('Only Tensors of floating point and complex dtype can require "
      "gradients',).");
}

void SortByModule(const ModuleSchema& schema, std::vector<std::string>* keys) {
  if (keys->size() < 2) return;
  absl::flat_hash_map<absl::string_view, size_t> modules = {{"", 0}};
  const auto for_each_module = [](absl::string_view name, auto visit) {
    size_t dot = name.find('.');
    for (size_t depth = 0; dot != absl::string_view::npos && depth < kMaxModuleDepth; ++depth) {
      if (!visit(name.substr(0, dot))) return;
      dot = name.find('.', dot + 1);
    }
  };
  for (const TensorSpec& spec : schema.specs()) {
    for_each_module(spec.name, [&modules](absl::string_view module) {
      modules.emplace(module, modules.size());
      return true;
    });
  }
  std::vector<std::pair<size_t, size_t>> order;  // of the module; place in the state_dict
  for (size_t i = 0; i < keys->size(); ++i) {
    size_t place = 0;
    for_each_module((*keys)[i], [&modules, &place](absl::string_view module) {
      const auto it = modules.find(module);
      if (it != modules.end()) place = it->second;
      return it != modules.end();
    });
    order.emplace_back(place, i);
  }
  std::sort(order.begin(), order.end());
  std::vector<std::string> sorted;
  sorted.reserve(keys->size());
  for (const auto& [place, i] : order) sorted.push_back(std::move((*keys)[i]));
  *keys = std::move(sorted);
}

absl::Status LoadError(absl::string_view module, bool strict, absl::Span<const std::string> missing,
                       absl::Span<const std::string> unexpected,
                       absl::Span<const SizeMismatch> mismatches) {
  if (!strict) missing = unexpected = {};
  bool cut = false;
  std::vector<std::string> parts = {
      absl::StrCat("Error(s) in loading state_dict for ", Shown(module, kMaxNameBytes), ":")};
  ErrorMetadata metadata = {{"module", std::string(module)}};
  std::optional<Reason> reason;
  const auto apply = [&](Reason own, const std::string& tensor, const char* key, size_t count) {
    if (!reason) {
      reason = own;
      metadata["tensor"] = Shown(tensor, kMaxNameBytes);
    }
    metadata[key] = absl::StrCat(count);
  };
  if (!missing.empty()) {
    parts.push_back(absl::StrCat("Missing key(s) in state_dict: ", KeyList(missing, &cut), ". "));
    apply(Reason::kMissingKey, missing.front(), "missing", missing.size());
  }
  if (!unexpected.empty()) {
    parts.push_back(
        absl::StrCat("Unexpected key(s) in state_dict: ", KeyList(unexpected, &cut), ". "));
    apply(Reason::kUnknownKey, unexpected.front(), "unexpected", unexpected.size());
  }
  if (!mismatches.empty()) {
    size_t bytes = 0;
    size_t shown = 0;
    for (const SizeMismatch& mismatch : mismatches) {
      const std::string text = Shown(mismatch.text, kMaxMismatchBytes);
      if (shown > 0 && bytes + text.size() > kMaxMismatchBytes) break;
      bytes += text.size();
      parts.push_back(text);
      ++shown;
    }
    if (shown < mismatches.size()) {
      cut = true;
      parts.push_back(absl::StrCat("and ", mismatches.size() - shown, " more size mismatches"));
    }
    apply(mismatches.front().reason, mismatches.front().name, "size_mismatches", mismatches.size());
  }
  // What torch does not say: the way out.
  std::vector<std::string> ways;
  if (!missing.empty() || !unexpected.empty()) {
    ways.push_back("the option strict set to false passes over missing and unexpected keys");
  }
  if (reason == Reason::kDTypeMismatch) {
    ways.push_back("without the option assign elements are cast to the module's dtype");
  }
  if (cut) ways.push_back("the option dry_run lists all");
  if (!ways.empty()) parts.push_back(absl::StrCat("(", absl::StrJoin(ways, "; "), ")"));
  return MakeError(reason.value_or(Reason::kShapeMismatch), absl::StrJoin(parts, "\n\t"),
                   std::move(metadata));
}

}  // namespace modelstate
