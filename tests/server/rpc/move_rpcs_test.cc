#include "tests/server/rpc/server_fixture.h"

namespace modelstate {
namespace {

using testing::HasSubstr;

// A server with two pools of host memory.
class MoveRpcsTest : public ServerTest {
 protected:
  MoveRpcsTest() { options_.device = "cpu,cpu:1"; }

  uint64_t Used(const std::string& device) {
    const v1::GetServerInfoResponse info = Info();
    for (const v1::DeviceInfo& entry : info.devices()) {
      if (entry.name() == device) return entry.memory_used_bytes();
    }
    ADD_FAILURE() << "no device " << device;
    return 0;
  }
};

TEST_F(MoveRpcsTest, ServerInfoListsEveryDevice) {
  const v1::GetServerInfoResponse info = Info();
  ASSERT_EQ(info.devices_size(), 2);
  EXPECT_EQ(info.devices(0).name(), "cpu");
  EXPECT_EQ(info.devices(1).name(), "cpu:1");
  EXPECT_EQ(info.devices(1).memory_limit_bytes(), uint64_t{1} << 30);
}

TEST_F(MoveRpcsTest, CreateModuleChoosesTheDevice) {
  EXPECT_EQ(CreateTiny("first").device(), "cpu");
  v1::CreateModuleRequest request;
  request.set_name("second");
  request.set_device("cpu:1");
  *request.mutable_spec()->add_tensors() = Tensor("weight", v1::PARAMETER, {1024});
  const uint64_t before = Used("cpu");
  auto module = Call(&v1::ModelState::Stub::CreateModule, request);
  ASSERT_TRUE(module.ok()) << module.status();
  EXPECT_EQ(module->device(), "cpu:1");
  EXPECT_EQ(Used("cpu:1"), 4096u);
  EXPECT_EQ(Used("cpu"), before);

  request.set_name("third");
  request.set_device("cpu:2");
  const auto unknown = Call(&v1::ModelState::Stub::CreateModule, request);
  EXPECT_THAT(unknown, FailsWith(Reason::kInvalidField));
  EXPECT_THAT(std::string(unknown.status().message()), HasSubstr("\"cpu\", \"cpu:1\""));
}

}  // namespace
}  // namespace modelstate
