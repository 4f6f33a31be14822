#ifndef MODELSTATE_COMMON_FORMAT_PICKLE_GLOBALS_H_
#define MODELSTATE_COMMON_FORMAT_PICKLE_GLOBALS_H_

#include <cstdint>
#include <optional>

#include "absl/types/span.h"
#include "common/base/dtype.h"
#include "common/format/pickle.h"

namespace modelstate {

// A global that a pickle may name. Internal to the folder.
struct PickleGlobalRow {
  const char* name;  // module, a space, name
  PickleGlobal global;
  std::optional<DType> dtype;   // of storage classes and dtypes that have one
  const char* torch_name = "";  // of the dtype: "complex128"
  uint64_t item_bytes = 1;      // of a storage class without DType
};

absl::Span<const PickleGlobalRow> PickleGlobals();

}  // namespace modelstate

#endif  // MODELSTATE_COMMON_FORMAT_PICKLE_GLOBALS_H_
