#include "ops/device/cuda/device_scope.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <fmt/format.h>

#include "ops/device/cuda/convert_kernels.h"
#include "ops/device/cuda/cuda_error.h"

namespace hvd::cuda {
namespace {

constexpr const char* kDriver = "libcuda.so.1";  // by this name the static runtime has opened it

template <class Function>
bool find_call(void* library, const char* name, Function** call, std::string* why_not) {
  *call = reinterpret_cast<Function*>(dlsym(library, name));
  if (*call == nullptr) *why_not = fmt::format("the CUDA driver ({}) has no {}", kDriver, name);
  return *call != nullptr;
}

Status checked_driver(int error, const char* call, int device) {
  // The runtime's numbers are the driver's since CUDA 10.1, so it can name them.
  return checked(static_cast<cudaError_t>(error), call, device);
}

}  // namespace

bool DriverCalls::find(DriverCalls* calls, std::string* why_not) {
  void* library = dlopen(kDriver, RTLD_NOW);
  if (library == nullptr) {
    *why_not = fmt::format("the CUDA driver cannot be opened: {}", dlerror());
    return false;
  }
  return find_call(library, "cuCtxGetCurrent", &calls->get_context, why_not) &&
         find_call(library, "cuCtxSetCurrent", &calls->set_context, why_not) &&
         find_call(library, "cuThreadExchangeStreamCaptureMode", &calls->exchange_capture_mode, why_not);
}

// ---- Contexts ----

Contexts::Contexts(const DriverCalls& driver, int devices)
    : driver_(driver), contexts_(static_cast<std::size_t>(devices)) {}

Result<void*> Contexts::of(int device) {
  if (device < 0 || device >= devices()) {
    return Status::invalid_argument(
        fmt::format("there is no CUDA device {}; this process sees {} (CUDA_VISIBLE_DEVICES)", device, devices()));
  }
  // acquire: pairs with the release below
  void* context = contexts_[static_cast<std::size_t>(device)].load(std::memory_order_acquire);
  return context != nullptr ? Result<void*>(context) : make(device);
}

int Contexts::any_device() const {
  for (std::size_t device = 0; device < contexts_.size(); ++device) {
    if (contexts_[device].load(std::memory_order_acquire) != nullptr) return static_cast<int>(device);
  }
  return 0;
}

Result<void*> Contexts::make(int device) {
  const std::scoped_lock lock(making_);
  if (void* made = contexts_[static_cast<std::size_t>(device)].load()) return made;
  const RelaxedCapture relaxed(driver_);
  void* before = nullptr;
  HVD_RETURN_IF_ERROR(checked_driver(driver_.get_context(&before), "cuCtxGetCurrent", device));
  void* made = nullptr;
  Status status = checked(cudaSetDevice(device), "cudaSetDevice", device);
  if (status.ok()) status = checked(load_kernels(), "cudaFuncGetAttributes", device);
  if (status.ok()) status = checked_driver(driver_.get_context(&made), "cuCtxGetCurrent", device);
  const int restored = driver_.set_context(before);
  HVD_RETURN_IF_ERROR(status);
  HVD_RETURN_IF_ERROR(checked_driver(restored, "cuCtxSetCurrent", device));
  // release: whoever finds it finds the kernels loaded
  contexts_[static_cast<std::size_t>(device)].store(made, std::memory_order_release);
  return made;
}

// ---- Scopes ----

RelaxedCapture::RelaxedCapture(const DriverCalls& driver) : driver_(driver), mode_(cudaStreamCaptureModeRelaxed) {
  driver_.exchange_capture_mode(&mode_);
}

RelaxedCapture::~RelaxedCapture() { driver_.exchange_capture_mode(&mode_); }

DeviceScope::DeviceScope(Contexts& contexts, int device) : driver_(contexts.driver()), relaxed_(driver_) {
  const Result<void*> context = contexts.of(device);
  status_ = context.status();
  if (status_.ok()) status_ = checked_driver(driver_.get_context(&before_), "cuCtxGetCurrent", device);
  if (!status_.ok() || before_ == context.value()) return;
  status_ = checked_driver(driver_.set_context(context.value()), "cuCtxSetCurrent", device);
  changed_ = status_.ok();
}

DeviceScope::~DeviceScope() {
  if (changed_) driver_.set_context(before_);
}

}  // namespace hvd::cuda
