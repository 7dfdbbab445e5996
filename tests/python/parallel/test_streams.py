"""Gradients that hooks make on several streams of a GPU, and that travel as one.

Streams are stand-ins; the data is on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_optimizer import several_ranks

import horovod_cpp.torch as hvd
from horovod_cpp.torch import buckets, operations, reduction, streams

MAIN, SIDE, DEFAULT = 5, 7, 0
WAYS: dict[str, dict[str, Any]] = {
    "group": {"groups": 1},
    "bucket": {"gradient_as_bucket_view": True},
    "bucket of a group": {"groups": 1, "gradient_as_bucket_view": True},
}


class Stream:
    """As torch.cuda.Stream, as far as it is used here."""

    def __init__(self, address: int, log: list[tuple[Any, ...]]) -> None:
        self.address = address
        self._log = log

    def wait_stream(self, other: Stream) -> None:
        self._log.append(("wait", self.address, other.address))


class Device:
    """Lets the reduction take all tensors for those of a GPU, whose current stream the test sets."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.current = MAIN
        self.log: list[tuple[Any, ...]] = []
        for module in (reduction, buckets):
            patch.setattr(module, "place_of", lambda tensor: (0, self.current))
        patch.setattr(streams, "current_stream", lambda device: self.current)
        patch.setattr(torch.cuda, "current_stream", lambda device: Stream(self.current, self.log))
        patch.setattr(torch.cuda, "default_stream", lambda device: Stream(DEFAULT, self.log))
        patch.setattr(torch.cuda, "ExternalStream", self.external)
        patch.setattr(torch.Tensor, "record_stream", lambda _, stream: self.log.append(("record", stream.address)))
        for start in ("start_group", "start_allreduce"):
            patch.setattr(operations, start, self.logged(getattr(operations, start)))

    def external(self, address: int, device: int) -> Stream:
        assert address != 0, "torch would make a new stream"
        return Stream(address, self.log)

    def logged(self, start: Callable[..., Any]) -> Callable[..., Any]:
        def started(*arguments: Any) -> Any:
            self.log.append(("start", self.current))
            return start(*arguments)

        return started

    def kinds(self, *without: str) -> list[tuple[Any, ...]]:
        return [entry for entry in self.log if entry[0] not in without]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    several_ranks()
    return Device(monkeypatch)


class Towers(torch.nn.Module):
    """The hooks of each tower run on its stream; before the optimizer's, as they are older."""

    def __init__(self, device: Device, first: int, second: int) -> None:
        super().__init__()
        self.device = device
        self.towers = torch.nn.ModuleList([torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)])
        for tower, stream in zip(self.towers, (first, second), strict=True):
            for parameter in tower.parameters():
                parameter.register_post_accumulate_grad_hook(lambda _, stream=stream: self.enter(stream))

    def enter(self, stream: int) -> None:
        self.device.current = stream

    def optimizer(self, way: str) -> Any:
        inner = torch.optim.SGD(self.parameters(), lr=0.1)
        return hvd.DistributedOptimizer(inner, self.named_parameters(), **WAYS[way])

    def backward(self, towers: int = 2) -> None:
        inputs = torch.ones(4, 3)
        torch.stack([tower(inputs).sum() for tower in list(self.towers)[:towers]]).sum().backward()
        self.device.current = MAIN


@pytest.mark.parametrize("other", [SIDE, DEFAULT])
@pytest.mark.parametrize("way", WAYS)
def test_the_stream_that_starts_a_reduction_waits_for_those_that_made_its_parts(
    device: Device, way: str, other: int
) -> None:
    model = Towers(device, MAIN, other)
    optimizer = model.optimizer(way)
    for _ in range(2):
        device.log.clear()
        model.backward()
        # Backward comes to the tower that was called first in the end.
        assert device.kinds("record") == [("wait", MAIN, other), ("start", MAIN)]
        records = device.log.count(("record", MAIN))
        assert records == (4 if way == "group" else 0)  # a bucket is no memory of the hooks' streams
        optimizer.step()
        optimizer.zero_grad()
        assert len(device.log) == 2 + records


@pytest.mark.parametrize("way", WAYS)
def test_one_stream_waits_for_none(device: Device, way: str) -> None:
    model = Towers(device, SIDE, SIDE)
    optimizer = model.optimizer(way)
    model.backward()
    optimizer.step()
    assert device.log == [("start", SIDE)]


@pytest.mark.parametrize("way", WAYS)
def test_what_synchronize_starts_waits_for_the_hooks_too(device: Device, way: str) -> None:
    model = Towers(device, SIDE, SIDE)
    optimizer = model.optimizer(way)
    model.backward(towers=1)
    assert device.log == []
    optimizer.step()
    assert device.kinds("record") == [("wait", MAIN, SIDE), ("start", MAIN)]
