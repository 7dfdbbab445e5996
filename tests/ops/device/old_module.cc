// A device module of another release. It must not be asked for anything but its version.
#include <cstdlib>

#include "ops/device/device_runtime.h"

namespace {

hvd::DeviceRuntime* must_not_be_called(std::string*) { std::abort(); }
constexpr hvd::DeviceModule kModule{hvd::kDeviceModuleVersion + 1, &must_not_be_called};

}  // namespace

extern "C" __attribute__((visibility("default"))) const hvd::DeviceModule* hvd_device_module() { return &kModule; }
