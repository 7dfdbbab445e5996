#include "torch/streams.h"

#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <source_location>

#include <horovod_cpp/error.h>

namespace hvd::torch::detail {
namespace {

c10::Stream current_stream(at::Device device) { return c10::impl::VirtualGuardImpl(device.type()).getStream(device); }

// Streams of LibTorch before 2.13 do not tell.
template <typename Stream>
void* native(const Stream& stream) {
  if constexpr (requires { stream.native_handle(); }) {
    return stream.native_handle();
  } else {
    throw Unavailable(StatusCode::kUnavailable, hvd::detail::rank_or_none(), "CUDA tensor",
                      "this version of LibTorch does not tell its CUDA streams; 2.13 does");
  }
}

}  // namespace

void* native_stream(at::Device device) { return device.is_cuda() ? native(current_stream(device)) : nullptr; }

void let_stream_wait(std::span<hvd_handle* const> handles, at::Device device) {
  if (!device.is_cuda() || handles.empty()) return;
  const auto count = static_cast<std::int32_t>(handles.size());
  hvd::detail::check(hvd_handles_stream_wait(handles.data(), count, native_stream(device)), "stream wait",
                     std::source_location::current());
}

void claim(const at::Tensor& tensor) {
  if (tensor.is_cuda()) tensor.record_stream(current_stream(tensor.device()));
}

void Producers::add(const at::Tensor& part) {
  if (!part.is_cuda()) return;
  const c10::Stream stream = current_stream(part.device());
  if (std::find(streams_.begin(), streams_.end(), stream) == streams_.end()) streams_.push_back(stream);
}

void Producers::hand_over(std::span<const at::Tensor> parts) const {
  for (const c10::Stream& stream : streams_) {
    const c10::Stream here = current_stream(stream.device());
    if (stream == here) continue;
    c10::Event written(stream.device_type());
    written.record(stream);
    written.block(here);
    for (const at::Tensor& part : parts) claim(part);
  }
}

}  // namespace hvd::torch::detail
