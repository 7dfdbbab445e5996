// The kernel that copies, converts and scales many pieces in one launch, as the runtime calls it.
// Any thread whose current device is the stream's; nothing here waits for the device.
#pragma once

#include <cuda_runtime_api.h>

#include <span>

#include "ops/device/device_runtime.h"

namespace hvd::cuda {

/// Loads every kernel onto the current device. A kernel that is loaded at its first launch may wait for kernels that
/// run, and those may wait for this one: a collective that is on the device, and on its peers not yet.
cudaError_t load_kernels();

/// cudaErrorInvalidValue for a pair of types that is none of DeviceConversion's, or a piece of more than 30 TB.
/// Addresses are multiples of their element's size, the divisor is at least 1.
cudaError_t launch_convert(const DeviceConversion& conversion, std::span<const DevicePiece> pieces,
                           cudaStream_t stream);

}  // namespace hvd::cuda
