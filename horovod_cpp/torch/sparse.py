"""Reductions of sparse tensors: their entries are gathered, and entries of one place add up."""

from __future__ import annotations

from collections.abc import Callable

import torch

from horovod_cpp.common.call_site import CallSite, call_site
from horovod_cpp.common.process_sets import ProcessSet, global_process_set
from horovod_cpp.torch import operations
from horovod_cpp.torch.collectives import Average, Sum
from horovod_cpp.torch.pending import AnyPending, Operation


class PendingSparse:
    """A sparse reduction in flight. `wait` may be called once it is needed, once."""

    __slots__ = ("_divisor", "_indices", "_shape", "_values")

    def __init__(self, indices: AnyPending, values: AnyPending, shape: torch.Size, divisor: int) -> None:
        self._indices = indices
        self._values = values
        self._shape = shape
        self._divisor = divisor

    def parts(self) -> tuple[Operation, ...]:
        """The operations that make it up."""
        return *self._indices.parts(), *self._values.parts()

    def wait(self) -> torch.Tensor:
        """Block until it is done; a COO tensor that is not coalesced. HorovodInternalError if it failed."""
        indices = self._indices.wait().t()
        values = self._values.wait()
        if self._divisor > 1:
            mode = None if values.is_floating_point() else "trunc"
            values = torch.div(values, self._divisor, rounding_mode=mode)
        # Checked: ranks may have had shapes that differ where an allgather does not look.
        return torch.sparse_coo_tensor(indices, values, self._shape, check_invariants=True)


def start_sparse_allreduce(
    tensor: torch.Tensor, name: str, op: int, process_set: ProcessSet, site: CallSite
) -> PendingSparse:
    """Start to gather the entries of a COO tensor. Does not block."""
    if tensor.layout is not torch.sparse_coo:
        raise ValueError(f"sparse allreduce '{name}' takes COO tensors; the layout is {tensor.layout}")
    if op not in (Average, Sum):
        raise ValueError(f"sparse allreduce '{name}': op must be Average or Sum")
    tensor = tensor.detach().coalesce()  # one entry for each place travels
    indices = operations.start_allgather(tensor.indices().t().contiguous(), f"{name}.indices", process_set, site)
    values = operations.start_allgather(tensor.values(), f"{name}.values", process_set, site)
    return PendingSparse(indices, values, tensor.shape, (process_set.size() or 1) if op == Average else 1)


def sparse_allreduce_async(
    tensor: torch.Tensor, name: str, op: int, process_set: ProcessSet = global_process_set
) -> Callable[[], torch.Tensor]:
    """Start a reduction of a sparse tensor over all ranks of the process set. Does not block.

    Args:
        tensor: a COO tensor, of the same shape and dtype on all ranks; it may have other entries on each.
        name: key of the operation, equal on all ranks.
        op: Average or Sum.
    Returns: a function that blocks until the reduction is done and returns the result, a COO tensor that is not
        coalesced.
    Raises: ValueError as `allgather`, for other layouts and for other ops; the function raises HorovodInternalError if
        ranks disagree or one is lost.
    """
    return start_sparse_allreduce(tensor, name, op, process_set, call_site()).wait
