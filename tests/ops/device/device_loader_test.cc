// The loader against every way in which a module can be missing or wrong, and against the real one, with or without a
// driver on this machine.
#include "ops/device/device_loader.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

namespace hvd {
namespace {

const std::string kFolder = HVD_TEST_FOLDER;
const std::string kModule = HVD_TEST_MODULE;  // empty: built without CUDA

std::string failure_of(const std::vector<std::string>& files) {
  const Result<DeviceRuntime*> runtime = open_device_runtime(files);
  EXPECT_FALSE(runtime.ok());
  EXPECT_EQ(runtime.status().code(), StatusCode::kUnavailable);
  EXPECT_EQ(runtime.status().text().find('\n'), std::string::npos);
  return runtime.status().text();
}

bool says(const std::string& text, std::string_view part) { return text.find(part) != std::string::npos; }

TEST(DeviceLoader, NamesThePlacesWhereNoModuleIs) {
  const std::string text = failure_of({"/nowhere/libhvd_cuda.so", "/nor/here/libhvd_cuda.so"});
  EXPECT_TRUE(says(text, "/nowhere/libhvd_cuda.so, /nor/here/libhvd_cuda.so")) << text;
  EXPECT_TRUE(says(text, "HVD_WITH_CUDA") && says(text, "HOROVOD_MODULE_PATH")) << text;
  EXPECT_TRUE(says(text, "host memory")) << text;
}

TEST(DeviceLoader, SaysWhyAFileCannotBeOpened) {
  const std::string file = kFolder + "/no_library.so";
  std::ofstream(file) << "text";
  const std::string text = failure_of({"/nowhere/libhvd_cuda.so", file});
  EXPECT_TRUE(says(text, file) && says(text, "cannot be opened")) << text;
}

TEST(DeviceLoader, RefusesALibraryThatIsNoModule) {
  const std::string text = failure_of({kFolder + "/other_module.so"});
  EXPECT_TRUE(says(text, "is no device module") && says(text, kDeviceModuleSymbol)) << text;
}

TEST(DeviceLoader, RefusesAModuleOfAnotherRelease) {
  const std::string text = failure_of({kFolder + "/old_module.so"});
  EXPECT_TRUE(says(text, "of another version")) << text;
}

TEST(DeviceLoader, OpensTheModuleOnAMachineWithAndWithoutADriver) {
  if (kModule.empty()) GTEST_SKIP() << "built without CUDA";
  const Result<DeviceRuntime*> runtime = open_device_runtime(std::vector{kModule});
  if (runtime.ok()) {
    EXPECT_GT(runtime.value()->device_count(), 0);
    EXPECT_TRUE(says(runtime.value()->description(), "CUDA")) << runtime.value()->description();
    return;
  }
  const std::string text = failure_of({kModule});
  EXPECT_TRUE(says(text, kModule) && says(text, "CUDA")) << text;
  if (!std::filesystem::exists("/dev/nvidiactl")) {
    EXPECT_TRUE(says(text, "no CUDA driver") || says(text, "no CUDA device is visible")) << text;
  }
}

TEST(DeviceLoader, GivesEveryThreadTheSame) {
  ASSERT_EQ(setenv("HOROVOD_MODULE_PATH", kFolder.c_str(), /*replace=*/1), 0);  // has no module of that name
  std::vector<std::string> texts(4);
  {
    std::vector<std::jthread> threads;
    for (std::string& text : texts) {
      threads.emplace_back([&text] { text = load_device_runtime().status().text(); });
    }
  }
  ASSERT_EQ(unsetenv("HOROVOD_MODULE_PATH"), 0);
  EXPECT_TRUE(says(texts[0], kFolder + "/libhvd_cuda.so")) << texts[0];
  for (const std::string& text : texts) EXPECT_EQ(text, texts[0]);
  EXPECT_EQ(load_device_runtime().status().text(), texts[0]);
}

}  // namespace
}  // namespace hvd
