"""Collective operations on torch tensors: blocking, asynchronous and in-place forms, and their gradients.

Names are keys: an operation meets the one with the same kind, process set and name on the other ranks, in whatever
order ranks call. Unnamed operations are counted per process set. A call raises ValueError for the caller's mistake, and
TypeError for an argument of the wrong type; what ranks find out together (mismatches, a lost rank) is a
HorovodInternalError from the waiting function.
On the CPU, allreduce and broadcast use the memory of a dense tensor as it lies, contiguous in whatever order of its
dimensions (channels_last, transposed), where all ranks have it in the same order; where they do not, the library copies
on those ranks whose tensor is not in the order of its dimensions. New outputs have the strides of the input. Other
tensors that are not contiguous are copied, and in-place results are copied back when the operation is waited for.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from horovod_cpp import _core
from horovod_cpp.common import basics, mistakes
from horovod_cpp.common.call_site import CallSite, call_site
from horovod_cpp.common.exceptions import HorovodInternalError
from horovod_cpp.common.handles import register
from horovod_cpp.common.process_sets import ProcessSet, global_process_set
from horovod_cpp.torch import operations
from horovod_cpp.torch.compression import Compression, Compressor

Average = _core.AVERAGE
Sum = _core.SUM
Adasum = _core.ADASUM
Min = _core.MIN
Max = _core.MAX
Product = _core.PRODUCT

_start_in_place = _core.start_in_place


def _mark_changed(tensor: torch.Tensor) -> None:
    operations.mark_changed((tensor,))


def resolve_reduce_op(op: int | None, average: bool | None, name: str | None, kind: str = "") -> int:
    """The reduction that `op` and the old parameter `average` ask for; Average if neither is given.

    `name` and `kind` ("grouped ") are for the message.
    """
    if average is not None:
        if op is not None:
            what = mistakes.label(_core.ALLREDUCE, name, kind)
            raise ValueError(f"The op parameter supersedes average. Please provide only one of them. ({what})")
        warnings.warn("the parameter average is deprecated; use op=hvd.Average or op=hvd.Sum", DeprecationWarning, 3)
        return Average if average else Sum
    return Average if op is None else op


def needs_gradient(tensor: torch.Tensor) -> bool:
    """Whether autograd has to know of an operation on `tensor`."""
    try:
        return tensor.requires_grad and torch.is_grad_enabled()
    except AttributeError:
        return False  # no tensor: the operation says so, by its name


def apply_function(function: type[torch.autograd.Function], arguments: tuple[Any, ...]) -> Any:
    """Call `function`, recorded by autograd."""
    return function.apply(*arguments)  # type: ignore[no-untyped-call]


def _allreduce(
    tensor: torch.Tensor,
    name: str | None,
    op: int,
    prescale_factor: float,
    postscale_factor: float,
    process_set: ProcessSet,
    site: CallSite,
) -> torch.Tensor:
    return operations.start_allreduce(
        tensor, False, name, op, prescale_factor, postscale_factor, process_set, site, caller_waits=True
    ).wait()


class _Allreduce(torch.autograd.Function):
    """Gradient: the same reduction, with the same factors, of the incoming gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        tensor: torch.Tensor,
        name: str | None,
        op: int,
        prescale_factor: float,
        postscale_factor: float,
        process_set: ProcessSet,
        site: CallSite,
    ) -> torch.Tensor:
        ctx.options = (op, prescale_factor, postscale_factor, process_set)
        return _allreduce(tensor, name, op, prescale_factor, postscale_factor, process_set, site)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        op, prescale_factor, postscale_factor, process_set = ctx.options
        gradient = allreduce(
            grads[0],
            op=op,
            prescale_factor=prescale_factor,
            postscale_factor=postscale_factor,
            process_set=process_set,
        )
        return gradient, None, None, None, None, None, None


def allreduce(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> torch.Tensor:
    """Reduce `tensor` over all ranks of the process set into a new tensor. Blocks. Differentiable.

    Args:
        tensor: the same shape and dtype on all ranks.
        average: deprecated, use `op`.
        name: key of the operation, equal on all ranks; made from a counter if None.
        compression: what travels, `Compression.none`, `Compression.fp16` or `Compression.bf16`.
        op: Average (default), Sum, Min, Max, Product, or Adasum of floating-point tensors (Maleki et al., "Scaling
            Distributed Training with Adaptive Summation"). An average of integers is cut to an integer.
        prescale_factor, postscale_factor: factors before and after the reduction.
    Returns: a tensor like `tensor`. Its gradient is the same reduction of the gradients of all ranks.
    Raises: ValueError for a dtype that is not supported, a name that is in flight already, or if this rank is not in
        the process set; HorovodInternalError if ranks disagree or one is lost.
    """
    op = resolve_reduce_op(op, average, name)
    compressed, context = compression.compress(tensor)
    arguments = (compressed, name, op, prescale_factor, postscale_factor, process_set, call_site())
    reduced = apply_function(_Allreduce, arguments) if needs_gradient(compressed) else _allreduce(*arguments)
    return compression.decompress(reduced, context)


def allreduce_async(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Start what `allreduce` does, less gradient and compression. Does not block.

    Returns: a handle for `poll` and `synchronize`; `tensor` has to stay untouched until that is done.
    """
    op = resolve_reduce_op(op, average, name)
    return register(
        operations.start_allreduce(tensor, False, name, op, prescale_factor, postscale_factor, process_set, call_site())
    )


def allreduce_(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> torch.Tensor:
    """Reduce `tensor` in place, otherwise as `allreduce`. Blocks. Not differentiable. Returns `tensor`.

    As with in-place functions of torch, a backward pass that needs the values of before is an error.
    """
    if average is None:
        started = _start_in_place(tensor, name, op, prescale_factor, postscale_factor, process_set, True)
        if started is not None:
            operations.mark_changed((tensor,))
            try:
                started.wait()
            except _core.Error as error:
                raise HorovodInternalError(str(error)) from None
            return tensor
    op = resolve_reduce_op(op, average, name)
    pending = operations.start_allreduce(
        tensor, True, name, op, prescale_factor, postscale_factor, process_set, call_site(), caller_waits=True
    )
    operations.mark_changed((tensor,))
    return pending.wait()


def allreduce_async_(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Start a reduction of `tensor` in place. Does not block. Returns: a handle for `poll` and `synchronize`."""
    if average is None:
        started = _start_in_place(tensor, name, op, prescale_factor, postscale_factor, process_set, False)
        if started is not None:
            return register(started, _mark_changed)
    op = resolve_reduce_op(op, average, name)
    pending = operations.start_allreduce(
        tensor, True, name, op, prescale_factor, postscale_factor, process_set, call_site()
    )
    return register(pending, _mark_changed)


def _allgather(tensor: torch.Tensor, name: str | None, process_set: ProcessSet, site: CallSite) -> torch.Tensor:
    return operations.start_allgather(tensor, name, process_set, site, caller_waits=True).wait()


class _Allgather(torch.autograd.Function):
    """Gradient: this rank's slice of the average of the incoming gradients."""

    @staticmethod
    def forward(
        ctx: Any, tensor: torch.Tensor, name: str | None, process_set: ProcessSet, site: CallSite
    ) -> torch.Tensor:
        ctx.rows = tensor.shape[0] if tensor.dim() > 0 else 0
        ctx.process_set = process_set
        return _allgather(tensor, name, process_set, site)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        averaged = allreduce(grads[0], op=Average, process_set=ctx.process_set)
        rows = allgather(torch.tensor([ctx.rows]), process_set=ctx.process_set)
        first = int(rows[: ctx.process_set.rank()].sum())
        return averaged.narrow(0, first, ctx.rows), None, None, None


def allgather(
    tensor: torch.Tensor, name: str | None = None, process_set: ProcessSet = global_process_set
) -> torch.Tensor:
    """Concatenate `tensor` of all ranks along dimension 0. Blocks. Differentiable.

    Args:
        tensor: shape (n_i, d1, ...); n_i may differ between ranks, the rest and the dtype may not.
        name: key of the operation, equal on all ranks; made from a counter if None.
    Returns: shape (sum of n_i, d1, ...), ordered by rank. Its gradient is this rank's slice of the *average* of the
        gradients of all ranks. On CUDA `record_stream` does nothing for it: read on another stream than the current
        one, it has to be kept until that has waited for the reader.
    Raises: ValueError as `allreduce`; HorovodInternalError for a scalar, if ranks disagree or one is lost.
    """
    arguments = (tensor, name, process_set, call_site())
    if needs_gradient(tensor):
        gathered: torch.Tensor = apply_function(_Allgather, arguments)
        return gathered
    return _allgather(*arguments)


def allgather_async(tensor: torch.Tensor, name: str | None = None, process_set: ProcessSet = global_process_set) -> int:
    """Start what `allgather` does, less the gradient. Does not block. Returns: a handle for `synchronize`."""
    return register(operations.start_allgather(tensor, name, process_set, call_site()))


def _broadcast(
    tensor: torch.Tensor, root_rank: int, name: str | None, process_set: ProcessSet, site: CallSite
) -> torch.Tensor:
    return operations.start_broadcast(tensor, False, root_rank, name, process_set, site, caller_waits=True).wait()


class _Broadcast(torch.autograd.Function):
    """Gradient: the average of the incoming gradients on the root, zeros on the other ranks."""

    @staticmethod
    def forward(
        ctx: Any, tensor: torch.Tensor, root_rank: int, name: str | None, process_set: ProcessSet, site: CallSite
    ) -> torch.Tensor:
        ctx.options = (root_rank, process_set)
        return _broadcast(tensor, root_rank, name, process_set, site)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        root_rank, process_set = ctx.options
        averaged = allreduce(grads[0], op=Average, process_set=process_set)
        gradient = averaged if basics.rank() == root_rank else torch.zeros_like(averaged)
        return gradient, None, None, None, None


def broadcast(
    tensor: torch.Tensor,
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> torch.Tensor:
    """Return the root's `tensor` on all ranks, as a new tensor. Blocks. Differentiable.

    Args:
        tensor: the same shape and dtype on all ranks.
        root_rank: *global* rank of the root, also with a process set.
        name: key of the operation, equal on all ranks; made from a counter if None.
    Returns: a tensor like `tensor`. Its gradient is the average of all gradients on the root, zero elsewhere.
    Raises: ValueError for a root outside the process set, and as `allreduce`; HorovodInternalError if ranks disagree.
    """
    arguments = (tensor, root_rank, name, process_set, call_site())
    if needs_gradient(tensor):
        result: torch.Tensor = apply_function(_Broadcast, arguments)
        return result
    return _broadcast(*arguments)


def broadcast_async(
    tensor: torch.Tensor,
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Start what `broadcast` does, less the gradient. Does not block. Returns: a handle for `synchronize`."""
    return register(operations.start_broadcast(tensor, False, root_rank, name, process_set, call_site()))


def broadcast_(
    tensor: torch.Tensor,
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> torch.Tensor:
    """Overwrite `tensor` with the root's, otherwise as `broadcast`. Blocks. Not differentiable. Returns `tensor`."""
    pending = operations.start_broadcast(tensor, True, root_rank, name, process_set, call_site(), caller_waits=True)
    operations.mark_changed((tensor,))
    return pending.wait()


def broadcast_async_(
    tensor: torch.Tensor,
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Start a broadcast into `tensor`. Does not block. Returns: a handle for `poll` and `synchronize`."""
    return register(operations.start_broadcast(tensor, True, root_rank, name, process_set, call_site()), _mark_changed)


def barrier(process_set: ProcessSet = global_process_set) -> None:
    """Block until all ranks of the process set have called. Operations in flight need not be done then."""
    operations.barrier(process_set, call_site())
