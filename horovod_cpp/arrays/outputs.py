"""Results: arrays that are made for them, and memory that the library made, which others adopt without a copy."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any

import numpy

from horovod_cpp import _core
from horovod_cpp.arrays.interfaces import (
    HOST,
    LEGACY_STREAM,
    PER_THREAD_STREAM,
    Place,
    place_on_device,
    typestr_of,
)
from horovod_cpp.common import exceptions

_DLPACK_CUDA = 2
_NO_SYNCHRONIZATION = -1


def stream_for_engine(stream: int) -> int:
    """A stream of the interface as the library takes it, on any of its threads.

    There, the default stream of a thread would be another one. The legacy default stream is in order with those of all
    threads.
    """
    return 0 if stream in (LEGACY_STREAM, PER_THREAD_STREAM) else stream


def stream_may_end(place: Place) -> bool:
    """Whether the stream of an array is one that its owner may destroy.

    Then the library must not work on it: that goes on for a moment after the operation has ended.
    """
    return place.device != HOST and place.stream not in (LEGACY_STREAM, PER_THREAD_STREAM)


def let_wait(handle: _core.Handle, stream: int) -> None:
    """Let a stream of the interface wait for the results of an operation that is done."""
    if stream == PER_THREAD_STREAM:
        handle.stream_wait(stream)  # here it is that of the caller
    handle.stream_wait(stream_for_engine(stream))


class _HostOutput:
    """Memory of the library as numpy adopts it."""

    def __init__(self, handle: _core.Handle, address: int, shape: tuple[int, ...], typestr: str) -> None:
        self._handle = handle
        self.__array_interface__ = {"version": 3, "shape": shape, "typestr": typestr, "data": (address, False)}


class DeviceOutput:
    """An array on a CUDA device, in memory that the library made.

    `cupy.asarray`, `numba.cuda.as_cuda_array`, `torch.as_tensor` and every `from_dlpack` adopt it without a copy. The
    streams that were made to wait for it have to live as long as it does, and as whatever has adopted it.
    """

    def __init__(self, handle: _core.Handle, stream: int) -> None:
        """Args: stream: what has been let wait for the results, as the interface numbers it."""
        self._handle = handle
        self._address, shape, dtype, self._device = handle.output_place(0)
        self._shape = tuple(shape)
        self._typestr = typestr_of(dtype)
        self._stream = LEGACY_STREAM if stream == PER_THREAD_STREAM else stream  # any thread may read this

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of its dimensions."""
        return self._shape

    @property
    def dtype(self) -> numpy.dtype[Any]:
        """The type of its elements."""
        return numpy.dtype(self._typestr)

    @property
    def device(self) -> int:
        """The number of the CUDA device, as this process sees it."""
        return self._device

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "version": 3,
            "shape": self._shape,
            "typestr": self._typestr,
            "data": (0 if 0 in self._shape else self._address, False),
            "strides": None,
            "stream": self._stream,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return _DLPACK_CUDA, self._device

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        """A capsule of the old kind, which every consumer takes. `stream` is made to wait for the results."""
        if copy:
            raise BufferError("a DeviceOutput is given away as it lies: copy it afterwards")
        if dl_device is not None and tuple(dl_device) != self.__dlpack_device__():
            raise BufferError(f"a DeviceOutput on CUDA device {self._device} cannot go to device {dl_device}")
        if stream is None:
            stream = LEGACY_STREAM
        if stream < _NO_SYNCHRONIZATION or stream == 0:
            raise BufferError(f"stream {stream} is none: 1 and 2 are default streams, more is an address")
        if stream != _NO_SYNCHRONIZATION:
            let_wait(self._handle, stream)
        return self._handle.to_dlpack(0)

    def __repr__(self) -> str:
        return f"DeviceOutput(shape={self._shape}, dtype={self.dtype}, device={self._device})"


def like(array: Any, place: Place, label: str) -> Place:
    """Where a new array of the kind, shape and type of `array` lies, whose owner is that array."""
    if place.device == HOST:
        made = numpy.empty_like(place.owner, subok=False)
        return Place(made, made.ctypes.data, place.shape, place.dtype, True, strides=place.strides)
    target = place_on_device(_device_array_like(array, label), label)
    if (target.shape, target.dtype, target.device) != (place.shape, place.dtype, place.device):
        raise ValueError(
            f"{label}: an array like the {type(array).__name__} of shape {place.shape} on CUDA device {place.device} "
            f"came out on device {target.device} with shape {target.shape}: make device {place.device} the current one"
        )
    return target


def _device_array_like(array: Any, label: str) -> Any:
    library = type(array).__module__.partition(".")[0]
    if library == "cupy":
        with getattr(array, "device", contextlib.nullcontext()):
            return importlib.import_module("cupy").empty_like(array, order="C")
    if library == "numba":
        return importlib.import_module("numba.cuda").device_array_like(array)
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__().empty_like(array)
    raise ValueError(
        f"{label}: how to make an array like a {type(array).__name__} is not known; use the form that works in place"
    )


def made_by_library(handle: _core.Handle, stream: int) -> Any:
    """The output that the library made: a numpy array, or a DeviceOutput."""
    address, shape, dtype, device = handle.output_place(0)
    if device != HOST:
        return DeviceOutput(handle, stream)
    if 0 in shape:
        return numpy.empty(shape, typestr_of(dtype))
    return numpy.asarray(_HostOutput(handle, address, tuple(shape), typestr_of(dtype)))


class Pending:
    """An operation on one array in flight. `wait` from any thread, one at a time."""

    __slots__ = ("_handle", "_place", "_result")

    def __init__(self, handle: _core.Handle, place: Place, result: Callable[[_core.Handle], Any]) -> None:
        self._handle = handle
        self._place = place
        self._result = result

    def done(self) -> bool:
        """Whether `wait` would return at once."""
        return self._handle.poll()

    def wait(self) -> Any:
        """Block until the operation is done and return its output. Raises HorovodInternalError if it failed.

        The device is not waited for: the stream that the array named is made to wait for the results.
        """
        try:
            self._handle.wait()
        except _core.Error as error:
            raise exceptions.HorovodInternalError(str(error)) from None
        if self._place.device != HOST:
            let_wait(self._handle, self._place.stream)
        return self._result(self._handle)
