#include "client/module_spec_proto.h"

#include <utility>
#include <vector>

#include "common/base/status.h"
#include "common/wire/convert.h"

namespace modelstate::client {
namespace {

using Kind = Initializer::Kind;

void KaimingFromProto(const v1::Initializer::Kaiming& proto, Initializer* value) {
  if (proto.has_a()) value->a = proto.a();
  value->mode = proto.mode();
  value->nonlinearity = proto.nonlinearity();
}

void KaimingToProto(const Initializer& value, v1::Initializer::Kaiming* proto) {
  if (value.a) proto->set_a(*value.a);
  proto->set_mode(value.mode);
  proto->set_nonlinearity(value.nonlinearity);
}

Initializer FromProto(const v1::Initializer& proto) {
  Initializer value;
  if (proto.has_seed()) value.seed = proto.seed();
  switch (proto.init_case()) {
    case v1::Initializer::kZeros:
    case v1::Initializer::INIT_NOT_SET:
      break;
    case v1::Initializer::kOnes:
      value.kind = Kind::kOnes;
      break;
    case v1::Initializer::kConstant:
      value.kind = Kind::kConstant;
      value.constant = proto.constant();
      break;
    case v1::Initializer::kUniform:
      value.kind = Kind::kUniform;
      if (proto.uniform().has_low()) value.low = proto.uniform().low();
      if (proto.uniform().has_high()) value.high = proto.uniform().high();
      break;
    case v1::Initializer::kNormal:
      value.kind = Kind::kNormal;
      if (proto.normal().has_mean()) value.mean = proto.normal().mean();
      if (proto.normal().has_std()) value.std = proto.normal().std();
      break;
    case v1::Initializer::kKaimingUniform:
      value.kind = Kind::kKaimingUniform;
      KaimingFromProto(proto.kaiming_uniform(), &value);
      break;
    case v1::Initializer::kKaimingNormal:
      value.kind = Kind::kKaimingNormal;
      KaimingFromProto(proto.kaiming_normal(), &value);
      break;
    case v1::Initializer::kXavierUniform:
      value.kind = Kind::kXavierUniform;
      if (proto.xavier_uniform().has_gain()) value.gain = proto.xavier_uniform().gain();
      break;
    case v1::Initializer::kXavierNormal:
      value.kind = Kind::kXavierNormal;
      if (proto.xavier_normal().has_gain()) value.gain = proto.xavier_normal().gain();
      break;
  }
  return value;
}

void ToProto(const Initializer& value, v1::Initializer* proto) {
  if (value.seed) proto->set_seed(*value.seed);
  switch (value.kind) {
    case Kind::kZeros:
      proto->set_zeros(true);
      break;
    case Kind::kOnes:
      proto->set_ones(true);
      break;
    case Kind::kConstant:
      proto->set_constant(value.constant);
      break;
    case Kind::kUniform:
      proto->mutable_uniform();
      if (value.low) proto->mutable_uniform()->set_low(*value.low);
      if (value.high) proto->mutable_uniform()->set_high(*value.high);
      break;
    case Kind::kNormal:
      proto->mutable_normal();
      if (value.mean) proto->mutable_normal()->set_mean(*value.mean);
      if (value.std) proto->mutable_normal()->set_std(*value.std);
      break;
    case Kind::kKaimingUniform:
      KaimingToProto(value, proto->mutable_kaiming_uniform());
      break;
    case Kind::kKaimingNormal:
      KaimingToProto(value, proto->mutable_kaiming_normal());
      break;
    case Kind::kXavierUniform:
      proto->mutable_xavier_uniform();
      if (value.gain) proto->mutable_xavier_uniform()->set_gain(*value.gain);
      break;
    case Kind::kXavierNormal:
      proto->mutable_xavier_normal();
      if (value.gain) proto->mutable_xavier_normal()->set_gain(*value.gain);
      break;
  }
}

std::optional<Values> ValuesOf(const v1::Values& proto) {
  switch (proto.elements_case()) {
    case v1::Values::kDoubles:
      return Values(
          std::vector<double>(proto.doubles().values().begin(), proto.doubles().values().end()));
    case v1::Values::kInts:
      return Values(
          std::vector<int64_t>(proto.ints().values().begin(), proto.ints().values().end()));
    case v1::Values::kRaw:
      return Values(proto.raw());
    case v1::Values::ELEMENTS_NOT_SET:
      break;
  }
  return std::nullopt;
}

void ToProto(const Values& value, v1::Values* proto) {
  if (const auto* doubles = std::get_if<std::vector<double>>(&value)) {
    proto->mutable_doubles()->mutable_values()->Assign(doubles->begin(), doubles->end());
  } else if (const auto* ints = std::get_if<std::vector<int64_t>>(&value)) {
    proto->mutable_ints()->mutable_values()->Assign(ints->begin(), ints->end());
  } else {
    proto->set_raw(std::get<std::string>(value));
  }
}

}  // namespace

absl::StatusOr<ModuleSpec> FromProto(const v1::ModuleSpec& proto) {
  MS_ASSIGN_OR_RETURN(std::vector<TensorSpec> specs, TensorSpecsFromProto(proto.tensors()));
  ModuleSpec value;
  value.tensors.reserve(specs.size());
  for (size_t i = 0; i < specs.size(); ++i) {
    const v1::TensorInfo& info = proto.tensors(static_cast<int>(i));
    Registration tensor;
    tensor.spec = std::move(specs[i]);
    if (info.has_values()) tensor.values = ValuesOf(info.values());
    if (info.has_initializer()) tensor.initializer = FromProto(info.initializer());
    value.tensors.push_back(std::move(tensor));
  }
  value.metadata.insert(proto.metadata().begin(), proto.metadata().end());
  value.seed = proto.seed();
  return value;
}

void ToProto(const Registration& value, v1::TensorInfo* proto) {
  if (value.spec.is_alias()) {
    proto->set_name(value.spec.name);
    proto->set_alias_of(value.spec.alias_of);
    if (value.spec.kind == TensorKind::kBuffer) proto->set_persistent(value.spec.persistent);
  } else {
    TensorSpecToProto(value.spec, proto);
    proto->clear_nbytes();
  }
  if (value.values) ToProto(*value.values, proto->mutable_values());
  if (value.initializer) ToProto(*value.initializer, proto->mutable_initializer());
}

void ToProto(const ModuleSpec& value, v1::ModuleSpec* proto) {
  proto->mutable_tensors()->Reserve(static_cast<int>(value.tensors.size()));
  for (const Registration& tensor : value.tensors) ToProto(tensor, proto->add_tensors());
  proto->mutable_metadata()->insert(value.metadata.begin(), value.metadata.end());
  proto->set_seed(value.seed);
}

}  // namespace modelstate::client
