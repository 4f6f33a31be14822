#include "common/format/torch_state_dict_writer.h"

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "common/base/bytes.h"
#include "common/base/status.h"
#include "common/format/pickle_writer.h"
#include "common/format/text.h"

namespace modelstate {
namespace {

// {"": {"version": 1}, "bn": {"version": 2}}
void PickleVersions(const std::map<std::string, int64_t>& versions, PickleWriter* out) {
  out->Op('}');
  out->String("_metadata");
  out->OrderedDict();
  out->Op('(');
  for (const auto& [module, version] : versions) {
    if (version < 0 || !IsValidUtf8(module)) continue;  // no PyTorch writes that
    out->UniqueString(module);
    out->Op('}');
    out->String("version");
    out->Int(static_cast<uint64_t>(version));
    out->Op('s');
  }
  out->Op('u');
  out->Op('s');
  out->Op('b');
}

}  // namespace

absl::Status WriteTorchStateDict(const File& file, absl::Span<const TensorSpec> specs,
                                 const std::map<std::string, int64_t>& module_versions,
                                 GiveElements give) {
  absl::flat_hash_map<absl::string_view, size_t> owners;
  PickleWriter out;
  out.OrderedDict();
  out.Op('(');
  for (size_t i = 0; i < specs.size(); ++i) {
    const TensorSpec& spec = specs[i];
    const absl::string_view problem = TensorNameProblem(spec.name);
    if (!problem.empty()) {
      return MakeError(
          Reason::kNotRepresentable,
          absl::StrCat("the tensor name ", ShowName(spec.name), " ", problem, "; rename it"));
    }
    const auto owner = owners.emplace(spec.is_alias() ? spec.alias_of : spec.name, i);
    out.UniqueString(spec.name);
    out.Tensor(absl::StrCat(owner.first->second), spec.dtype, spec.shape);
  }
  out.Op('u');
  if (!module_versions.empty()) PickleVersions(module_versions, &out);
  const std::string pickle = std::move(out).Finish();

  ZipWriter zip(file);
  MS_RETURN_IF_ERROR(zip.Add("archive/data.pkl", AsBytes(pickle)));
  MS_RETURN_IF_ERROR(zip.Add("archive/byteorder", AsBytes("little")));
  for (size_t i = 0; i < specs.size(); ++i) {
    const TensorSpec& spec = specs[i];
    if (owners.at(spec.is_alias() ? spec.alias_of : spec.name) != i) continue;
    MS_RETURN_IF_ERROR(zip.AddStream(absl::StrCat("archive/data/", i), spec.nbytes(),
                                     [&](ZipWriter::TakeBytes take) { return give(i, take); }));
  }
  MS_RETURN_IF_ERROR(zip.Add("archive/version", AsBytes("3\n")));
  return zip.Finish();
}

}  // namespace modelstate
