"""How parameters are cut into buckets, and how their gradients lie there. C++ ranks cut in the same way."""

from __future__ import annotations

import pytest
import torch

from horovod_cpp.torch import buckets
from horovod_cpp.torch.buckets import Bucket, Named, cut, split_by_kind

MIB = 1 << 20


def parameter(mebibytes: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(int(mebibytes * MIB) // dtype.itemsize, dtype=dtype)


def sizes_of(*mebibytes: float) -> list[list[float]]:
    """The buckets of parameters of these sizes."""
    named = [(str(index), parameter(size)) for index, size in enumerate(mebibytes)]
    return [[4 * tensor.numel() / MIB for _, tensor in bucket] for bucket in cut(named)]


def test_the_limits() -> None:
    assert (buckets.FIRST_BUCKET_BYTES, buckets.BUCKET_BYTES, buckets.ALIGNMENT_BYTES) == (MIB, 16 * MIB, 64)


def test_buckets_are_cut_from_the_end_and_the_first_is_small() -> None:
    assert sizes_of() == []
    assert sizes_of(0.25) == [[0.25]]
    assert sizes_of(3, 0.5, 0.5) == [[0.5, 0.5], [3]]
    assert sizes_of(7, 6, 5, 5, 4, 0.75, 0.5) == [[0.5, 0.75], [4, 5, 5, 6], [7]]
    assert sizes_of(1, 100, 2) == [[2], [100], [1]]


def test_each_type_has_buckets_of_its_own() -> None:
    named = [("a", parameter(1)), ("b", parameter(1, torch.float16)), ("c", parameter(0.5)), ("d", parameter(0.5))]
    assert [[name for name, _ in bucket] for bucket in cut(named)] == [["d", "c"], ["b"], ["a"]]
    named = [("a", parameter(0.1)), ("b", parameter(0.1, torch.float16)), ("c", parameter(0.1))]
    assert [[name for name, _ in bucket] for bucket in cut(named)] == [["c", "a"], ["b"]]
    assert [[name for name, _ in part] for part in split_by_kind(named)] == [["a", "c"], ["b"]]


def named_bucket(*tensors: torch.Tensor) -> Bucket:
    members: list[Named] = [(f"p{index}", tensor) for index, tensor in enumerate(tensors)]
    return Bucket(7, members, takes_sparse=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.complex128])
def test_gradients_lie_side_by_side_in_cache_lines_of_their_own(dtype: torch.dtype) -> None:
    tensors = [torch.ones(shape, dtype=dtype) for shape in [(), (0,), (3, 17), (1,), (64,)]]
    bucket = named_bucket(*tensors)
    assert bucket.name == "bucket.7.p0"
    step = 64 // dtype.itemsize
    views = [bucket.view(index) for index in range(len(tensors))]
    assert [view.storage_offset() for view in views] == [
        step * lines for lines in (0, 1, 1, 1 - (-51 // step), 2 - (-51 // step))
    ]
    for index, (view, tensor) in enumerate(zip(views, tensors, strict=True)):
        assert (view.shape, view.stride(), view.dtype) == (tensor.shape, tensor.stride(), dtype)
        view.fill_(index)
    assert all(bool((view == index).all()) for index, view in enumerate(views))


def test_gradients_lie_in_the_order_of_their_parameter() -> None:
    for tensor in (
        torch.empty(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        torch.empty(3, 4).t(),
        torch.empty(2, 1, 3),
    ):
        assert named_bucket(tensor).view(0).stride() == tensor.stride()
    with_gaps = named_bucket(torch.empty(4, 6)[:, ::2]).view(0)
    assert with_gaps.stride() == (3, 1)
    expanded = named_bucket(torch.empty(4, 1).expand(4, 3)).view(0)
    assert sorted(expanded.stride()) in ([1, 3], [1, 4])


def test_the_length_tells_shapes_and_orders_apart() -> None:
    shapes = [(4, 6), (6, 4), (24,), (2, 12)]
    lengths = {named_bucket(torch.empty(shape)).flat.numel() for shape in shapes}
    lengths.add(named_bucket(torch.empty(6, 4).t()).flat.numel())
    assert len(lengths) == 5
    assert all(24 <= length < 32 + 1021 for length in lengths)
