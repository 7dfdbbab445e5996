"""Grouped, sparse and differentiable forms in a part of the ranks, while others do the same in another part."""

from __future__ import annotations

import pytest
import torch
from reference import OPS, all_inputs, assert_reduced, reduced
from test_process_sets import Sets, mine
from test_sparse import entries

import horovod_cpp.torch as hvd

pytestmark = pytest.mark.usefixtures("alone_and_beside_a_stuck_set")


def members() -> list[int]:
    return list(range(hvd.rank() % 2, hvd.size(), 2))


def place() -> int:
    return members().index(hvd.rank())


def of_members(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    inputs = all_inputs(shape, dtype)
    return [inputs[rank] for rank in members()]


SHAPES = [(5,), (300_000,), (2, 3)]  # the second travels in several pieces


@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_grouped_allreduce(even_and_odd: Sets, op: int) -> None:
    expected = [reduced(of_members(shape), op) for shape in SHAPES]
    own = [of_members(shape)[place()] for shape in SHAPES]
    results = hvd.grouped_allreduce(own, op=op, name="group", process_set=mine(even_and_odd))
    in_place = hvd.grouped_allreduce_(own, op=op, process_set=mine(even_and_odd))
    for result, changed, tensor, wanted in zip(results, in_place, own, expected, strict=True):
        assert changed is tensor
        assert_reduced(result, wanted, torch.float64)
        assert_reduced(tensor, wanted, torch.float64)


def test_grouped_allgather(even_and_odd: Sets) -> None:
    own = [torch.full((hvd.rank() + extra, 2), float(hvd.rank())) for extra in (0, 1, 4)]
    gathered = hvd.grouped_allgather(own, process_set=mine(even_and_odd))
    for extra, result in zip((0, 1, 4), gathered, strict=True):
        assert result[:, 1].tolist() == [float(rank) for rank in members() for _ in range(rank + extra)]


@pytest.mark.parametrize("op", [hvd.Sum, hvd.Average])
def test_grouped_reducescatter(even_and_odd: Sets, op: int) -> None:
    shapes = [(5, 2), (7,)]  # the first ranks get one row more
    own = [of_members(shape)[place()] for shape in shapes]
    results = hvd.grouped_reducescatter(own, op=op, process_set=mine(even_and_odd))
    for shape, result in zip(shapes, results, strict=True):
        assert_reduced(result, reduced(of_members(shape), op).tensor_split(len(members()))[place()], torch.float64)


@pytest.mark.parametrize("op", ["average", "sum"])
def test_sparse_allreduce(even_and_odd: Sets, op: str) -> None:
    own = entries(hvd.rank(), torch.float64, 3)
    finish = hvd.sparse_allreduce_async(own, f"sparse.{op}", OPS[op], process_set=mine(even_and_odd))
    total = sum((entries(rank, torch.float64, 3).to_dense() for rank in members()), torch.zeros(()))
    assert torch.allclose(finish().to_dense(), total / (len(members()) if op == "average" else 1))


def test_sparse_gradients(even_and_odd: Sets) -> None:
    table = torch.nn.Embedding(hvd.size() + 1, 2, sparse=True, dtype=torch.float64)
    with torch.no_grad():
        table.weight.fill_(0.0)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(table.parameters(), lr=1.0), table.named_parameters(), process_set=mine(even_and_odd)
    )
    for _ in range(2):
        optimizer.zero_grad()
        table(torch.tensor([hvd.rank(), hvd.size()])).sum().backward()
        optimizer.step()
    expected = torch.zeros(hvd.size() + 1, 2, dtype=torch.float64)
    expected[members()] = -2.0 / len(members())
    expected[-1] = -2.0
    assert torch.allclose(table.weight, expected)


# ---- gradients. Each rank weights what it gets with its own numbers, so that all of them have to arrive.


def weights(rank: int, like: torch.Tensor) -> torch.Tensor:
    return torch.arange(1.0, like.numel() + 1, dtype=like.dtype).reshape(like.shape) * (rank + 1)


def test_gradient_of_alltoall(even_and_odd: Sets) -> None:
    count = len(members())
    splits = [index + 1 for index in range(count)]  # to each rank of the set
    rows = torch.zeros(sum(splits), 2, dtype=torch.float64, requires_grad=True)
    output, received = hvd.alltoall(rows, splits, process_set=mine(even_and_odd))
    assert received.tolist() == [place() + 1] * count
    (output * weights(hvd.rank(), output)).sum().backward()
    wanted = []
    for index, rank in enumerate(members()):
        there = weights(rank, torch.zeros((index + 1) * count, 2, dtype=torch.float64))
        wanted.append(there[place() * (index + 1) : (place() + 1) * (index + 1)])
    assert torch.equal(rows.grad, torch.cat(wanted))


@pytest.mark.parametrize("form", ["single", "grouped"])
@pytest.mark.parametrize("op", ["average", "sum"])
def test_gradient_of_reducescatter(even_and_odd: Sets, op: str, form: str) -> None:
    tensor = torch.zeros(5, 2, dtype=torch.float64, requires_grad=True)
    if form == "single":
        output = hvd.reducescatter(tensor, op=OPS[op], process_set=mine(even_and_odd))
    else:
        (output,) = hvd.grouped_reducescatter([tensor], op=OPS[op], process_set=mine(even_and_odd))
    (output * weights(hvd.rank(), output)).sum().backward()
    shares = torch.zeros(5, 2, dtype=torch.float64).tensor_split(len(members()))
    wanted = torch.cat([weights(rank, share) for rank, share in zip(members(), shares, strict=True)])
    assert torch.equal(tensor.grad, wanted * (len(members()) if op == "sum" else 1))


def test_gradient_of_broadcast(even_and_odd: Sets) -> None:
    root = members()[-1]
    tensor = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    output = hvd.broadcast(tensor, root, process_set=mine(even_and_odd))
    (output * weights(hvd.rank(), output)).sum().backward()
    average = sum(weights(rank, output) for rank in members()) / len(members())
    assert torch.allclose(tensor.grad, average if hvd.rank() == root else torch.zeros_like(average))


def test_gradients_of_grouped_forms(even_and_odd: Sets) -> None:
    tensors = [torch.zeros(2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    outputs = hvd.grouped_allreduce(tensors, op=hvd.Sum, process_set=mine(even_and_odd))
    sum((output * weights(hvd.rank(), output)).sum() for output in outputs).backward()
    for tensor in tensors:
        assert torch.equal(tensor.grad, sum(weights(rank, tensor) for rank in members()))
        tensor.grad = None
    outputs = hvd.grouped_allgather(tensors, process_set=mine(even_and_odd))
    sum((output * weights(hvd.rank(), output)).sum() for output in outputs).backward()
    gathered = torch.zeros(2 * len(members()), dtype=torch.float64)
    average = sum(weights(rank, gathered) for rank in members()) / len(members())
    for tensor in tensors:
        assert torch.allclose(tensor.grad, average[2 * place() : 2 * place() + 2])
