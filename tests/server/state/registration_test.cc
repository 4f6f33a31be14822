#include "server/state/registration.h"

#include <gmock/gmock.h>

#include <algorithm>
#include <list>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace modelstate {
namespace {

using ::testing::HasSubstr;
using Names = std::vector<std::pair<std::string, TensorKind>>;

constexpr TensorKind kParameter = TensorKind::kParameter;
constexpr TensorKind kBuffer = TensorKind::kBuffer;

absl::Status Register(const Names& names) {
  Registrar registrar;
  for (const auto& [name, kind] : names) {
    if (absl::Status status = registrar.AddName(name, kind); !status.ok()) return status;
  }
  return absl::OkStatus();
}

TEST(Registrar, TakesWhatAModuleCanHave) {
  const absl::Status status = Register({{"weight", kParameter},
                                        {"layer1.0.conv1.weight", kParameter},
                                        {"layer1.0.bn1.weight", kParameter},
                                        {"layer1.0.bn1.running_mean", kBuffer},
                                        {"layer1.0.scale", kParameter},
                                        {"layer10.weight", kParameter},
                                        {"näme mit Raum", kBuffer}});
  EXPECT_TRUE(status.ok()) << status;
}

TEST(Registrar, RefusesLongNamesBeforeItLooksIntoThem) {
  std::string dotted;
  for (int i = 0; i < 200000; ++i) dotted += "a.";
  const absl::Status status = Register({{dotted + "w", kParameter}});
  EXPECT_EQ(GetReason(status), Reason::kInvalidField);
  EXPECT_THAT(status.message(), HasSubstr("400001 bytes"));
  EXPECT_TRUE(Register({{std::string(kMaxTensorNameBytes, 'a'), kParameter}}).ok());
}

TEST(Registrar, RefusesInTorchsWords) {
  struct Case {
    Names names;
    std::string torch;
    std::string hint;
  };
  const Case cases[] = {
      {{{"", kParameter}}, "parameter name can't be empty string \"\"", "give it a name"},
      {{{"", kBuffer}}, "buffer name can't be empty string \"\"", "give it a name"},
      {{{"conv.", kParameter}}, "parameter name can't be empty string \"\"", "\"conv.\""},
      {{{"conv.", kBuffer}}, "buffer name can't be empty string \"\"", "\"conv.\""},
      {{{".weight", kParameter}}, "module name can't be empty string \"\"", "\".weight\""},
      {{{"a..weight", kBuffer}}, "module name can't be empty string \"\"", "\"a..weight\""},
      {{{"x", kParameter}, {"x", kParameter}}, "attribute 'x' already exists", "alias_of"},
      {{{"a.x", kParameter}, {"a.x", kBuffer}}, "attribute 'x' already exists", "\"a.x\""},
      {{{"conv", kParameter}, {"conv.weight", kParameter}},
       "attribute 'conv' already exists",
       "\"conv\" is a tensor"},
      {{{"m.conv.weight", kParameter}, {"m.conv", kBuffer}},
       "attribute 'conv' already exists",
       "\"m.conv.weight\" makes it a module"},
      {{{"m.conv.a.b", kParameter}, {"m.conv", kBuffer}},
       "attribute 'conv' already exists",
       "makes it a module"},
      {{{"m.n", kParameter}, {"m.n.conv.weight", kBuffer}},
       "attribute 'n' already exists",
       "\"m.n\" is a tensor"},
  };
  for (const Case& c : cases) {
    const absl::Status status = Register(c.names);
    SCOPED_TRACE(status.ToString());
    EXPECT_EQ(GetReason(status), Reason::kInvalidField);
    EXPECT_THAT(std::string(status.message()), HasSubstr(c.torch));
    EXPECT_THAT(std::string(status.message()), HasSubstr(c.hint));
    EXPECT_EQ(GetErrorMetadata(status)["tensor"], c.names.back().first);
  }
}

// Against the rule itself: no name twice, and none that another is in.
TEST(Registrar, FindsEveryConflictInAnyOrder) {
  std::mt19937 random(11);
  for (int round = 0; round < 300; ++round) {
    SCOPED_TRACE(round);
    Registrar registrar;
    std::list<std::string> taken;  // names are borrowed
    for (int i = 0; i < 20; ++i) {
      std::string name;
      for (uint32_t parts = 1 + random() % 3; parts > 0; --parts) {
        absl::StrAppend(&name, name.empty() ? "" : ".", random() % 2 ? "a" : "a-", random() % 3);
      }
      const bool conflict = std::any_of(taken.begin(), taken.end(), [&](const std::string& other) {
        return other == name || absl::StartsWith(other, name + ".") ||
               absl::StartsWith(name, other + ".");
      });
      taken.push_back(name);
      EXPECT_EQ(registrar.AddName(taken.back(), kParameter).ok(), !conflict) << name;
      if (conflict) taken.pop_back();
    }
  }
}

TEST(Registrar, RefusalsStayReadable) {
  const std::string deep = std::string(1000, 'x');
  const absl::Status status = Register({{deep, kParameter}, {deep + ".weight", kParameter}});
  EXPECT_EQ(GetReason(status), Reason::kInvalidField);
  EXPECT_LT(status.message().size(), 500u);
}

TEST(CheckRequiresGrad, IntegerParametersMustBeFrozen) {
  TensorSpec spec;
  spec.name = "ids";
  for (DType dtype : kAllDTypes) {
    SCOPED_TRACE(DTypeName(dtype));
    spec.dtype = dtype;
    spec.kind = kParameter;
    spec.requires_grad = true;
    const absl::Status status = CheckRequiresGrad(spec);
    EXPECT_EQ(status.ok(), CanRequireGrad(dtype));
    if (!status.ok()) {
      EXPECT_EQ(GetReason(status), Reason::kInvalidField);
      EXPECT_THAT(
          std::string(status.message()),
          HasSubstr("Only Tensors of floating point and complex dtype can require gradients"));
      EXPECT_THAT(std::string(status.message()), HasSubstr("\"ids\""));
    }
    spec.requires_grad = false;
    EXPECT_TRUE(CheckRequiresGrad(spec).ok());
    spec.requires_grad = true;
    spec.kind = kBuffer;
    EXPECT_TRUE(CheckRequiresGrad(spec).ok());
  }
}

TEST(CheckMetadata, BoundsEntriesAndBytes) {
  ModuleMetadata metadata;
  for (size_t i = 0; i < kMaxMetadataEntries; ++i) metadata.emplace(absl::StrCat(i), "v");
  EXPECT_TRUE(CheckMetadata(metadata).ok());
  metadata["one more"] = "";
  EXPECT_EQ(GetReason(CheckMetadata(metadata)), Reason::kInvalidField);
  metadata = {{"key", std::string(kMaxMetadataBytes - 3, 'v')}};
  EXPECT_TRUE(CheckMetadata(metadata).ok());
  metadata["k"] = "";
  const absl::Status status = CheckMetadata(metadata);
  EXPECT_EQ(GetReason(status), Reason::kInvalidField);
  EXPECT_THAT(std::string(status.message()), HasSubstr("262145 bytes; at most 262144"));
}

}  // namespace
}  // namespace modelstate
