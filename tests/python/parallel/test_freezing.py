"""DistributedOptimizer, where ranks freeze parameters, alone or one after the other, while the others train them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import assert_same_on_all_ranks

import horovod_cpp.torch as hvd

KINDS: dict[str, dict[str, Any]] = {
    "one by one": {},
    "in a group": {"groups": 1},
    "in groups": {"groups": 2},
    "in buckets": {"gradient_as_bucket_view": True},
    "in buckets by group": {"groups": 2, "gradient_as_bucket_view": True},
    "fp16": {"compression": hvd.Compression.fp16},
}


def parameters() -> list[torch.Tensor]:
    return [torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2)]


def moving(of: list[torch.Tensor], **options: Any) -> Any:
    optimizer = torch.optim.SGD(of, lr=0.125, momentum=0.5, weight_decay=0.25)
    return hvd.DistributedOptimizer(optimizer, [(f"p{i}", each) for i, each in enumerate(of)], **options)


def backward(of: list[torch.Tensor]) -> None:
    """A gradient of the rank, and one, in what is not frozen."""
    torch.stack([each.sum() * (hvd.rank() + 1) for each in of]).sum().backward()


def operations_of(work: Any) -> int:
    """How many operations this rank has done in it, of those that all ranks have begun after the others' work."""
    hvd.barrier()
    before = hvd.statistics()["operations_done"]
    work()
    done: int = hvd.statistics()["operations_done"] - before
    hvd.barrier()
    return done


def reference(of: torch.Tensor, gradients: list[float | None]) -> torch.Tensor:
    """Where one process moves it, with these gradients in its steps."""
    parameter = torch.nn.Parameter(torch.ones_like(of))
    optimizer = torch.optim.SGD([parameter], lr=0.125, momentum=0.5, weight_decay=0.25)
    for gradient in gradients:
        parameter.grad = None if gradient is None else torch.full_like(parameter, gradient)
        optimizer.step()
    return parameter


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_freezes_alone_then_the_others_and_then_all_train_again(kind: str) -> None:
    first, second = parameters()
    optimizer = moving([first, second], op=hvd.Sum, **KINDS[kind])
    ranks = hvd.size() * (hvd.size() + 1) / 2
    frozen_at = [1 if hvd.rank() == hvd.size() - 1 else 3, 6]
    others = ranks - hvd.size() if hvd.size() > 1 else None
    expected = [ranks, others, others, None, None, None, ranks, ranks]
    for step, gradient in enumerate(expected):
        second.requires_grad_(not frozen_at[0] <= step < frozen_at[1])
        optimizer.zero_grad()
        backward([first, second])
        optimizer.step()
        if gradient is None:
            assert second.grad is None, step
        else:
            assert second.grad is not None, step
            assert torch.equal(second.grad, torch.full_like(second, gradient)), step
        assert first.grad is not None
        assert torch.equal(first.grad, torch.full_like(first, ranks))
        assert torch.allclose(second, reference(second, expected[: step + 1]))
        assert_same_on_all_ranks(first)
        assert_same_on_all_ranks(second)


@pytest.mark.parametrize("kind", ["one by one", "in buckets by group", "in groups"])
def test_what_is_frozen_on_all_ranks_costs_nothing(kind: str) -> None:
    first, second = parameters()
    optimizer = moving([first, second], **KINDS[kind])

    def step() -> None:
        optimizer.zero_grad()
        backward([first, second])
        optimizer.step()

    reduced = operations_of(step)
    if hvd.rank() == 0:
        second.requires_grad_(False)
    step()
    assert operations_of(step) == reduced  # zeros still go
    second.requires_grad_(False)
    step()
    assert operations_of(step) == reduced / 2
    assert operations_of(step) == reduced / 2


@pytest.mark.parametrize("kind", KINDS)
def test_it_may_be_used_by_one_rank_in_the_step_in_which_it_becomes_frozen(kind: str) -> None:
    first, second = parameters()
    optimizer = moving([first, second], op=hvd.Sum, **KINDS[kind])
    for step in range(4):
        optimizer.zero_grad()
        if hvd.rank() > 0 and step == 1:
            second.requires_grad_(False)
        backward([first, second])
        if hvd.rank() == 0 and step == 1:
            second.requires_grad_(False)
        optimizer.step()
        assert_same_on_all_ranks(second)
        if step == 0:
            assert second.grad is not None
        elif step == 1:
            assert second.grad is not None and torch.equal(second.grad, torch.ones_like(second))
        else:
            assert second.grad is None


def test_after_many_steps_that_need_no_asking() -> None:
    """Of a reduction that repeats the ranks tell each other nothing, until one of them asks."""
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([parameter], lr=0.125), [("only", parameter)], op=hvd.Sum)
    for step in range(60):
        parameter.requires_grad_(hvd.rank() > 0 or not 40 <= step < 50)
        optimizer.zero_grad()
        if parameter.requires_grad:
            (parameter.sum() * (hvd.rank() + 1)).backward()
        optimizer.step()
        expected = sum(rank + 1 for rank in range(hvd.size()) if rank > 0 or not 40 <= step < 50)
        if expected > 0:
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, torch.full_like(parameter, expected)), step
        else:
            assert parameter.grad is None


@pytest.mark.parametrize("rank_of_steps", [[0, 0], [0, 1], [1, 0]])
def test_ranks_take_turns(rank_of_steps: list[int]) -> None:
    first, second = parameters()
    optimizer = moving([first, second], op=hvd.Sum)
    ranks = range(hvd.size())
    for step in range(6):
        frozen = rank_of_steps[step % 2] if step < 4 else None  # by this rank alone, as long as there are others
        second.requires_grad_(frozen != hvd.rank())
        optimizer.zero_grad()
        backward([first, second])
        optimizer.step()
        left = sum(rank + 1 for rank in ranks if rank != frozen)
        if left > 0:
            assert second.grad is not None and torch.equal(second.grad, torch.full_like(second, left))
        assert_same_on_all_ranks(second)


@pytest.mark.parametrize("op", [hvd.Average, hvd.Sum])
def test_sparse_gradients(op: int) -> None:
    torch.manual_seed(5)
    table = torch.nn.Embedding(4, 2, sparse=True, dtype=torch.float64)
    other = torch.nn.Linear(2, 1, dtype=torch.float64)
    named = [*table.named_parameters("table"), *other.named_parameters("other")]
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([each for _, each in named], lr=0.5), named, op=op)
    for step in range(6):
        table.weight.requires_grad_(step < (2 if hvd.rank() == 0 else 4))
        optimizer.zero_grad()
        before = table.weight.clone()
        other(table(torch.tensor([hvd.rank() % 4]))).sum().backward()
        optimizer.step()
        moved = not torch.equal(table.weight, before)
        assert moved == (step < (4 if hvd.size() > 1 else 2))
        assert (table.weight.grad is None) == (not moved)
        assert_same_on_all_ranks(table.weight)
        assert_same_on_all_ranks(other.weight)


@pytest.mark.parametrize("compression", [hvd.Compression.none, hvd.Compression.fp16])
def test_adasum(compression: Any) -> None:
    first, second = parameters()
    optimizer = moving([first, second], op=hvd.Adasum, compression=compression)

    def step() -> None:
        optimizer.zero_grad()
        backward([first, second])
        optimizer.step()

    for round_trip in range(6):
        second.requires_grad_(round_trip < (1 if hvd.rank() == 0 else 3) or round_trip == 5)
        before = second.detach().clone()
        step()
        moved = not torch.equal(second, before)
        assert moved == (round_trip < (3 if hvd.size() > 1 else 1) or round_trip == 5), round_trip
        assert_same_on_all_ranks(first)
        assert_same_on_all_ranks(second)
    second.requires_grad_(False)
    step()
    assert operations_of(step) == (1 if hvd.size() > 1 else 0)


def test_a_step_that_fails_on_all_ranks_is_no_answer() -> None:
    """Adasum: who has become frozen is asked after the step of the rank."""
    first, second = parameters()
    optimizer = moving([first, second], op=hvd.Adasum)
    second.requires_grad_(False)

    def closure() -> torch.Tensor:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        optimizer.step(closure)
    optimizer.step()
    assert operations_of(optimizer.step) == (1 if hvd.size() > 1 else 0)


def test_gradients_that_differ_in_shape_are_still_an_error() -> None:
    parameter = torch.nn.Parameter(torch.ones(3 + hvd.rank()))
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([parameter], lr=1.0), [("wide", parameter)])
    parameter.sum().backward()
    if hvd.size() == 1:
        optimizer.step()
        return
    with pytest.raises(hvd.HorovodInternalError, match="'wide': mismatched shape"):
        optimizer.step()


def test_a_new_job_agrees_anew() -> None:
    """A rank that joins later has been told nothing."""
    first, second = parameters()
    optimizer = moving([first, second])
    second.requires_grad_(False)
    optimizer.step()
    hvd.shutdown()
    hvd.init()
    if hvd.rank() > 0:
        second.requires_grad_(True)
        optimizer = moving([first, second])
        second.requires_grad_(False)
        second.grad = None

    def step() -> None:
        optimizer.zero_grad()
        backward([first, second])
        optimizer.step()

    step()
    assert operations_of(step) == (1 if hvd.size() > 1 else 0)
    assert second.grad is None
