#ifndef MODELSTATE_SERVER_CHECKPOINT_TENSOR_FILE_H_
#define MODELSTATE_SERVER_CHECKPOINT_TENSOR_FILE_H_

#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "common/base/file.h"
#include "common/base/state_layout.h"
#include "server/checkpoint/job_progress.h"
#include "server/checkpoint/manifest.h"
#include "server/state/tensor_storage.h"

namespace modelstate {

// What a safetensors file of a checkpoint is made of. The lists are parallel; borrowed.
struct TensorFile {
  absl::Span<const TensorSpec> specs;
  const StateLayout* layout = nullptr;
  absl::Span<const StorageRef> storages;
  std::map<std::string, std::string> metadata;
};

// Makes the file `path` (which must not exist), writes it whole, with the digests of the storages
// in its metadata, and syncs its data. Afterwards every storage has its digest cached. `meter`
// counts the bytes of the elements. STORAGE_FULL, STORAGE_ERROR; NOT_REPRESENTABLE; CANCELLED. A
// failure may leave a part of the file.
absl::StatusOr<Manifest::FileEntry> WriteTensorFile(const RootDirectory& root,
                                                    const std::string& path, TensorFile content,
                                                    ProgressMeter& meter,
                                                    const JobControl& control);

}  // namespace modelstate

#endif  // MODELSTATE_SERVER_CHECKPOINT_TENSOR_FILE_H_
