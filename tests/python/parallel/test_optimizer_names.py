"""DistributedOptimizer: several optimizers whose parameters have the same names."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from test_optimizer import linear_model, mean_of_ranks, own_input, several_ranks

import horovod_cpp.torch as hvd

pytestmark = pytest.mark.usefixtures("gradients_and_bucket_views")


def distributed(model: torch.nn.Module, named: bool = True, **options: Any) -> Any:
    return hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.125), model.named_parameters() if named else None, **options
    )


def step(*pairs: tuple[torch.nn.Module, Any]) -> None:
    """One backward pass for all of them."""
    for _, optimizer in pairs:
        optimizer.zero_grad()
    torch.stack([(place + 1) * model(own_input()).sum() for place, (model, _) in enumerate(pairs)]).sum().backward()
    for _, optimizer in pairs:
        optimizer.step()


def names(optimizer: Any) -> list[str]:
    """As they travel; the same on all ranks."""
    own = [gradient.name for gradient in optimizer._reduction.gradients.values()]
    assert hvd.allgather_object(own) == [own] * hvd.size()
    return own


@pytest.mark.parametrize("options", [{}, {"groups": 1}, {"compression": hvd.Compression.bf16}], ids=str)
@pytest.mark.parametrize("named", [True, False])
def test_optimizers_of_one_backward_pass(named: bool, options: dict[str, Any]) -> None:
    models = [linear_model() for _ in range(3)]
    pairs = [(model, distributed(model, named, **options)) for model in models]
    for _ in range(4):
        step(*pairs)
    for place, model in enumerate(models):
        wanted = 1 - 4 * 0.125 * (place + 1) * mean_of_ranks()
        assert torch.allclose(
            model.weight, torch.full_like(model.weight, wanted), atol=0.02 if options.get("compression") else 1e-12
        )


@pytest.mark.parametrize("options", [{}, {"groups": 1}], ids=str)
def test_two_optimizers_of_one_parameter(options: dict[str, Any]) -> None:
    several_ranks()
    model = linear_model()
    first = distributed(model, **options)
    second = distributed(model, **options)
    with pytest.raises(AssertionError, match=r"two DistributedOptimizers have parameter 'weight', and both reduce"):
        model(own_input()).sum().backward()
    first.synchronize()
    del first
    gc.collect()
    second.zero_grad()
    model(own_input()).sum().backward()
    second.step()
    assert torch.allclose(model.weight, torch.full_like(model.weight, 1 - 0.125 * mean_of_ranks()))
    distributed(model)  # gone again
    gc.collect()
    second.zero_grad()
    model(own_input()).sum().backward()
    second.step()


def test_the_first_keeps_its_names() -> None:
    several_ranks()
    first, second, third = (torch.nn.Linear(3, 2, dtype=torch.float64) for _ in range(3))
    optimizers = [distributed(first), distributed(second), distributed(third, named=False)]
    assert [names(optimizer) for optimizer in optimizers] == [
        ["weight", "bias"], ["weight#2", "bias#2"], ["allreduce.noname.0.0", "allreduce.noname.0.1"],
    ]  # fmt: skip
    assert list(optimizers[1]._parameter_names.values()) == ["weight", "bias"]


def test_a_parameter_that_is_unfrozen_later_has_the_name_of_its_turn() -> None:
    several_ranks()
    first, second = linear_model(), linear_model()
    first.weight.requires_grad_(False)
    one, other = distributed(first), distributed(second)
    step((first, one), (second, other))
    first.weight.requires_grad_(True)
    for _ in range(2):
        step((first, one), (second, other))
    assert names(one) == ["weight"] and names(other) == ["weight#2"]


def test_who_is_called_again_keeps_its_names() -> None:
    several_ranks()
    first, second = linear_model(), linear_model()
    one, other = distributed(first), distributed(second)
    for _ in range(2):
        one = hvd.DistributedOptimizer(one, first.named_parameters())
        other = hvd.DistributedOptimizer(torch.optim.SGD(second.parameters(), lr=0.125), second.named_parameters())
        assert names(one) == ["weight"] and names(other) == ["weight#2"]
        step((first, one), (second, other))


def test_models_that_follow_one_another_have_the_same_names() -> None:
    several_ranks()
    for _ in range(3):
        pairs = [(model, distributed(model)) for model in (linear_model(), linear_model())]
        assert [names(optimizer) for _, optimizer in pairs] == [["weight"], ["weight#2"]]
        step(*pairs)


@pytest.mark.parametrize("used", [True, False])
def test_names_do_not_depend_on_what_a_rank_still_has(used: bool) -> None:
    several_ranks()
    kept: list[Any] = []
    for number in range(4):
        model = linear_model()
        optimizer = distributed(model)
        assert names(optimizer) == ["weight" if used or number == 0 else f"weight#{number + 1}"]
        if used:
            step((model, optimizer))
        if hvd.rank() == 0:
            kept.append((model, optimizer))
        del model, optimizer
        gc.collect()


@pytest.mark.usefixtures("alone_and_beside_a_stuck_set")
def test_each_set_has_names_of_its_own() -> None:
    if hvd.size() < 3:
        pytest.skip("two ranks have no set of two")
    first_two = hvd.add_process_set([0, 1])
    models = [linear_model() for _ in range(2)]
    if first_two.included():  # the others make none
        optimizers = [distributed(model, process_set=first_two) for model in models]
        assert [gradient.name for gradient in optimizers[1]._reduction.gradients.values()] == ["weight#2"]
    assert names(distributed(linear_model())) == ["weight"]
    hvd.barrier()
    assert hvd.remove_process_set(first_two)


def test_a_new_job_gives_names_from_the_start() -> None:
    several_ranks()
    models = [linear_model() for _ in range(3)]
    if hvd.rank() == 0:  # failed later than the others
        distributed(models[0])
    hvd.barrier()
    hvd.shutdown()
    hvd.init(process_sets="dynamic")
    assert [names(distributed(model)) for model in models[1:]] == [["weight"], ["weight#2"]]


def judged(maker: torch.nn.Module, judge: torch.nn.Module) -> torch.Tensor:
    return judge(maker(own_input())).sum()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("cleared_by", ["optimizer", "model"])
def test_gradients_of_another_networks_loss_are_an_error_that_says_what_to_do(passes: int, cleared_by: str) -> None:
    several_ranks()
    maker, judge = (torch.nn.Linear(3, 3, dtype=torch.float64) for _ in range(2))
    of_maker, of_judge = distributed(maker), distributed(judge, backward_passes_per_step=passes)

    def train_judge() -> None:
        of_judge.zero_grad() if cleared_by == "optimizer" else judge.zero_grad()
        for _ in range(passes):
            judge(maker(own_input()).detach()).sum().backward()
        of_judge.step()

    def train_maker() -> None:
        of_maker.zero_grad()
        judged(maker, judge).backward()
        of_maker.step()

    train_judge()
    train_maker()
    with pytest.raises(AssertionError, match=r"for another optimizer.*requires_grad_\(False\).*synchronize\(\)"):
        train_judge()
    of_judge.synchronize()
    for advice in ("requires_grad_", "inputs", "synchronize"):
        train_judge()
        if advice == "requires_grad_":
            judge.requires_grad_(False)
            train_maker()
            judge.requires_grad_(True)
        elif advice == "inputs":
            of_maker.zero_grad()
            judged(maker, judge).backward(inputs=list(maker.parameters()))
            of_maker.step()
        else:
            train_maker()
            of_judge.synchronize()
    train_judge()
