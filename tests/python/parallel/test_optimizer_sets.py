"""DistributedOptimizer in process sets: one for all parameters, or one for each param group."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from reference import assert_same_on_all_ranks
from test_adasum import adasum_of_all
from test_optimizer import batch, linear_model, loss_of, mean_of_ranks, network, own_input, part, several_ranks

import horovod_cpp.torch as hvd

pytestmark = pytest.mark.usefixtures("alone_and_beside_a_stuck_set", "gradients_and_bucket_views")

NOT_REGISTERED = "Process set provided does not exist, or has not been registered"


def everyone_can_go_on() -> None:
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == hvd.size()


@pytest.mark.parametrize("op", ["Average", "Adasum"])
def test_a_set_that_is_not_registered_is_refused(op: str) -> None:
    model = linear_model()
    plain = torch.optim.SGD(model.parameters(), lr=1.0)
    options = {"gradient_as_bucket_view": False} if op == "Adasum" else {}
    with pytest.raises(ValueError, match=NOT_REGISTERED):
        hvd.DistributedOptimizer(plain, op=getattr(hvd, op), process_set=hvd.ProcessSet(range(hvd.size())), **options)
    assert type(plain) is torch.optim.SGD
    model(own_input()).sum().backward()
    plain.step()
    everyone_can_go_on()


@pytest.mark.parametrize("op", ["Average", "Adasum"])
def test_a_set_that_has_been_removed_is_refused_in_it_and_outside(op: str) -> None:
    several_ranks()
    first_two = hvd.add_process_set([0, 1]) if hvd.size() > 2 else hvd.add_process_set([0])
    model = linear_model()
    options = {"gradient_as_bucket_view": False} if op == "Adasum" else {}
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0), op=getattr(hvd, op), process_set=first_two, **options
    )
    hvd.barrier()
    assert hvd.remove_process_set(first_two)
    before = model.weight.detach().clone()
    if op == "Average" and hvd.size() > 2 and hvd.rank() < 2:
        with pytest.raises(ValueError, match=NOT_REGISTERED):
            model(own_input()).sum().backward()
    with pytest.raises(ValueError, match=NOT_REGISTERED):
        optimizer.step()
    assert torch.equal(model.weight, before)
    everyone_can_go_on()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0))
    optimizer.zero_grad()
    model(own_input()).sum().backward()
    optimizer.step()
    assert torch.allclose(model.weight, torch.full_like(model.weight, 1 - mean_of_ranks()))


@pytest.fixture
def mine() -> Iterator[hvd.ProcessSet]:
    """The even ranks on those, the odd ranks on these."""
    several_ranks()
    sets = [hvd.add_process_set(range(parity, hvd.size(), 2)) for parity in range(2)]
    yield sets[hvd.rank() % 2]
    hvd.barrier()
    for process_set in sets:
        hvd.remove_process_set(process_set)


def param_groups(model: torch.nn.Module, **options: Any) -> list[dict[str, Any]]:
    """The layer in the middle has a group of its own, with `options`."""
    first, middle, last = (list(layer.parameters()) for layer in model.children() if list(layer.parameters()))
    return [{"params": first}, {"params": middle, "lr": 0.02, **options}, {"params": last}]


def sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.05, momentum=0.9)


STEPS = 8
ROWS = 4


def train_alone(passes: int) -> torch.nn.Module:
    """One process does what all ranks do: the layer in the middle is there twice, for the even and the odd ranks."""
    models = [network(), network()]
    optimizers = [sgd(param_groups(model)) for model in models]
    for step in range(STEPS):
        gradients: list[list[list[torch.Tensor]]] = [[], []]  # of the even and the odd ranks
        for rank in range(hvd.size()):
            model = models[rank % 2]
            model.zero_grad()
            for number in range(passes):
                images, labels = batch(step * passes + number, ROWS * hvd.size(), torch.float64)
                loss_of(model, images.chunk(hvd.size())[rank], labels.chunk(hvd.size())[rank]).backward()
            gradients[rank % 2].append([parameter.grad.clone() for parameter in model.parameters()])
        for parity, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            for place, parameter in enumerate(model.parameters()):
                of_ranks = gradients[parity] if place in (2, 3) else gradients[0] + gradients[1]
                parameter.grad = torch.stack([each[place] for each in of_ranks]).mean(0)
            optimizer.step()
    return models[hvd.rank() % 2]


FEATURES: dict[str, Callable[[list[torch.Tensor]], dict[str, Any]]] = {
    "plain": lambda _: {},
    "two passes": lambda _: {"backward_passes_per_step": 2},
    "predivide": lambda _: {"gradient_predivide_factor": 4.0},
    "groups cut at the sets": lambda _: {"groups": 2},
    "one group": lambda _: {"groups": 1},
    "lists": lambda parameters: {"groups": [[parameters[5], parameters[0]], parameters[2:4]]},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_param_groups_in_two_sets_train_like_one_process(feature: str, mine: hvd.ProcessSet) -> None:
    together = network()
    options = FEATURES[feature](list(together.parameters()))
    passes = options.get("backward_passes_per_step", 1)
    optimizer = hvd.DistributedOptimizer(
        sgd(param_groups(together, process_set=mine)), together.named_parameters(), **options
    )
    for step in range(STEPS):
        optimizer.zero_grad()
        for number in range(passes):
            images, labels = batch(step * passes + number, ROWS * hvd.size(), torch.float64)
            loss_of(together, part(images), part(labels)).backward()
        optimizer.step()
    for got, wanted, start in zip(
        together.parameters(), train_alone(passes).parameters(), network().parameters(), strict=True
    ):
        assert (got - wanted).abs().max().item() <= 1e-9
        assert not torch.equal(got, start)
    assert_same_on_all_ranks(next(iter(together.parameters())))


@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"gradient_predivide_factor": 2.0}], ids=str)
def test_some_of_the_ranks_train_like_one_process(options: dict[str, Any]) -> None:
    if hvd.size() < 3:
        pytest.skip("two ranks have no part of two")
    ends = hvd.add_process_set([0, hvd.size() - 1])
    alone, together = network(), network()
    plain = torch.optim.SGD(alone.parameters(), lr=0.05, momentum=0.9)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(together.parameters(), lr=0.05, momentum=0.9),
        together.named_parameters(),
        process_set=ends,
        **options,
    )
    for step in range(STEPS):
        images, labels = batch(step, ROWS * 2, torch.float64)
        for model, stepper, pick in ((alone, plain, slice(None)), (together, optimizer, own_rows(ends))):
            stepper.zero_grad()
            loss_of(model, images[pick], labels[pick]).backward()
            stepper.step()
    for got, wanted in zip(together.parameters(), alone.parameters(), strict=True):
        # Outside, a rank steps with its own gradients, here those of the whole batch.
        assert (got - wanted).abs().max().item() <= 1e-9
    hvd.barrier()
    assert hvd.remove_process_set(ends)


def own_rows(process_set: hvd.ProcessSet) -> slice:
    """This rank's part of a batch for two; outside the set all of it."""
    if not process_set.included():
        return slice(None)
    first = process_set.rank() * ROWS
    return slice(first, first + ROWS)


@pytest.mark.parametrize("shared", [False, True])
def test_the_loss_of_a_closure_is_reduced_in_the_set_that_all_know(shared: bool, mine: hvd.ProcessSet) -> None:
    model = network()
    only, *others = list(model.parameters())
    groups = [{"params": [only], "process_set": mine}] + ([{"params": others}] if shared else [])
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(groups, lr=0.1), model.named_parameters())

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        (hvd.rank() * sum(parameter.square().sum() for parameter in model.parameters())).backward()
        return torch.tensor(float(hvd.rank()))

    ranks = range(hvd.size()) if shared else range(hvd.rank() % 2, hvd.size(), 2)
    assert torch.equal(optimizer.step(closure), torch.tensor(sum(ranks) / len(ranks)))


def test_adasum_in_two_sets(mine: hvd.ProcessSet) -> None:
    shared, own = linear_model(), linear_model()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD([{"params": [shared.weight]}, {"params": [own.weight], "process_set": mine}], lr=1.0),
        op=hvd.Adasum,
        gradient_as_bucket_view=False,
    )
    (shared(own_input()) + own(own_input())).sum().backward()
    optimizer.step()
    changes = [torch.full((2, 3), -(rank + 1.0), dtype=torch.float64) for rank in range(hvd.size())]
    assert torch.allclose(shared.weight - 1, adasum_of_all(changes), rtol=1e-12)
    assert torch.allclose(own.weight - 1, adasum_of_all(changes[hvd.rank() % 2 :: 2]), rtol=1e-12)


def mean_of(process_set: hvd.ProcessSet) -> float:
    return sum(rank + 1 for rank in process_set.ranks) / len(process_set.ranks)


def test_a_group_with_a_set_that_is_added_later(mine: hvd.ProcessSet) -> None:
    first, late = linear_model(), torch.nn.Linear(3, 2, dtype=torch.float64)
    start = late.weight.detach().clone()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(first.parameters(), lr=1.0))
    with pytest.raises(ValueError, match=r"param group 1: process_set must be a hvd\.ProcessSet \(it is \[0\]\)"):
        optimizer.add_param_group({"params": list(late.parameters()), "process_set": [0]})
    with pytest.raises(ValueError, match=NOT_REGISTERED):
        optimizer.add_param_group({"params": list(late.parameters()), "process_set": hvd.ProcessSet([0])})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": list(late.parameters()), "process_set": mine})
    (first(own_input()) + late(own_input())).sum().backward()
    optimizer.step()
    assert torch.allclose(first.weight, torch.full_like(first.weight, 1 - mean_of_ranks()))
    assert torch.allclose(late.weight, start - mean_of(mine))


def test_a_state_is_saved_without_sets_and_loaded_beside_them(mine: hvd.ProcessSet) -> None:
    model = network()
    optimizer = hvd.DistributedOptimizer(sgd(param_groups(model, process_set=mine)), model.named_parameters())
    images, labels = batch(0, ROWS * hvd.size(), torch.float64)
    loss_of(model, part(images), part(labels)).backward()
    optimizer.step()
    optimizer.zero_grad()
    assert all("process_set" not in group for group in optimizer.state_dict()["param_groups"])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    sgd(param_groups(network())).load_state_dict(state)
    with_sets = sgd(param_groups(network(), process_set=hvd.global_process_set)).state_dict()
    for each in (state, with_sets):
        optimizer.load_state_dict(each)
        assert [group.get("process_set") for group in optimizer.param_groups] == [None, mine, None]
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    assert optimizer.param_groups[1]["process_set"] is mine
    middle = list(model.parameters())[3]
    start = middle.detach().clone()
    (middle * float(hvd.rank() + 1)).sum().backward()
    optimizer.step()
    assert torch.allclose(middle, start - 0.02 * mean_of(mine))


def test_a_state_is_broadcast_before_the_optimizer_is_distributed(mine: hvd.ProcessSet) -> None:
    model = network()
    plain = sgd(param_groups(model, process_set=mine))
    plain.param_groups[0]["lr"] = 0.5 * (hvd.rank() + 1)
    hvd.broadcast_optimizer_state(plain, root_rank=0)
    assert plain.param_groups[0]["lr"] == 0.5
    assert [group.get("process_set") for group in plain.param_groups] == [None, mine, None]
    optimizer = hvd.DistributedOptimizer(plain, model.named_parameters())
    middle = list(model.parameters())[3]
    start = middle.detach().clone()
    (middle * float(hvd.rank() + 1)).sum().backward()
    optimizer.step()
    assert torch.allclose(middle, start - 0.02 * mean_of(mine))


def test_options_of_a_second_call_keep_the_sets_of_groups(mine: hvd.ProcessSet) -> None:
    model = linear_model()
    plain = torch.optim.SGD([{"params": list(model.parameters()), "process_set": mine}], lr=1.0)
    hvd.DistributedOptimizer(plain, op=hvd.Max)
    optimizer = hvd.DistributedOptimizer(plain)
    model(own_input()).sum().backward()
    optimizer.step()
    assert torch.allclose(model.weight, torch.full_like(model.weight, 1 - mean_of(mine)))


def test_a_set_that_is_exchanged_later_is_an_error(mine: hvd.ProcessSet) -> None:
    model = linear_model()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0))
    optimizer.param_groups[0]["process_set"] = mine
    model(own_input()).sum().backward()
    with pytest.raises(ValueError, match=r"param group 0: process_set is .*, and was .*; call it again"):
        optimizer.step()
    hvd.barrier()  # what backward has started is reduced
    hvd.DistributedOptimizer(optimizer)
    optimizer.zero_grad()
    model(own_input()).sum().backward()
    optimizer.step()
    assert torch.allclose(model.weight, torch.full_like(model.weight, 1 - mean_of(mine)))


def test_bad_sets_of_groups_leave_the_optimizer_as_it_was(mine: hvd.ProcessSet) -> None:
    model = network()
    parameters = list(model.parameters())
    bad: list[tuple[Any, dict[str, Any], str]] = [
        ([0], {}, r"param group 1: process_set must be a hvd\.ProcessSet \(it is \[0\]\)"),
        (None, {}, r"param group 1: process_set must be a hvd\.ProcessSet \(it is None\)"),
        (mine, {"process_set": 1}, r"process_set must be a hvd\.ProcessSet \(it is 1\)"),
        (hvd.ProcessSet(range(hvd.size())), {}, NOT_REGISTERED),
        (mine, {"groups": [parameters[1:3]]}, "'0.bias' is reduced by the ranks .*, and '3.weight' of the same group"),
    ]
    for process_set, options, text in bad:
        plain = sgd(param_groups(model, process_set=process_set))
        with pytest.raises(ValueError, match=text):
            hvd.DistributedOptimizer(plain, model.named_parameters(), **options)
        assert type(plain) is torch.optim.SGD
    everyone_can_go_on()
