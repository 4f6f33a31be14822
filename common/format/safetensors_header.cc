#include "common/format/safetensors_header.h"

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <string>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/format/text.h"

namespace modelstate {
namespace {

using Json = nlohmann::json;

// No entry of a tensor is shorter.
constexpr size_t kMinEntryBytes = 48;
// A pair takes twenty times its shortest text in memory.
constexpr size_t kMaxMetadataPairs = size_t{1} << 18;

// Sub-byte and other types of the format that have no DType.
struct OpaqueDType {
  absl::string_view name;
  uint8_t bits;
};
constexpr OpaqueDType kOpaqueDTypes[] = {{"F4", 4},      {"F6_E2M3", 6},     {"F6_E3M2", 6},
                                         {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8},
                                         {"C128", 128}};

absl::Status InvalidHeader(absl::string_view text) {
  return Corrupt(absl::StrCat("the safetensors header is invalid: ", text));
}

std::string OccursTwice(absl::string_view name) {
  return absl::StrCat("the name ", ShowName(name), " occurs twice");
}

// Receives the text token by token, so it sees what a DOM would hide: duplicate keys, and whether a
// number was written as an integer. Each callback returns false to stop; then status() says why.
class HeaderHandler : public nlohmann::json_sax<Json> {
 public:
  HeaderHandler(bool allow_opaque, size_t max_tensors) : allow_opaque_(allow_opaque) {
    index_.tensors.reserve(max_tensors);
    index_.begins.reserve(max_tensors);
  }

  SafetensorsIndex& index() { return index_; }
  absl::Status status() const { return status_; }
  bool complete() const { return complete_; }

  bool null() override {
    if (state_ == State::kTopValue && key_ == "__metadata__") {
      state_ = State::kTop;
      return true;
    }
    return Unexpected("null");
  }
  bool boolean(bool) override { return Unexpected("a boolean"); }
  bool number_integer(number_integer_t) override { return Unexpected("a negative number"); }
  bool number_float(number_float_t, const string_t&) override {
    return Unexpected("a number with a fraction or exponent, or over 2^64");
  }
  bool binary(binary_t&) override { return Unexpected("binary data"); }

  bool number_unsigned(number_unsigned_t value) override {
    if (state_ == State::kShape) {
      if (dims_.size() == Shape::kMaxRank) {
        return Fail(absl::StrCat("has more than ", Shape::kMaxRank, " dimensions"));
      }
      if (value > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
        return Fail(absl::StrCat("has the dimension ", value, ", which is over 2^63"));
      }
      dims_.push_back(static_cast<int64_t>(value));
      return true;
    }
    if (state_ == State::kOffsets) {
      if (offset_count_ == 2) return Fail("has more than two data_offsets");
      (offset_count_++ == 0 ? begin_ : end_) = value;
      return true;
    }
    return Unexpected("a number");
  }

  bool string(string_t& value) override {
    if (state_ == State::kMetadata) {
      index_.metadata.emplace(key_, std::move(value));
      return true;
    }
    if (state_ == State::kField && field_ == kDType) {
      dtype_ = ParseDType(value);
      const auto opaque =
          std::find_if(std::begin(kOpaqueDTypes), std::end(kOpaqueDTypes),
                       [&](const OpaqueDType& known) { return known.name == value; });
      const bool known = opaque != std::end(kOpaqueDTypes);
      if (known && allow_opaque_) {
        dtype_ = DType::kU8;
        tensor_.opaque_bits = opaque->bits;
        tensor_.opaque_dtype = opaque->name;
      }
      if (!dtype_) {
        status_ = Unsupported(
            absl::StrCat("tensor ", ShowName(key_), " has the dtype ", ShowName(value),
                         known ? ", which PyTorch modules here cannot hold"
                               : ", which this version does not know",
                         "; convert it to one such as F32 or BF16 and save the file again"));
        return false;
      }
      state_ = State::kEntry;
      return true;
    }
    return Unexpected("a string");
  }

  bool start_object(size_t) override {
    switch (state_) {
      case State::kStart:
        state_ = State::kTop;
        return true;
      case State::kTopValue:
        if (key_ == "__metadata__") {
          state_ = State::kMetadata;
          return true;
        }
        tensor_ = {};
        dims_.clear();
        dtype_.reset();
        offset_count_ = 0;
        seen_ = 0;
        state_ = State::kEntry;
        return true;
      default:
        return Unexpected("an object");
    }
  }

  bool key(string_t& value) override {
    switch (state_) {
      case State::kTop: {
        key_ = std::move(value);
        if (key_ == "__metadata__") {
          if (std::exchange(has_metadata_, true)) return FailHeader(OccursTwice(key_));
        } else {
          const absl::string_view problem = TensorNameProblem(key_);
          if (!problem.empty()) {
            return FailHeader(absl::StrCat("the tensor name ", ShowName(key_), " ", problem));
          }
        }
        state_ = State::kTopValue;
        return true;
      }
      case State::kMetadata:
        key_ = std::move(value);
        if (index_.metadata.count(key_) != 0) {
          return FailHeader(absl::StrCat("__metadata__ has the key ", ShowName(key_), " twice"));
        }
        if (index_.metadata.size() == kMaxMetadataPairs) {
          return FailHeader(
              absl::StrCat("__metadata__ has more than ", kMaxMetadataPairs, " keys; remove some"));
        }
        return true;
      case State::kEntry: {
        if (value == "dtype") {
          field_ = kDType;
        } else if (value == "shape") {
          field_ = kShape;
        } else if (value == "data_offsets") {
          field_ = kOffsets;
        } else {
          return Fail(absl::StrCat("has the unknown field ", ShowName(value)));
        }
        if ((seen_ & field_) != 0) return Fail(absl::StrCat("has the field ", value, " twice"));
        seen_ |= field_;
        state_ = State::kField;
        return true;
      }
      default:
        return Unexpected("a key");
    }
  }

  bool end_object() override {
    switch (state_) {
      case State::kEntry:
        state_ = State::kTop;
        return FinishEntry();
      case State::kMetadata:
        state_ = State::kTop;
        return true;
      case State::kTop:
        complete_ = true;
        state_ = State::kEnd;
        return true;
      default:
        return Unexpected("the end of an object");
    }
  }

  bool start_array(size_t) override {
    if (state_ == State::kField && field_ == kShape) {
      state_ = State::kShape;
      return true;
    }
    if (state_ == State::kField && field_ == kOffsets) {
      state_ = State::kOffsets;
      return true;
    }
    return Unexpected("an array");
  }

  bool end_array() override {
    if (state_ == State::kOffsets && offset_count_ != 2) return Fail("needs two data_offsets");
    state_ = State::kEntry;
    return true;
  }

  bool parse_error(size_t position, const std::string&, const Json::exception&) override {
    // The parser's own text quotes the input; the position is enough.
    return FailHeader(absl::StrCat("it is not JSON at byte ", position));
  }

 private:
  enum class State { kStart, kTop, kTopValue, kMetadata, kEntry, kField, kShape, kOffsets, kEnd };
  enum Field { kDType = 1, kShape = 2, kOffsets = 4 };

  bool FailHeader(absl::string_view text) {
    if (status_.ok()) status_ = InvalidHeader(text);
    return false;
  }
  bool Fail(absl::string_view text) {
    return FailHeader(absl::StrCat("tensor ", ShowName(key_), " ", text));
  }
  bool Unexpected(absl::string_view what) {
    if (state_ == State::kStart || state_ == State::kTop || state_ == State::kEnd) {
      return FailHeader(absl::StrCat("it is ", what, " where an object of tensors is due"));
    }
    if (state_ == State::kMetadata || key_ == "__metadata__") {
      return FailHeader(absl::StrCat("__metadata__ holds ", what, ", and may hold strings only"));
    }
    return Fail(absl::StrCat("has ", what, " where its ",
                             state_ == State::kTopValue ? "description"
                             : field_ == kDType         ? "dtype"
                             : field_ == kShape         ? "shape"
                                                        : "data_offsets",
                             " is due"));
  }

  bool FinishEntry() {
    if (seen_ != (kDType | kShape | kOffsets)) {
      return Fail("does not have all of dtype, shape and data_offsets");
    }
    absl::StatusOr<Shape> shape = Shape::Create(dims_);
    if (!shape.ok()) return Fail(absl::StrCat("has no valid shape: ", shape.status().message()));
    tensor_.name = key_;
    tensor_.dtype = *dtype_;
    tensor_.shape = *std::move(shape);
    if (static_cast<uint64_t>(tensor_.shape.num_elements()) * tensor_.opaque_bits % 8 != 0) {
      return Fail(absl::StrCat("takes no whole number of bytes: ", tensor_.shape.ToString(), " of ",
                               tensor_.opaque_bits, " bits"));
    }
    if (begin_ > end_ || end_ - begin_ != tensor_.nbytes()) {
      return Fail(absl::StrCat("has data_offsets [", begin_, ", ", end_, "], but ",
                               tensor_.dtype_name(), " ", tensor_.shape.ToString(), " takes ",
                               tensor_.nbytes(), " bytes"));
    }
    index_.tensors.push_back(std::move(tensor_));
    index_.begins.push_back(begin_);
    return true;
  }

  const bool allow_opaque_;
  SafetensorsIndex index_;
  absl::Status status_;
  bool complete_ = false;
  State state_ = State::kStart;
  bool has_metadata_ = false;
  // Of the entry at hand.
  std::string key_;
  Field field_ = kDType;
  int seen_ = 0;
  int offset_count_ = 0;
  std::optional<DType> dtype_;
  std::vector<int64_t> dims_;
  StoredTensor tensor_;
  uint64_t begin_ = 0;
  uint64_t end_ = 0;
};

// The places of the tensors, sorted by what `key` gives for one.
template <typename Key>
std::vector<uint32_t> SortedBy(const SafetensorsIndex& index, Key key) {
  std::vector<uint32_t> order(index.tensors.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&key](uint32_t a, uint32_t b) { return key(a) < key(b); });
  return order;
}

absl::Status CheckNamesDiffer(const SafetensorsIndex& index) {
  const auto name = [&index](uint32_t i) { return absl::string_view(index.tensors[i].name); };
  const std::vector<uint32_t> order = SortedBy(index, name);
  const auto twice = std::adjacent_find(
      order.begin(), order.end(), [&name](uint32_t a, uint32_t b) { return name(a) == name(b); });
  if (twice == order.end()) return absl::OkStatus();
  return InvalidHeader(OccursTwice(name(*twice)));
}

absl::Status CheckTiling(const SafetensorsIndex& index, uint64_t data_bytes) {
  const auto range = [&index](uint32_t i) {
    return std::pair(index.begins[i], index.begins[i] + index.tensors[i].nbytes());
  };
  uint64_t end = 0;
  for (uint32_t i : SortedBy(index, range)) {
    if (index.begins[i] != end) {
      return Corrupt(absl::StrCat("tensor ", ShowName(index.tensors[i].name), " begins at byte ",
                                  index.begins[i], " of the data, but the one before ends at ", end,
                                  ": safetensors allows no ",
                                  index.begins[i] > end ? "hole" : "overlap"));
    }
    end = range(i).second;
  }
  if (end != data_bytes) {
    return Corrupt(absl::StrCat(
        "the tensors take ", end, " bytes, but the file has ", data_bytes, " after its header: ",
        end > data_bytes ? "it is truncated; copy it again" : "it has trailing bytes"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<SafetensorsIndex> ParseSafetensorsHeader(absl::string_view json, uint64_t data_bytes,
                                                        bool allow_opaque) {
  // The parser would skip a byte-order mark and take a NUL for the end of the text.
  if (json.empty() || json.front() != '{') {
    return Corrupt("the safetensors header is invalid: it does not begin with \"{\"");
  }
  if (json.find('\0') != absl::string_view::npos) {
    return Corrupt("the safetensors header is invalid: it has a NUL byte");
  }
  // Set aside once: a vector that grows holds up to three times what is in it.
  const auto objects = static_cast<size_t>(std::count(json.begin(), json.end(), '{'));
  HeaderHandler handler(allow_opaque, std::min(objects, json.size() / kMinEntryBytes));
  const bool parsed = Json::sax_parse(json.data(), json.data() + json.size(), &handler);
  MS_RETURN_IF_ERROR(handler.status());
  if (!parsed || !handler.complete()) return Corrupt("the safetensors header is not an object");
  MS_RETURN_IF_ERROR(CheckNamesDiffer(handler.index()));
  MS_RETURN_IF_ERROR(CheckTiling(handler.index(), data_bytes));
  return std::move(handler.index());
}

AliasRecords FindAliasRecords(const std::map<std::string, std::string>& metadata,
                              absl::Span<const StoredTensor> tensors) {
  absl::flat_hash_map<absl::string_view, size_t> places;
  for (size_t i = 0; i < tensors.size(); ++i) places.emplace(tensors[i].name, i);
  AliasRecords aliases;
  for (const auto& [key, value] : metadata) {
    if (!IsAliasRecord(key, value) || places.contains(key)) continue;
    const auto owner = places.find(value);
    if (owner != places.end()) aliases[owner->second].push_back(key);
  }
  return aliases;
}

bool IsAliasRecord(absl::string_view key, absl::string_view value) {
  if (absl::StartsWith(key, "modelstate.")) return false;
  // {"format": "pt"} is in most files, also in one with a tensor called "pt".
  if (key == "format" && value == "pt") return false;
  return TensorNameProblem(key).empty() && TensorNameProblem(value).empty();
}

}  // namespace modelstate
