"""Every collective operation in one form, for what holds for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import horovod_cpp.torch as hvd

# Each takes a tensor and name=, process_set=, and returns a handle. The tensor's rows can be dealt out to all ranks.
ASYNC: dict[str, Callable[..., int]] = {
    "allreduce": hvd.allreduce_async,
    "allreduce_": hvd.allreduce_async_,
    "allgather": hvd.allgather_async,
    "broadcast": lambda tensor, **options: hvd.broadcast_async(tensor, 0, **options),
    "broadcast_": lambda tensor, **options: hvd.broadcast_async_(tensor, 0, **options),
    "alltoall": hvd.alltoall_async,
    "reducescatter": hvd.reducescatter_async,
    "grouped_allreduce": lambda tensor, **options: hvd.grouped_allreduce_async([tensor, tensor.clone()], **options),
    "grouped_allreduce_": lambda tensor, **options: hvd.grouped_allreduce_async_([tensor, tensor.clone()], **options),
    "grouped_allgather": lambda tensor, **options: hvd.grouped_allgather_async([tensor, tensor.clone()], **options),
    "grouped_reducescatter": lambda tensor, **options: hvd.grouped_reducescatter_async(
        [tensor, tensor.clone()], **options
    ),
}

# Those that reduce, and so take op=, prescale_factor= and postscale_factor=, too.
REDUCING = [name for name in ASYNC if "reduce" in name]


def equal_rows(*columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Ones: two rows for each rank."""
    return torch.ones(2 * hvd.size(), *columns, dtype=dtype)


def run(operation: str, tensor: torch.Tensor, **options: Any) -> Any:
    """Start the operation and wait for its end."""
    return hvd.synchronize(ASYNC[operation](tensor, **options))
