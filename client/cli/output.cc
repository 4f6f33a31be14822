#include "client/cli/output.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <iostream>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "common/base/digest.h"

namespace modelstate::cli {
namespace {

bool IsNumber(const std::string& text) {
  const size_t sign = !text.empty() && text[0] == '-' ? 1 : 0;
  return text.size() > sign && absl::ascii_isdigit(static_cast<unsigned char>(text[sign])) != 0;
}

// The length of the character at the start of `text`, and its code point; 0: it is not UTF-8.
size_t DecodeUtf8(absl::string_view text, uint32_t* code_point) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char lead = byte(0);
  size_t length = 1;
  if (lead >= 0x80) length = lead < 0xc2 ? 0 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
  if (length == 0 || lead > 0xf4 || text.size() < length) return 0;
  *code_point = length == 1 ? lead : lead & (0xff >> (length + 1));
  for (size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xc0) != 0x80) return 0;
    *code_point = *code_point << 6 | (byte(i) & 0x3f);
  }
  return length;
}

bool IsHarmless(uint32_t code_point) {
  const auto in = [&](uint32_t first, uint32_t last) {
    return first <= code_point && code_point <= last;
  };
  // C0, DEL and C1; line and paragraph separators and the overrides and isolates of direction.
  return !in(0, 0x1f) && !in(0x7f, 0x9f) && !in(0x2028, 0x202e) && !in(0x2066, 0x2069);
}

}  // namespace

std::string Printable(absl::string_view text) {
  std::string result;
  result.reserve(text.size());
  while (!text.empty()) {
    uint32_t code_point = 0;
    size_t length = DecodeUtf8(text, &code_point);
    if (length > 0 && IsHarmless(code_point)) {
      absl::StrAppend(&result, text.substr(0, length));
    } else if (length > 1) {
      absl::StrAppendFormat(&result, "\\u%04x", code_point);
    } else {
      length = 1;
      absl::StrAppend(&result, absl::CHexEscape(text.substr(0, 1)));
    }
    text.remove_prefix(length);
  }
  return result;
}

Table Table::OfPairs(std::string key, std::string value) {
  Table table({Printable(key), Printable(value)});
  table.numbers_right_ = false;
  return table;
}

void Table::Add(std::vector<std::string> row) {
  for (std::string& cell : row) cell = Printable(cell);
  rows_.push_back(std::move(row));
}

void Table::Print() const {
  std::vector<size_t> widths(rows_[0].size());
  for (const auto& row : rows_) {
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  for (const auto& row : rows_) {
    std::string line;
    for (size_t i = 0; i < row.size(); ++i) {
      const std::string pad(widths[i] - row[i].size(), ' ');
      const bool right = numbers_right_ && IsNumber(row[i]);
      absl::StrAppend(&line, i == 0 ? "" : "  ", right ? pad : "", row[i], right ? "" : pad);
    }
    std::cout << absl::StripTrailingAsciiWhitespace(line) << "\n";
  }
  std::cout.flush();
}

std::string HumanBytes(uint64_t bytes) {
  if (bytes < 1024) return absl::StrCat(bytes, " B");
  constexpr const char* kUnits[] = {"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  double value = static_cast<double>(bytes) / 1024;
  size_t unit = 0;
  while (value >= 1024 && unit + 1 < std::size(kUnits)) {
    value /= 1024;
    ++unit;
  }
  return absl::StrFormat("%.1f %s", value, kUnits[unit]);
}

std::string HumanTime(absl::Time time) {
  return absl::FormatTime("%Y-%m-%d %H:%M:%S", time, absl::LocalTimeZone());
}

std::string Joined(const std::vector<std::string>& parts) {
  return Printable(absl::StrJoin(parts, ", "));
}

std::string Counted(uint64_t count, const char* noun) {
  return absl::StrCat(count, " ", noun, count == 1 ? "" : "s");
}

std::string CountedParameters(uint64_t parameters, uint64_t tied_names) {
  std::string text = Counted(parameters, "parameter");
  if (tied_names > 0) absl::StrAppend(&text, " (", Counted(tied_names, "tied name"), ")");
  return text;
}

std::string Number(double value) { return absl::StrFormat("%.6g", value); }

const char* StateName(client::ModuleState state) {
  switch (state) {
    case client::ModuleState::kEmpty:
      return "EMPTY";
    case client::ModuleState::kReady:
      return "READY";
    case client::ModuleState::kFailed:
      return "FAILED";
    case client::ModuleState::kUnknown:
      break;
  }
  return "UNKNOWN";
}

Json ToJson(const Version& version) {
  // 64 bits do not fit in every JSON reader's numbers.
  return {{"incarnation", absl::StrCat(version.incarnation)}, {"number", version.number}};
}

Json ToJson(const client::ModuleInfo& module) {
  Json json = {{"name", module.name},
               {"state", StateName(module.state)},
               {"version", ToJson(module.version)},
               {"step", module.step},
               {"schema_revision", module.schema_revision},
               {"layout_digest", module.layout_digest},
               {"parameters", module.parameter_count},
               {"buffers", module.buffer_count},
               {"parameter_elements", module.parameter_elements},
               {"bytes", module.total_bytes},
               {"device", module.device},
               {"has_optimizer", module.has_optimizer},
               {"create_time", absl::FormatTime(module.create_time, absl::UTCTimeZone())}};
  json["metadata"] = module.metadata;
  return json;
}

Json ToJson(const client::TensorInfo& tensor) {
  Json json = {{"name", tensor.spec.name},
               {"kind", TensorKindName(tensor.spec.kind)},
               {"dtype", std::string(DTypeName(tensor.spec.dtype))},
               {"shape", Json::array()},
               {"bytes", tensor.spec.nbytes()}};
  for (int64_t dim : tensor.spec.shape.dims()) json["shape"].push_back(dim);
  if (tensor.spec.kind == TensorKind::kParameter) json["requires_grad"] = tensor.spec.requires_grad;
  if (tensor.spec.kind == TensorKind::kBuffer) json["persistent"] = tensor.spec.persistent;
  if (tensor.spec.is_alias()) json["alias_of"] = tensor.spec.alias_of;
  json["changed_version"] = tensor.changed_version;
  if (!tensor.slot.empty()) json["slot"] = tensor.slot;
  if (tensor.group) json["group"] = *tensor.group;
  if (tensor.xxh3) json["xxh3"] = DigestToHex(*tensor.xxh3);
  if (tensor.statistics) json["statistics"] = ToJson(*tensor.statistics);
  return json;
}

Json ToJson(const client::TensorStatistics& statistics) {
  return {{"count", statistics.count}, {"min", statistics.min},
          {"max", statistics.max},     {"mean", statistics.mean},
          {"norm", statistics.norm},   {"nonfinite", statistics.nonfinite}};
}

Json ToJson(double value) {
  if (std::isfinite(value)) return value;
  return std::isnan(value) ? "nan" : value > 0 ? "inf" : "-inf";
}

ProgressBar::ProgressBar(const Context& context)
    : enabled_(!context.json && ::isatty(STDERR_FILENO) != 0) {}

void ProgressBar::Update(const client::Progress& progress) {
  if (!enabled_) return;
  const absl::Time now = absl::Now();
  if (progress.phase != phase_) {
    phase_ = progress.phase;
    phase_start_ = now;
    phase_first_ = progress.done_bytes;
  } else if (now < next_ && progress.done_bytes < progress.total_bytes) {
    return;
  }
  next_ = now + absl::Milliseconds(100);
  const double seconds = std::max(1e-3, absl::ToDoubleSeconds(now - phase_start_));
  const double rate = static_cast<double>(progress.done_bytes - phase_first_) / seconds;
  const double part = progress.total_bytes == 0 ? 1
                                                : static_cast<double>(progress.done_bytes) /
                                                      static_cast<double>(progress.total_bytes);
  constexpr int kWidth = 30;
  const int filled = std::clamp(static_cast<int>(part * kWidth), 0, kWidth);
  std::string left = "--:--";
  if (rate > 0 && progress.total_bytes >= progress.done_bytes) {
    const auto rest = static_cast<int64_t>(
        static_cast<double>(progress.total_bytes - progress.done_bytes) / rate);
    left = absl::StrFormat("%02d:%02d", rest / 60, rest % 60);
  }
  std::cerr << absl::StrFormat("\r%s [%s%s] %3d%% %s of %s, %s/s, %s left\033[K", phase_,
                               std::string(static_cast<size_t>(filled), '#'),
                               std::string(static_cast<size_t>(kWidth - filled), '.'),
                               static_cast<int>(part * 100), HumanBytes(progress.done_bytes),
                               HumanBytes(progress.total_bytes),
                               HumanBytes(static_cast<uint64_t>(std::max(0.0, rate))), left)
            << std::flush;
  shown_ = true;
}

void ProgressBar::Clear() {
  if (shown_) std::cerr << "\r\033[K" << std::flush;
  shown_ = false;
}

}  // namespace modelstate::cli
