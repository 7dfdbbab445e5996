#include "ops/device/device_loader.h"

#include <dlfcn.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include "common/module_search.h"

namespace hvd {
namespace {

constexpr const char* kModuleName = "libhvd_cuda.so";
constexpr const char* kWithoutIt = "without it, only tensors in host memory can be used";

Status unavailable(std::string_view text) { return Status::unavailable(fmt::format("{}; {}", text, kWithoutIt)); }

}  // namespace

std::optional<std::string> device_module_file() { return first_existing(module_places(kModuleName)); }

Result<DeviceRuntime*> load_device_runtime() {
  static const Result<DeviceRuntime*> result = open_device_runtime(module_places(kModuleName));
  return result;
}

Result<DeviceRuntime*> open_device_runtime(std::span<const std::string> module_files) {
  const auto file = first_existing(module_files);
  if (!file) {
    return unavailable(fmt::format(
        "this build of horovod_cpp has no CUDA module: looked for [{}]; install a CUDA toolkit (nvcc), or "
        "run `scripts/setup --cuda`, and build again with HVD_WITH_CUDA=ON, or name the module's folder in {}",
        fmt::join(module_files, ", "), kModuleVariable));
  }
  void* module = dlopen(file->c_str(), RTLD_NOW | RTLD_LOCAL);
  if (module == nullptr) return unavailable(fmt::format("the CUDA module cannot be opened: {}", dl_error()));
  auto* function = reinterpret_cast<DeviceModuleFunction*>(dlsym(module, kDeviceModuleSymbol));
  if (function == nullptr) return unavailable(fmt::format("{} is no device module: {}", *file, dl_error()));
  const DeviceModule* description = function();
  if (description->version != kDeviceModuleVersion) {
    return unavailable(fmt::format(
        "{} is of another version of horovod_cpp (module interface {}, expected {}); build or install both together",
        *file, description->version, kDeviceModuleVersion));
  }
  std::string why_not;
  DeviceRuntime* runtime = description->open(&why_not);
  if (runtime == nullptr) return unavailable(fmt::format("{} cannot be used: {}", *file, why_not));
  return runtime;
}

}  // namespace hvd
