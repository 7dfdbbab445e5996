"""Buckets: which parameters share one, and the memory that their gradients are views of.

Communicates nothing. The thread of the caller; each optimizer has buckets of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from horovod_cpp import _core
from horovod_cpp.common.process_sets import ProcessSet, global_process_set
from horovod_cpp.torch.pending import Pending
from horovod_cpp.torch.streams import Place, place_of

FIRST_BUCKET_BYTES = _core.FIRST_BUCKET_BYTES
BUCKET_BYTES = _core.BUCKET_BYTES
ALIGNMENT_BYTES = _core.BUCKET_ALIGNMENT_BYTES

Named = tuple[str, torch.Tensor]
Kind = tuple[torch.dtype, torch.device]


class Placement(NamedTuple):
    """How one gradient lies in its bucket, in elements."""

    shape: torch.Size
    strides: tuple[int, ...]
    offset: int


class Bucket:
    """Gradients that lie one behind the other in one tensor, which is reduced as a whole, in place."""

    __slots__ = (
        "_addresses",
        "_elements",
        "_kind",
        "_placements",
        "_views",
        "context",
        "flat",
        "name",
        "pending",
        "process_set",
        "producers",
        "ready",
        "takes_sparse",
    )

    def __init__(
        self,
        number: int,
        members: list[Named],
        takes_sparse: bool,
        process_set: ProcessSet = global_process_set,
    ) -> None:
        parameters = [parameter for _, parameter in members]
        self._kind = _kind(parameters[0])
        self._placements, self._elements = _placements(parameters)
        self.name = f"bucket.{number}.{members[0][0]}"
        self.process_set = process_set
        self.takes_sparse = takes_sparse  # whether sparse gradients are made dense
        self.ready = 0  # how many gradients are in their places
        self.producers: set[Place] = set()  # what put them there: each hook runs on the stream of its forward
        self.pending: Pending | None = None
        self.context: Any = None  # what the compressor wants back
        self._allocate()

    def _allocate(self) -> None:
        dtype, device = self._kind
        with torch.inference_mode(False):
            # Zeros: what is between the gradients is reduced, too.
            self.flat = torch.zeros(self._elements, dtype=dtype, device=device)
            self._views = [_view(self.flat, placement) for placement in self._placements]
        self._addresses = [view.data_ptr() for view in self._views]

    def view(self, place: int) -> torch.Tensor:
        """The gradient in that place.

        Who sets the `data` of a gradient, as `Module.to` does, takes it out of the bucket; then there is a new one.
        """
        if self._views[place].data_ptr() != self._addresses[place]:
            self._views[place] = _view(self.flat, self._placements[place])
        return self._views[place]

    def count_ready(self) -> bool:
        """Count one more gradient that is in its place; whether it was the last. Hooks may run on several threads."""
        self.producers.add(place_of(self.flat))
        self.ready = ready = self.ready + 1
        return ready == len(self._placements)

    def reset(self) -> None:
        """Forget what is in flight. What still is keeps the memory; later gradients get another.

        On a GPU an operation that is done may still be at work, and nobody has made a stream wait for it.
        """
        if self.pending is not None and (self.flat.is_cuda or not all(part.done() for part in self.pending.parts())):
            self._allocate()
        self.pending = self.context = None
        self.ready = 0
        self.producers.clear()


def cut(members: Iterable[Named]) -> list[list[Named]]:
    """Cut parameters, in the order of the optimizer, into buckets: those that backward reaches first come first.

    Each has one dtype and device, and is full once it has BUCKET_BYTES; the first of each kind FIRST_BUCKET_BYTES.
    """
    buckets: list[list[Named]] = []
    open_ones: dict[Kind, tuple[list[Named], int]] = {}
    limits: dict[Kind, int] = {}
    for member in reversed(list(members)):
        kind = _kind(member[1])
        if kind not in open_ones:
            buckets.append([])
            open_ones[kind] = buckets[-1], 0
        bucket, size = open_ones[kind]
        bucket.append(member)
        size += member[1].numel() * member[1].element_size()
        if size < limits.get(kind, FIRST_BUCKET_BYTES):
            open_ones[kind] = bucket, size
        else:
            del open_ones[kind]
            limits[kind] = BUCKET_BYTES
    return buckets


def split_by_kind(members: Iterable[Named]) -> list[list[Named]]:
    """The members in parts of one dtype and device each, in their order."""
    parts: dict[Kind, list[Named]] = {}
    for member in members:
        parts.setdefault(_kind(member[1]), []).append(member)
    return list(parts.values())


def _kind(parameter: torch.Tensor) -> Kind:
    return parameter.dtype, parameter.device


def _view(flat: torch.Tensor, placement: Placement) -> torch.Tensor:
    """A part of the memory of `flat`. To autograd it is no view: these cannot be detached in place, as programs do."""
    return flat.new_empty(0).set_(flat.untyped_storage(), placement.offset, placement.shape, placement.strides)


def _placements(parameters: list[torch.Tensor]) -> tuple[list[Placement], int]:
    """Where each gradient lies, and how many elements there are in all."""
    placements, end = [], 0
    step = ALIGNMENT_BYTES // parameters[0].element_size()
    for parameter in parameters:
        # Torch's own choice of strides: the parameter's where these have no gaps, so that the optimizer's kernels see
        # both in one order.
        strides = torch.empty_like(parameter.detach(), device="meta").stride()
        placements.append(Placement(parameter.shape, strides, end))
        end += -(-parameter.numel() // step) * step
    return placements, end + _tail(placements)


def _tail(placements: list[Placement]) -> int:
    """How many elements follow the last gradient.

    A bucket travels as one row of numbers, of which ranks compare the length only: a number made of all shapes and
    memory orders lets ranks that differ in these meet an error, all but one time in a thousand.
    """
    text = ";".join(f"{','.join(map(str, placement.shape))}/{_order(placement)}" for placement in placements)
    return _fnv1a(text) % 1021


def _order(placement: Placement) -> str:
    """The dimensions from the slowest in memory to the fastest, without those of size 1."""
    if placement.shape.numel() == 0:
        return ""
    counted = [dimension for dimension, size in enumerate(placement.shape) if size != 1]
    return ",".join(map(str, sorted(counted, key=lambda dimension: -placement.strides[dimension])))


def _fnv1a(text: str) -> int:
    """The hash of Fowler, Noll and Vo in 32 bits: short, and the same in C++."""
    value = 0x811C9DC5
    for byte in text.encode():
        value = (value ^ byte) * 0x01000193 & 0xFFFFFFFF
    return value
