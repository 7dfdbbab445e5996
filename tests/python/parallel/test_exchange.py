"""Alltoall and reducescatter against what every rank can compute by itself, their gradients and their errors."""

from __future__ import annotations

import pytest
import torch
from reference import DTYPES, FLOATS, all_inputs, assert_reduced, rank_input, reduced

import horovod_cpp.torch as hvd


def splits_of(rank: int) -> list[int]:
    """Rows for each rank: uneven, some of them none."""
    return [(rank + 2 * to) % 4 for to in range(hvd.size())]


def rows_of(rank: int, size: int, rows: int) -> slice:
    """The rows that a rank gets of a reducescatter: the first ranks get one more."""
    begin = rank * (rows // size) + min(rank, rows % size)
    return slice(begin, begin + rows // size + (rank < rows % size))


# ---- alltoall


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [(), (3,), (2, 5), (0,)], ids=str)
def test_uneven_splits(dtype: torch.dtype, columns: tuple[int, ...]) -> None:
    inputs = [rank_input((sum(splits_of(rank)), *columns), dtype, rank) for rank in range(hvd.size())]
    tensor = inputs[hvd.rank()]
    output, received = hvd.alltoall(tensor, splits=torch.tensor(splits_of(hvd.rank()), dtype=torch.int32))
    parts = [inputs[rank].split(splits_of(rank))[hvd.rank()] for rank in range(hvd.size())]
    assert output.dtype == dtype and torch.equal(output, torch.cat(parts))
    assert received.dtype == torch.int32
    assert received.tolist() == [splits_of(rank)[hvd.rank()] for rank in range(hvd.size())]


def test_equal_shares_give_the_output_alone() -> None:
    tensor = torch.arange(3 * hvd.size()).reshape(-1, 1) + 100 * hvd.rank()
    output = hvd.alltoall(tensor)
    expected = [100 * rank + 3 * hvd.rank() + i for rank in range(hvd.size()) for i in range(3)]
    assert isinstance(output, torch.Tensor) and output[:, 0].tolist() == expected


def test_other_splits_each_time_are_the_same_agreement() -> None:
    # The first time by its shape, from then on by an id of the response cache.
    before = hvd.statistics()["cache_hits"]
    for turn in range(6):
        splits = [(turn + to) % 3 for to in range(hvd.size())]
        output, received = hvd.alltoall(torch.full((sum(splits) + turn, 2), hvd.rank()), splits, name="turns")
        mine = (turn + hvd.rank()) % 3
        assert received.tolist() == [mine] * hvd.size()
        assert output[:, 0].tolist() == [rank for rank in range(hvd.size()) for _ in range(mine)]
    assert hvd.statistics()["cache_hits"] - before == 5


def test_large_blocks_and_no_rows_at_all() -> None:
    # One rank sends everything, 2 MiB to each; the others send nothing.
    rows = 1 << 19 if hvd.rank() == 0 else 0
    tensor = torch.arange(rows * hvd.size(), dtype=torch.float32)
    output, received = hvd.alltoall(tensor, [rows] * hvd.size())
    assert received.tolist() == [1 << 19] + [0] * (hvd.size() - 1)
    assert torch.equal(output, torch.arange((1 << 19) * hvd.rank(), (1 << 19) * (hvd.rank() + 1), dtype=torch.float32))


def test_async_and_views() -> None:
    tensor = torch.arange(4.0 * hvd.size()).reshape(2, -1).t()  # not contiguous
    handle = hvd.alltoall_async(tensor, [2] * hvd.size(), name="view")
    output, received = hvd.synchronize(handle)
    assert torch.equal(output, tensor[2 * hvd.rank() : 2 * hvd.rank() + 2].repeat(hvd.size(), 1))
    assert received.tolist() == [2] * hvd.size()
    assert hvd.synchronize(handle) is None


def test_complex_rows() -> None:
    tensor = torch.arange(2.0 * hvd.size()) + 1j * hvd.rank()
    output = hvd.alltoall(tensor)
    assert output.tolist() == [complex(2 * hvd.rank() + i, rank) for rank in range(hvd.size()) for i in range(2)]


def test_gradient_goes_back_where_the_rows_came_from() -> None:
    splits = splits_of(hvd.rank())
    tensor = torch.ones(sum(splits) + 1, 2, dtype=torch.float64, requires_grad=True)  # one row goes to nobody
    output, _ = hvd.alltoall(tensor, splits)
    (output * (hvd.rank() + 1)).sum().backward()
    assert tensor.grad is not None
    expected = [to + 1 for to in range(hvd.size()) for _ in range(splits[to])] + [0]
    assert tensor.grad[:, 0].tolist() == expected


def test_bad_splits_are_refused_at_the_call() -> None:
    tensor = torch.zeros(hvd.size())
    with pytest.raises(ValueError, match="alltoall expects a 1D splits tensor"):
        hvd.alltoall(tensor, torch.ones(1, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match="32-bit integer elements"):
        hvd.alltoall(tensor, torch.ones(hvd.size(), dtype=torch.int64))
    with pytest.raises(ValueError, match="Sum of splits entries is greater than the first dimension of tensor"):
        hvd.alltoall(tensor, [2] * hvd.size())
    with pytest.raises(ValueError, match="Number of entries in splits does not equal number of workers"):
        hvd.alltoall(tensor, [1] * (hvd.size() + 1))
    with pytest.raises(ValueError, match="Number of entries in splits does not equal number of workers"):
        hvd.alltoall(tensor, [])
    with pytest.raises(ValueError, match="negative"):
        hvd.alltoall(tensor, [-1] + [0] * (hvd.size() - 1))
    with pytest.raises(ValueError, match="scalar"):
        hvd.alltoall(torch.tensor(1.0), [1] * hvd.size())
    for splits in ([0.5] * hvd.size(), [2**40] * hvd.size(), ["0"] * hvd.size(), [float("inf")] * hvd.size(), 1):
        with pytest.raises(ValueError, match=r"32-bit integer elements \(alltoall 'rows': got "):
            hvd.alltoall(tensor, splits, "rows")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"1D splits tensor \(alltoall 'rows': got 2 dimensions\)"):
        hvd.alltoall(tensor, torch.ones(1, 1, dtype=torch.int32), "rows")
    if hvd.size() > 1:
        with pytest.raises(ValueError, match="not an even multiple of the number of workers"):
            hvd.alltoall(torch.zeros(hvd.size() + 1))
    hvd.barrier()


def test_ranks_that_disagree_are_named() -> None:
    if hvd.size() == 1:
        pytest.skip("one rank agrees with itself")
    dtype = torch.float64 if hvd.rank() == hvd.size() - 1 else torch.float32
    with pytest.raises(hvd.HorovodInternalError, match=rf"alltoall 'odd'.*float64: rank {hvd.size() - 1}"):
        hvd.alltoall(torch.zeros(hvd.size(), dtype=dtype), name="odd")
    columns = 2 if hvd.rank() == 0 else 3
    with pytest.raises(hvd.HorovodInternalError, match=r"shape after the first dimension: \[2\]: rank 0"):
        hvd.alltoall(torch.zeros(hvd.size(), columns), name="odd")
    assert hvd.alltoall(torch.ones(hvd.size()), name="odd").tolist() == [1.0] * hvd.size()


# ---- reducescatter


@pytest.mark.parametrize("op", [hvd.Sum, hvd.Average], ids=["sum", "average"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0,), (1,), (17,), (6, 3), (5, 0, 3), (1013, 7)], ids=str)
def test_reducescatter(op: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    inputs = all_inputs(shape, dtype)
    given = inputs[hvd.rank()].clone()
    output = hvd.reducescatter(given, op=op)
    rows = rows_of(hvd.rank(), hvd.size(), shape[0])
    assert_reduced(output, reduced(inputs, op)[rows], dtype)
    assert torch.equal(given, inputs[hvd.rank()])


def test_reducescatter_of_megabytes_equals_the_rows_of_an_allreduce() -> None:
    tensor = torch.randn(100_003, 11, generator=torch.Generator().manual_seed(hvd.rank()), dtype=torch.float64)
    whole = hvd.allreduce(tensor, op=hvd.Sum)
    part = hvd.reducescatter(tensor, op=hvd.Sum)
    assert torch.allclose(part, whole[rows_of(hvd.rank(), hvd.size(), 100_003)], atol=1e-12)


def test_reducescatter_factors_compression_and_async() -> None:
    tensor = torch.arange(8.0 * hvd.size()) + hvd.rank()
    rows = rows_of(hvd.rank(), hvd.size(), 8 * hvd.size())
    total = sum(torch.arange(8.0 * hvd.size()) + rank for rank in range(hvd.size()))
    scaled = hvd.reducescatter(tensor, op=hvd.Sum, prescale_factor=0.5, postscale_factor=4.0)
    assert torch.equal(scaled, 2.0 * total[rows])
    small = hvd.reducescatter(tensor, compression=hvd.Compression.fp16, op=hvd.Sum)
    assert small.dtype == torch.float32 and torch.equal(small, total[rows])
    handle = hvd.reducescatter_async(tensor, name="later", op=hvd.Sum)
    assert torch.equal(hvd.synchronize(handle), total[rows])


@pytest.mark.parametrize("form", ["alone", "grouped"])
def test_reducescatter_scales_what_is_too_large_to_be_fused(form: str) -> None:
    hvd.barrier()
    hvd.shutdown()
    hvd.init(process_sets="dynamic", options={"fusion_threshold": 1 << 16})
    tensor = torch.arange(50_000.0) % 1000 + hvd.rank()
    options = {"op": hvd.Sum, "prescale_factor": 0.5, "postscale_factor": 4.0}
    part = (
        hvd.grouped_reducescatter([tensor], **options)[0] if form == "grouped" else hvd.reducescatter(tensor, **options)
    )
    total = sum(torch.arange(50_000.0) % 1000 + rank for rank in range(hvd.size()))
    assert torch.equal(part, 2.0 * total[rows_of(hvd.rank(), hvd.size(), 50_000)])
    hvd.barrier()
    hvd.shutdown()


@pytest.mark.parametrize("op", [hvd.Sum, hvd.Average], ids=["sum", "average"])
def test_reducescatter_gradient(op: int) -> None:
    tensor = torch.ones(2 * hvd.size() + 1, 3, dtype=torch.float64, requires_grad=True)
    (hvd.reducescatter(tensor, op=op) * (hvd.rank() + 1)).sum().backward()
    assert tensor.grad is not None
    expected = torch.empty(2 * hvd.size() + 1)
    for rank in range(hvd.size()):
        expected[rows_of(rank, hvd.size(), len(expected))] = rank + 1
    factor = hvd.size() if op == hvd.Sum else 1
    assert torch.equal(tensor.grad[:, 0], factor * expected.double())


def test_reducescatter_refusals() -> None:
    with pytest.raises(ValueError, match="Reducescatter does not support scalar inputs"):
        hvd.reducescatter(torch.tensor(1.0))
    for op in (hvd.Min, hvd.Max, hvd.Product, hvd.Adasum):
        with pytest.raises(hvd.HorovodInternalError, match="Reducescatter currently only supports AVERAGE and SUM"):
            hvd.reducescatter(torch.zeros(4), op=op)
    if hvd.size() > 1:
        rows = 5 if hvd.rank() == 1 else 4
        with pytest.raises(hvd.HorovodInternalError, match=r"mismatched shape: \[4\]: .*; \[5\]: rank 1"):
            hvd.reducescatter(torch.zeros(rows), name="uneven")
    assert hvd.reducescatter(torch.ones(hvd.size()), name="uneven", op=hvd.Sum).tolist() == [float(hvd.size())]


@pytest.mark.usefixtures("alone_and_beside_a_stuck_set")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_both_in_a_part_of_the_ranks(dtype: torch.dtype) -> None:
    if hvd.size() < 3:
        pytest.skip("needs two sets, of which one has two ranks")
    part = hvd.add_process_set([0, 2])
    if hvd.rank() in (0, 2):
        index = (0, 2).index(hvd.rank())
        tensor = torch.arange(5).to(dtype) + hvd.rank()
        assert hvd.reducescatter(tensor, op=hvd.Sum, process_set=part).tolist() == [[2, 4, 6], [8, 10]][index]
        output, received = hvd.alltoall(tensor, [2, 3], process_set=part)
        assert received.tolist() == [[2, 2], [3, 3]][index]
        assert output.tolist() == [[0, 1, 2, 3], [2, 3, 4, 4, 5, 6]][index]
    else:
        with pytest.raises(ValueError, match="is not a member of the provided process set"):
            hvd.alltoall(torch.zeros(2), process_set=part)
    hvd.barrier()
    assert hvd.remove_process_set(part)
