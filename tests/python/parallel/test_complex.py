"""Complex numbers, which travel as pairs of real ones."""

from __future__ import annotations

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
