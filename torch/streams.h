// The streams that devices are given work on, and the order between them. LibTorch's interface of devices has all that
// is needed, so that this compiles without CUDA, and against any build of LibTorch. Any thread.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Stream.h>

#include <span>
#include <vector>

#include <horovod_cpp/c_api.h>

namespace hvd::torch::detail {

/// The cudaStream_t on which work on `device` is in line now; null for the host.
void* native_stream(at::Device device);

/// Lets the current stream of a device wait for results there; nothing on the host.
void let_stream_wait(std::span<hvd_handle* const> handles, at::Device device);

/// After let_stream_wait(): the current stream uses `tensor`, whose memory may be in the care of another one. It would
/// be given out again in the order of that.
void claim(const at::Tensor& tensor);

/// The streams that made the parts of what travels as one. Not synchronised.
class Producers {
 public:
  /// The current stream of its device has made `part`. Nothing on the host.
  void add(const at::Tensor& part);
  /// Lets the current stream use what they have made: it waits for those that are other streams. `parts`: those whose
  /// memory they may have allocated.
  void hand_over(std::span<const at::Tensor> parts = {}) const;
  void clear() { streams_.clear(); }

 private:
  std::vector<c10::Stream> streams_;  // each once
};

}  // namespace hvd::torch::detail
