"""Reductions of sparse tensors: their entries are gathered, and entries of one place add up.

What travels is one group of three flat tensors: what ranks have to bring alike, the indices, and
the values. So the library finds nothing to compare, and the ranks compare what their users gave.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from horovod_cpp import _core
from horovod_cpp.common import attributes
from horovod_cpp.common.call_site import CallSite, call_site
from horovod_cpp.common.exceptions import HorovodInternalError
from horovod_cpp.common.process_sets import ProcessSet, global_process_set, registered_ranks, require_id
from horovod_cpp.torch import operations
from horovod_cpp.torch.collectives import Average, Sum
from horovod_cpp.torch.pending import Operation, PendingGroup

_ATTRIBUTES = ("data type", "shape", "number of sparse dimensions", "reduction")


class PendingSparse:
    """A sparse reduction in flight. `wait` may be called once it is needed, once."""

    __slots__ = ("_divisor", "_dtype", "_gathered", "_name", "_ranks", "_shape", "_sparse_dim")

    def __init__(self, gathered: PendingGroup, name: str, tensor: torch.Tensor, ranks: list[int], divisor: int) -> None:
        self._gathered = gathered
        self._name = name
        self._dtype = tensor.dtype
        self._shape = tensor.shape
        self._sparse_dim = tensor.sparse_dim()
        self._ranks = ranks
        self._divisor = divisor

    def parts(self) -> tuple[Operation, ...]:
        """The operations that make it up."""
        return self._gathered.parts()

    def wait(self) -> torch.Tensor:
        """Block until it is done; a COO tensor that is not coalesced. HorovodInternalError if it failed."""
        lines, flat_indices, flat_values = self._gathered.wait()
        # The one time that the host waits for a GPU.
        *line_bytes, is_outside = torch.cat([lines, self._is_outside(flat_indices)]).tolist()
        different = attributes.disagreements(_ATTRIBUTES, bytes(line_bytes), self._ranks)
        if different:
            raise HorovodInternalError(f"sparse allreduce '{self._name}': {different}")
        dense_shape = self._shape[self._sparse_dim :]
        values = flat_values.view(self._dtype)
        entries = values.numel() // max(math.prod(dense_shape), 1)
        if self._sparse_dim > 0:
            entries = flat_indices.numel() // self._sparse_dim
        indices = flat_indices.reshape(entries, self._sparse_dim).t()
        values = self._divided(values.reshape(entries, *dense_shape))
        try:
            # Torch's own check reads from the device; where there is nothing to find it is left out.
            return torch.sparse_coo_tensor(indices, values, self._shape, check_invariants=bool(is_outside))
        except RuntimeError as error:  # all ranks have gathered the same
            raise HorovodInternalError(f"sparse allreduce '{self._name}': a rank has a bad index: {error}") from None

    def _is_outside(self, flat_indices: torch.Tensor) -> torch.Tensor:
        """One byte: whether an index is none of the shape. Ranks may disagree about that, and so about the length."""
        found = flat_indices.new_zeros(1, dtype=torch.uint8)
        for dimension, size in enumerate(self._shape[: self._sparse_dim]):
            column = flat_indices[dimension :: self._sparse_dim]
            found |= ((column < 0) | (column >= size)).any()
        return found

    def _divided(self, values: torch.Tensor) -> torch.Tensor:
        if self._divisor == 1 or self._dtype == torch.bool:  # a sum of bools is "or", and so is their average
            return values
        is_exact = values.is_floating_point() or values.is_complex()
        return torch.div(values, self._divisor, rounding_mode=None if is_exact else "trunc")


def start_sparse_allreduce(
    tensor: torch.Tensor, name: str, op: int, process_set: ProcessSet, site: CallSite
) -> PendingSparse:
    """Start to gather the entries of a COO tensor. Does not block."""
    if tensor.layout is not torch.sparse_coo:
        raise ValueError(f"sparse allreduce '{name}' takes COO tensors; the layout is {tensor.layout}")
    if op not in (Average, Sum):
        raise ValueError(f"sparse allreduce '{name}': op must be Average or Sum")
    tensor = tensor.detach().coalesce()  # one entry for each place travels
    values = tensor.values().contiguous().reshape(-1).resolve_conj().resolve_neg()
    if not values.is_complex():
        operations.require_supported(_core.ALLREDUCE, values, name, "sparse ")
    line = attributes.encode(
        {
            "data type": str(tensor.dtype).removeprefix("torch."),
            "shape": str(list(tensor.shape)),
            "number of sparse dimensions": str(tensor.sparse_dim()),
            "reduction": "Average" if op == Average else "Sum",
        },
        site,
    )
    parts = [
        torch.tensor(list(line), dtype=torch.uint8).to(tensor.device, non_blocking=True),
        tensor.indices().t().reshape(-1),
        values.view(torch.uint8),
    ]
    gathered = operations.start_group(_core.ALLGATHER, parts, False, name, _core.SUM, 1.0, 1.0, process_set, site)
    ranks = registered_ranks(require_id(process_set))
    return PendingSparse(gathered, name, tensor, ranks, len(ranks) if op == Average else 1)


def sparse_allreduce_async(
    tensor: torch.Tensor, name: str, op: int, process_set: ProcessSet = global_process_set
) -> Callable[[], torch.Tensor]:
    """Start a reduction of a sparse tensor over all ranks of the process set. Does not block.

    Args:
        tensor: a COO tensor, of the same shape, dtype and number of sparse dimensions on all ranks; it may have other
            entries on each.
        name: key of the operation, equal on all ranks.
        op: Average or Sum, which for bool are both "or".
    Returns: a function that blocks until the reduction is done and returns the result, a COO tensor that is not
        coalesced.
    Raises: ValueError as `allgather`, for other layouts and for other ops; the function raises HorovodInternalError if
        ranks disagree or one is lost.
    """
    return start_sparse_allreduce(tensor, name, op, process_set, call_site()).wait
