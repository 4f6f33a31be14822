// The manifest of a saved directory up to its digest, which is always right.
#include "absl/strings/str_cat.h"
#include "common/base/digest.h"
#include "common/base/status.h"
#include "tests/common/allocation_meter.h"
#include "tests/fuzz/read_everything.h"
#include "tests/server/checkpoint/whole_manifest.h"

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::string text = absl::StrCat(
      std::string(reinterpret_cast<const char*>(data), size), modelstate::kManifestTailBegin,
      modelstate::DigestToHex(modelstate::Xxh3(absl::MakeConstSpan(data, size))),
      modelstate::kManifestTailEnd);
  modelstate::ResetPeakAllocation();
  const auto status = modelstate::StoredManifest::Parse(text).status();
  modelstate::fuzz::Require(modelstate::PeakAllocation() <= text.size() + (size_t{16} << 20),
                            "more memory than the file and 16 MiB");
  const auto manifest = modelstate::ParseWholeManifest(std::move(text));
  modelstate::fuzz::Require(manifest.status() == status, "it reads in another way a second time");
  if (!manifest.ok()) {
    modelstate::fuzz::Require(modelstate::GetReason(manifest.status()).has_value(),
                              "an error has no reason");
    return 0;
  }
  // What is read can be written, and reads back to the same text.
  const auto written = modelstate::ManifestToText(*manifest);
  modelstate::fuzz::Require(written.ok(), "what was read cannot be written");
  const auto again = modelstate::ParseWholeManifest(*written);
  modelstate::fuzz::Require(again.ok(), "what was written cannot be read");
  modelstate::fuzz::Require(modelstate::ManifestToText(*again).value() == *written,
                            "a manifest changes when it is read and written");
  return 0;
}
