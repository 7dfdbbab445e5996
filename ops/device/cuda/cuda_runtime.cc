#include "ops/device/cuda/cuda_runtime.h"

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <cstdint>
#include <utility>

#include "ops/device/cuda/convert_kernels.h"
#include "ops/device/cuda/cuda_error.h"

namespace hvd::cuda {
namespace {

cudaStream_t as_stream(DeviceStream stream) { return static_cast<cudaStream_t>(stream); }
cudaEvent_t as_event(DeviceEvent event) { return static_cast<cudaEvent_t>(event); }

// What is given back may fail only because of an error that came before, which its own call reports.
void forget(cudaError_t error) {
  if (error != cudaSuccess) (void)cudaGetLastError();
}

Status no_memory(const Status& status, std::size_t bytes) {
  return Status::internal(fmt::format("{}; {} bytes were asked for", status.text(), bytes));
}

bool is_multiple(const void* address, std::size_t bytes) {
  return reinterpret_cast<std::uintptr_t>(address) % bytes == 0;
}

// The kernel's accesses would stop the device for good where an address is odd.
Status check_pieces(const DeviceConversion& conversion, std::span<const DevicePiece> pieces) {
  const std::size_t from_bytes = size_of(conversion.from_type);
  const std::size_t to_bytes = size_of(conversion.to_type);
  if (from_bytes == 0 || to_bytes == 0 || conversion.divisor < 1) {
    return Status::invalid_argument(fmt::format("no conversion from type {} to type {} with divisor {}",
                                                static_cast<int>(conversion.from_type),
                                                static_cast<int>(conversion.to_type), conversion.divisor));
  }
  for (const DevicePiece& piece : pieces) {
    if (is_multiple(piece.from, from_bytes) && is_multiple(piece.to, to_bytes)) continue;
    return Status::invalid_argument(fmt::format(
        "device memory at {} (read as {}) or {} (written as {}) does not begin at a multiple of its element's size",
        piece.from, name_of(conversion.from_type), piece.to, name_of(conversion.to_type)));
  }
  return {};
}

}  // namespace

CudaRuntime::CudaRuntime(const DriverCalls& driver, int devices, std::string description)
    : description_(std::move(description)), contexts_(driver, devices) {}

// -1 stands for "none": a thread that had no device is given back without one, see DriverCalls.
Result<int> CudaRuntime::exchange_current(int device) {
  const DriverCalls& driver = contexts_.driver();
  void* context = nullptr;
  if (device != -1) {
    Result<void*> found = contexts_.of(device);
    if (!found) return found.status();
    context = *found;
  }
  void* before = nullptr;
  int device_before = -1;
  HVD_RETURN_IF_ERROR(checked(static_cast<cudaError_t>(driver.get_context(&before)), "cuCtxGetCurrent", device));
  if (before != nullptr) HVD_RETURN_IF_ERROR(checked(cudaGetDevice(&device_before), "cudaGetDevice", device));
  if (before != context) {
    HVD_RETURN_IF_ERROR(checked(static_cast<cudaError_t>(driver.set_context(context)), "cuCtxSetCurrent", device));
  }
  return device_before;
}

// ---- Streams ----

Result<DeviceStream> CudaRuntime::create_stream(int device) {
  const DeviceScope scope(contexts_, device);
  HVD_RETURN_IF_ERROR(scope.status());
  int lowest = 0;
  int highest = 0;
  HVD_RETURN_IF_ERROR(
      checked(cudaDeviceGetStreamPriorityRange(&lowest, &highest), "cudaDeviceGetStreamPriorityRange", device));
  cudaStream_t stream = nullptr;
  HVD_RETURN_IF_ERROR(checked(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, highest),
                              "cudaStreamCreateWithPriority", device));
  return DeviceStream{stream};
}

void CudaRuntime::destroy_stream(int device, DeviceStream stream) {
  const DeviceScope scope(contexts_, device);
  if (scope.status().ok() && stream != nullptr) forget(cudaStreamDestroy(as_stream(stream)));
}

Result<bool> CudaRuntime::is_capturing(int device, DeviceStream stream) {
  const DeviceScope scope(contexts_, device);
  HVD_RETURN_IF_ERROR(scope.status());
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  const cudaError_t asked = cudaStreamIsCapturing(as_stream(stream), &capture);
  const Status status = checked(asked, "cudaStreamIsCapturing", device);
  if (asked == cudaErrorStreamCaptureImplicit) return Status::precondition(status.text());
  HVD_RETURN_IF_ERROR(status);
  return capture != cudaStreamCaptureStatusNone;
}

// ---- Events ----

Result<DeviceEvent> CudaRuntime::create_event(int device) {
  const DeviceScope scope(contexts_, device);
  HVD_RETURN_IF_ERROR(scope.status());
  cudaEvent_t event = nullptr;
  HVD_RETURN_IF_ERROR(
      checked(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreateWithFlags", device));
  return DeviceEvent{event};
}

void CudaRuntime::destroy_event(int device, DeviceEvent event) {
  const DeviceScope scope(contexts_, device);
  if (scope.status().ok() && event != nullptr) forget(cudaEventDestroy(as_event(event)));
}

Status CudaRuntime::record(int device, DeviceEvent event, DeviceStream stream) {
  const DeviceScope scope(contexts_, device);
  HVD_RETURN_IF_ERROR(scope.status());
  return checked(cudaEventRecord(as_event(event), as_stream(stream)), "cudaEventRecord", device);
}

Status CudaRuntime::wait(int device, DeviceStream stream, DeviceEvent event) {
  const DeviceScope scope(contexts_, device);
  HVD_RETURN_IF_ERROR(scope.status());
  return checked(cudaStreamWaitEvent(as_stream(stream), as_event(event), cudaEventWaitDefault), "cudaStreamWaitEvent",
                 device);
}

Result<bool> CudaRuntime::query(int device, DeviceEvent event) {
  const DeviceScope scope(contexts_, device);
  HVD_RETURN_IF_ERROR(scope.status());
  const cudaError_t error = cudaEventQuery(as_event(event));
  if (error == cudaErrorNotReady) {
    forget(error);
    return false;
  }
  HVD_RETURN_IF_ERROR(checked(error, "cudaEventQuery", device));
  return true;
}

// ---- Memory ----

Result<void*> CudaRuntime::allocate(int device, std::size_t bytes) {
  const DeviceScope scope(contexts_, device);
  HVD_RETURN_IF_ERROR(scope.status());
  void* memory = nullptr;
  const Status status = checked(cudaMalloc(&memory, bytes), "cudaMalloc", device);
  return status.ok() ? Result<void*>(memory) : no_memory(status, bytes);
}

void CudaRuntime::free(int device, void* memory) {
  const DeviceScope scope(contexts_, device);
  if (scope.status().ok()) forget(cudaFree(memory));
}

Result<void*> CudaRuntime::allocate_pinned(std::size_t bytes) {
  const int device = contexts_.any_device();
  const DeviceScope scope(contexts_, device);
  HVD_RETURN_IF_ERROR(scope.status());
  void* memory = nullptr;
  const Status status = checked(cudaHostAlloc(&memory, bytes, cudaHostAllocPortable), "cudaHostAlloc", device);
  return status.ok() ? Result<void*>(memory) : no_memory(status, bytes);
}

void CudaRuntime::free_pinned(void* memory) {
  const DeviceScope scope(contexts_, contexts_.any_device());
  if (scope.status().ok()) forget(cudaFreeHost(memory));
}

Result<int> CudaRuntime::device_of(const void* memory) {
  const int device = contexts_.any_device();
  const DeviceScope scope(contexts_, device);
  HVD_RETURN_IF_ERROR(scope.status());
  cudaPointerAttributes found{};
  HVD_RETURN_IF_ERROR(checked(cudaPointerGetAttributes(&found, memory), "cudaPointerGetAttributes", device));
  if (found.type == cudaMemoryTypeDevice || found.type == cudaMemoryTypeManaged) return found.device;
  return Status::invalid_argument(fmt::format("the memory at {} is not that of a CUDA device", memory));
}

// ---- Work ----

Status CudaRuntime::copy(int device, void* to, const void* from, std::size_t bytes, DeviceStream stream) {
  const DeviceScope scope(contexts_, device);
  HVD_RETURN_IF_ERROR(scope.status());
  return checked(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, as_stream(stream)), "cudaMemcpyAsync", device);
}

Status CudaRuntime::convert(int device, const DeviceConversion& conversion, std::span<const DevicePiece> pieces,
                            DeviceStream stream) {
  HVD_RETURN_IF_ERROR(check_pieces(conversion, pieces));
  const DeviceScope scope(contexts_, device);
  HVD_RETURN_IF_ERROR(scope.status());
  return checked(launch_convert(conversion, pieces, as_stream(stream)), "cudaLaunchKernel", device);
}

}  // namespace hvd::cuda
