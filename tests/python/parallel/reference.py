"""What every rank can compute by itself: the inputs of all ranks, and results in double precision."""

from __future__ import annotations

import functools
import operator
import zlib

import torch

import horovod_cpp.torch as hvd

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
DTYPES = [torch.bool, *INTEGERS, *FLOATS]
OPS = {"average": hvd.Average, "sum": hvd.Sum, "min": hvd.Min, "max": hvd.Max, "product": hvd.Product}
SHAPES = [(), (0,), (1,), (17,), (5, 0, 3), (3, 17, 7)]

# Relative to the largest value that a sum of the inputs can have.
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 1e-6, torch.float64: 1e-14}


def rank_input(shape: tuple[int, ...], dtype: torch.dtype, rank: int, key: str = "") -> torch.Tensor:
    """The tensor of one rank. Small integers also in floating point, so that products of four stay in range."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{key}{shape}{dtype}".encode()) + 7919 * rank)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    if dtype == torch.uint8:
        return torch.randint(0, 4, shape, generator=generator).to(dtype)
    if dtype in INTEGERS:
        return torch.randint(-3, 4, shape, generator=generator).to(dtype)
    return (torch.rand(shape, generator=generator, dtype=torch.float64) * 3 - 1.5).to(dtype)


def all_inputs(shape: tuple[int, ...], dtype: torch.dtype, key: str = "") -> list[torch.Tensor]:
    return [rank_input(shape, dtype, rank, key) for rank in range(hvd.size())]


def reduced(inputs: list[torch.Tensor], op: int) -> torch.Tensor:
    """The reduction in float64, or exactly in integers; "or" and "and" for bool."""
    dtype = inputs[0].dtype
    if dtype == torch.bool:
        combine = torch.logical_and if op in (hvd.Min, hvd.Product) else torch.logical_or
        return functools.reduce(combine, inputs)
    wide = [tensor.to(torch.float64 if dtype.is_floating_point else torch.int64) for tensor in inputs]
    if op == hvd.Min:
        return functools.reduce(torch.minimum, wide)
    if op == hvd.Max:
        return functools.reduce(torch.maximum, wide)
    if op == hvd.Product:
        return functools.reduce(operator.mul, wide)
    total = functools.reduce(operator.add, wide)
    if op == hvd.Sum:
        return total
    return total / len(wide) if dtype.is_floating_point else torch.div(total, len(wide), rounding_mode="trunc")


def assert_reduced(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, what: str = "") -> None:
    assert got.dtype == dtype, what
    assert got.shape == expected.shape, what
    if not dtype.is_floating_point:
        assert torch.equal(got, expected.to(dtype)), f"{what}: {got} != {expected}"
        return
    error = (got.double() - expected).abs().max().item() if got.numel() else 0.0
    assert error <= TOLERANCE[dtype] * 6 * hvd.size(), f"{what}: off by {error}"


def assert_same_on_all_ranks(tensor: torch.Tensor) -> None:
    """Bit by bit."""
    rows = hvd.allgather(tensor.detach().reshape(1, -1))
    for row in rows:
        assert torch.equal(row, tensor.reshape(-1))
