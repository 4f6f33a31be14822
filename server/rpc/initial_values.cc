#include "server/rpc/initial_values.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/wire/values_codec.h"

namespace modelstate {
namespace {

constexpr size_t kFillBlock = size_t{64} << 10;

std::string What(const TensorSpec& spec) { return absl::StrCat("tensor \"", spec.name, "\""); }

Initializer KaimingFromProto(const v1::Initializer::Kaiming& proto, Initializer::Kind kind) {
  Initializer initializer;
  initializer.kind = kind;
  if (proto.has_a()) initializer.a = proto.a();
  if (!proto.mode().empty()) initializer.mode = proto.mode();
  if (!proto.nonlinearity().empty()) initializer.nonlinearity = proto.nonlinearity();
  return initializer;
}

Initializer XavierFromProto(const v1::Initializer::Xavier& proto, Initializer::Kind kind) {
  Initializer initializer;
  initializer.kind = kind;
  if (proto.has_gain()) initializer.gain = proto.gain();
  return initializer;
}

// nullopt: not a random one.
std::optional<Initializer> InitializerFromProto(const v1::Initializer& proto) {
  using Kind = Initializer::Kind;
  Initializer initializer;
  switch (proto.init_case()) {
    case v1::Initializer::kUniform:
      if (proto.uniform().has_low()) initializer.low = proto.uniform().low();
      if (proto.uniform().has_high()) initializer.high = proto.uniform().high();
      return initializer;
    case v1::Initializer::kNormal:
      initializer.kind = Kind::kNormal;
      if (proto.normal().has_mean()) initializer.mean = proto.normal().mean();
      if (proto.normal().has_std()) initializer.std = proto.normal().std();
      return initializer;
    case v1::Initializer::kKaimingUniform:
      return KaimingFromProto(proto.kaiming_uniform(), Kind::kKaimingUniform);
    case v1::Initializer::kKaimingNormal:
      return KaimingFromProto(proto.kaiming_normal(), Kind::kKaimingNormal);
    case v1::Initializer::kXavierUniform:
      return XavierFromProto(proto.xavier_uniform(), Kind::kXavierUniform);
    case v1::Initializer::kXavierNormal:
      return XavierFromProto(proto.xavier_normal(), Kind::kXavierNormal);
    default:
      return std::nullopt;
  }
}

}  // namespace

absl::StatusOr<InitialValue> InitialValueFromProto(const v1::TensorInfo& info,
                                                   const TensorSpec& spec, uint64_t seed) {
  InitialValue value;
  if (info.has_values()) {
    if (info.has_initializer()) {
      return MakeError(Reason::kInvalidField,
                       absl::StrCat(What(spec), " has both values and an initializer; give one"),
                       {{"tensor", spec.name}});
    }
    absl::Status status =
        EncodeValues(info.values(), spec.dtype, spec.shape.num_elements(), &value.elements);
    if (!status.ok()) return Annotate(status, What(spec));
    return value;
  }
  const v1::Initializer& proto = info.initializer();
  if (const std::optional<Initializer> random = InitializerFromProto(proto)) {
    MS_ASSIGN_OR_RETURN(value.draw, ResolveInitializer(*random, spec));
    value.seed = proto.has_seed() ? proto.seed() : seed;
    return value;
  }
  double constant = 0;
  if (proto.init_case() == v1::Initializer::kOnes && proto.ones()) constant = 1;
  if (proto.init_case() == v1::Initializer::kConstant) constant = proto.constant();
  if (constant == 0 && !std::signbit(constant)) return value;
  v1::Values one;
  one.mutable_doubles()->add_values(constant);
  if (spec.dtype == DType::kC64) one.mutable_doubles()->add_values(0);
  absl::Status status = EncodeValues(one, spec.dtype, 1, &value.elements);
  if (!status.ok()) return Annotate(status, absl::StrCat(What(spec), ", initializer"));
  return value;
}

absl::Status CheckTiedHasNoValue(const TensorSpec& spec, bool has_value) {
  if (!spec.is_alias() || !has_value) return absl::OkStatus();
  return MakeError(Reason::kInvalidField,
                   absl::StrCat(What(spec), " is tied to \"", spec.alias_of,
                                "\", whose values it has; leave out its own"),
                   {{"tensor", spec.name}});
}

absl::Status FillInitialValue(const InitialValue& value, const TensorSpec& spec,
                              ComputePool& compute, TensorStorage& storage) {
  if (value.draw) return FillStorage(*value.draw, value.seed, spec, compute, storage);
  Device& device = storage.device();
  if (value.elements.empty()) return device.FillZero(storage.MutableBuffer());
  std::string block = value.elements;
  while (block.size() < kFillBlock && block.size() < storage.size()) block += block;
  for (uint64_t offset = 0; offset < storage.size(); offset += block.size()) {
    const uint64_t size = std::min<uint64_t>(block.size(), storage.size() - offset);
    const auto* data = reinterpret_cast<const uint8_t*>(block.data());
    MS_RETURN_IF_ERROR(
        device.CopyFromHost(absl::MakeConstSpan(data, size), storage.MutableBuffer(), offset));
  }
  return absl::OkStatus();
}

}  // namespace modelstate
