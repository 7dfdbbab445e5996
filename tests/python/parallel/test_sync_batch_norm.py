"""SyncBatchNorm on N ranks is BatchNorm on the whole batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import horovod_cpp.torch as hvd

SHAPES = {"rows": (), "signal": (5,), "image": (3, 4)}


def batches(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    """Of all ranks; rank 0 has none if there are several."""
    generator = torch.Generator().manual_seed(seed)
    rows = [0 if rank == 0 and hvd.size() > 1 else 3 + rank for rank in range(hvd.size())]
    return [torch.randn(count, 6, *shape, generator=generator, dtype=torch.float64).to(dtype) * 3 + 7 for count in rows]


def plain(shape: tuple[int, ...], **options: Any) -> torch.nn.Module:
    return {0: torch.nn.BatchNorm1d, 1: torch.nn.BatchNorm1d, 2: torch.nn.BatchNorm2d}[len(shape)](6, **options)


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "cumulative": {"momentum": None},
    "not affine": {"affine": False},
    "no running statistics": {"track_running_stats": False},
}


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("where", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_it_is_batch_norm_of_the_whole_batch(dtype: torch.dtype, where: str, kind: str) -> None:
    shape, options = SHAPES[where], OPTIONS[kind]
    whole = plain(shape, **options).to(dtype)
    layer = hvd.SyncBatchNorm(6, **options).to(dtype)
    if whole.affine:
        with torch.no_grad():
            whole.weight.copy_(torch.linspace(-1, 2, 6))
            whole.bias.copy_(torch.linspace(3, -1, 6))
    layer.load_state_dict(copy.deepcopy(whole.state_dict()))
    near = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 2e-4, "atol": 2e-4}
    for seed in range(3):
        parts = batches(shape, dtype, seed)
        expected_input = torch.cat(parts).requires_grad_()
        own = parts[hvd.rank()].clone().requires_grad_()
        expected, got = whole(expected_input), layer(own)
        first = sum(len(part) for part in parts[: hvd.rank()])
        torch.testing.assert_close(got, expected[first : first + len(own)], **near)
        factor = torch.randn(expected.shape, generator=torch.Generator().manual_seed(99), dtype=dtype)
        (expected * factor).sum().backward()
        (got * factor[first : first + len(own)]).sum().backward()
        torch.testing.assert_close(own.grad, expected_input.grad[first : first + len(own)], **near)
    if whole.affine:
        for name in ("weight", "bias"):
            summed = hvd.allreduce(getattr(layer, name).grad, op=hvd.Sum)
            torch.testing.assert_close(summed, getattr(whole, name).grad, **near)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value, **near)
    layer.eval(), whole.eval()
    if whole.track_running_stats:
        value = torch.randn(4, 6, *shape, dtype=dtype)
        torch.testing.assert_close(layer(value), whole(value), **near)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_normalised_in_single(dtype: torch.dtype) -> None:
    layer = hvd.SyncBatchNorm(6)
    parts = batches((3, 4), dtype)
    got = layer(parts[hvd.rank()])
    assert got.dtype == dtype
    expected = torch.nn.BatchNorm2d(6)(torch.cat(parts).float())
    first = sum(len(part) for part in parts[: hvd.rank()])
    torch.testing.assert_close(got.float(), expected[first : first + len(got)], rtol=2e-2, atol=2e-2)


def test_training_with_it_equals_training_on_one_rank() -> None:
    def network(layer: torch.nn.Module) -> torch.nn.Module:
        torch.manual_seed(3)
        return torch.nn.Sequential(torch.nn.Conv2d(1, 6, 3), layer, torch.nn.Flatten(), torch.nn.Linear(96, 2)).double()

    alone, together = network(torch.nn.BatchNorm2d(6)), network(hvd.SyncBatchNorm(6))
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.05, momentum=0.9)
    distributed = hvd.DistributedOptimizer(
        torch.optim.SGD(together.parameters(), lr=0.05, momentum=0.9), together.named_parameters()
    )
    for step in range(10):
        images = torch.randn(
            4 * hvd.size(), 1, 6, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64
        )
        optimizer.zero_grad()
        alone(images).square().mean().backward()
        optimizer.step()
        distributed.zero_grad()
        together(images.chunk(hvd.size())[hvd.rank()]).square().mean().backward()
        distributed.step()
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(together.state_dict()[name], value, rtol=1e-9, atol=1e-9)


def test_one_collective_each_way() -> None:
    if hvd.size() == 1:
        pytest.skip("nothing is sent")
    layer = hvd.SyncBatchNorm(6)
    value = batches((), torch.float32)[hvd.rank()].requires_grad_()

    def calls() -> int:
        return hvd.statistics()["collective_calls"]

    before = calls()
    output = layer(value)
    assert calls() == before + 1
    output.sum().backward()
    assert calls() == before + 2


def test_bad_input_is_an_error_on_every_rank() -> None:
    layer = hvd.SyncBatchNorm(6)
    with pytest.raises(ValueError, match="at least 2D input"):
        layer(torch.ones(6))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.ones(1 if hvd.rank() == 0 else 0, 6))
    if hvd.size() > 1:
        with pytest.raises(hvd.HorovodInternalError, match="mismatched shape"):
            layer(torch.ones(4, 6 + hvd.rank()))
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == hvd.size()


class HostStops(TorchDispatchMode):
    """Counts what stops the host on a GPU: a number that is read back, and one that a tensor is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += operation in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.lift_fresh.default)
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", OPTIONS)
def test_the_host_does_not_stop_for_numbers_of_the_device(kind: str) -> None:
    layer = hvd.SyncBatchNorm(6, **OPTIONS[kind])
    own = torch.randn(2, 6, requires_grad=True)
    with HostStops() as stops:
        layer(own).sum().backward()
    assert stops.count == 0
    # Too few values are an error, so a rank that has too few looks whether all have.
    if hvd.size() > 1:
        with HostStops() as stops:
            layer(torch.randn(1, 6))
        assert stops.count == 1


@pytest.mark.usefixtures("alone_and_beside_a_stuck_set")
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_input_that_is_not_floating_point_is_refused_as_by_torch(dtype: torch.dtype, training: bool) -> None:
    values = torch.arange(12).reshape(4, 3).to(dtype)
    with pytest.raises(NotImplementedError):
        torch.nn.BatchNorm1d(3).train(training)(values)
    layer = hvd.SyncBatchNorm(3).train(training)
    with pytest.raises(NotImplementedError, match=f"SyncBatchNorm takes floating-point input; this one is of {dtype}"):
        layer(values)
    assert layer.num_batches_tracked == 0
    assert layer(values.real.float()).shape == (4, 3)


@pytest.mark.usefixtures("alone_and_beside_a_stuck_set")
def test_ranks_outside_its_process_set_do_not_count() -> None:
    if hvd.size() < 3:
        pytest.skip("needs a rank outside of a set of two")
    pair = hvd.add_process_set([0, 2])
    members = [0, 2] if hvd.rank() in (0, 2) else [hvd.rank()]
    parts = [torch.full((2 + rank, 6), float(rank), dtype=torch.float64) for rank in range(hvd.size())]
    parts = [part + torch.arange(part.numel(), dtype=torch.float64).reshape(part.shape) ** 2 for part in parts]
    whole = torch.cat([parts[rank] for rank in members]).requires_grad_()
    expected = plain(()).double()(whole)
    own = parts[hvd.rank()].clone().requires_grad_()
    layer = hvd.SyncBatchNorm(6, process_set=pair) if len(members) == 2 else plain(())
    got = layer.double()(own)
    first = sum(len(parts[rank]) for rank in members if rank < hvd.rank())
    torch.testing.assert_close(got, expected[first : first + len(own)], rtol=1e-9, atol=1e-9)
    weights = torch.arange(float(whole.numel()), dtype=torch.float64).reshape(whole.shape)
    (expected * weights).sum().backward()
    (got * weights[first : first + len(own)]).sum().backward()
    assert own.grad is not None and whole.grad is not None
    torch.testing.assert_close(own.grad, whole.grad[first : first + len(own)], rtol=1e-9, atol=1e-9)
    hvd.barrier()
    assert hvd.remove_process_set(pair)
