"""Hands torch tensors to the library: address, shape and dtype go in, a `Pending` comes out.

This is the only file that knows how a tensor lies in memory. The memory of a dense tensor on the CPU is reduced and
broadcast as it lies, whatever the order of its dimensions (channels_last, transposed): its strides go with it, and the
library copies where ranks lay out a tensor differently. Other tensors that are not contiguous are copied here, and
results are copied back.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence

import torch

from horovod_cpp import _core
from horovod_cpp.common import call_site as call_sites
from horovod_cpp.common import exceptions
from horovod_cpp.common.call_site import CallSite
from horovod_cpp.common.mistakes import LAST_REDUCTION, OPERATION_NAMES, label, require_root, unknown_reduction
from horovod_cpp.common.process_sets import ProcessSet, not_registered, refusal
from horovod_cpp.torch.mistakes import explained
from horovod_cpp.torch.pending import (
    GroupPlace,
    Operation,
    Pending,
    PendingAlltoall,
    PendingGroup,
)
from horovod_cpp.torch.streams import ON_HOST, Place, device_of, place_of

call_sites.skip_folder(os.path.dirname(os.path.abspath(torch.__file__)))

for plain_type in (torch.Tensor, torch.nn.Parameter):
    _core.read_tensors_of(plain_type)

_DTYPES = {
    torch.uint8: _core.UINT8,
    torch.int8: _core.INT8,
    torch.int16: _core.INT16,
    torch.int32: _core.INT32,
    torch.int64: _core.INT64,
    torch.float16: _core.FLOAT16,
    torch.float32: _core.FLOAT32,
    torch.float64: _core.FLOAT64,
    torch.bool: _core.BOOL,
    torch.bfloat16: _core.BFLOAT16,
    torch.complex32: _core.COMPLEX32,
    torch.complex64: _core.COMPLEX64,
    torch.complex128: _core.COMPLEX128,
}
# Of more than one element, which the library takes in another order than C order; the parts of complex numbers are one.
_MOST_ORDERED_DIMENSIONS = 16

_CONJUGATED = "a conjugated view cannot be the output; call resolve_conj() first"
_EXPANDED = "an expanded tensor cannot be the output: its elements share memory; call clone() first"


def _version_counter() -> Callable[[Sequence[torch.Tensor]], None]:
    """What tells autograd that tensors were changed in place."""
    increment: Callable[[Sequence[torch.Tensor]], None] = torch._C._increment_version
    try:
        increment((torch.empty(0),))
    except TypeError:  # before torch 2.6 it takes one tensor; the public function costs a quarter of a microsecond more
        return _count_each
    return increment


def _count_each(tensors: Sequence[torch.Tensor]) -> None:
    for tensor in tensors:
        torch.autograd.graph.increment_version(tensor)


# Autograd finds out with it if backward needs what was there before. Of what this is not called for, nobody will ask.
mark_changed = _version_counter()


def _start_plain(
    op: int,
    tensor: torch.Tensor,
    in_place: bool,
    name: str | None,
    process_set: ProcessSet,
    reduce_op: int,
    root_rank: int,
    prescale: float,
    postscale: float,
    site: CallSite,
    caller_waits: bool,
) -> Pending | None:
    """The short way for tensors that lie in host memory as they are; None for others."""
    if tensor.is_neg():
        return None
    target = tensor
    if not in_place:
        if not (tensor.is_cpu and tensor.is_contiguous()):
            return None  # before memory is made that nobody would use
        target = torch.empty_like(tensor, requires_grad=False)
    process_set_id = process_set.process_set_id
    if process_set_id is None:
        raise not_registered(process_set, label(op, name))
    try:
        handle = _core.enqueue_plain(
            op, tensor, target, name, process_set_id, reduce_op, root_rank, prescale, postscale, site, caller_waits
        )
    except _core.Error as error:
        raise refusal(error, process_set_id, label(op, name)) from None
    return None if handle is None else Pending(handle, ON_HOST, target, None)


def start_allreduce(
    tensor: torch.Tensor,
    in_place: bool,
    name: str | None,
    reduce_op: int,
    prescale_factor: float,
    postscale_factor: float,
    process_set: ProcessSet,
    site: CallSite,
    caller_waits: bool = False,
) -> Pending:
    """Start a reduction of `tensor` into itself or into a new tensor. Does not block."""
    try:
        if not 0 <= reduce_op <= LAST_REDUCTION:
            raise unknown_reduction(label(_core.ALLREDUCE, name), reduce_op)
        pending = _start_plain(
            _core.ALLREDUCE, tensor, in_place, name, process_set, reduce_op, 0, prescale_factor, postscale_factor, site,
            caller_waits,
        )  # fmt: skip
        if pending is not None:
            return pending
        _require_can_add(_core.ALLREDUCE, tensor, reduce_op, name)
        dtype = require_supported(_core.ALLREDUCE, tensor, name)
        source, target, copy_to, strides = _place(_core.ALLREDUCE, tensor, in_place, name)
        place = place_of(source)
        handle = _enqueue(
            _core.ALLREDUCE, dtype, source, target, place, name, process_set, site, caller_waits, reduce_op,
            prescale=prescale_factor, postscale=postscale_factor, strides=strides,
        )  # fmt: skip
        return Pending(handle, place, target, copy_to)
    except (AttributeError, TypeError) as error:
        raise explained(
            error,
            label(_core.ALLREDUCE, name),
            [tensor],
            name,
            process_set,
            {"op": reduce_op, "prescale_factor": prescale_factor, "postscale_factor": postscale_factor},
        ) from None


def start_allgather(
    tensor: torch.Tensor, name: str | None, process_set: ProcessSet, site: CallSite, caller_waits: bool = False
) -> Pending:
    """Start a concatenation along dimension 0; the library makes the output. Does not block."""
    try:
        dtype = require_supported(_core.ALLGATHER, tensor, name)
        source = _plain(tensor)
        place = place_of(source)
        handle = _enqueue(_core.ALLGATHER, dtype, source, source, place, name, process_set, site, caller_waits)
        return Pending(handle, place, None, None)
    except (AttributeError, TypeError) as error:
        raise explained(error, label(_core.ALLGATHER, name), [tensor], name, process_set) from None


def start_broadcast(
    tensor: torch.Tensor,
    in_place: bool,
    root_rank: int,
    name: str | None,
    process_set: ProcessSet,
    site: CallSite,
    caller_waits: bool = False,
) -> Pending:
    """Start a broadcast of the root's `tensor` into `tensor` or into a new tensor. Does not block."""
    try:
        require_root(root_rank, name)
        pending = _start_plain(
            _core.BROADCAST, tensor, in_place, name, process_set, _core.SUM, root_rank, 1.0, 1.0, site, caller_waits
        )
        if pending is not None:
            return pending
        dtype = require_supported(_core.BROADCAST, tensor, name)
        source, target, copy_to, strides = _place(_core.BROADCAST, tensor, in_place, name)
        place = place_of(source)
        handle = _enqueue(
            _core.BROADCAST, dtype, source, target, place, name, process_set, site, caller_waits, root_rank=root_rank,
            strides=strides,
        )  # fmt: skip
        return Pending(handle, place, target, copy_to)
    except (AttributeError, TypeError) as error:
        raise explained(
            error, label(_core.BROADCAST, name), [tensor], name, process_set, {"root_rank": root_rank}
        ) from None


def check_broadcast(tensor: torch.Tensor, name: str | None) -> None:
    """ValueError, which names it, for a tensor that `start_broadcast` in place would refuse."""
    if tensor.is_conj():
        raise ValueError(f"{label(_core.BROADCAST, name)}: {_CONJUGATED}")
    if _shares_elements(tensor):
        raise ValueError(f"{label(_core.BROADCAST, name)}: {_EXPANDED}")
    require_supported(_core.BROADCAST, tensor, name)


def start_group(
    op: int,
    tensors: Sequence[torch.Tensor],
    in_place: bool,
    name: str | None,
    reduce_op: int,
    prescale_factor: float,
    postscale_factor: float,
    process_set: ProcessSet,
    site: CallSite,
    caller_waits: bool = False,
) -> PendingGroup:
    """Start an operation on several tensors that is agreed and done for all of them or for none. Does not block."""
    try:
        if not 0 <= reduce_op <= LAST_REDUCTION:
            raise unknown_reduction(label(op, name, "grouped "), reduce_op)
        if not tensors:
            raise ValueError(f"grouped {OPERATION_NAMES[op]} of no tensors ({label(op, name)})")
        places = [_group_place(op, tensor, in_place, name, reduce_op) for tensor in tensors]
        place = place_of(places[0].source)
        if any(device_of(other.source) != place[0] for other in places):
            where = sorted({str(tensor.device) for tensor in tensors})
            raise exceptions.HorovodInternalError(
                f"Tensors in list must be on same device. ({label(op, name, 'grouped ')}: {', '.join(where)})"
            )
        process_set_id = _id_of(process_set, op, name)
        with _as_refusal(process_set_id, op, name, "grouped "):
            handle = _core.enqueue_group(
                op,
                [one.member() for one in places],
                name,
                process_set_id,
                reduce_op,
                prescale_factor,
                postscale_factor,
                site[0],
                site[1],
                caller_waits,
                place[0],
                place[1],
                places,
            )
        return PendingGroup(handle, place, places)
    except (AttributeError, TypeError) as error:
        raise explained(
            error,
            label(op, name, "grouped "),
            tensors,
            name,
            process_set,
            {"op": reduce_op, "prescale_factor": prescale_factor, "postscale_factor": postscale_factor},
        ) from None


def _group_place(op: int, tensor: torch.Tensor, in_place: bool, name: str | None, reduce_op: int) -> GroupPlace:
    _require_can_add(op, tensor, reduce_op, name)
    dtype = require_supported(op, tensor, name)
    if op == _core.ALLREDUCE:
        source, target, copy_to, strides = _place(op, tensor, in_place, name)
        return GroupPlace(dtype, source, target, copy_to, strides)
    return GroupPlace(dtype, _plain(tensor), None, None, None)


def start_reducescatter(
    tensor: torch.Tensor,
    name: str | None,
    reduce_op: int,
    prescale_factor: float,
    postscale_factor: float,
    process_set: ProcessSet,
    site: CallSite,
    caller_waits: bool = False,
) -> Pending:
    """Start a reduction of which each rank gets its rows; the library makes the output. Does not block."""
    try:
        if not 0 <= reduce_op <= LAST_REDUCTION:
            raise unknown_reduction(label(_core.REDUCESCATTER, name), reduce_op)
        _require_can_add(_core.REDUCESCATTER, tensor, reduce_op, name)
        dtype = require_supported(_core.REDUCESCATTER, tensor, name)
        source = _plain(tensor)
        place = place_of(source)
        handle = _enqueue(
            _core.REDUCESCATTER, dtype, source, source, place, name, process_set, site, caller_waits, reduce_op,
            prescale=prescale_factor, postscale=postscale_factor,
        )  # fmt: skip
        return Pending(handle, place, None, None)
    except (AttributeError, TypeError) as error:
        raise explained(
            error,
            label(_core.REDUCESCATTER, name),
            [tensor],
            name,
            process_set,
            {"op": reduce_op, "prescale_factor": prescale_factor, "postscale_factor": postscale_factor},
        ) from None


def start_alltoall(
    tensor: torch.Tensor,
    splits: Sequence[int] | None,
    name: str | None,
    process_set: ProcessSet,
    site: CallSite,
    caller_waits: bool = False,
) -> PendingAlltoall:
    """Start an exchange of rows; the library makes the output. Does not block."""
    try:
        dtype = require_supported(_core.ALLTOALL, tensor, name)
        source = _plain(tensor)
        place = place_of(source)
        process_set_id = _id_of(process_set, _core.ALLTOALL, name)
        with _as_refusal(process_set_id, _core.ALLTOALL, name):
            handle = _core.enqueue_alltoall(
                dtype,
                source.shape,
                source.data_ptr(),
                splits,
                name,
                process_set_id,
                site[0],
                site[1],
                caller_waits,
                place[0],
                place[1],
                (source,),
            )
        return PendingAlltoall(handle, place, splits is not None)
    except (AttributeError, TypeError) as error:
        raise explained(error, label(_core.ALLTOALL, name), [tensor], name, process_set) from None


def join(site: CallSite, device: int) -> int:
    """Block until all ranks have joined; the rank that did last."""
    try:
        handle = _core.enqueue_join(site[0], site[1], device)
    except _core.Error as error:
        raise refusal(error, 0, "join") from None
    Operation(handle).finish()
    return handle.last_joined_rank()


def barrier(process_set: ProcessSet, site: CallSite) -> None:
    """Block until all ranks of the set are here."""
    try:
        handle = _enqueue(_core.BARRIER, _core.UINT8, None, None, ON_HOST, None, process_set, site, caller_waits=True)
    except (AttributeError, TypeError) as error:
        raise explained(error, "barrier", [], None, process_set) from None
    Operation(handle).finish()


def _require_can_add(op: int, tensor: torch.Tensor, reduce_op: int, name: str | None) -> None:
    if tensor.is_complex() and reduce_op not in (_core.SUM, _core.AVERAGE):
        raise ValueError(f"complex numbers can be summed and averaged only ({label(op, name)})")


def require_supported(op: int, tensor: torch.Tensor, name: str | None, kind: str = "") -> int:
    """The library's number of the dtype; ValueError for tensors that it does not take. `kind`: "sparse ", for texts."""
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is not None and (tensor.is_cpu or tensor.is_cuda) and tensor.layout is torch.strided:
        return dtype
    raise ValueError(
        f"Tensor type {tensor.type()} is not supported. ({label(op, name, kind)}: dtype {tensor.dtype}, "
        f"layout {tensor.layout}, device {tensor.device}; supported are dense CPU and CUDA tensors of "
        f"{', '.join(str(known) for known in _DTYPES)})"
    )


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() and not tensor.is_neg() and not tensor.is_conj()


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if _is_plain(tensor) else _plain_copy(tensor)


def _plain_copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)


def _is_block(tensor: torch.Tensor) -> bool:
    """Whether the library can use the memory of a tensor that is not plain: one block without gaps and overlaps."""
    if tensor.is_cuda or tensor.is_neg() or tensor.is_conj():
        return False
    elements = 1
    counted = [pair for pair in zip(tensor.stride(), tensor.shape, strict=True) if pair[1] != 1]
    for stride, size in sorted(counted):
        if stride != elements:
            return False
        elements *= size
    return len(counted) + tensor.is_complex() <= _MOST_ORDERED_DIMENSIONS


def _shares_elements(tensor: torch.Tensor) -> bool:
    if tensor.layout is not torch.strided:
        return False
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _place(
    op: int, tensor: torch.Tensor, in_place: bool, name: str | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, tuple[int, ...] | None]:
    """Where the library reads, where it writes, where the result has to be copied in the end, if anywhere, and strides.

    The strides are those of both memories; None where they are contiguous.
    """
    if _is_plain(tensor):
        if in_place:
            return tensor, tensor, None, None
        return tensor, torch.empty_like(tensor, requires_grad=False), None, None
    if _is_block(tensor):
        target = tensor if in_place else torch.empty_like(tensor, requires_grad=False)
        return tensor, target, None, tensor.stride()
    if in_place and tensor.is_conj():
        raise ValueError(f"{label(op, name)}: {_CONJUGATED}")
    if in_place and _shares_elements(tensor):
        raise ValueError(f"{label(op, name)}: {_EXPANDED}")
    copy = _plain_copy(tensor)
    return copy, copy, tensor if in_place else None, None


def _enqueue(
    op: int,
    dtype: int,
    source: torch.Tensor | None,
    target: torch.Tensor | None,
    place: Place,
    name: str | None,
    process_set: ProcessSet,
    site: CallSite,
    caller_waits: bool,
    reduce_op: int = _core.SUM,
    root_rank: int = 0,
    prescale: float = 1.0,
    postscale: float = 1.0,
    strides: tuple[int, ...] | None = None,
) -> _core.Handle:
    process_set_id = _id_of(process_set, op, name)
    try:  # as _as_refusal does, which costs about a microsecond more
        return _core.enqueue(
            op,
            dtype,
            () if source is None else source.shape,
            0 if source is None else source.data_ptr(),
            0 if target is None else target.data_ptr(),
            name,
            process_set_id,
            reduce_op,
            root_rank,
            prescale,
            postscale,
            site[0],
            site[1],
            caller_waits,
            place[0],
            place[1],
            (source, target),
            strides,
        )
    except _core.Error as error:
        raise refusal(error, process_set_id, label(op, name)) from None


def _id_of(process_set: ProcessSet, op: int, name: str | None) -> int:
    process_set_id = process_set.process_set_id
    if process_set_id is None:
        raise not_registered(process_set, label(op, name))
    return process_set_id


@contextlib.contextmanager
def _as_refusal(process_set_id: int, op: int, name: str | None, kind: str = "") -> Iterator[None]:
    try:
        yield
    except _core.Error as error:
        raise refusal(error, process_set_id, label(op, name, kind)) from None
