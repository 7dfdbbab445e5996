"""The streams that devices are given work on, as addresses, and the order between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

# What torch.cuda.current_stream() asks, without an object for each answer; a build without CUDA lacks it.
_raw: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)

HOST = -1
"""The number of the device that is none."""


Place = tuple[int, int]
"""A device and its stream that makes the inputs of an operation."""

ON_HOST: Place = (HOST, 0)


def place_of(tensor: torch.Tensor) -> Place:
    """Where an operation on `tensor`, called now, finds its input."""
    if not tensor.is_cuda:
        return ON_HOST
    device = tensor.get_device()
    return device, current_stream(device)


def device_of(tensor: torch.Tensor) -> int:
    """The number of the CUDA device that `tensor` lies on; HOST for host memory."""
    return tensor.get_device() if tensor.is_cuda else HOST


def current_stream(device: int) -> int:
    """The current stream of a CUDA device (a cudaStream_t); 0 for the host and for the default stream."""
    if device == HOST:
        return 0
    return _raw(device) if _raw is not None else int(torch.cuda.current_stream(device).cuda_stream)


def hand_over(producers: Iterable[Place], tensors: Iterable[torch.Tensor] = ()) -> None:
    """Let the current stream use what `producers` have made: it waits for those that are other streams.

    `tensors`: of those whose memory they may have allocated; it would be given out again in their order.
    """
    for device, stream in producers:
        if stream == current_stream(device):
            continue
        here = torch.cuda.current_stream(device)
        here.wait_stream(_stream_at(device, stream))
        for tensor in tensors:
            tensor.record_stream(here)


def _stream_at(device: int, address: int) -> torch.cuda.Stream:
    # Address 0 would make ExternalStream take a stream of torch's pool.
    if address == 0:
        return torch.cuda.default_stream(device)
    return torch.cuda.ExternalStream(address, device)  # type: ignore[no-untyped-call]
