"""Collective operations on arrays: blocking, asynchronous and in-place forms.

An array is anything with `__cuda_array_interface__` (CuPy, Numba, ...), or with `__array_interface__` in host memory
(numpy). Names are keys: an operation meets the one with the same kind, process set and name on the other ranks, in
whatever order ranks call; also one on tensors, so that ranks may use different frameworks. A call raises ValueError
for the caller's mistake, and TypeError for a name, a set or a number of the wrong type; what ranks find out together is
a HorovodInternalError from the waiting function.

Host arrays may have any strides: dense ones are reduced and broadcast as they lie, others are copied, and copied back
where the operation works in place. Device arrays have to be contiguous. Nobody waits for a device; see `interfaces`
for what the stream of an array means.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from typing import Any

import numpy

from horovod_cpp import _core
from horovod_cpp.arrays.interfaces import HOST, Place, is_on_device, place_on_device, place_on_host, require_writable
from horovod_cpp.arrays.outputs import Pending, like, made_by_library, stream_for_engine, stream_may_end
from horovod_cpp.common import exceptions
from horovod_cpp.common.call_site import CallSite, call_site
from horovod_cpp.common.handles import register
from horovod_cpp.common.mistakes import LAST_REDUCTION, explained, label, require_root, unknown_reduction
from horovod_cpp.common.process_sets import ProcessSet, global_process_set, refusal, require_id

Average = _core.AVERAGE
Sum = _core.SUM
Adasum = _core.ADASUM
Min = _core.MIN
Max = _core.MAX
Product = _core.PRODUCT

_MOST_ORDERED_DIMENSIONS = 16  # of more than one element, which the library takes in another order than C order


def _is_block(place: Place) -> bool:
    """Whether a host array that is not in C order is one block without gaps and overlaps."""
    assert place.strides is not None
    elements = 1
    counted = [pair for pair in zip(place.strides, place.shape, strict=True) if pair[1] != 1]
    for stride, size in sorted(counted):
        if stride != elements:
            return False
        elements *= size
    return len(counted) <= _MOST_ORDERED_DIMENSIONS


def _copied(place: Place) -> Place:
    """A copy of a host array in C order."""
    copy = numpy.array(place.owner, order="C", copy=True)
    return Place(copy, copy.ctypes.data, place.shape, place.dtype, writable=True)


def _place_of(array: Any, what: str) -> Place:
    return place_on_device(array, what) if is_on_device(array) else place_on_host(array, what)


def _readable(place: Place, any_order: bool) -> Place:
    """The place itself, or that of a copy. `any_order`: the operation takes dense host arrays in any order."""
    if place.device != HOST:
        return place
    as_it_lies = place.strides is None or (any_order and _is_block(place))
    return place if as_it_lies and place.owner.flags.aligned else _copied(place)


def _shares_memory_with_itself(array: numpy.ndarray[Any, Any]) -> bool:
    return any(stride == 0 and size > 1 for stride, size in zip(array.strides, array.shape, strict=True))


def _enqueue(
    operation: int,
    source: Place | None,
    target: Place | None,
    name: str | None,
    process_set: ProcessSet,
    site: CallSite,
    caller_waits: bool,
    reduce_op: int = Sum,
    root_rank: int = 0,
    prescale: float = 1.0,
    postscale: float = 1.0,
) -> _core.Handle:
    what = label(operation, name)
    try:
        if not 0 <= reduce_op <= LAST_REDUCTION:
            raise unknown_reduction(what, reduce_op)
        require_root(root_rank, name)
        process_set_id = require_id(process_set, what)
        return _core.enqueue(
            operation,
            _core.UINT8 if source is None else source.dtype,
            () if source is None else source.shape,
            0 if source is None else source.address,
            0 if target is None else target.address,
            name,
            process_set_id,
            reduce_op,
            root_rank,
            prescale,
            postscale,
            site[0],
            site[1],
            caller_waits and not (source is not None and stream_may_end(source)),
            HOST if source is None else source.device,
            0 if source is None or source.device == HOST else stream_for_engine(source.stream),
            (source, target),
            None if source is None else source.strides,
        )
    except _core.Error as error:
        raise refusal(error, process_set_id, what) from None
    except (AttributeError, TypeError) as error:
        numbers = {
            "op": reduce_op, "root_rank": root_rank, "prescale_factor": prescale, "postscale_factor": postscale,
        }  # fmt: skip
        raise explained(error, what, name, process_set, numbers) from None


def _give(output: Any, _handle: _core.Handle) -> Any:
    return output


def _copy_back(array: Any, to: Any, source: Any, _handle: _core.Handle) -> Any:
    numpy.copyto(to, source)
    return array


def _start_into(
    operation: int,
    array: Any,
    in_place: bool,
    name: str | None,
    process_set: ProcessSet,
    site: CallSite,
    caller_waits: bool,
    **options: Any,
) -> Pending:
    """An operation whose output is like its input."""
    what = label(operation, name)
    own = _place_of(array, what)
    source = _readable(own, any_order=True)
    if not in_place:
        target = like(array, source, what)
        result = functools.partial(_give, target.owner)
    else:
        require_writable(own, array, what)
        target = source
        result = functools.partial(_give, array)
        if source is not own:
            if _shares_memory_with_itself(own.owner):
                raise ValueError(
                    f"{what}: the elements of the {type(array).__name__} of shape {own.shape} share memory: it cannot "
                    "be the output"
                )
            result = functools.partial(_copy_back, array, own.owner, source.owner)
    handle = _enqueue(operation, source, target, name, process_set, site, caller_waits, **options)
    return Pending(handle, source, result)


def _start_made(
    operation: int,
    array: Any,
    name: str | None,
    process_set: ProcessSet,
    site: CallSite,
    caller_waits: bool,
    **options: Any,
) -> Pending:
    """An operation whose output the library makes."""
    source = _readable(_place_of(array, label(operation, name)), any_order=False)
    handle = _enqueue(operation, source, source, name, process_set, site, caller_waits, **options)
    return Pending(handle, source, lambda done: made_by_library(done, source.stream))


# ---- allreduce


def _start_allreduce(
    array: Any,
    in_place: bool,
    name: str | None,
    op: int,
    prescale_factor: float,
    postscale_factor: float,
    process_set: ProcessSet,
    site: CallSite,
    caller_waits: bool = False,
) -> Pending:
    return _start_into(
        _core.ALLREDUCE, array, in_place, name, process_set, site, caller_waits,
        reduce_op=op, prescale=prescale_factor, postscale=postscale_factor,
    )  # fmt: skip


def allreduce(
    array: Any,
    name: str | None = None,
    op: int = Average,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Reduce `array` over all ranks of the process set into a new array. Blocks.

    Args:
        array: the same shape and type on all ranks.
        name: key of the operation, equal on all ranks; made from a counter if None.
        op: Average, Sum, Min, Max, Product, or Adasum of floating-point arrays. An average of integers is cut.
        prescale_factor, postscale_factor: factors before and after the reduction.
    Returns: an array like `array`, made by its library: numpy, CuPy, Numba, or what `__array_namespace__` names.
    Raises: ValueError for an array that cannot be used (type, byte order, mask, a device array that is not contiguous),
        a name that is in flight already, or if this rank is not in the process set; HorovodInternalError if ranks
        disagree or one is lost; RuntimeError where the CUDA module or NCCL is missing.
    """
    return _start_allreduce(
        array, False, name, op, prescale_factor, postscale_factor, process_set, call_site(), caller_waits=True
    ).wait()


def allreduce_async(
    array: Any,
    name: str | None = None,
    op: int = Average,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Start what `allreduce` does. Does not block.

    Returns: a handle for `poll` and `synchronize`; `array` has to stay untouched until that is done.
    """
    return register(
        _start_allreduce(array, False, name, op, prescale_factor, postscale_factor, process_set, call_site())
    )


def allreduce_(
    array: Any,
    name: str | None = None,
    op: int = Average,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Reduce `array` in place, otherwise as `allreduce`. Blocks. Returns `array`. ValueError if it is read-only."""
    return _start_allreduce(
        array, True, name, op, prescale_factor, postscale_factor, process_set, call_site(), caller_waits=True
    ).wait()


def allreduce_async_(
    array: Any,
    name: str | None = None,
    op: int = Average,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Start a reduction of `array` in place. Does not block. Returns: a handle for `poll` and `synchronize`."""
    return register(
        _start_allreduce(array, True, name, op, prescale_factor, postscale_factor, process_set, call_site())
    )


# ---- broadcast


def _start_broadcast(
    array: Any,
    in_place: bool,
    root_rank: int,
    name: str | None,
    process_set: ProcessSet,
    site: CallSite,
    caller_waits: bool = False,
) -> Pending:
    return _start_into(_core.BROADCAST, array, in_place, name, process_set, site, caller_waits, root_rank=root_rank)


def broadcast(array: Any, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set) -> Any:
    """Return the root's `array` on all ranks, as a new array. Blocks.

    Args:
        array: the same shape and type on all ranks.
        root_rank: *global* rank of the root, also with a process set.
        name: key of the operation, equal on all ranks; made from a counter if None.
    Returns: an array like `array`, as of `allreduce`.
    Raises: ValueError for a root outside the process set, and as `allreduce`; HorovodInternalError if ranks disagree.
    """
    return _start_broadcast(array, False, root_rank, name, process_set, call_site(), caller_waits=True).wait()


def broadcast_async(
    array: Any, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> int:
    """Start what `broadcast` does. Does not block. Returns: a handle for `poll` and `synchronize`."""
    return register(_start_broadcast(array, False, root_rank, name, process_set, call_site()))


def broadcast_(
    array: Any, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Any:
    """Overwrite `array` with the root's, otherwise as `broadcast`. Blocks. Returns `array`.

    The memory has to be writable on every rank, the root included.
    """
    return _start_broadcast(array, True, root_rank, name, process_set, call_site(), caller_waits=True).wait()


def broadcast_async_(
    array: Any, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> int:
    """Start a broadcast into `array`. Does not block. Returns: a handle for `poll` and `synchronize`."""
    return register(_start_broadcast(array, True, root_rank, name, process_set, call_site()))


# ---- allgather


def _start_allgather(
    array: Any, name: str | None, process_set: ProcessSet, site: CallSite, caller_waits: bool = False
) -> Pending:
    return _start_made(_core.ALLGATHER, array, name, process_set, site, caller_waits)


def allgather(array: Any, name: str | None = None, process_set: ProcessSet = global_process_set) -> Any:
    """Concatenate `array` of all ranks along dimension 0. Blocks.

    Args:
        array: shape (n_i, d1, ...); n_i may differ between ranks, the rest and the type may not.
        name: key of the operation, equal on all ranks; made from a counter if None.
    Returns: shape (sum of n_i, d1, ...), ordered by rank: a numpy array, or for a device array a `DeviceOutput`.
    Raises: ValueError as `allreduce`; HorovodInternalError for a scalar, if ranks disagree or one is lost.
    """
    return _start_allgather(array, name, process_set, call_site(), caller_waits=True).wait()


def allgather_async(array: Any, name: str | None = None, process_set: ProcessSet = global_process_set) -> int:
    """Start what `allgather` does. Does not block. Returns: a handle for `poll` and `synchronize`."""
    return register(_start_allgather(array, name, process_set, call_site()))


# ---- reducescatter


def _start_reducescatter(
    array: Any,
    name: str | None,
    op: int,
    prescale_factor: float,
    postscale_factor: float,
    process_set: ProcessSet,
    site: CallSite,
    caller_waits: bool = False,
) -> Pending:
    return _start_made(
        _core.REDUCESCATTER, array, name, process_set, site, caller_waits,
        reduce_op=op, prescale=prescale_factor, postscale=postscale_factor,
    )  # fmt: skip


def reducescatter(
    array: Any,
    name: str | None = None,
    op: int = Average,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Reduce `array` over all ranks and return this rank's rows of the result. Blocks.

    Args:
        array: the same shape and type on all ranks, of at least one dimension. Where its rows do not go out evenly, the
            first ranks get one more.
        op: Average or Sum.
        name, prescale_factor, postscale_factor: as for `allreduce`.
    Returns: a numpy array, or for a device array a `DeviceOutput`.
    Raises: ValueError for a scalar, and as `allreduce`; HorovodInternalError for another reduction, and if ranks
        disagree or one is lost.
    """
    return _start_reducescatter(
        array, name, op, prescale_factor, postscale_factor, process_set, call_site(), caller_waits=True
    ).wait()


def reducescatter_async(
    array: Any,
    name: str | None = None,
    op: int = Average,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Start what `reducescatter` does. Does not block. Returns: a handle for `poll` and `synchronize`."""
    return register(_start_reducescatter(array, name, op, prescale_factor, postscale_factor, process_set, call_site()))


# ---- alltoall


def _exchanged(source: Place, with_splits: bool, handle: _core.Handle) -> Any:
    output = made_by_library(handle, source.stream)
    return (output, numpy.array(handle.received_splits(), dtype=numpy.int32)) if with_splits else output


def _start_alltoall(
    array: Any,
    splits: Iterable[int] | None,
    name: str | None,
    process_set: ProcessSet,
    site: CallSite,
    caller_waits: bool = False,
) -> Pending:
    what = label(_core.ALLTOALL, name)
    try:
        rows = None if splits is None else [operator.index(split) for split in splits]
    except TypeError:
        raise ValueError(f"{what}: splits have to be whole numbers, one for each rank: {splits!r}") from None
    source = _readable(_place_of(array, what), any_order=False)
    try:
        process_set_id = require_id(process_set, what)
        handle = _core.enqueue_alltoall(
            source.dtype,
            source.shape,
            source.address,
            rows,
            name,
            process_set_id,
            site[0],
            site[1],
            caller_waits and not stream_may_end(source),
            source.device,
            0 if source.device == HOST else stream_for_engine(source.stream),
            source,
        )
    except _core.Error as error:
        raise refusal(error, process_set_id, what) from None
    except (AttributeError, TypeError) as error:
        raise explained(error, what, name, process_set) from None
    return Pending(handle, source, functools.partial(_exchanged, source, splits is not None))


def alltoall(
    array: Any,
    splits: Iterable[int] | None = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Send rows of `array` to each rank, and return the rows that came, in the order of their ranks. Blocks.

    Args:
        array: the same type and the same shape after the first dimension on all ranks.
        splits: rows for each rank of the process set, in turn from the first row on, one number a rank, in host memory,
            with a sum of at most the first dimension. None: equal shares.
        name: key of the operation, equal on all ranks; made from a counter if None.
    Returns: the output (a numpy array, or for a device array a `DeviceOutput`); with `splits` a tuple of it and of the
        rows that came from each rank (int32, numpy).
    Raises: ValueError for bad splits, or a first dimension that cannot be shared equally, and as `allreduce`;
        HorovodInternalError if ranks disagree or one is lost.
    """
    return _start_alltoall(array, splits, name, process_set, call_site(), caller_waits=True).wait()


def alltoall_async(
    array: Any,
    splits: Iterable[int] | None = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Start what `alltoall` does. Does not block. Returns: a handle for `poll` and `synchronize`."""
    return register(_start_alltoall(array, splits, name, process_set, call_site()))


# ---- barrier


def barrier(process_set: ProcessSet = global_process_set) -> None:
    """Block until all ranks of the process set have called. Operations in flight need not be done then."""
    handle = _enqueue(_core.BARRIER, None, None, None, process_set, call_site(), caller_waits=True)
    try:
        handle.wait()
    except _core.Error as error:
        raise exceptions.HorovodInternalError(str(error)) from None
