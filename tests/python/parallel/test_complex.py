"""Complex numbers, which ranks reduce part by part."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import horovod_cpp.torch as hvd

DTYPES = [torch.complex64, torch.complex128]


def values(rank: int, dtype: torch.dtype, shape: tuple[int, ...] = (3, 5)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(*shape, 2, generator=generator, dtype=torch.float64).view(*shape, 2).to(
        torch.float32 if dtype == torch.complex64 else torch.float64
    ).view(dtype).squeeze(-1)  # fmt: skip


def total(dtype: torch.dtype) -> torch.Tensor:
    return torch.stack([values(rank, dtype).to(torch.complex128) for rank in range(hvd.size())]).sum(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["plain", "transposed"])
def test_sums_and_averages(layout: str, dtype: torch.dtype) -> None:
    mine = values(hvd.rank(), dtype)
    expected = total(dtype)
    if layout == "transposed":
        mine, expected = mine.t(), expected.t()
    got = hvd.allreduce(mine, op=hvd.Sum)
    assert got.dtype == dtype and got.shape == mine.shape
    torch.testing.assert_close(got.to(torch.complex128), expected, rtol=1e-5, atol=1e-5)
    in_place = mine.clone(memory_format=torch.preserve_format)
    handle = hvd.allreduce_async_(in_place, op=hvd.Average)
    assert hvd.synchronize(handle) is in_place
    torch.testing.assert_close(in_place.to(torch.complex128), expected / hvd.size(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hvd.allreduce(mine.conj(), op=hvd.Sum), got.conj().resolve_conj())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather_and_broadcast(dtype: torch.dtype) -> None:
    shapes = [(rank + 1, 2) for rank in range(hvd.size())]
    gathered = hvd.allgather(values(hvd.rank(), dtype, shapes[hvd.rank()]))
    assert torch.equal(gathered, torch.cat([values(rank, dtype, shapes[rank]) for rank in range(hvd.size())]))
    root = hvd.size() - 1
    assert torch.equal(hvd.broadcast(values(hvd.rank(), dtype), root), values(root, dtype))
    mine = values(hvd.rank(), dtype).t()
    assert hvd.broadcast_(mine, root) is mine
    assert torch.equal(mine, values(root, dtype).t())


def test_gradient_of_a_sum() -> None:
    mine = values(hvd.rank(), torch.complex128).requires_grad_()
    hvd.allreduce(mine, op=hvd.Sum).abs().square().sum().backward()
    torch.testing.assert_close(mine.grad, 2 * hvd.size() * total(torch.complex128))


def test_what_has_no_order_or_no_place_is_refused() -> None:
    for op in (hvd.Min, hvd.Max, hvd.Product):
        with pytest.raises(ValueError, match=r"complex numbers can be summed and averaged only \(allreduce 'c'\)"):
            hvd.allreduce(torch.ones(2, dtype=torch.complex64), name="c", op=op)
    with pytest.raises(ValueError, match=r"^allreduce 'c': a conjugated view"):
        hvd.allreduce_(torch.ones(2, dtype=torch.complex64).conj(), name="c")
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == hvd.size()
    with pytest.raises(hvd.HorovodInternalError, match="scalar"):
        hvd.allgather(torch.ones((), dtype=torch.complex64))
    for gather in (hvd.reducescatter, hvd.alltoall):
        with pytest.raises(ValueError, match="scalar"):
            gather(torch.ones((), dtype=torch.complex64))


def group_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    return [torch.ones(2), tensor]


@pytest.fixture
def needs_several_ranks() -> None:
    if hvd.size() == 1:
        pytest.skip("one rank cannot disagree")


CALLS: dict[str, Callable[[torch.Tensor], object]] = {
    "allreduce": lambda tensor: hvd.allreduce(tensor, name="c", op=hvd.Sum),
    "allgather": lambda tensor: hvd.allgather(tensor, name="c"),
    "broadcast": lambda tensor: hvd.broadcast(tensor, 0, name="c"),
    "reducescatter": lambda tensor: hvd.reducescatter(tensor, name="c", op=hvd.Sum),
    "alltoall": lambda tensor: hvd.alltoall(tensor, name="c"),
    "grouped allreduce": lambda tensor: hvd.grouped_allreduce(group_of(tensor), name="c", op=hvd.Sum)[1],
    "grouped allgather": lambda tensor: hvd.grouped_allgather(group_of(tensor), name="c")[1],
    "grouped reducescatter": lambda tensor: hvd.grouped_reducescatter(group_of(tensor), name="c", op=hvd.Sum)[1],
}


@pytest.mark.usefixtures("needs_several_ranks")
@pytest.mark.parametrize("agreed_before", [0, 1, 4], ids=["new", "remembered", "standing"])
@pytest.mark.parametrize("call", CALLS)
def test_complex_numbers_are_not_the_pairs_that_have_their_memory(call: str, agreed_before: int) -> None:
    """Also where the ranks have agreed about the name before, on what both look like in memory."""
    rows = 2 * hvd.size()
    numbers, pairs = torch.ones(rows, 3, dtype=torch.complex64), torch.ones(rows, 3, 2)
    for _ in range(agreed_before):
        assert CALLS[call](numbers).dtype == torch.complex64
    for _ in range(2):
        with pytest.raises(hvd.HorovodInternalError) as caught:
            CALLS[call](pairs if hvd.rank() == 1 else numbers)
        text = str(caught.value)
        assert re.search(r"mismatched data type: .*complex64: rank", text) and "float32: rank 1 " in text, text
    assert CALLS[call](pairs).dtype == torch.float32
    assert CALLS[call](numbers).dtype == torch.complex64


@pytest.mark.usefixtures("needs_several_ranks")
def test_mismatches_show_complex_numbers_as_the_user_has_them() -> None:
    mine = torch.ones(4 + (hvd.rank() == 1), dtype=torch.complex128)
    with pytest.raises(hvd.HorovodInternalError, match=r"mismatched shape: \[4\]: rank.*; \[5\]: rank 1 "):
        hvd.allreduce(mine, name="c")
    single = torch.ones(4, dtype=torch.complex64 if hvd.rank() == 1 else torch.complex128)
    with pytest.raises(hvd.HorovodInternalError, match=r"complex128: rank.*; complex64: rank 1 "):
        hvd.allgather(single, name="c")


@pytest.mark.parametrize("options", [{}, {"groups": 1}, {"gradient_as_bucket_view": True}], ids=str)
def test_gradients_of_conjugated_parameters(options: dict[str, Any]) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64)) for _ in range(3)]
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=1.0), op=hvd.Sum, **options)
    factor = torch.tensor([[1 + 2j, 3j], [1.0, 0.0]]) * (hvd.rank() + 1)
    uses: list[Callable[[torch.Tensor], torch.Tensor]] = [torch.Tensor.conj, lambda one: one.mH, lambda one: one]
    for _ in range(2):
        optimizer.zero_grad()
        sum((use(one) * factor).sum().real for use, one in zip(uses, parameters, strict=True)).backward()
        alone = factor * (hvd.size() + 1) / 2 * hvd.size() / (hvd.rank() + 1)
        optimizer.synchronize()
        for parameter, wanted in zip(parameters, (alone, alone.t(), alone.conj()), strict=True):
            assert torch.allclose(parameter.grad, wanted)
            assert not parameter.grad.is_conj() or hvd.size() == 1
