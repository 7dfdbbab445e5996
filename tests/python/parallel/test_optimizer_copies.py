"""DistributedOptimizer: copies and pickles train on with all options."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import assert_same_on_all_ranks
from test_optimizer import batch, linear_model, loss_of, mean_of_ranks, network, own_input, part, several_ranks

import horovod_cpp.torch as hvd

pytestmark = pytest.mark.usefixtures("gradients_and_bucket_views")


def saved_and_loaded(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": saved_and_loaded,
}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "groups": {"groups": 2},
    "two passes": {"backward_passes_per_step": 2},
    "sum": {"op": hvd.Sum},
    "predivide": {"gradient_predivide_factor": 4.0, "sparse_as_dense": True},
    "fp16": {"compression": hvd.Compression.fp16},
    "adasum": {"op": hvd.Adasum, "gradient_as_bucket_view": False},
}


def train(model: torch.nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        for _ in range(optimizer.backward_passes_per_step):
            images, labels = batch(step, 4 * hvd.size(), torch.float64)
            loss_of(model, part(images), part(labels)).backward()
        optimizer.step()


def adam(model: torch.nn.Module, **options: Any) -> Any:
    first, *others = model.parameters()
    groups = [{"params": [first], "lr": 0.03, "process_set": hvd.global_process_set}, {"params": others}]
    return hvd.DistributedOptimizer(torch.optim.AdamW(groups, lr=0.01), model.named_parameters(), **options)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("options", OPTIONS)
def test_a_copy_trains_on_as_the_first_does(options: str, how: str) -> None:
    model = network()
    optimizer = adam(model, **OPTIONS[options])
    train(model, optimizer, range(3))
    copied_model, copied = COPIES[how]((model, optimizer))
    assert isinstance(copied, torch.optim.AdamW) and type(copied).__name__ == "AdamW"
    assert copied.param_groups[0]["process_set"] is hvd.global_process_set
    assert copied.backward_passes_per_step == optimizer.backward_passes_per_step
    assert copied._reduction.site == optimizer._reduction.site
    before = [parameter.detach().clone() for parameter in model.parameters()]
    train(copied_model, copied, range(3, 6))
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), before, strict=True))
    train(model, optimizer, range(3, 6))
    for one, other in zip(copied_model.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)
        assert_same_on_all_ranks(one)


def test_a_copy_of_a_copy_and_of_a_scheduler() -> None:
    model = linear_model()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), model.named_parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    model, optimizer, scheduler = copy.deepcopy(copy.deepcopy((model, optimizer, scheduler)))
    assert scheduler.optimizer is optimizer
    for _ in range(2):
        optimizer.zero_grad()
        model(own_input()).sum().backward()
        optimizer.step()
        scheduler.step()
    assert torch.allclose(model.weight, torch.full_like(model.weight, 1 - 1.5 * mean_of_ranks()))


def test_a_copy_has_nothing_in_flight() -> None:
    several_ranks()
    model = linear_model()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), model.named_parameters())
    model(own_input()).sum().backward()
    copied_model, copied = copy.deepcopy((model, optimizer))
    copied.zero_grad()
    copied_model(2 * own_input()).sum().backward()
    copied.step()
    optimizer.step()
    for each, factor in ((model, 1), (copied_model, 2)):
        assert torch.allclose(each.weight, torch.full_like(each.weight, 1 - factor * mean_of_ranks()))


def test_a_shallow_copy_is_refused() -> None:
    model = linear_model()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0))
    with pytest.raises(TypeError, match=r"use copy\.deepcopy"):
        copy.copy(optimizer)
    model(own_input()).sum().backward()
    optimizer.step()


@pytest.mark.usefixtures("alone_and_beside_a_stuck_set")
def test_a_copy_keeps_its_process_set() -> None:
    several_ranks()
    first = hvd.add_process_set([0])
    model = linear_model()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), process_set=first)
    for how in COPIES.values():
        copied_model, copied = how((model, optimizer))
        copied_model(own_input()).sum().backward()
        copied.step()
        assert torch.allclose(copied_model.weight, torch.full_like(model.weight, 1.0 - (hvd.rank() + 1)))
    pickled = pickle.dumps(optimizer)
    hvd.barrier()
    assert hvd.remove_process_set(first)
    with pytest.raises(ValueError, match="has not been registered"):
        pickle.loads(pickled)


def test_a_pickle_is_of_a_job() -> None:
    model = linear_model()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0))
    pickled = pickle.dumps((model, optimizer))
    hvd.barrier()
    hvd.shutdown()
    with pytest.raises(ValueError, match=r"Horovod has not been initialized; use hvd\.init\(\)\."):
        pickle.loads(pickled)
    hvd.init(process_sets="dynamic")
    model, optimizer = pickle.loads(pickled)
    model(own_input()).sum().backward()
    optimizer.step()
    assert torch.allclose(model.weight, torch.full_like(model.weight, 1 - mean_of_ranks()))
