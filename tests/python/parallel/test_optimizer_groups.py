"""DistributedOptimizer: groups of gradients, and that every feature trains as one process does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import assert_same_on_all_ranks
from test_optimizer import batch, linear_model, loss_of, network, part

import horovod_cpp.torch as hvd

STEPS = 6

FEATURES: dict[str, Callable[[list[torch.Tensor]], dict[str, Any]]] = {
    "plain": lambda _: {},
    "groups": lambda _: {"groups": 3},
    "more groups than parameters": lambda _: {"groups": 100},
    "lists": lambda parameters: {"groups": [parameters[4:1:-1], [parameters[0]]]},
    "compression none": lambda _: {"compression": hvd.Compression.none, "groups": 1},
    "predivide": lambda _: {"gradient_predivide_factor": 4.0},
    "predivide in groups": lambda _: {"gradient_predivide_factor": 4.0, "groups": 2},
    "sparse as dense": lambda _: {"sparse_as_dense": True},
    "global process set": lambda _: {"process_set": hvd.global_process_set, "groups": 2},
}


def train_alone(passes: int) -> torch.nn.Module:
    """One process with the whole batch; several passes add their gradients up, as backward does."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        for number in range(passes):
            loss_of(model, *batch(step * passes + number, 4 * hvd.size(), torch.float64)).backward()
        optimizer.step()
    return model


def train_together(passes: int, options: Callable[[list[torch.Tensor]], dict[str, Any]]) -> torch.nn.Module:
    model = network()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        model.named_parameters(),
        backward_passes_per_step=passes,
        **options(list(model.parameters())),
    )
    for step in range(STEPS):
        optimizer.zero_grad()
        for number in range(passes):
            images, labels = batch(step * passes + number, 4 * hvd.size(), torch.float64)
            loss_of(model, part(images), part(labels)).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature_trains_like_one_process(feature: str, passes: int) -> None:
    alone, together = train_alone(passes), train_together(passes, FEATURES[feature])
    for got, wanted in zip(together.parameters(), alone.parameters(), strict=True):
        assert (got - wanted).abs().max().item() <= 1e-9
        assert_same_on_all_ranks(got)


@pytest.mark.parametrize("feature", ["plain", "groups", "lists"])
def test_compressed_gradients_train_nearly_so(feature: str) -> None:
    if hvd.size() == 1:
        pytest.skip("one rank sends nothing")

    def options(parameters: list[torch.Tensor]) -> dict[str, Any]:
        return {**FEATURES[feature](parameters), "compression": hvd.Compression.bf16}

    alone, together = train_alone(1), train_together(1, options)
    for got, wanted in zip(together.parameters(), alone.parameters(), strict=True):
        difference = (got - wanted).abs().max().item()
        assert 0 < difference < 0.01


def test_a_group_is_one_operation() -> None:
    if hvd.size() == 1:
        pytest.skip("one rank reduces nothing")
    model = network()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), groups=2)
    for step in range(3):
        optimizer.zero_grad()
        images, labels = batch(step, 4 * hvd.size(), torch.float64)
        hvd.barrier()
        before = hvd.statistics()
        loss_of(model, part(images), part(labels)).backward()
        optimizer.step()
        after = hvd.statistics()
        assert after["operations_done"] - before["operations_done"] == 2
        assert after["collective_calls"] - before["collective_calls"] == 2


def test_gradients_that_one_rank_lacks_are_zeros_in_their_group() -> None:
    first, second = linear_model(), linear_model()
    parameters = [first.weight, second.weight]
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=1.0), groups=[parameters])
    for _ in range(2):
        optimizer.zero_grad()
        loss = first(torch.ones(1, 3, dtype=torch.float64)).sum()
        if hvd.rank() == 0:
            loss = loss + second(torch.ones(1, 3, dtype=torch.float64)).sum()
        loss.backward()
        optimizer.step()
    assert torch.allclose(first.weight, torch.full_like(first.weight, 1.0 - 2.0))
    assert torch.allclose(second.weight, torch.full_like(second.weight, 1.0 - 2.0 / hvd.size()))


def test_sparse_gradients_are_dense_in_a_group() -> None:
    table = torch.nn.Embedding(5, 2, sparse=True, dtype=torch.float64)
    linear = linear_model()
    with torch.no_grad():
        table.weight.fill_(0.0)
    parameters = [table.weight, linear.weight]
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=1.0), groups=[parameters], op=hvd.Sum)
    for _ in range(2):
        optimizer.zero_grad()
        (table(torch.tensor([hvd.rank()])).sum() + linear(torch.ones(1, 3, dtype=torch.float64)).sum()).backward()
        optimizer.step()
    expected = torch.zeros(5, 2, dtype=torch.float64)
    expected[: hvd.size()] = -2.0
    assert torch.equal(table.weight.detach(), expected)


def test_frozen_parameters_and_an_empty_group() -> None:
    model = network()
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    kept = parameters[0].detach().clone()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(parameters, lr=0.1), groups=[[parameters[0]], [], parameters[1:3]]
    )
    images, labels = batch(0, 4 * hvd.size(), torch.float64)
    loss_of(model, part(images), part(labels)).backward()
    optimizer.step()
    assert torch.equal(parameters[0], kept)
    assert_same_on_all_ranks(parameters[2])


def test_a_number_of_groups_counts_what_requires_a_gradient() -> None:
    if hvd.size() == 1:
        pytest.skip("one rank has no groups")
    model = network()
    parameters = list(model.parameters())
    for parameter in parameters[:2]:
        parameter.requires_grad_(False)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=0.1), groups=2)
    groups = [optimizer._reduction.gradients[parameter].group for parameter in parameters[2:]]
    assert groups[0] is groups[1] is not groups[2] is groups[3]


def test_num_groups_is_the_old_name() -> None:
    model = network()
    with pytest.warns(DeprecationWarning, match="num_groups"):
        optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), num_groups=2)
    images, labels = batch(0, 4 * hvd.size(), torch.float64)
    loss_of(model, part(images), part(labels)).backward()
    optimizer.step()


def test_a_parameter_in_two_groups_is_refused() -> None:
    model = linear_model()
    with pytest.raises(ValueError, match="in more than one group"):
        hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), groups=[[model.weight], [model.weight]])


@pytest.mark.usefixtures("alone_and_beside_a_stuck_set")
def test_two_optimizers_in_different_sets() -> None:
    if hvd.size() < 2:
        pytest.skip("one rank has no parts")
    members = [0] if hvd.size() == 2 else [0, hvd.size() - 1]
    part_of = hvd.add_process_set(members)
    everywhere, somewhere = linear_model(), linear_model()
    with torch.no_grad():
        everywhere.weight.fill_(1.0)
        somewhere.weight.fill_(1.0)
    optimizers = [
        hvd.DistributedOptimizer(
            torch.optim.SGD([everywhere.weight], lr=1.0), [("all", everywhere.weight)], op=hvd.Sum, groups=1
        ),
        hvd.DistributedOptimizer(
            torch.optim.SGD([somewhere.weight], lr=1.0),
            [("some", somewhere.weight)],
            op=hvd.Sum,
            groups=1,
            process_set=part_of,
        ),
    ]
    ones = torch.ones(1, 3, dtype=torch.float64)
    (everywhere(ones) + somewhere(ones)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(everywhere.weight, torch.full_like(everywhere.weight, 1.0 - hvd.size()))
    sum_of_ones = len(members) if hvd.rank() in members else 1  # outside, the own gradient alone
    assert torch.equal(somewhere.weight, torch.full_like(somewhere.weight, 1.0 - sum_of_ones))
    assert hvd.remove_process_set(part_of)
