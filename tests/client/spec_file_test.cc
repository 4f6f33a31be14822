#include "client/files/spec_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/base/status.h"

namespace modelstate::client {
namespace {

using ::testing::HasSubstr;

constexpr char kJson[] = R"({
  "metadata": {"git": "abc"},
  "seed": 7,
  "tensors": [
    {"name": "weight", "kind": "PARAMETER", "dtype": "F32", "shape": [2, 3],
     "requires_grad": false, "initializer": {"kaiming_uniform": {"a": 0.5}}},
    {"name": "count", "kind": "BUFFER", "dtype": "I64", "persistent": false,
     "values": {"ints": {"values": [9007199254740993]}}},
    {"name": "tied", "alias_of": "weight"}
  ]
})";

constexpr char kText[] = R"(metadata { key: "git" value: "abc" }
seed: 7
tensors {
  name: "weight" kind: PARAMETER dtype: F32 shape: [2, 3] requires_grad: false
  initializer { kaiming_uniform { a: 0.5 } }
}
tensors { name: "count" kind: BUFFER dtype: I64 persistent: false values { ints { values: 9007199254740993 } } }
tensors { name: "tied" alias_of: "weight" }
)";

TEST(SpecFile, JsonAndTextProtoSayTheSame) {
  const absl::StatusOr<ModuleSpec> json = ParseModuleSpec(kJson, SpecFormat::kJson, "a.json");
  ASSERT_TRUE(json.ok()) << json.status();
  const absl::StatusOr<ModuleSpec> text = ParseModuleSpec(kText, SpecFormat::kTextProto, "a");
  ASSERT_TRUE(text.ok()) << text.status();
  EXPECT_EQ(FormatModuleSpec(*json, SpecFormat::kTextProto),
            FormatModuleSpec(*text, SpecFormat::kTextProto));
  ASSERT_EQ(json->tensors.size(), 3u);
  EXPECT_EQ(json->seed, 7u);
  EXPECT_FALSE(json->tensors[0].spec.requires_grad);
  EXPECT_EQ(json->tensors[0].initializer->a, 0.5);
  EXPECT_EQ(std::get<std::vector<int64_t>>(*json->tensors[1].values)[0], 9007199254740993);
  EXPECT_EQ(json->tensors[2].spec.shape, json->tensors[0].spec.shape);
}

TEST(SpecFile, WhatIsWrittenIsReadBack) {
  const ModuleSpec spec = *ParseModuleSpec(kJson, SpecFormat::kJson, "a.json");
  for (SpecFormat format : {SpecFormat::kJson, SpecFormat::kTextProto}) {
    const std::string text = FormatModuleSpec(spec, format);
    const absl::StatusOr<ModuleSpec> back = ParseModuleSpec(text, format, "b");
    ASSERT_TRUE(back.ok()) << back.status() << text;
    EXPECT_EQ(FormatModuleSpec(*back, format), text);
    EXPECT_EQ(GuessSpecFormat("", text), format);
  }
  // Shapes are numbers, for people.
  EXPECT_THAT(FormatModuleSpec(spec, SpecFormat::kJson), HasSubstr("\"shape\":[2,3]"));
  // An empty module is one too.
  const std::string empty = FormatModuleSpec(ModuleSpec(), SpecFormat::kJson);
  EXPECT_TRUE(ParseModuleSpec(empty, SpecFormat::kJson, "c").ok()) << empty;
}

TEST(SpecFile, FormatIsOfTheExtensionElseOfTheText) {
  EXPECT_EQ(GuessSpecFormat("a.json", "tensors {}"), SpecFormat::kJson);
  EXPECT_EQ(GuessSpecFormat("a.textproto", "{}"), SpecFormat::kTextProto);
  EXPECT_EQ(GuessSpecFormat("a", "\n {}"), SpecFormat::kJson);
  EXPECT_EQ(GuessSpecFormat("a.txt", "# a comment\ntensors {}"), SpecFormat::kTextProto);
}

void ExpectError(const char* text, SpecFormat format, std::vector<std::string> parts) {
  const absl::Status status = ParseModuleSpec(text, format, "bad.spec").status();
  EXPECT_EQ(GetReason(status), Reason::kInvalidField) << status;
  parts.push_back("bad.spec: ");
  for (const std::string& part : parts) {
    EXPECT_THAT(std::string(status.message()), HasSubstr(part));
  }
}

TEST(SpecFile, ErrorsNameTheFileAndTheLineOrField) {
  ExpectError("{\"tensors\": [\n{\"name\" \"w\"}]}", SpecFormat::kJson, {"line 2, column"});
  ExpectError("{\"tensors\": [{\"name\": \"w\", \"dtype\": \"F33\"}]}", SpecFormat::kJson,
              {"tensors[0].dtype", "F33"});
  ExpectError("{\"tensors\": [{\"nome\": \"w\"}]}", SpecFormat::kJson, {"tensors[0]", "nome"});
  ExpectError("seed: 1\ntensors { nome: \"w\" }", SpecFormat::kTextProto,
              {"line 2, column", "nome"});
  ExpectError("{\"tensors\": [{\"name\": \"w\", \"kind\": \"PARAMETER\"}]}", SpecFormat::kJson,
              {"tensor \"w\"", "dtype is not set"});
  ExpectError("", SpecFormat::kJson, {"line 1"});
}

}  // namespace
}  // namespace modelstate::client
