"""Operations in flight: what they are waited for by, and what comes out.

Any thread; one wait at a time for each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Protocol

import torch
from torch.utils.dlpack import from_dlpack

from horovod_cpp import _core
from horovod_cpp.common import exceptions
from horovod_cpp.torch.streams import HOST, ON_HOST, Place, current_stream


class HasParts(Protocol):
    """One or several operations in flight."""

    def parts(self) -> tuple[Operation, ...]:
        """The operations that make it up."""


class Operation:
    """One operation of the library in flight.

    On a CUDA device it is done once its work is in line there; `finish` lets the current stream wait for the results,
    and does not wait for the device.
    """

    __slots__ = ("_device", "_handle", "_stream", "_waiting_stream")

    def __init__(self, handle: _core.Handle, place: Place = ON_HOST) -> None:
        self._handle = handle
        self._device, self._stream = place
        self._waiting_stream: int | None = None

    def parts(self) -> tuple[Operation, ...]:
        """The operations that make it up."""
        return (self,)

    def done(self) -> bool:
        """Whether `wait` would return at once."""
        return self._handle.poll()

    def finish(self) -> None:
        """Block until it is done. Raises HorovodInternalError if it failed."""
        try:
            self._handle.wait()
        except _core.Error as error:
            raise exceptions.HorovodInternalError(str(error)) from None
        if self._device != HOST:
            stream = current_stream(self._device)
            if stream != self._waiting_stream:
                self._handle.stream_wait(stream)
                self._waiting_stream = stream

    def claim(self, tensor: torch.Tensor) -> None:
        """After `finish`: the current stream uses `tensor`, whose memory may be in the care of another one."""
        if self._device != HOST and self._waiting_stream != self._stream:
            # It would be given out again in the order of the stream that it was made on.
            tensor.record_stream(torch.cuda.current_stream(self._device))


class Pending(Operation):
    """An operation on one tensor. `wait` may be called once it is needed, from any thread, one at a time."""

    __slots__ = ("_copy_to", "_output")

    def __init__(
        self, handle: _core.Handle, place: Place, output: torch.Tensor | None, copy_to: torch.Tensor | None
    ) -> None:
        self._handle = handle  # as Operation.__init__, which costs a tenth of a microsecond to call
        self._device, self._stream = place
        self._waiting_stream = None
        self._output = output  # None: the library makes the output
        self._copy_to = copy_to

    def given(self) -> torch.Tensor:
        """The tensor that is reduced in place."""
        given = self._output if self._copy_to is None else self._copy_to
        assert given is not None
        return given

    def wait(self) -> torch.Tensor:
        """Block until the operation is done and return its output. Raises HorovodInternalError if it failed."""
        self.finish()
        if self._output is None:
            return from_dlpack(self._handle.to_dlpack(0))
        self.claim(self._output)
        if self._copy_to is None:
            return self._output
        with torch.no_grad():
            return self._copy_to.copy_(self._output)


@dataclasses.dataclass
class GroupPlace:
    """Where one tensor of a group is read and written."""

    dtype: int
    source: torch.Tensor
    target: torch.Tensor | None  # None: the library makes the output
    copy_to: torch.Tensor | None
    strides: tuple[int, ...] | None  # of source and target; None: they are contiguous

    def member(self) -> tuple[int, torch.Size, int, int, tuple[int, ...] | None]:
        """Dtype, shape, the addresses of input and output, and strides, as the library takes them."""
        target = self.source if self.target is None else self.target
        return self.dtype, self.source.shape, self.source.data_ptr(), target.data_ptr(), self.strides

    def result(self, handle: _core.Handle, index: int) -> torch.Tensor:
        """The output of tensor number `index` of an operation that is done."""
        output = from_dlpack(handle.to_dlpack(index)) if self.target is None else self.target
        if self.copy_to is not None:
            with torch.no_grad():
                output = self.copy_to.copy_(output)
        return output


class PendingGroup(Operation):
    """An operation on several tensors, done for all of them or for none."""

    __slots__ = ("_places",)

    def __init__(self, handle: _core.Handle, place: Place, places: list[GroupPlace]) -> None:
        super().__init__(handle, place)
        self._places = places

    def wait(self) -> list[torch.Tensor]:
        """Block until the operation is done and return its outputs. Raises HorovodInternalError if it failed."""
        self.finish()
        for place in self._places:
            if place.target is not None:
                self.claim(place.target)
        return [place.result(self._handle, index) for index, place in enumerate(self._places)]


class PendingAlltoall(Operation):
    """An alltoall in flight."""

    __slots__ = ("_with_splits",)

    def __init__(self, handle: _core.Handle, place: Place, with_splits: bool) -> None:
        super().__init__(handle, place)
        self._with_splits = with_splits

    def wait(self) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Block until it is done; the output, and with given splits the rows that came from each rank (int32)."""
        self.finish()
        output = from_dlpack(self._handle.to_dlpack(0))
        return (output, self.received_splits()) if self._with_splits else output

    def received_splits(self) -> torch.Tensor:
        """After `wait`."""
        return torch.tensor(self._handle.received_splits(), dtype=torch.int32)


def wait_all(pending: Iterable[HasParts]) -> None:
    """Block until all are done, be it well or with an error; then `wait` returns at once."""
    parts = [part for one in pending for part in one.parts()]
    _core.wait_all([part._handle for part in parts])
    for device in {part._device for part in parts if part._device != HOST}:
        stream = current_stream(device)
        on_device = [part for part in parts if part._device == device]
        _core.streams_wait([part._handle for part in on_device], stream)
        for part in on_device:
            part._waiting_stream = stream
