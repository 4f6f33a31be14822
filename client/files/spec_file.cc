#include "client/files/spec_file.h"

#include <google/protobuf/io/tokenizer.h>
#include <google/protobuf/text_format.h>
#include <google/protobuf/util/json_util.h>

#include <nlohmann/json.hpp>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "client/module_spec_proto.h"
#include "common/base/status.h"

namespace modelstate::client {
namespace {

using Json = nlohmann::ordered_json;

absl::Status SpecError(absl::string_view path, absl::string_view text) {
  return MakeError(Reason::kInvalidField, absl::StrCat(path, ": ", text));
}

// Keeps the first error, with its place.
class FirstError final : public google::protobuf::io::ErrorCollector {
 public:
  void AddError(int line, int column, const std::string& text) override {
    if (message_.empty()) {
      message_ = absl::StrCat("line ", line + 1, ", column ", column + 1, ": ", text);
    }
  }
  const std::string& message() const { return message_; }

 private:
  std::string message_;
};

absl::Status ParseJson(absl::string_view text, absl::string_view path, v1::ModuleSpec* proto) {
  // protobuf says which field is wrong, but not on which line the syntax is.
  try {
    const Json valid = Json::parse(text.begin(), text.end());
  } catch (const Json::parse_error& error) {
    absl::string_view what = error.what();
    const size_t end = what.find("] ");
    if (end != absl::string_view::npos) what.remove_prefix(end + 2);
    return SpecError(path, what);
  }
  const google::protobuf::util::Status status = google::protobuf::util::JsonStringToMessage(
      google::protobuf::StringPiece(text.data(), text.size()), proto);
  if (!status.ok()) return SpecError(path, std::string(status.message()));
  return absl::OkStatus();
}

absl::Status ParseText(absl::string_view text, absl::string_view path, v1::ModuleSpec* proto) {
  FirstError error;
  google::protobuf::TextFormat::Parser parser;
  parser.RecordErrorsTo(&error);
  if (!parser.ParseFromString(std::string(text), proto)) return SpecError(path, error.message());
  return absl::OkStatus();
}

// protobuf writes 64-bit integers as strings; of a shape nobody expects that.
void UnquoteShape(Json* tensor) {
  const auto shape = tensor->find("shape");
  if (shape == tensor->end()) return;
  for (Json& dim : *shape) dim = std::stoll(dim.get<std::string>());
}

std::string FormatJson(const ModuleSpec& spec, const v1::ModuleSpec& proto) {
  google::protobuf::util::JsonPrintOptions options;
  options.preserve_proto_field_names = true;
  std::string text;
  // Only for a message that has no such form: this has.
  if (!google::protobuf::util::MessageToJsonString(proto, &text, options).ok()) return text;
  Json json = Json::parse(text);
  if (!spec.metadata.empty()) json["metadata"] = spec.metadata;  // in the order of the keys
  std::string out = "{";
  const char* separator = "\n";
  for (const char* key : {"metadata", "seed"}) {
    if (!json.contains(key)) continue;
    absl::StrAppend(&out, separator, "  \"", key, "\": ", json[key].dump());
    separator = ",\n";
  }
  absl::StrAppend(&out, separator, "  \"tensors\": [");
  separator = "\n";
  if (json.contains("tensors")) {
    for (Json& tensor : json["tensors"]) {
      UnquoteShape(&tensor);
      absl::StrAppend(&out, separator, "    ", tensor.dump());
      separator = ",\n";
    }
  }
  absl::StrAppend(&out, "\n  ]\n}\n");
  return out;
}

}  // namespace

SpecFormat GuessSpecFormat(absl::string_view path, absl::string_view text) {
  if (absl::EndsWith(path, ".json")) return SpecFormat::kJson;
  for (const char* extension : {".textproto", ".txtpb", ".pbtxt", ".prototxt"}) {
    if (absl::EndsWith(path, extension)) return SpecFormat::kTextProto;
  }
  const size_t first = text.find_first_not_of(" \t\r\n");
  return first != absl::string_view::npos && text[first] == '{' ? SpecFormat::kJson
                                                                : SpecFormat::kTextProto;
}

absl::StatusOr<ModuleSpec> ParseModuleSpec(absl::string_view text, SpecFormat format,
                                           absl::string_view path) {
  v1::ModuleSpec proto;
  MS_RETURN_IF_ERROR(format == SpecFormat::kJson ? ParseJson(text, path, &proto)
                                                 : ParseText(text, path, &proto));
  absl::StatusOr<ModuleSpec> spec = FromProto(proto);
  if (!spec.ok()) return Annotate(spec.status(), path);
  return spec;
}

std::string FormatModuleSpec(const ModuleSpec& spec, SpecFormat format) {
  v1::ModuleSpec proto;
  ToProto(spec, &proto);
  if (format == SpecFormat::kJson) return FormatJson(spec, proto);
  std::string text;
  google::protobuf::TextFormat::PrintToString(proto, &text);
  return text;
}

}  // namespace modelstate::client
