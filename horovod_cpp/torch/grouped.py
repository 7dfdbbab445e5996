"""Grouped collectives: several tensors that are one operation, agreed and done for all of them or for none.

A group has one name, one negotiation and one call of the library. Tensors of a group may differ in shape and dtype; all
ranks give the same number of them, in the same order. Errors are those of the forms for one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from horovod_cpp import _core
from horovod_cpp.common.call_site import CallSite, call_site
from horovod_cpp.common.handles import register
from horovod_cpp.common.process_sets import ProcessSet, global_process_set
from horovod_cpp.torch import operations
from horovod_cpp.torch.collectives import (
    Average,
    Sum,
    allgather,
    apply_function,
    needs_gradient,
    resolve_reduce_op,
)
from horovod_cpp.torch.compression import Compression, Compressor


def _size(process_set: ProcessSet) -> int:
    size = process_set.size()
    assert size is not None
    return size


# ---- allreduce


def _allreduce(
    tensors: Sequence[torch.Tensor],
    name: str | None,
    op: int,
    prescale_factor: float,
    postscale_factor: float,
    process_set: ProcessSet,
    site: CallSite,
) -> list[torch.Tensor]:
    return operations.start_group(
        _core.ALLREDUCE, tensors, False, name, op, prescale_factor, postscale_factor, process_set, site, True
    ).wait()


class _GroupedAllreduce(torch.autograd.Function):
    """Gradient: the same reduction, with the same factors, of the incoming gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        name: str | None,
        op: int,
        prescale_factor: float,
        postscale_factor: float,
        process_set: ProcessSet,
        site: CallSite,
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.options = (op, prescale_factor, postscale_factor, process_set)
        return tuple(_allreduce(tensors, name, op, prescale_factor, postscale_factor, process_set, site))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        op, prescale_factor, postscale_factor, process_set = ctx.options
        gradients = grouped_allreduce(
            grads,
            op=op,
            prescale_factor=prescale_factor,
            postscale_factor=postscale_factor,
            process_set=process_set,
        )
        return None, None, None, None, None, None, *gradients


def grouped_allreduce(
    tensors: Sequence[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> list[torch.Tensor]:
    """Reduce each of `tensors` over all ranks into new tensors. Blocks. Differentiable. Otherwise as `allreduce`."""
    op = resolve_reduce_op(op, average, name, "grouped ")
    compressed = [compression.compress(tensor) for tensor in tensors]
    sent = [tensor for tensor, _ in compressed]
    options = (name, op, prescale_factor, postscale_factor, process_set, call_site())
    if any(map(needs_gradient, sent)):
        reduced = list(apply_function(_GroupedAllreduce, (*options, *sent)))
    else:
        reduced = _allreduce(sent, *options)
    return [compression.decompress(tensor, context) for tensor, (_, context) in zip(reduced, compressed, strict=True)]


def grouped_allreduce_async(
    tensors: Sequence[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Start what `grouped_allreduce` does, less gradient and compression. Does not block.

    Returns: one handle for all tensors; `synchronize` gives their list.
    """
    op = resolve_reduce_op(op, average, name, "grouped ")
    return register(
        operations.start_group(
            _core.ALLREDUCE, tensors, False, name, op, prescale_factor, postscale_factor, process_set, call_site()
        )
    )


def grouped_allreduce_(
    tensors: Sequence[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> list[torch.Tensor]:
    """Reduce each of `tensors` in place. Blocks. Not differentiable. Returns the tensors."""
    op = resolve_reduce_op(op, average, name, "grouped ")
    pending = operations.start_group(
        _core.ALLREDUCE, tensors, True, name, op, prescale_factor, postscale_factor, process_set, call_site(), True
    )
    operations.mark_changed(tensors)
    return pending.wait()


def grouped_allreduce_async_(
    tensors: Sequence[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Start a reduction of each of `tensors` in place. Does not block. Returns: one handle for all tensors."""
    op = resolve_reduce_op(op, average, name, "grouped ")
    pending = operations.start_group(
        _core.ALLREDUCE, tensors, True, name, op, prescale_factor, postscale_factor, process_set, call_site()
    )
    return register(pending, operations.mark_changed)


# ---- allgather


def _allgather(
    tensors: Sequence[torch.Tensor], name: str | None, process_set: ProcessSet, site: CallSite
) -> list[torch.Tensor]:
    return operations.start_group(
        _core.ALLGATHER, tensors, False, name, _core.SUM, 1.0, 1.0, process_set, site, True
    ).wait()


class _GroupedAllgather(torch.autograd.Function):
    """Gradient: this rank's slices of the average of the incoming gradients."""

    @staticmethod
    def forward(
        ctx: Any, name: str | None, process_set: ProcessSet, site: CallSite, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.process_set = process_set
        ctx.rows = [tensor.shape[0] for tensor in tensors]
        return tuple(_allgather(tensors, name, process_set, site))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        averaged = grouped_allreduce(grads, op=Average, process_set=ctx.process_set)
        counts = allgather(torch.tensor([ctx.rows]), process_set=ctx.process_set)
        first = counts[: ctx.process_set.rank()].sum(dim=0).tolist()
        gradients = [
            gradient.narrow(0, begin, rows) for gradient, begin, rows in zip(averaged, first, ctx.rows, strict=True)
        ]
        return None, None, None, *gradients


def grouped_allgather(
    tensors: Sequence[torch.Tensor], name: str | None = None, process_set: ProcessSet = global_process_set
) -> list[torch.Tensor]:
    """Concatenate each of `tensors` along dimension 0 over all ranks. Blocks. Differentiable. As `allgather`."""
    site = call_site()
    if any(map(needs_gradient, tensors)) and all(tensor.dim() > 0 for tensor in tensors):
        return list(apply_function(_GroupedAllgather, (name, process_set, site, *tensors)))
    return _allgather(tensors, name, process_set, site)


def grouped_allgather_async(
    tensors: Sequence[torch.Tensor], name: str | None = None, process_set: ProcessSet = global_process_set
) -> int:
    """Start what `grouped_allgather` does, less the gradient. Does not block. Returns: one handle for all tensors."""
    return register(
        operations.start_group(_core.ALLGATHER, tensors, False, name, _core.SUM, 1.0, 1.0, process_set, call_site())
    )


# ---- reducescatter


def _reducescatter(
    tensors: Sequence[torch.Tensor],
    name: str | None,
    op: int,
    process_set: ProcessSet,
    prescale_factor: float,
    postscale_factor: float,
    site: CallSite,
) -> list[torch.Tensor]:
    return operations.start_group(
        _core.REDUCESCATTER, tensors, False, name, op, prescale_factor, postscale_factor, process_set, site, True
    ).wait()


class _GroupedReducescatter(torch.autograd.Function):
    """Gradient: the incoming gradients of all ranks, one behind the other; of a sum, times the number of ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        name: str | None,
        op: int,
        process_set: ProcessSet,
        prescale_factor: float,
        postscale_factor: float,
        site: CallSite,
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        outputs = _reducescatter(tensors, name, op, process_set, prescale_factor, postscale_factor, site)
        # The set is one of this job, or there would be no outputs.
        ctx.factor = prescale_factor * postscale_factor * (_size(process_set) if op == Sum else 1)
        ctx.process_set = process_set
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        gathered = grouped_allgather(grads, process_set=ctx.process_set)
        return None, None, None, None, None, None, *[gradient * ctx.factor for gradient in gathered]


def grouped_reducescatter(
    tensors: Sequence[torch.Tensor],
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> list[torch.Tensor]:
    """Reduce each of `tensors` and keep this rank's rows of it. Blocks. Differentiable. As `reducescatter`."""
    compressed = [compression.compress(tensor) for tensor in tensors]
    sent = [tensor for tensor, _ in compressed]
    options = (name, op, process_set, prescale_factor, postscale_factor, call_site())
    if any(map(needs_gradient, sent)):
        reduced = list(apply_function(_GroupedReducescatter, (*options, *sent)))
    else:
        reduced = _reducescatter(sent, *options)
    return [compression.decompress(tensor, context) for tensor, (_, context) in zip(reduced, compressed, strict=True)]


def grouped_reducescatter_async(
    tensors: Sequence[torch.Tensor],
    name: str | None = None,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> int:
    """Start what `grouped_reducescatter` does, less gradient and compression. Does not block. Returns: one handle."""
    return register(
        operations.start_group(
            _core.REDUCESCATTER, tensors, False, name, op, prescale_factor, postscale_factor, process_set, call_site()
        )
    )
