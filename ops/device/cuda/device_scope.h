// Makes a device current for the calling thread and gives the thread back as it was.
// Any thread.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include <horovod_cpp/status.h>

namespace hvd::cuda {

/// Calls of the driver that the runtime API has no equal for. cudaSetDevice cannot give a thread back that had no
/// device yet: it would make a context on device 0, hundreds of megabytes, for every process that shares it. cuda.h is
/// not needed: these have been the same since CUDA 4 and CUDA 10.
struct DriverCalls {
  int (*get_context)(void** context) = nullptr;       ///< cuCtxGetCurrent
  int (*set_context)(void* context) = nullptr;        ///< cuCtxSetCurrent
  int (*exchange_capture_mode)(int* mode) = nullptr;  ///< cuThreadExchangeStreamCaptureMode

  /// From the driver of this process. False: `why_not` says what it lacks.
  static bool find(DriverCalls* calls, std::string* why_not);
};

/// The primary context of each device, made when the device is first used, with all kernels loaded.
class Contexts {
 public:
  Contexts(const DriverCalls& driver, int devices);

  const DriverCalls& driver() const { return driver_; }
  int devices() const { return static_cast<int>(contexts_.size()); }
  /// kInvalidArgument for a device that is not there.
  Result<void*> of(int device);
  /// A device whose context has been made, or 0: for what needs any context.
  int any_device() const;

 private:
  Result<void*> make(int device);

  DriverCalls driver_;
  std::mutex making_;
  std::vector<std::atomic<void*>> contexts_;
};

/// While it lives, calls may also be made that a capture of a graph by another thread forbids otherwise: ours touch
/// none of its streams.
class RelaxedCapture {
 public:
  explicit RelaxedCapture(const DriverCalls& driver);
  ~RelaxedCapture();
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  const DriverCalls& driver_;
  int mode_;
};

/// The device is current, if status() says so, as long as this lives.
class DeviceScope {
 public:
  DeviceScope(Contexts& contexts, int device);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

  const Status& status() const { return status_; }

 private:
  const DriverCalls& driver_;
  RelaxedCapture relaxed_;
  void* before_ = nullptr;
  bool changed_ = false;
  Status status_;
};

}  // namespace hvd::cuda
