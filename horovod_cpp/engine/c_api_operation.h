// What a caller of the C ABI asks for, checked and put into the engine's terms. Any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include <horovod_cpp/c_api.h>
#include <horovod_cpp/status.h>

#include "horovod_cpp/engine/request_response.h"
#include "horovod_cpp/engine/tensor_queue.h"

namespace hvd::c_api {

/// What the caller knows of the outputs of one operation: memory that it gave for them, and which are complex.
struct CallerOutputs {
  struct Tensor {
    std::byte* data = nullptr;
    std::size_t bytes = 0;
    std::size_t first_dimension = 0;  ///< in `dimensions`
    std::size_t dimension_count = 0;
  };
  std::vector<Tensor> tensors;
  std::vector<std::int64_t> dimensions;  ///< of all tensors
  std::vector<bool> is_complex;          ///< of each output, also of those made by the engine; empty: none is

  std::span<const std::int64_t> shape(std::size_t index) const {
    return std::span(dimensions).subspan(tensors[index].first_dimension, tensors[index].dimension_count);
  }
  /// Keeps what it has allocated.
  void clear() {
    tensors.clear();
    dimensions.clear();
    is_complex.clear();
  }
};

/// Fills a blank `request`. kInvalidArgument for what no rank could run, whatever the others ask for.
Status read_request(const hvd_operation& operation, Request& request);

/// Once the request of `entry` was read: where its tensors lie, and the device that they are on.
void take_memory(const hvd_operation& operation, TensorEntry& entry, CallerOutputs& outputs);

}  // namespace hvd::c_api
