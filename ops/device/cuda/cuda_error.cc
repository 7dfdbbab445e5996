#include "ops/device/cuda/cuda_error.h"

#include <fmt/format.h>

namespace hvd::cuda {

Status checked(cudaError_t error, std::string_view call, int device) {
  if (error == cudaSuccess) return {};
  (void)cudaGetLastError();
  return Status::internal(fmt::format("{} failed on CUDA device {}: {} ({})", call, device, cudaGetErrorName(error),
                                      cudaGetErrorString(error)));
}

}  // namespace hvd::cuda
