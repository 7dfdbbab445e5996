// What the engine asks of an accelerator: streams, events, memory, and one kernel that copies, converts and scales many
// pieces in one launch. The CUDA module implements it; tests have one on host memory. No function waits for the device.
//
// Any thread may call; each function works on the device that it names and leaves the calling thread's current device,
// and its way with graph capture, as it found them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include <horovod_cpp/data_type.h>
#include <horovod_cpp/status.h>

namespace hvd {

/// A cudaStream_t, ours or a framework's; nullptr is the legacy default stream.
using DeviceStream = void*;
/// A cudaEvent_t without timing.
using DeviceEvent = void*;

/// Elements that one launch handles together with others.
struct DevicePiece {
  const void* from = nullptr;  ///< nullptr: each element becomes DeviceConversion::fill
  void* to = nullptr;          ///< may be `from` where both types have one size; otherwise no overlap
  std::size_t count = 0;       ///< elements
};

/// What happens to each element: converted to `to_type` after from * factor / divisor.
/// Factor and divisor mean what `scale` and `divide` of ops/reduce/reducer.h say, bit for bit, in this order; where
/// both are 1 and the types are equal, bytes are copied. Types differ only as int16 to int32 and back (truncating), and
/// then both are 1.
struct DeviceConversion {
  DataType from_type = DataType::kUint8;
  DataType to_type = DataType::kUint8;
  double factor = 1.0;
  int divisor = 1;
  std::uint64_t fill = 0;  ///< the bits of one element of `to_type`, in its first bytes
};

class DeviceRuntime {
 public:
  virtual ~DeviceRuntime() = default;

  /// For people: "CUDA 13.0, driver 13.0".
  virtual std::string description() const = 0;
  virtual int device_count() const = 0;
  /// Makes `device` the calling thread's current device and returns the one before: for libraries that look at it.
  /// -1 is "none", which a thread has before it first uses a device; it can be given back like a device.
  virtual Result<int> exchange_current(int device) = 0;

  /// A stream that does not wait for the default stream, of the highest priority.
  virtual Result<DeviceStream> create_stream(int device) = 0;
  virtual void destroy_stream(int device, DeviceStream stream) = 0;
  /// Whether what is put on the stream becomes a part of a graph. kPrecondition while nothing may be put on it, as it
  /// would wait for a stream that is being captured (the legacy default stream).
  virtual Result<bool> is_capturing(int device, DeviceStream stream) = 0;

  virtual Result<DeviceEvent> create_event(int device) = 0;
  virtual void destroy_event(int device, DeviceEvent event) = 0;
  /// From now on the event stands for all that the stream has been given so far.
  virtual Status record(int device, DeviceEvent event, DeviceStream stream) = 0;
  /// What the stream is given from now on begins after the event.
  virtual Status wait(int device, DeviceStream stream, DeviceEvent event) = 0;
  /// Whether all that the event stands for is done. An error is one of the device.
  virtual Result<bool> query(int device, DeviceEvent event) = 0;

  /// Aligned to 256 bytes. kInternal, with the bytes asked for, when there is no memory.
  virtual Result<void*> allocate(int device, std::size_t bytes) = 0;
  /// May wait for the device.
  virtual void free(int device, void* memory) = 0;
  /// Host memory that the device copies from and to without a stop.
  virtual Result<void*> allocate_pinned(std::size_t bytes) = 0;
  virtual void free_pinned(void* memory) = 0;
  /// The device whose memory lies at that address, managed memory included. kInvalidArgument for other memory.
  virtual Result<int> device_of(const void* memory) = 0;

  /// In the order of the stream, between device memory and pinned memory or within device memory.
  virtual Status copy(int device, void* to, const void* from, std::size_t bytes, DeviceStream stream) = 0;
  /// Converts all pieces in as few launches as their number allows.
  virtual Status convert(int device, const DeviceConversion& conversion, std::span<const DevicePiece> pieces,
                         DeviceStream stream) = 0;
};

/// Of an answer of is_capturing: whether an event cannot be recorded there now that tells when work is done.
inline bool is_closed_by_capture(const Result<bool>& capturing) {
  return capturing ? capturing.value() : capturing.status().code() == StatusCode::kPrecondition;
}

/// What a device module exports under kDeviceModuleSymbol. `version` is compared; `open` gives the runtime, which lives
/// as long as the process, or fills in why there is none ("no CUDA driver", "no device").
struct DeviceModule {
  std::uint32_t version = 0;
  DeviceRuntime* (*open)(std::string* why_not) = nullptr;
};
using DeviceModuleFunction = const DeviceModule*();
inline constexpr std::uint32_t kDeviceModuleVersion = 2;
inline constexpr const char* kDeviceModuleSymbol = "hvd_device_module";

}  // namespace hvd
