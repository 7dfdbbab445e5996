// The module libhvd_cuda.so: says whether CUDA can be used here, and gives the one CudaRuntime of the process.
// Opened by the loader; any thread.
#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <memory>

#include "common/env_options.h"
#include "ops/device/cuda/cuda_runtime.h"
#include "ops/device/device_runtime.h"

namespace hvd::cuda {
namespace {

std::string version_text(int version) { return fmt::format("{}.{}", version / 1000, version % 1000 / 10); }

std::string visible_devices() {
  const auto devices = environment("CUDA_VISIBLE_DEVICES");
  return devices ? fmt::format("CUDA_VISIBLE_DEVICES={}", *devices) : "CUDA_VISIBLE_DEVICES is not set";
}

std::unique_ptr<CudaRuntime> make_runtime(std::string* why_not) {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
    *why_not = "no CUDA driver (libcuda.so.1 of the NVIDIA driver is not on this machine)";
    return nullptr;
  }
  int runtime = CUDART_VERSION;
  (void)cudaRuntimeGetVersion(&runtime);
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess) (void)cudaGetLastError();
  if (error == cudaErrorInsufficientDriver) {
    *why_not = fmt::format(
        "the CUDA driver is too old: it is for CUDA {}, the module was built with CUDA {}; update the driver, or build "
        "with an older CUDA toolkit",
        version_text(driver), version_text(runtime));
    return nullptr;
  }
  if (error == cudaErrorNoDevice || (error == cudaSuccess && devices == 0)) {
    *why_not = fmt::format("no CUDA device is visible ({})", visible_devices());
    return nullptr;
  }
  if (error != cudaSuccess) {
    *why_not = fmt::format("cudaGetDeviceCount failed: {} ({}); CUDA driver {}, {}", cudaGetErrorName(error),
                           cudaGetErrorString(error), version_text(driver), visible_devices());
    return nullptr;
  }
  DriverCalls calls;
  if (!DriverCalls::find(&calls, why_not)) return nullptr;
  return std::make_unique<CudaRuntime>(calls, devices,
                                       fmt::format("CUDA {}, driver {}", version_text(runtime), version_text(driver)));
}

struct Opened {
  std::string why_not;
  CudaRuntime* runtime = make_runtime(&why_not).release();  // for ever: threads may still use it when main has ended
};

DeviceRuntime* open(std::string* why_not) {
  static const Opened opened;
  if (opened.runtime == nullptr) *why_not = opened.why_not;
  return opened.runtime;
}

constexpr DeviceModule kModule{kDeviceModuleVersion, &open};

}  // namespace
}  // namespace hvd::cuda

extern "C" __attribute__((visibility("default"))) const hvd::DeviceModule* hvd_device_module() {
  return &hvd::cuda::kModule;
}
