"""Collectives in which ranks get different things: alltoall and reducescatter; and join, for uneven data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from horovod_cpp import _core
from horovod_cpp.common import mistakes
from horovod_cpp.common.call_site import CallSite, call_site
from horovod_cpp.common.handles import register
from horovod_cpp.common.process_sets import ProcessSet, global_process_set
from horovod_cpp.torch import operations
from horovod_cpp.torch.collectives import Average, Sum, allgather, apply_function, needs_gradient
from horovod_cpp.torch.compression import Compression, Compressor

# ---- alltoall


def _read_splits(splits: torch.Tensor | Sequence[int] | None, name: str | None) -> list[int] | None:
    if splits is None:
        return None
    what = mistakes.label(_core.ALLTOALL, name)
    if isinstance(splits, torch.Tensor):
        if splits.dim() != 1:
            raise ValueError(f"alltoall expects a 1D splits tensor ({what}: got {splits.dim()} dimensions)")
        if splits.dtype != torch.int32:
            raise ValueError(f"alltoall expects splits to contain 32-bit integer elements ({what}: got {splits.dtype})")
        return [int(split) for split in splits.tolist()]
    try:
        read = [int(split) for split in splits]
        fits = all(one == split and -(2**31) <= one < 2**31 for one, split in zip(read, splits, strict=True))
    except (OverflowError, TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(f"alltoall expects splits to contain 32-bit integer elements ({what}: got {splits!r})")
    return read


class _Alltoall(torch.autograd.Function):
    """Gradient: the incoming gradients go back where their rows came from."""

    @staticmethod
    def forward(
        ctx: Any,
        tensor: torch.Tensor,
        splits: list[int] | None,
        name: str | None,
        process_set: ProcessSet,
        site: CallSite,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        pending = operations.start_alltoall(tensor, splits, name, process_set, site, caller_waits=True)
        result = pending.wait()
        output = result[0] if isinstance(result, tuple) else result
        received = pending.received_splits()
        ctx.received = received
        ctx.rows = tensor.shape[0]
        ctx.process_set = process_set
        ctx.mark_non_differentiable(received)
        return output, received

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        returned, _ = alltoall(grads[0], splits=ctx.received, process_set=ctx.process_set)
        if returned.shape[0] < ctx.rows:  # rows that went to nobody
            left = ctx.rows - returned.shape[0]
            returned = torch.cat([returned, returned.new_zeros((left, *returned.shape[1:]))])
        return returned, None, None, None, None


def alltoall(
    tensor: torch.Tensor,
    splits: torch.Tensor | Sequence[int] | None = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Send rows of `tensor` to each rank, and return the rows that came, in the order of their ranks. Blocks.

    Args:
        tensor: the same dtype and the same shape after the first dimension on all ranks.
        splits: rows for each rank of the process set, in turn from the first row on: int32, one entry a rank, with a
            sum of at most the first dimension. None: equal shares.
        name: key of the operation, equal on all ranks; made from a counter if None.
    Returns: the output; with `splits` a tuple of it and of the rows that came from each rank (int32). Differentiable:
        gradients go back to the ranks that the rows came from. On CUDA the output is kept as that of `allgather`.
    Raises: ValueError for bad splits, or a first dimension that cannot be shared equally, and as `allreduce`;
        HorovodInternalError if ranks disagree or one is lost.
    """
    read = _read_splits(splits, name)
    site = call_site()
    if needs_gradient(tensor) and tensor.dim() > 0:
        output, received = apply_function(_Alltoall, (tensor, read, name, process_set, site))
        return output if read is None else (output, received)
    return operations.start_alltoall(tensor, read, name, process_set, site, caller_waits=True).wait()


def alltoall_async(
    tensor: torch.Tensor,
    splits: torch.Tensor | Sequence[int] | None = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Start what `alltoall` does, less the gradient. Does not block. Returns: a handle for `synchronize`."""
    return register(operations.start_alltoall(tensor, _read_splits(splits, name), name, process_set, call_site()))


# ---- reducescatter


def _reducescatter(
    tensor: torch.Tensor,
    name: str | None,
    op: int,
    process_set: ProcessSet,
    prescale_factor: float,
    postscale_factor: float,
    site: CallSite,
) -> torch.Tensor:
    return operations.start_reducescatter(
        tensor, name, op, prescale_factor, postscale_factor, process_set, site, caller_waits=True
    ).wait()


class _Reducescatter(torch.autograd.Function):
    """Gradient: the incoming gradients of all ranks, one behind the other; of a sum, times the number of ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        tensor: torch.Tensor,
        name: str | None,
        op: int,
        process_set: ProcessSet,
        prescale_factor: float,
        postscale_factor: float,
        site: CallSite,
    ) -> torch.Tensor:
        output = _reducescatter(tensor, name, op, process_set, prescale_factor, postscale_factor, site)
        size = process_set.size()  # of this job, or there would be no output
        assert size is not None
        ctx.factor = prescale_factor * postscale_factor * (size if op == Sum else 1)
        ctx.process_set = process_set
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        gathered = allgather(grads[0], process_set=ctx.process_set)
        return gathered * ctx.factor, None, None, None, None, None, None


def reducescatter(
    tensor: torch.Tensor,
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> torch.Tensor:
    """Reduce `tensor` over all ranks and return this rank's rows of the result. Blocks. Differentiable.

    Args:
        tensor: the same shape and dtype on all ranks, of at least one dimension. Where its rows do not go out evenly,
            the first ranks get one more.
        op: Average or Sum.
        name, compression, prescale_factor, postscale_factor: as for `allreduce`.
    Returns: a new tensor. The gradient is that of all ranks, one behind the other, for a sum times the number of ranks.
        On CUDA it is kept as that of `allgather`.
    Raises: ValueError for a scalar, and as `allreduce`; HorovodInternalError for another reduction, at once, and if
        ranks disagree or one is lost.
    """
    compressed, context = compression.compress(tensor)
    arguments = (compressed, name, op, process_set, prescale_factor, postscale_factor, call_site())
    reduced = apply_function(_Reducescatter, arguments) if needs_gradient(compressed) else _reducescatter(*arguments)
    return compression.decompress(reduced, context)


def reducescatter_async(
    tensor: torch.Tensor,
    name: str | None = None,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> int:
    """Start what `reducescatter` does, less gradient and compression. Does not block. Returns: a handle."""
    return register(
        operations.start_reducescatter(tensor, name, op, prescale_factor, postscale_factor, process_set, call_site())
    )


# ---- join


def join(device: int = -1) -> int:
    """Tell the others that this rank has no more data, and block until all ranks of the job have told the same.

    Meanwhile the rank takes part in the allreduces of the others with elements that change nothing (zeros for Sum and
    Average, which still divides by the size of the set; the highest, the lowest and 1 for Min, Max and Product), and in
    their barriers. Every other operation of theirs is a HorovodInternalError there that names the ranks that have
    joined. Afterwards unnamed operations are counted from the start again on all ranks.

    Args: device: the CUDA device for such elements where the others' tensors lie on one; -1: the current one.
    Returns: the rank that joined last, the same on all ranks.
    Raises: HorovodInternalError if a rank is lost or the job ends; ValueError for a number that is no device's.
    """
    if device >= 2**31:
        raise ValueError(f"join: there is no device {device}")
    if device < 0:
        device = torch.cuda.current_device() if torch.cuda.is_available() else -1
    return operations.join(call_site(), device)
