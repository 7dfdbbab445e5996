"""Tensors whose elements do not fit an int of 32 bits. Run like tests/python/parallel; a rank takes 3 GB of memory."""

from __future__ import annotations

import torch

import horovod_cpp.torch as hvd

ELEMENTS = 2**31 + 100_003
CHUNK = 1 << 26


def marks() -> torch.Tensor:
    """Places at both ends, in the middle of each half, and around the powers of two where counts overflow."""
    near = torch.arange(-3, 4)
    return torch.cat([
        torch.arange(7), 2**30 + near, ELEMENTS // 2 + near, 2**31 + near, ELEMENTS - 1 - torch.arange(7),
    ])  # fmt: skip


def test_an_allreduce_of_more_than_2_31_elements() -> None:
    torch.set_num_threads(1)
    hvd.init()
    places = marks()
    tensor = torch.full((ELEMENTS,), hvd.rank() + 1, dtype=torch.uint8)
    tensor[places] = torch.arange(len(places), dtype=torch.uint8) + hvd.rank()
    assert hvd.allreduce_(tensor, name="large", op=hvd.Sum) is tensor

    marked = tensor[places].long()
    assert torch.equal(marked, hvd.size() * torch.arange(len(places)) + hvd.size() * (hvd.size() - 1) // 2)
    total = hvd.size() * (hvd.size() + 1) // 2
    tensor[places] = total
    for chunk in tensor.split(CHUNK):
        assert bool((chunk == total).all())
