"""The stream that a device is given work on at the moment, as an address."""

from __future__ import annotations

from collections.abc import Callable

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
