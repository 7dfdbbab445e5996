"""DistributedOptimizer with gradients that are views of buckets. What it shares with other gradients is in
test_optimizer.py and test_training_idioms.py, which run with views, too."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import assert_same_on_all_ranks
from test_memory_formats import Copies
from test_optimizer import CLASSES, batch, linear_model, loss_of, mean_of_ranks, own_input, part, several_ranks

import horovod_cpp.torch as hvd
from horovod_cpp.torch.bucket_reduction import BucketReduction
from horovod_cpp.torch.buckets import Bucket

pytestmark = pytest.mark.usefixtures("small_buckets")

VIEWS = {"gradient_as_bucket_view": True}

STEPS = 5
CHANNELS_LAST = torch.channels_last


class Network(torch.nn.Module):
    """Convolutions in channels_last, and a layer that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.features = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 5, 3))
        self.unused = torch.nn.Linear(3, 2)
        self.head = torch.nn.Linear(5 * 16, CLASSES)
        self.to(torch.float64, memory_format=CHANNELS_LAST)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images.contiguous(memory_format=CHANNELS_LAST)).flatten(1))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)


def views_of(optimizer: Any) -> list[Bucket]:
    reduction = optimizer._reduction
    assert isinstance(reduction, BucketReduction)
    return reduction.buckets


def with_views(inner: torch.optim.Optimizer, model: torch.nn.Module, **options: Any) -> Any:
    return hvd.DistributedOptimizer(inner, model.named_parameters(), gradient_as_bucket_view=True, **options)


def step(model: torch.nn.Module, optimizer: Any, number: int, passes: int = 1, set_to_none: bool = True) -> None:
    """On this rank's part of the batch if the optimizer is a distributed one."""
    optimizer.zero_grad(set_to_none=set_to_none)
    for each in range(passes):
        images, labels = batch(number * passes + each, 4 * hvd.size(), torch.float64)
        if hasattr(optimizer, "skip_synchronize"):
            images, labels = part(images), part(labels)
        loss_of(model, images, labels).backward()
    optimizer.step()


FEATURES: dict[str, Callable[[list[torch.Tensor]], dict[str, Any]]] = {
    "plain": lambda _: {},
    "groups": lambda _: {"groups": 2},
    "lists": lambda parameters: {"groups": [parameters[3:1:-1], [parameters[0]]]},
    "predivide": lambda _: {"gradient_predivide_factor": 4.0},
    "sparse as dense": lambda _: {"sparse_as_dense": True},
    "two passes": lambda _: {"backward_passes_per_step": 2},
}


@pytest.mark.parametrize("set_to_none", [True, False], ids=["none", "zeros"])
@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature_trains_like_one_process(feature: str, make: Any, set_to_none: bool) -> None:
    alone, together = Network(), Network()
    options = FEATURES[feature](list(together.parameters()))
    passes = options.get("backward_passes_per_step", 1)
    plain, optimizer = make(alone.parameters()), with_views(make(together.parameters()), together, **options)
    for number in range(STEPS):
        step(alone, plain, number, passes, set_to_none)
        step(together, optimizer, number, passes, set_to_none)
    for got, wanted, start in zip(together.parameters(), alone.parameters(), Network().parameters(), strict=True):
        assert (got - wanted).abs().max().item() <= 1e-9
        assert not torch.equal(got, start) or got.shape[0] == 2
        assert_same_on_all_ranks(got)


@pytest.mark.parametrize("compression", [hvd.Compression.fp16, hvd.Compression.bf16])
def test_compressed_buckets_train_nearly_so(compression: Any) -> None:
    several_ranks()
    alone, together = Network(), Network()
    plain, optimizer = (
        sgd(alone.parameters()),
        with_views(sgd(together.parameters()), together, compression=compression),
    )
    for number in range(STEPS):
        step(alone, plain, number)
        step(together, optimizer, number)
    difference = max(
        (got - wanted).abs().max().item() for got, wanted in zip(together.parameters(), alone.parameters(), strict=True)
    )
    assert 0 < difference < 0.01
    assert all(parameter.grad.dtype == torch.float64 for parameter in together.parameters())


@pytest.mark.parametrize("set_to_none", [True, False], ids=["none", "zeros"])
def test_gradients_are_views_that_stay_where_they_are(set_to_none: bool) -> None:
    several_ranks()
    model = Network()
    optimizer = with_views(sgd(model.parameters()), model)
    addresses = set()
    for number in range(3):
        step(model, optimizer, number, set_to_none=set_to_none)
        addresses.add(tuple(parameter.grad.data_ptr() for parameter in model.parameters()))
    assert len(addresses) == 1
    buckets = views_of(optimizer)
    assert 1 < len(buckets) < len(list(model.parameters()))
    of_parameter = {parameter: gradient.bucket for parameter, gradient in optimizer._reduction.gradients.items()}
    for parameter in model.parameters():
        flat = of_parameter[parameter].flat
        offset = parameter.grad.data_ptr() - flat.data_ptr()
        assert 0 <= offset <= 8 * (flat.numel() - parameter.numel())
        assert offset % 64 == 0
        assert parameter.grad.stride() == parameter.stride()
        parameter.grad.detach_().zero_()  # as programs of old do
    assert not model.features[2].weight.grad.is_contiguous()


def test_a_bucket_is_one_operation_and_step_copies_nothing() -> None:
    several_ranks()
    model = Network()
    optimizer = with_views(sgd(model.parameters()), model)
    for number in range(3):
        optimizer.zero_grad()
        images, labels = batch(number, 4 * hvd.size(), torch.float64)
        hvd.barrier()
        before = hvd.statistics()
        (loss_of(model, part(images), part(labels)) + model.unused.weight.sum() + model.unused.bias.sum()).backward()
        with Copies() as copies:
            optimizer.synchronize()
        assert not copies.seen
        after = hvd.statistics()
        assert after["operations_done"] - before["operations_done"] == len(views_of(optimizer))


def test_a_gradient_that_is_the_view_is_not_copied() -> None:
    several_ranks()
    model = linear_model()
    optimizer = with_views(torch.optim.SGD(model.parameters(), lr=1.0), model, backward_passes_per_step=2)
    for number, turns in enumerate(([1, 0], [0, 0])):
        for expected in turns:
            loss = model(own_input()).sum()
            with Copies() as copies:
                loss.backward()
            assert copies.seen.count("aten.copy_.default") == expected, number
        optimizer.synchronize()
        assert torch.allclose(model.weight.grad, torch.full_like(model.weight, 2 * mean_of_ranks()))
        optimizer.zero_grad(set_to_none=False)


def test_a_gradient_of_the_users_own_is_reduced() -> None:
    model = linear_model()
    optimizer = with_views(torch.optim.SGD(model.parameters(), lr=1.0), model)
    model.weight.grad = torch.full_like(model.weight, float(hvd.rank() + 1))
    optimizer.step()
    assert torch.allclose(model.weight, torch.full_like(model.weight, 1.0 - mean_of_ranks()))
    optimizer.zero_grad(set_to_none=False)
    model.weight.grad = model.weight.grad + 1.0  # before backward, which adds to it
    model(own_input()).sum().backward()
    model.weight.grad = None  # what is in flight comes back
    optimizer.step()
    wanted = 1.0 + mean_of_ranks() if hvd.size() > 1 else 0.0
    assert torch.allclose(model.weight, torch.full_like(model.weight, 1.0 - mean_of_ranks() - wanted))


def test_parameters_of_two_types_are_in_two_buckets() -> None:
    several_ranks()
    model = torch.nn.ModuleList([torch.nn.Linear(3, 2, dtype=dtype) for dtype in (torch.float32, torch.float64)])
    for options in ({}, {"groups": 1}):
        optimizer = with_views(torch.optim.SGD(model.parameters(), lr=0.1), model, **options)
        sum(layer(own_input().to(layer.weight.dtype)).double().sum() for layer in model).backward()
        optimizer.step()
        assert [bucket.flat.dtype for bucket in views_of(optimizer)] == (
            [torch.float64, torch.float32] if not options else [torch.float32, torch.float64]
        )
        for layer in model:
            assert torch.allclose(layer.weight.grad, torch.full_like(layer.weight, mean_of_ranks()))
        optimizer.zero_grad()


def test_complex_gradients() -> None:
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.complex128))
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([weight], lr=1.0), gradient_as_bucket_view=True)
    for _ in range(2):
        optimizer.zero_grad()
        (weight * (hvd.rank() + 1)).imag.sum().backward()
        optimizer.synchronize()
        assert torch.allclose(weight.grad, torch.full_like(weight, 1j * mean_of_ranks()))


@pytest.mark.parametrize("as_dense", ["option", "group"])
def test_sparse_gradients_are_made_dense(as_dense: str) -> None:
    table = torch.nn.Embedding(5, 2, sparse=True, dtype=torch.float64)
    torch.nn.init.zeros_(table.weight)
    options: dict[str, Any] = {"sparse_as_dense": True} if as_dense == "option" else {"groups": 1}
    optimizer = with_views(torch.optim.SGD(table.parameters(), lr=1.0), table, op=hvd.Sum, **options)
    for _ in range(2):
        optimizer.zero_grad()
        table(torch.tensor([hvd.rank()])).sum().backward()
        optimizer.step()
    expected = torch.zeros(5, 2, dtype=torch.float64)
    expected[: hvd.size()] = -2.0
    assert torch.equal(table.weight.detach(), expected)


def test_a_sparse_gradient_without_the_option_is_an_error_that_names_it() -> None:
    several_ranks()
    table = torch.nn.Embedding(5, 2, sparse=True)
    optimizer = with_views(torch.optim.SGD(table.parameters(), lr=1.0), table)
    with pytest.raises(ValueError, match=r"parameter 'weight' has a sparse gradient.*sparse_as_dense=True"):
        table(torch.tensor([1])).sum().backward()
    optimizer.zero_grad()
    (table.weight * 2).sum().backward()
    optimizer.step()


def test_a_model_that_has_another_type_by_now_is_an_error_that_says_so() -> None:
    several_ranks()
    model = linear_model()
    optimizer = with_views(torch.optim.SGD(model.parameters(), lr=1.0), model)
    model.to(torch.float32)
    with pytest.raises(
        ValueError, match=r"'weight' is of torch.float32.*bucket of torch.float64.*move the model before"
    ):
        model(own_input().float()).sum().backward()
    optimizer.zero_grad()


def test_a_group_that_is_added_later_has_buckets_of_its_own() -> None:
    model, late = linear_model(), torch.nn.Linear(3, 2, dtype=torch.float64)
    optimizer = with_views(torch.optim.SGD(model.parameters(), lr=1.0), model)
    optimizer.add_param_group({"params": list(late.parameters()), "lr": 0.5})
    start = late.weight.detach().clone()
    (model(own_input()) + late(own_input())).sum().backward()
    optimizer.step()
    assert torch.allclose(late.weight, start - 0.5 * mean_of_ranks())
    if hvd.size() > 1:
        assert [bucket.name for bucket in views_of(optimizer)] == [
            "bucket.0.weight",
            "bucket.1.allreduce.noname.1.1",
        ]


@pytest.mark.parametrize(
    ("options", "name"), [({}, "weight"), ({"groups": 1}, "group.0.weight"), (VIEWS, "bucket.0.weight")]
)
def test_an_error_on_one_rank_and_training_goes_on(options: dict[str, Any], name: str) -> None:
    several_ranks()
    model = linear_model()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0), model.named_parameters(), **options
    )
    blocking = None
    if hvd.rank() == 0:  # its name is in flight already, so that its backward fails
        blocking = hvd.allreduce_async(torch.ones(999), name=name)
        with pytest.raises(ValueError, match=re.escape(name)):
            model(own_input()).sum().backward()
    hvd.barrier()
    if blocking is None:
        blocking = hvd.allreduce_async(torch.ones(999), name=name)
    hvd.synchronize(blocking)
    if hvd.rank() > 0:
        model(own_input()).sum().backward()
    optimizer.step()  # starts what was refused
    for _ in range(2):
        assert torch.allclose(model.weight.grad, torch.full_like(model.weight, mean_of_ranks()))
        optimizer.zero_grad()
        model(own_input()).sum().backward()
        optimizer.step()
    assert_same_on_all_ranks(model.weight)


@pytest.mark.parametrize("change", ["memory format", "precision and back", "data"])
def test_a_gradient_that_somebody_has_moved_is_reduced(change: str) -> None:
    """`Module.to` and its like set the data of a gradient: the object stays, its memory is another one."""
    several_ranks()
    model = torch.nn.Conv2d(2, 2, 2)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    optimizer = with_views(torch.optim.SGD(model.parameters(), lr=0.1), model)
    for step in range(3):
        optimizer.zero_grad(set_to_none=step == 1)
        model(torch.full((1, 2, 4, 4), float(hvd.rank() + step))).sum().backward()
        optimizer.step()
        if step > 0:
            continue
        if change == "memory format":
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        elif change == "precision and back":
            model.double().float()
        else:
            model.weight.grad.data = model.weight.grad.data.clamp(-1, 1)
    assert_same_on_all_ranks(model.weight)
    assert_same_on_all_ranks(model.bias)


def test_what_is_forgotten_in_flight_keeps_its_memory() -> None:
    several_ranks()
    model = linear_model()
    optimizer = with_views(torch.optim.SGD(model.parameters(), lr=1.0), model)
    late = hvd.rank() > 0
    if not late:
        model(own_input()).sum().backward()
        (bucket,) = views_of(optimizer)
        before = bucket.flat
        optimizer.load_state_dict(optimizer.state_dict())
        assert bucket.flat.data_ptr() != before.data_ptr()
        optimizer.zero_grad()
    hvd.barrier()
    if late:
        model(own_input()).sum().backward()
        optimizer._reduction.synchronize()
        optimizer.zero_grad()
    hvd.barrier()  # nothing of that name is in flight any more
    model(own_input()).sum().backward()
    optimizer.step()
    assert torch.allclose(model.weight, torch.full_like(model.weight, 1 - mean_of_ranks()))


@pytest.mark.parametrize("difference", ["shape", "order"])
def test_ranks_whose_gradients_lie_differently_meet_an_error(difference: str) -> None:
    several_ranks()
    shape = (3, 2, 2, 2) if difference == "order" or hvd.rank() == 0 else (2, 3, 2, 2)
    weight = torch.ones(shape)
    if difference == "order" and hvd.rank() == 0:
        weight = weight.contiguous(memory_format=CHANNELS_LAST)
    parameter = torch.nn.Parameter(weight)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD([parameter], lr=1.0), [("lies.differently", parameter)], gradient_as_bucket_view=True
    )
    parameter.sum().backward()
    with pytest.raises(hvd.HorovodInternalError, match=r"bucket\.0\.lies\.differently"):
        optimizer.step()
    hvd.barrier()


@pytest.mark.usefixtures("alone_and_beside_a_stuck_set")
def test_one_rank_alone_has_plain_gradients() -> None:
    model = linear_model()
    alone = hvd.add_process_set([0]) if hvd.size() > 1 else hvd.global_process_set
    optimizer = with_views(torch.optim.SGD(model.parameters(), lr=1.0), model, process_set=alone)
    assert not views_of(optimizer)
    model(own_input()).sum().backward()
    optimizer.step()
    assert torch.allclose(model.weight, torch.full_like(model.weight, 1.0 - (hvd.rank() + 1)))
    hvd.barrier()
    assert alone is hvd.global_process_set or hvd.remove_process_set(alone)


@pytest.mark.usefixtures("alone_and_beside_a_stuck_set")
def test_a_process_set() -> None:
    if hvd.size() < 3:
        pytest.skip("two ranks have no set of two")
    ends = hvd.add_process_set([0, hvd.size() - 1])
    model = linear_model()
    optimizer = with_views(torch.optim.SGD(model.parameters(), lr=1.0), model, process_set=ends)
    model(own_input()).sum().backward()
    optimizer.step()
    wanted = mean_of_ranks() if ends.included() else hvd.rank() + 1.0
    assert torch.allclose(model.weight, torch.full_like(model.weight, 1.0 - wanted))
    hvd.barrier()
    assert hvd.remove_process_set(ends)
