"""Where an array lies: what `__cuda_array_interface__` (version 3) and `__array_interface__` say, checked.

The stream of a device array is that of its producer, and of whoever uses the result: 1 is the legacy default stream, 2
the default stream of the calling thread, another number the address of a stream. None asks for no order; the legacy
default stream then stands in for it, which has the order of all streams but those made as non-blocking ones.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy

from horovod_cpp import _core
from horovod_cpp.common import exceptions

HOST = -1
"""The number of the device that is none."""

LEGACY_STREAM = 1
PER_THREAD_STREAM = 2

_NATIVE = "<" if sys.byteorder == "little" else ">"
_DTYPES = {
    "u1": _core.UINT8,
    "i1": _core.INT8,
    "i2": _core.INT16,
    "i4": _core.INT32,
    "i8": _core.INT64,
    "f2": _core.FLOAT16,
    "f4": _core.FLOAT32,
    "f8": _core.FLOAT64,
    "b1": _core.BOOL,
    "c8": _core.COMPLEX64,
    "c16": _core.COMPLEX128,
}
_TYPESTRS = {dtype: ("|" if kind[1:] == "1" else _NATIVE) + kind for kind, dtype in _DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an array lies. Valid as long as `owner` is."""

    owner: Any
    address: int
    shape: tuple[int, ...]
    dtype: int
    writable: bool
    device: int = HOST
    stream: int = LEGACY_STREAM
    strides: tuple[int, ...] | None = None  # in elements; None: C order


def typestr_of(dtype: int) -> str:
    """The data type of the library as the interfaces write it."""
    return _TYPESTRS[dtype]


def is_on_device(array: Any) -> bool:
    """Whether an array says that it lies in the memory of a CUDA device."""
    return hasattr(array, "__cuda_array_interface__")


def place_on_device(array: Any, label: str) -> Place:
    """Where a device array lies. `label` names the operation in errors, which are ValueErrors."""
    interface = array.__cuda_array_interface__
    shape, typestr, address, read_only = _read(interface, array, label)
    dtype = _dtype_of(typestr, array, shape, label)
    strides = interface.get("strides")
    if strides is not None and not _is_c_order(shape, strides, int(typestr[2:])):
        raise _error(
            array, shape, label, f"is not contiguous (strides {tuple(strides)}): make a contiguous copy, and use that"
        )
    if address == 0 and 0 not in shape:
        raise _error(array, shape, label, "comes without memory")
    device = _device_of(address, array, shape, label) if address != 0 else _device_without_memory(array)
    return Place(array, address, shape, dtype, not read_only, device, _stream_of(interface, array, shape, label))


def place_on_host(array: Any, label: str) -> Place:
    """Where an array in host memory lies; its owner is a numpy array over that memory. Its strides are not checked."""
    if isinstance(array, numpy.ma.MaskedArray):
        raise _error(array, array.shape, label, "has a mask, which the library cannot respect")
    if not isinstance(array, numpy.ndarray):
        interface = getattr(array, "__array_interface__", None)
        if interface is None:
            raise ValueError(
                f"{label}: a {type(array).__name__} is no array: it has neither __cuda_array_interface__ nor "
                "__array_interface__"
            )
        _read(interface, array, label)
    source = numpy.asarray(array)
    dtype = _dtype_of(source.dtype.str, array, source.shape, label)
    # A scalar of numpy has no memory of its own to write to: what asarray made is a copy.
    writable = source.flags.writeable and not isinstance(array, numpy.generic)
    strides = None
    if not source.flags.c_contiguous:
        strides = tuple(stride // source.itemsize for stride in source.strides)
    return Place(source, source.ctypes.data, source.shape, dtype, writable, strides=strides)


def require_writable(place: Place, array: Any, label: str) -> None:
    """ValueError for memory that its owner calls read-only."""
    if not place.writable:
        raise _error(array, place.shape, label, "is read-only, and cannot be the output")


def _error(array: Any, shape: Sequence[int], label: str, problem: str) -> ValueError:
    return ValueError(f"{label}: the {type(array).__name__} of shape {tuple(shape)} {problem}")


def _read(interface: Any, array: Any, label: str) -> tuple[tuple[int, ...], str, int, bool]:
    """Shape, typestr, address and whether it is read-only."""
    if not isinstance(interface, Mapping):
        raise ValueError(f"{label}: the interface of a {type(array).__name__} is no dictionary: {interface!r}")
    try:
        shape = tuple(int(size) for size in interface["shape"])
        typestr = str(interface["typestr"])
        data = interface.get("data")
        address, read_only = (0, True) if data is None else (int(data[0] or 0), bool(data[1]))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{label}: the interface of a {type(array).__name__} is not complete: {error!r}") from None
    if interface.get("mask") is not None:
        raise _error(array, shape, label, "has a mask, which the library cannot respect")
    return shape, typestr, address, read_only


def _dtype_of(typestr: str, array: Any, shape: Sequence[int], label: str) -> int:
    match = re.fullmatch(r"([<>|=])(\w+)", typestr)
    dtype = _DTYPES.get(match[2]) if match else None
    if match is None or dtype is None:
        raise _error(
            array, shape, label, f"has elements of type {typestr!r}; supported are {', '.join(_TYPESTRS.values())}"
        )
    if match[1] in "<>" and match[1] != _NATIVE and not match[2].endswith("1"):
        raise _error(array, shape, label, f"has its bytes in the order of other machines ({typestr!r}): convert it")
    return dtype


def _is_c_order(shape: Sequence[int], strides: Sequence[int], element_bytes: int) -> bool:
    expected = element_bytes
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size == 0:
            return True
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _stream_of(interface: Mapping[str, Any], array: Any, shape: Sequence[int], label: str) -> int:
    stream = interface.get("stream")
    if stream is None:
        return LEGACY_STREAM
    if isinstance(stream, bool) or not isinstance(stream, int) or stream <= 0:
        raise _error(
            array, shape, label, f"names the stream {stream!r}: 1 and 2 are default streams, more is an address"
        )
    return stream


def _device_without_memory(array: Any) -> int:
    return int(array.__dlpack_device__()[1]) if hasattr(array, "__dlpack_device__") else 0


def _device_of(address: int, array: Any, shape: Sequence[int], label: str) -> int:
    try:
        return _core.cuda_device_of(address)
    except _core.Error as error:
        if error.code == _core.INVALID_ARGUMENT:
            raise _error(array, shape, label, f"is said to lie on a CUDA device, but: {error}") from None
        raise exceptions.operation_error(error) from None
