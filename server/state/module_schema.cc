#include "server/state/module_schema.h"

#include <algorithm>
#include <iterator>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "server/state/registration.h"

namespace modelstate {
namespace {

constexpr uint64_t kMaxBytes = static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
// Of a push too. Descriptions of tensors are in no memory budget.
constexpr size_t kMaxTensors = 1'000'000;
// The key of a safetensors header that is not a tensor.
constexpr absl::string_view kReservedName = "__metadata__";

absl::Status CheckSpec(const TensorSpec& spec) {
  if (spec.name.empty()) {
    return MakeError(Reason::kInvalidField, "a tensor's name is empty; give it one",
                     {{"field", "name"}});
  }
  const ErrorMetadata metadata = {{"tensor", spec.name}};
  if (spec.name == kReservedName || spec.name.find('\0') != std::string::npos) {
    return MakeError(
        Reason::kInvalidField,
        absl::StrCat("tensor \"", spec.name, "\": checkpoint files cannot hold this name; rename ",
                     "it (\"", kReservedName, "\" and NUL are not allowed)"),
        metadata);
  }
  if (spec.kind != TensorKind::kParameter && spec.kind != TensorKind::kBuffer) {
    return MakeError(Reason::kInvalidField,
                     absl::StrCat("tensor \"", spec.name, "\" is a ", TensorKindName(spec.kind),
                                  "; a module holds parameters and buffers only"),
                     metadata);
  }
  MS_RETURN_IF_ERROR(CheckRequiresGrad(spec));
  if (spec.kind == TensorKind::kParameter && !spec.persistent) {
    return MakeError(Reason::kInvalidField,
                     absl::StrCat("parameter \"", spec.name,
                                  "\" is not persistent; only a buffer can be left out of the "
                                  "state_dict"),
                     metadata);
  }
  return absl::OkStatus();
}

absl::Status AddBytes(const TensorSpec& spec, uint64_t* total) {
  const uint64_t bytes = spec.nbytes();
  if (bytes > kMaxBytes - *total) {
    return MakeError(Reason::kInvalidField,
                     absl::StrCat("tensor \"", spec.name, "\" of shape ", spec.shape.ToString(),
                                  ": the module's size overflows a 64-bit byte count"),
                     {{"tensor", spec.name}});
  }
  *total += bytes;
  return absl::OkStatus();
}

std::shared_ptr<const StateView> MakeView(std::vector<uint32_t> indices,
                                          std::vector<TensorSpec> specs) {
  auto view = std::make_shared<StateView>();
  view->indices = std::move(indices);
  view->specs = std::move(specs);
  view->layout = StateLayout(view->specs);
  return view;
}

}  // namespace

absl::StatusOr<std::shared_ptr<const ModuleSchema>> ModuleSchema::Create(
    std::vector<TensorSpec> specs, uint64_t revision) {
  if (specs.size() > kMaxTensors) {
    return MakeError(Reason::kInvalidField, absl::StrCat("a module has at most ", kMaxTensors,
                                                         " tensors, and this would "
                                                         "have ",
                                                         specs.size(), ": make several of it"));
  }
  std::shared_ptr<ModuleSchema> schema(new ModuleSchema());
  schema->revision_ = revision;
  schema->specs_ = std::move(specs);
  schema->owners_.reserve(schema->size());
  schema->by_name_.reserve(schema->size());
  std::vector<uint32_t> persistent;
  for (uint32_t i = 0; i < schema->specs_.size(); ++i) {
    TensorSpec& spec = schema->specs_[i];
    MS_RETURN_IF_ERROR(CheckSpec(spec));
    uint32_t owner = i;
    if (spec.is_alias()) {
      const std::optional<uint32_t> found = schema->Find(spec.alias_of);
      const TensorSpec* of = found ? &schema->specs_[*found] : nullptr;
      if (of == nullptr || of->is_alias() || of->kind != spec.kind || of->dtype != spec.dtype ||
          of->shape != spec.shape) {
        return MakeError(
            Reason::kUnknownKey,
            absl::StrCat("tensor \"", spec.name, "\" is an alias of \"", spec.alias_of,
                         "\", which is not an earlier tensor of the same kind, dtype and shape "
                         "that is no alias itself; name the first of the tied tensors"),
            {{"tensor", spec.name}, {"alias_of", spec.alias_of}});
      }
      owner = *found;
      spec.requires_grad = of->requires_grad;
    }
    if (!schema->by_name_.emplace(spec.name, i).second) {
      return MakeError(Reason::kInvalidField,
                       absl::StrCat("two tensors are named \"", spec.name,
                                    "\"; names must be unique, and a tied name needs alias_of"),
                       {{"tensor", spec.name}});
    }
    schema->owners_.push_back(owner);
    if (spec.persistent) persistent.push_back(i);
    if (owner != i) continue;
    MS_RETURN_IF_ERROR(AddBytes(spec, &schema->storage_bytes_));
    if (spec.kind == TensorKind::kParameter) {
      ++schema->parameter_count_;
      schema->parameter_elements_ += static_cast<uint64_t>(spec.shape.num_elements());
    } else {
      ++schema->buffer_count_;
    }
  }
  std::vector<TensorSpec> persistent_specs;
  persistent_specs.reserve(persistent.size());
  for (uint32_t i : persistent) persistent_specs.push_back(schema->specs_[i]);
  schema->state_dict_ = MakeView(std::move(persistent), std::move(persistent_specs));
  schema->MakeListings();
  schema->recent_views_ = std::make_shared<SelectionCache<StateView>>(kRecentViews);
  return schema;
}

std::optional<uint32_t> ModuleSchema::Find(absl::string_view name) const {
  auto it = by_name_.find(name);
  if (it == by_name_.end()) return std::nullopt;
  return it->second;
}

absl::StatusOr<std::shared_ptr<const StateView>> ModuleSchema::View(
    const Selection& selection) const {
  if (selection.everything() &&
      (!selection.include_non_persistent || state_dict_->indices.size() == size())) {
    return state_dict_;
  }
  std::string key = SelectionKey(selection, "");
  if (std::shared_ptr<const StateView> recent = recent_views_->Find(key)) return recent;
  std::vector<std::string> unknown;
  std::vector<uint32_t> indices = Select(selection, specs_, &unknown);
  if (!unknown.empty()) return UnknownNames(unknown);
  std::vector<TensorSpec> specs;
  specs.reserve(indices.size());
  uint64_t total = 0;
  for (uint32_t i : indices) {
    specs.push_back(specs_[i]);
    TensorSpec& spec = specs.back();
    if (selection.float_dtype && IsFloatingPoint(spec.dtype)) spec.dtype = *selection.float_dtype;
    // An upper bound: a tied tensor is counted once per name.
    MS_RETURN_IF_ERROR(AddBytes(spec, &total));
  }
  std::shared_ptr<const StateView> view = MakeView(std::move(indices), std::move(specs));
  recent_views_->Add(std::move(key), view);
  return view;
}

std::shared_ptr<const StateView> ModuleSchema::Part(const StateView& view,
                                                    absl::FunctionRef<bool(uint32_t)> keep) const {
  std::vector<uint32_t> indices;
  std::vector<TensorSpec> specs;
  for (size_t i = 0; i < view.indices.size(); ++i) {
    if (!keep(owner(view.indices[i]))) continue;
    indices.push_back(view.indices[i]);
    specs.push_back(view.specs[i]);
  }
  return MakeView(std::move(indices), std::move(specs));
}

absl::Status ModuleSchema::UnknownNames(const std::vector<std::string>& unknown) const {
  return MakeError(Reason::kTensorNotFound,
                   absl::StrCat("the module has no tensor named ", QuotedList(unknown),
                                "; list its parameters and buffers to see the names"),
                   {{"tensor", unknown.front()}});
}

void ModuleSchema::MakeListings() {
  for (TensorKind kind : {TensorKind::kParameter, TensorKind::kBuffer}) {
    std::vector<uint32_t> all;
    std::vector<uint32_t> named;
    std::vector<uint32_t> state_dict;
    for (uint32_t i = 0; i < size(); ++i) {
      if (specs_[i].kind != kind) continue;
      all.push_back(i);
      if (owners_[i] == i) named.push_back(i);
      if (specs_[i].persistent) state_dict.push_back(i);
    }
    auto& lists = listings_[kind == TensorKind::kBuffer ? 1 : 0];
    const auto keep = [&lists](ListView view, std::vector<uint32_t> list) {
      lists[static_cast<size_t>(view)] =
          std::make_shared<const std::vector<uint32_t>>(std::move(list));
    };
    keep(ListView::kAll, std::move(all));
    keep(ListView::kNamed, std::move(named));
    keep(ListView::kStateDict, std::move(state_dict));
  }
  recent_listings_ = std::make_shared<SelectionCache<std::vector<uint32_t>>>(kRecentListings);
}

absl::StatusOr<ModuleSchema::Listing> ModuleSchema::List(TensorKind kind, ListView view,
                                                         const Selection& selection) const {
  if (selection.names.empty() && selection.prefixes.empty() && selection.globs.empty() &&
      selection.kinds.empty()) {
    return FullListing(kind, view);
  }
  Selection wanted = selection;
  wanted.include_non_persistent = true;
  wanted.float_dtype.reset();
  std::string key =
      SelectionKey(wanted, absl::StrCat(static_cast<int>(kind), " ", static_cast<int>(view), " "));
  if (Listing recent = recent_listings_->Find(key)) return recent;
  std::vector<std::string> unknown;
  const std::vector<uint32_t> selected = Select(wanted, specs_, &unknown);
  if (!unknown.empty()) return UnknownNames(unknown);
  const std::vector<uint32_t>& shown = *FullListing(kind, view);
  std::vector<uint32_t> indices;
  std::set_intersection(selected.begin(), selected.end(), shown.begin(), shown.end(),
                        std::back_inserter(indices));
  auto listing = std::make_shared<const std::vector<uint32_t>>(std::move(indices));
  recent_listings_->Add(std::move(key), listing);
  return Listing(std::move(listing));
}

std::shared_ptr<const ModuleSchema> ModuleSchema::WithRequiresGrad(
    absl::Span<const uint32_t> parameters, bool requires_grad) const {
  std::shared_ptr<ModuleSchema> schema(new ModuleSchema(*this));
  schema->revision_ = revision_ + 1;
  std::vector<bool> change(size(), false);
  for (uint32_t index : parameters) change[owner(index)] = true;
  for (uint32_t i = 0; i < size(); ++i) {
    TensorSpec& spec = schema->specs_[i];
    // All names of a tied parameter: it is one parameter.
    if (!change[owner(i)] || spec.kind != TensorKind::kParameter) continue;
    spec.requires_grad = requires_grad && CanRequireGrad(spec.dtype);
  }
  schema->by_name_.clear();
  for (uint32_t i = 0; i < size(); ++i) schema->by_name_.emplace(schema->specs_[i].name, i);
  auto view = std::make_shared<StateView>(*state_dict_);
  for (size_t k = 0; k < view->indices.size(); ++k) {
    view->specs[k].requires_grad = schema->specs_[view->indices[k]].requires_grad;
  }
  schema->state_dict_ = std::move(view);
  // Views carry requires_grad; listings are indices alone and go on.
  schema->recent_views_ = std::make_shared<SelectionCache<StateView>>(kRecentViews);
  return schema;
}

}  // namespace modelstate
