// How failures of CUDA become statuses. Any thread; the runtime keeps the last error for each thread apart.
#pragma once

#include <cuda_runtime_api.h>

#include <string_view>

#include <horovod_cpp/status.h>

namespace hvd::cuda {

/// Ok, or kInternal with the call, the device, and CUDA's name and words for the error. A failure is also taken out of
/// CUDA's own memory of the last error, so that nobody finds it after another call.
Status checked(cudaError_t error, std::string_view call, int device);

}  // namespace hvd::cuda
