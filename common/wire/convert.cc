#include "common/wire/convert.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace modelstate {
namespace {

// Well-formed UTF-8 as Unicode defines it: no overlong forms, no surrogates, at most U+10FFFF.
bool IsValidUtf8(absl::string_view text) {
  size_t i = 0;
  while (i < text.size()) {
    const auto byte = [&](size_t k) { return static_cast<unsigned char>(text[i + k]); };
    const unsigned char lead = byte(0);
    if (lead < 0x80) {
      ++i;
      continue;
    }
    size_t length = 0;
    unsigned char low = 0x80;
    unsigned char high = 0xBF;
    if (lead >= 0xC2 && lead <= 0xDF) {
      length = 2;
    } else if ((lead & 0xF0) == 0xE0) {
      length = 3;
      if (lead == 0xE0) low = 0xA0;
      if (lead == 0xED) high = 0x9F;
    } else if (lead >= 0xF0 && lead <= 0xF4) {
      length = 4;
      if (lead == 0xF0) low = 0x90;
      if (lead == 0xF4) high = 0x8F;
    } else {
      return false;
    }
    if (i + length > text.size() || byte(1) < low || byte(1) > high) return false;
    for (size_t k = 2; k < length; ++k) {
      if ((byte(k) & 0xC0) != 0x80) return false;
    }
    i += length;
  }
  return true;
}

absl::Status FieldError(absl::string_view what, absl::string_view rule) {
  return MakeError(Reason::kInvalidField, absl::StrCat(what, ": ", rule));
}

std::string Quoted(absl::string_view name) {
  constexpr size_t kShown = 100;
  return absl::StrCat("tensor \"", absl::Utf8SafeCEscape(name.substr(0, kShown)),
                      name.size() > kShown ? "..." : "", "\"");
}

absl::Status CheckSlot(const TensorSpec& spec) {
  const std::string what = Quoted(spec.name);
  if (spec.kind != TensorKind::kOptimizerState) {
    return FieldError(what, "slot names a piece of optimizer state; give that kind, or no slot");
  }
  if (spec.slot.size() > kMaxSlotBytes) {
    return FieldError(what, absl::StrCat("its slot has ", spec.slot.size(), " bytes; at most ",
                                         kMaxSlotBytes, " are allowed"));
  }
  if (spec.slot.find('\0') != std::string::npos || !IsValidUtf8(spec.slot)) {
    return FieldError(what, "its slot is not valid UTF-8 without NUL");
  }
  if (spec.is_alias()) {
    return FieldError(what,
                      "the optimizer state of a tied parameter comes once, under one of its "
                      "names; leave alias_of out");
  }
  return absl::OkStatus();
}

// Fills in what a tied tensor leaves out, or checks what it says against its owner.
absl::Status ResolveAlias(const v1::TensorInfo& info, const TensorSpec& owner, TensorSpec* spec) {
  const std::string what = Quoted(spec->name);
  if (owner.is_alias()) {
    return MakeError(
        Reason::kUnknownKey,
        absl::StrCat(what, ": alias_of names \"", owner.name,
                     "\", which is tied itself; name its owner \"", owner.alias_of, "\""),
        {{"tensor", spec->name}, {"alias_of", owner.name}});
  }
  if (info.kind() == v1::TENSOR_KIND_UNSPECIFIED) spec->kind = owner.kind;
  if (info.dtype() == v1::DTYPE_UNSPECIFIED) spec->dtype = owner.dtype;
  if (info.shape().empty()) spec->shape = owner.shape;
  if (!info.has_requires_grad()) spec->requires_grad = owner.requires_grad;
  if (!info.has_persistent()) spec->persistent = owner.persistent;
  if (spec->kind != owner.kind || spec->dtype != owner.dtype || spec->shape != owner.shape ||
      spec->requires_grad != owner.requires_grad) {
    return FieldError(what, absl::StrCat("a tied tensor has the kind, dtype, shape and "
                                         "requires_grad of its owner \"",
                                         owner.name, "\"; leave them out"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckPatterns(const google::protobuf::RepeatedPtrField<std::string>& patterns,
                           absl::string_view field) {
  const auto refuse = [&](absl::string_view rule) {
    return MakeError(Reason::kInvalidField,
                     absl::StrCat(field, ": ", rule, "; use names, or several calls"),
                     {{"field", std::string(field)}});
  };
  if (patterns.size() > kMaxPatterns) {
    return refuse(
        absl::StrCat("there are ", patterns.size(), "; at most ", kMaxPatterns, " are allowed"));
  }
  for (const std::string& pattern : patterns) {
    if (pattern.size() <= kMaxPatternBytes) continue;
    return refuse(absl::StrCat("one has ", pattern.size(), " bytes; at most ", kMaxPatternBytes,
                               " are allowed"));
  }
  return absl::OkStatus();
}

absl::StatusOr<DType> DTypeFromProto(v1::DType dtype, absl::string_view what) {
  if (dtype == v1::DTYPE_UNSPECIFIED) {
    return FieldError(what, "dtype is not set; give one, as \"F32\"");
  }
  if (!v1::DType_IsValid(dtype)) {
    return FieldError(what, absl::StrCat("dtype ", static_cast<int>(dtype), " is not known here"));
  }
  return static_cast<DType>(dtype);
}

v1::DType DTypeToProto(DType dtype) { return static_cast<v1::DType>(dtype); }

absl::StatusOr<TensorKind> TensorKindFromProto(v1::TensorKind kind, absl::string_view what) {
  if (kind == v1::TENSOR_KIND_UNSPECIFIED) {
    return FieldError(what, "kind is not set; give PARAMETER or BUFFER");
  }
  if (!v1::TensorKind_IsValid(kind)) {
    return FieldError(what, absl::StrCat("kind ", static_cast<int>(kind), " is not known here"));
  }
  return static_cast<TensorKind>(kind);
}

v1::TensorKind TensorKindToProto(TensorKind kind) { return static_cast<v1::TensorKind>(kind); }

absl::Status ValidateTensorName(absl::string_view name) {
  if (name.empty()) return FieldError("a tensor", "its name is empty");
  if (name.size() > kMaxTensorNameBytes) {
    return FieldError(Quoted(name), absl::StrCat("its name has ", name.size(), " bytes; at most ",
                                                 kMaxTensorNameBytes, " are allowed"));
  }
  if (name.find('\0') != absl::string_view::npos) {
    return FieldError(Quoted(name), "its name has a NUL");
  }
  if (!IsValidUtf8(name)) return FieldError(Quoted(name), "its name is not valid UTF-8");
  return absl::OkStatus();
}

absl::StatusOr<TensorSpec> TensorSpecFromProto(const v1::TensorInfo& info,
                                               std::optional<TensorKind> default_kind) {
  MS_RETURN_IF_ERROR(ValidateTensorName(info.name()));
  const auto what = [&info] { return Quoted(info.name()); };  // costs more than all the rest
  TensorSpec spec;
  spec.name = info.name();
  if (info.kind() == v1::TENSOR_KIND_UNSPECIFIED && default_kind) {
    spec.kind = *default_kind;
  } else if (v1::TensorKind_IsValid(info.kind()) && info.kind() != v1::TENSOR_KIND_UNSPECIFIED) {
    spec.kind = static_cast<TensorKind>(info.kind());
  } else {
    return TensorKindFromProto(info.kind(), what()).status();
  }
  if (!v1::DType_IsValid(info.dtype()) || info.dtype() == v1::DTYPE_UNSPECIFIED) {
    return DTypeFromProto(info.dtype(), what()).status();
  }
  spec.dtype = static_cast<DType>(info.dtype());
  absl::StatusOr<Shape> shape =
      Shape::Create(absl::MakeConstSpan(info.shape().data(), info.shape().size()));
  if (!shape.ok()) return FieldError(what(), shape.status().message());
  spec.shape = *std::move(shape);
  if (info.has_requires_grad()) spec.requires_grad = info.requires_grad();
  if (info.has_persistent()) spec.persistent = info.persistent();
  if (!info.alias_of().empty()) {
    MS_RETURN_IF_ERROR(ValidateTensorName(info.alias_of()));
    if (info.alias_of() == info.name()) {
      return FieldError(what(), "alias_of names the tensor itself; leave it out");
    }
    spec.alias_of = info.alias_of();
  }
  if (!info.slot().empty()) {
    spec.slot = info.slot();
    MS_RETURN_IF_ERROR(CheckSlot(spec));
  }
  if (info.nbytes() != 0 && info.nbytes() != spec.nbytes()) {
    return FieldError(what(),
                      absl::StrCat("nbytes is ", info.nbytes(), ", but ", DTypeName(spec.dtype),
                                   " of shape ", spec.shape.ToString(), " has ", spec.nbytes()));
  }
  return spec;
}

absl::StatusOr<std::vector<TensorSpec>> TensorSpecsFromProto(
    const google::protobuf::RepeatedPtrField<v1::TensorInfo>& infos) {
  std::vector<TensorSpec> specs;
  specs.reserve(static_cast<size_t>(infos.size()));  // messages that are in memory already
  absl::flat_hash_map<absl::string_view, size_t> index_of_name;
  for (const v1::TensorInfo& info : infos) {
    TensorSpec spec;
    if (info.alias_of().empty()) {
      MS_ASSIGN_OR_RETURN(spec, TensorSpecFromProto(info, std::nullopt));
    } else {
      auto owner = index_of_name.find(info.alias_of());
      if (owner == index_of_name.end()) {
        MS_RETURN_IF_ERROR(ValidateTensorName(info.name()));
        return MakeError(Reason::kUnknownKey,
                         absl::StrCat(Quoted(info.name()), ": alias_of names ",
                                      Quoted(info.alias_of()), ", which does not come before it"),
                         {{"tensor", info.name()}, {"alias_of", info.alias_of()}});
      }
      v1::TensorInfo complete = info;
      const TensorSpec& owner_spec = specs[owner->second];
      if (complete.dtype() == v1::DTYPE_UNSPECIFIED) {
        complete.set_dtype(DTypeToProto(owner_spec.dtype));
      }
      MS_ASSIGN_OR_RETURN(spec, TensorSpecFromProto(complete, owner_spec.kind));
      MS_RETURN_IF_ERROR(ResolveAlias(info, owner_spec, &spec));
    }
    if (!index_of_name.emplace(info.name(), specs.size()).second) {
      return FieldError(Quoted(info.name()), "the name comes twice");
    }
    specs.push_back(std::move(spec));
  }
  return specs;
}

void TensorSpecToProto(const TensorSpec& spec, v1::TensorInfo* info) {
  info->set_name(spec.name);
  info->set_kind(TensorKindToProto(spec.kind));
  info->set_dtype(DTypeToProto(spec.dtype));
  info->mutable_shape()->Assign(spec.shape.dims().begin(), spec.shape.dims().end());
  if (spec.kind == TensorKind::kParameter) info->set_requires_grad(spec.requires_grad);
  // Of a parameter only where it is wrong, so that whoever checks it sees that.
  if (spec.kind == TensorKind::kBuffer || !spec.persistent) info->set_persistent(spec.persistent);
  if (spec.is_alias()) info->set_alias_of(spec.alias_of);
  if (!spec.slot.empty()) info->set_slot(spec.slot);
  info->set_nbytes(spec.nbytes());
}

Version VersionFromProto(const v1::Version& version) {
  return {version.incarnation(), version.number()};
}

void VersionToProto(const Version& version, v1::Version* proto) {
  proto->set_incarnation(version.incarnation);
  proto->set_number(version.number);
}

absl::StatusOr<Selection> SelectionFromProto(const v1::Selection& selection) {
  Selection result;
  if (selection.names_size() > kMaxSelectedNames) {
    return FieldError("selection.names",
                      absl::StrCat("there are ", selection.names_size(), "; at most ",
                                   kMaxSelectedNames, " are allowed; use several calls"));
  }
  MS_RETURN_IF_ERROR(CheckPatterns(selection.prefixes(), "selection.prefixes"));
  MS_RETURN_IF_ERROR(CheckPatterns(selection.globs(), "selection.globs"));
  for (const std::string& name : selection.names()) {
    if (name.empty()) return FieldError("selection.names", "a name is empty");
    result.names.push_back(name);
  }
  result.prefixes.assign(selection.prefixes().begin(), selection.prefixes().end());
  result.globs.assign(selection.globs().begin(), selection.globs().end());
  for (int kind : selection.kinds()) {
    MS_ASSIGN_OR_RETURN(TensorKind parsed,
                        TensorKindFromProto(static_cast<v1::TensorKind>(kind), "selection.kinds"));
    // Once each: every tensor is held against all of them.
    if (std::find(result.kinds.begin(), result.kinds.end(), parsed) == result.kinds.end()) {
      result.kinds.push_back(parsed);
    }
  }
  if (selection.has_float_dtype()) {
    MS_ASSIGN_OR_RETURN(DType dtype,
                        DTypeFromProto(selection.float_dtype(), "selection.float_dtype"));
    if (!IsFloatingPoint(dtype)) {
      return FieldError("selection.float_dtype",
                        absl::StrCat(DTypeName(dtype), " is not a floating-point dtype"));
    }
    result.float_dtype = dtype;
  }
  result.include_non_persistent = selection.include_non_persistent();
  return result;
}

void SelectionToProto(const Selection& selection, v1::Selection* proto) {
  proto->mutable_names()->Assign(selection.names.begin(), selection.names.end());
  proto->mutable_prefixes()->Assign(selection.prefixes.begin(), selection.prefixes.end());
  proto->mutable_globs()->Assign(selection.globs.begin(), selection.globs.end());
  for (TensorKind kind : selection.kinds) proto->add_kinds(TensorKindToProto(kind));
  if (selection.float_dtype) proto->set_float_dtype(DTypeToProto(*selection.float_dtype));
  proto->set_include_non_persistent(selection.include_non_persistent);
}

absl::StatusOr<std::vector<ByteRange>> ByteRangesFromProto(
    const google::protobuf::RepeatedPtrField<v1::ByteRange>& ranges) {
  std::vector<ByteRange> result;
  uint64_t end = 0;
  for (const v1::ByteRange& range : ranges) {
    const std::string text = absl::StrCat("[", range.begin(), ", ", range.end(), ")");
    if (range.begin() > range.end()) {
      return FieldError("ranges", absl::StrCat(text, " ends before it begins"));
    }
    if (range.begin() < end) {
      return FieldError("ranges", absl::StrCat(text, " begins before the one before it ends, at ",
                                               end, "; give them ascending and disjoint"));
    }
    end = range.end();
    if (range.begin() == range.end()) continue;
    if (!result.empty() && result.back().end == range.begin()) {
      result.back().end = range.end();
    } else {
      result.push_back({range.begin(), range.end()});
    }
  }
  return result;
}

void ByteRangeToProto(const ByteRange& range, v1::ByteRange* proto) {
  proto->set_begin(range.begin);
  proto->set_end(range.end);
}

absl::StatusOr<absl::Duration> DurationFromProto(const google::protobuf::Duration& duration,
                                                 absl::string_view field) {
  constexpr int64_t kMaxSeconds = 315576000000;  // 10,000 years, as duration.proto says
  constexpr int32_t kMaxNanos = 999'999'999;
  std::string problem;
  if (duration.seconds() < 0 || duration.nanos() < 0) {
    problem = "a duration may not be negative";
  } else if (duration.seconds() > kMaxSeconds) {
    problem = absl::StrCat("the duration has ", duration.seconds(), " seconds; at most ",
                           kMaxSeconds, " (10,000 years) are allowed, give a shorter one");
  } else if (duration.nanos() > kMaxNanos) {
    problem = absl::StrCat("the duration has ", duration.nanos(), " nanos; at most ", kMaxNanos,
                           " are allowed, put whole seconds into `seconds`");
  }
  if (!problem.empty()) {
    return MakeError(Reason::kInvalidField, absl::StrCat(field, ": ", problem),
                     {{"field", std::string(field)}});
  }
  return absl::Seconds(duration.seconds()) + absl::Nanoseconds(duration.nanos());
}

void DurationToProto(absl::Duration duration, google::protobuf::Duration* proto) {
  proto->set_seconds(absl::IDivDuration(duration, absl::Seconds(1), &duration));
  proto->set_nanos(static_cast<int32_t>(absl::ToInt64Nanoseconds(duration)));
}

absl::Time TimeFromProto(const google::protobuf::Timestamp& time) {
  return absl::FromUnixSeconds(time.seconds()) + absl::Nanoseconds(time.nanos());
}

void TimeToProto(absl::Time time, google::protobuf::Timestamp* proto) {
  proto->set_seconds(absl::ToUnixSeconds(time));
  proto->set_nanos(static_cast<int32_t>(
      absl::ToInt64Nanoseconds(time - absl::FromUnixSeconds(proto->seconds()))));
}

}  // namespace modelstate
