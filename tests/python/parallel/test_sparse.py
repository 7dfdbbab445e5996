"""Sparse tensors and sparse gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import horovod_cpp.torch as hvd


def entries(rank: int, dtype: torch.dtype, width: int | None) -> torch.Tensor:
    """A tensor of 20 rows of which this rank has some, one of them twice."""
    generator = torch.Generator().manual_seed(rank)
    count = 3 * rank  # rank 0 has none
    rows = torch.randint(0, 20, (count,), generator=generator)
    rows = torch.cat([rows, rows[:1]])
    values = torch.randint(-9, 10, (len(rows),) if width is None else (len(rows), width), generator=generator).to(dtype)
    shape = (20,) if width is None else (20, width)
    return torch.sparse_coo_tensor(rows.unsqueeze(0), values, shape, check_invariants=True)


@pytest.mark.parametrize("op", ["average", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64], ids=str)
@pytest.mark.parametrize("width", [None, 5])
def test_a_sparse_sum_is_the_sum_of_the_dense_tensors(width: int | None, dtype: torch.dtype, op: str) -> None:
    mine = entries(hvd.rank(), dtype, width)
    finish = hvd.sparse_allreduce_async(mine, f"sparse.{width}.{dtype}.{op}", getattr(hvd, op.capitalize()))
    got = finish()
    total = sum((entries(rank, torch.float64, width).to_dense() for rank in range(hvd.size())), torch.zeros(()))
    if op == "sum":
        assert torch.equal(got.to_dense(), total.to(dtype))
    elif dtype.is_floating_point:
        assert torch.allclose(got.to_dense(), (total / hvd.size()).to(dtype))
    assert got.layout is torch.sparse_coo and got.dtype == dtype and got.shape == mine.shape


def test_what_is_not_sparse_or_cannot_be_added_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sparse allreduce 'd' takes COO tensors"):
        hvd.sparse_allreduce_async(torch.ones(3), "d", hvd.Sum)
    with pytest.raises(ValueError, match="op must be Average or Sum"):
        hvd.sparse_allreduce_async(torch.ones(3).to_sparse(), "d", hvd.Max)
    with pytest.raises(ValueError, match=r"is not supported\. \(sparse allreduce 'd': dtype torch\.uint16"):
        hvd.sparse_allreduce_async(one_entry(0, (3,), torch.uint16), "d", hvd.Sum)


def refused_on_every_rank(mine: torch.Tensor, name: str, op: int, expected: str) -> None:
    """The operation ends with a text that all ranks have alike, and the job goes on."""
    with pytest.raises(hvd.HorovodInternalError, match=expected) as caught:
        hvd.sparse_allreduce_async(mine, name, op)()
    assert len(set(hvd.allgather_object(str(caught.value)))) == 1
    zeros = hvd.sparse_allreduce_async(torch.zeros(3).to_sparse(), name, hvd.Average)()
    assert torch.equal(zeros.to_dense(), torch.zeros(3))


def one_entry(index: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    values = torch.ones((1, *shape[1:]), dtype=dtype)
    return torch.sparse_coo_tensor(torch.tensor([[index]]), values, shape, check_invariants=True)


def others() -> str:
    return "rank 1" if hvd.size() == 2 else f"ranks 1-{hvd.size() - 1}"


def test_shapes_that_differ_are_an_error_on_every_rank() -> None:
    if hvd.size() == 1:
        pytest.skip("one rank cannot disagree")
    here = r" \(.*test_sparse\.py:\d+\)"
    first = hvd.rank() == 0
    refused_on_every_rank(
        one_entry(2 if first else 4, (3,) if first else (5,)),
        "lengths",
        hvd.Sum,
        rf"^sparse allreduce 'lengths': mismatched shape: \[3\]: rank 0{here}; \[5\]: {others()}{here}$",
    )
    refused_on_every_rank(
        one_entry(1, (3, 2) if first else (3, 4)), "widths", hvd.Sum,
        rf"^sparse allreduce 'widths': mismatched shape: \[3, 2\]: rank 0{here}; \[3, 4\]: {others()}{here}$",
    )  # fmt: skip


def test_ops_dtypes_and_kinds_of_dimensions_that_differ_are_an_error_on_every_rank() -> None:
    if hvd.size() == 1:
        pytest.skip("one rank cannot disagree")
    first = hvd.rank() == 0
    refused_on_every_rank(
        one_entry(0, (3,)), "ops", hvd.Sum if first else hvd.Average,
        r"'ops': mismatched reduction: Sum: rank 0 .*; Average: rank",
    )  # fmt: skip
    refused_on_every_rank(
        one_entry(0, (3,), torch.float32 if first else torch.complex64), "dtypes", hvd.Sum,
        r"'dtypes': mismatched data type: float32: rank 0 .*; complex64: rank",
    )  # fmt: skip
    refused_on_every_rank(
        torch.ones(2, 2).to_sparse(2 if first else 1), "hybrid", hvd.Sum,
        r"'hybrid': mismatched number of sparse dimensions: 2: rank 0 .*; 1: rank",
    )  # fmt: skip
    refused_on_every_rank(
        one_entry(0, (3,), torch.int64) if first else one_entry(0, (4, 2)), "all", hvd.Average if first else hvd.Sum,
        r"'all': mismatched data type: int64: .*; float32: .*; mismatched shape: .*; mismatched reduction: Average: ",
    )  # fmt: skip


@pytest.mark.usefixtures("alone_and_beside_a_stuck_set")
def test_a_process_set_names_global_ranks() -> None:
    if hvd.size() < 3:
        pytest.skip("a process set of some ranks")
    ends = hvd.add_process_set([0, hvd.size() - 1])
    if ends.included():
        op = hvd.Sum if hvd.rank() == hvd.size() - 1 else hvd.Average
        with pytest.raises(hvd.HorovodInternalError, match=rf"Average: rank 0 .*; Sum: rank {hvd.size() - 1} "):
            hvd.sparse_allreduce_async(one_entry(0, (3,)), "set", op, ends)()
        mean = hvd.sparse_allreduce_async(one_entry(0, (3,)), "set", hvd.Average, ends)()
        assert mean.to_dense().tolist() == [1, 0, 0]
    hvd.barrier()
    assert hvd.remove_process_set(ends)


def test_another_group_by_the_name_is_an_error() -> None:
    if hvd.size() == 1:
        pytest.skip("one rank cannot disagree")
    if hvd.rank() == 0:
        bytes_ = torch.zeros(3, dtype=torch.uint8)
        hvd.grouped_allgather([bytes_, torch.zeros(3, dtype=torch.int64), bytes_], name="stranger")
    else:
        with pytest.raises(hvd.HorovodInternalError, match=r"^sparse allreduce 'stranger': a rank has another"):
            hvd.sparse_allreduce_async(one_entry(0, (3,)), "stranger", hvd.Sum)()
    assert hvd.allreduce(torch.ones(()), op=hvd.Sum) == hvd.size()


@pytest.mark.parametrize("index", [3, 100, -1])
def test_an_index_outside_is_an_error_on_every_rank(index: int) -> None:
    """Of a tensor whose user had torch check nothing."""
    bad = torch.sparse_coo_tensor(torch.tensor([[index]]), torch.ones(1), (3,), check_invariants=False)
    bad = bad if hvd.rank() == hvd.size() - 1 else one_entry(0, (3,))
    refused_on_every_rank(
        bad, "outside", hvd.Sum, r"^sparse allreduce 'outside': a rank has a bad index: .*(found index|negative)"
    )


class Operations(TorchDispatchMode):
    """The names of torch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(operation.name())
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("width", [None, 5])
def test_the_host_reads_once(width: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it waits for that; torch's check of the indices would read them, too."""
    readings = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: [readings.append(1), tolist(tensor)][1])
    finish = hvd.sparse_allreduce_async(entries(hvd.rank(), torch.float32, width), f"once.{width}", hvd.Average)
    with Operations() as operations:
        finish()
    assert len(readings) == 1
    assert not {"aten::_local_scalar_dense", "aten::min.dim", "aten::max.dim"} & set(operations.names)


@pytest.mark.parametrize("shape", [(0,), (4,), (0, 3), (4, 0)])
def test_nothing_adds_up_to_nothing(shape: tuple[int, ...]) -> None:
    got = hvd.sparse_allreduce_async(torch.zeros(shape).to_sparse(1), f"nothing.{shape}", hvd.Average)()
    assert got.shape == shape and torch.equal(got.to_dense(), torch.zeros(shape))


def test_a_scalar_is_a_sparse_tensor_too() -> None:
    got = hvd.sparse_allreduce_async(torch.tensor(hvd.rank() + 1.0).to_sparse(), "scalar", hvd.Sum)()
    assert got.to_dense().item() == hvd.size() * (hvd.size() + 1) / 2


def test_complex_numbers_have_averages() -> None:
    mine = torch.tensor([0, complex(hvd.rank(), 1), 0]).to_sparse().conj()
    got = hvd.sparse_allreduce_async(mine, "complex", hvd.Average)()
    torch.testing.assert_close(got.to_dense(), torch.tensor([0, complex((hvd.size() - 1) / 2, -1), 0]))


@pytest.mark.parametrize("op", ["average", "sum"])
def test_bools_are_or(op: str) -> None:
    mine = torch.zeros(hvd.size() + 1, dtype=torch.bool)
    mine[hvd.rank()] = True
    got = hvd.sparse_allreduce_async(mine.to_sparse(), f"bool.{op}", getattr(hvd, op.capitalize()))()
    assert got.dtype == torch.bool and got.to_dense().tolist() == [True] * hvd.size() + [False]


class Embedder(torch.nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embedding = torch.nn.EmbeddingBag(30, 4, mode="sum", sparse=sparse, dtype=torch.float64)
        self.rare = torch.nn.EmbeddingBag(10, 4, mode="sum", sparse=sparse, dtype=torch.float64)
        self.linear = torch.nn.Linear(4, 2, dtype=torch.float64)

    def forward(self, words: torch.Tensor, use_rare: bool) -> torch.Tensor:
        hidden = self.embedding(words)
        return self.linear(hidden + self.rare(words % 10) if use_rare else hidden)


@pytest.mark.parametrize("sparse_as_dense", [False, True])
@pytest.mark.parametrize("passes", [1, 2])
def test_embeddings_train_as_on_one_rank(sparse_as_dense: bool, passes: int) -> None:
    alone, together = Embedder(sparse=False), Embedder(sparse=True)
    plain = torch.optim.SGD(alone.parameters(), lr=0.1)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(together.parameters(), lr=0.1),
        together.named_parameters(),
        backward_passes_per_step=passes,
        sparse_as_dense=sparse_as_dense,
    )
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        plain.zero_grad()
        optimizer.zero_grad()
        for _ in range(passes):
            words = torch.randint(0, 30, (4 * hvd.size(), 6), generator=generator)
            # In some steps one rank has no gradient of the second embedding.
            used = [step % 2 == 0 or rank > 0 or hvd.size() == 1 for rank in range(hvd.size())]
            for rank, part in enumerate(words.chunk(hvd.size())):
                (alone(part, used[rank]).square().mean() / hvd.size()).backward()
            together(words.chunk(hvd.size())[hvd.rank()], used[hvd.rank()]).square().mean().backward()
        plain.step()
        optimizer.step()
    for (name, expected), (_, got) in zip(alone.named_parameters(), together.named_parameters(), strict=True):
        assert torch.allclose(got, expected, rtol=1e-9, atol=1e-9), name


def test_sparse_adam() -> None:
    together = Embedder(sparse=True)
    make: Callable[..., torch.optim.Optimizer] = torch.optim.SparseAdam
    optimizer = hvd.DistributedOptimizer(
        make([together.embedding.weight], lr=0.01), [("embedding.weight", together.embedding.weight)]
    )
    for step in range(3):
        words = torch.randint(0, 30, (4, 6), generator=torch.Generator().manual_seed(10 * step + hvd.rank()))
        together(words, False).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for other in hvd.allgather_object(together.embedding.weight.detach()):
        assert torch.equal(other, together.embedding.weight)


def test_a_sparse_gradient_has_no_maximum() -> None:
    if hvd.size() == 1:
        pytest.skip("nothing is reduced")
    together = Embedder(sparse=True)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD([together.embedding.weight], lr=0.1), [("max.weight", together.embedding.weight)], op=hvd.Max
    )
    with pytest.raises(ValueError, match=r"'max\.weight': op must be Average or Sum"):
        together(torch.zeros(2, 3, dtype=torch.int64), False).sum().backward()
    del optimizer  # with it, the hooks
