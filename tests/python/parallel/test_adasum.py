"""Adasum of tensors and of optimizer steps, on any number of ranks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import FLOATS, TOLERANCE, all_inputs, assert_same_on_all_ranks
from test_optimizer import batch, loss_of, network

import horovod_cpp.torch as hvd


def adasum(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    dot, norm_a, norm_b = (a * b).sum(), (a * a).sum(), (b * b).sum()
    of_a = a * (1 - dot / (2 * norm_a)) if norm_a > 0 else a
    of_b = b * (1 - dot / (2 * norm_b)) if norm_b > 0 else b
    return of_a + of_b


def adasum_of_all(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The tree over ranks: those beyond a power of two first, then pairs of pairs."""
    vectors = [tensor.double() for tensor in tensors]
    paired = 1
    while 2 * paired <= len(vectors):
        paired *= 2
    for i in range(paired, len(vectors)):
        vectors[i - paired] = adasum(vectors[i - paired], vectors[i])
    distance = 1
    while distance < paired:
        for i in range(0, paired, 2 * distance):
            vectors[i] = adasum(vectors[i], vectors[i + distance])
        distance *= 2
    return vectors[0]


@pytest.mark.parametrize("shape", [(1,), (17,), (3, 17, 7), (0,), (), (100_003,)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_allreduce(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    inputs = all_inputs(shape, dtype)
    output = hvd.allreduce(inputs[hvd.rank()], op=hvd.Adasum)
    expected = adasum_of_all(inputs)
    assert output.dtype == dtype and output.shape == expected.shape
    if output.numel():
        assert (output.double() - expected).abs().max().item() <= 10 * TOLERANCE[dtype] * hvd.size()
    assert_same_on_all_ranks(output)


def test_equal_vectors_stay_and_orthogonal_ones_add_up() -> None:
    assert torch.equal(hvd.allreduce(torch.full((9,), 0.5), op=hvd.Adasum), torch.full((9,), 0.5))
    own = torch.zeros(hvd.size(), dtype=torch.float64)
    own[hvd.rank()] = 3.0
    assert hvd.allreduce(own, op=hvd.Adasum).tolist() == [3.0] * hvd.size()


def test_each_tensor_has_weights_of_its_own() -> None:
    # Whatever travels with it: fused or in a group, a tensor gets what it gets alone.
    inputs = [torch.randn(n, dtype=torch.float64) * (hvd.rank() + 1) for n in (5, 50, 500)]
    alone = [hvd.allreduce(tensor, op=hvd.Adasum) for tensor in inputs]
    handles = [hvd.allreduce_async(tensor, op=hvd.Adasum) for tensor in inputs]
    together = [hvd.synchronize(handle) for handle in handles]
    grouped = hvd.grouped_allreduce(inputs, op=hvd.Adasum)
    for one, two, three in zip(alone, together, grouped, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


def test_factors_and_refusals() -> None:
    tensor = torch.arange(4.0) + hvd.rank()
    plain = hvd.allreduce(tensor, op=hvd.Adasum)
    scaled = hvd.allreduce(tensor, op=hvd.Adasum, prescale_factor=2.0, postscale_factor=0.25)
    assert torch.allclose(scaled, 0.5 * plain)
    with pytest.raises(ValueError, match="Adasum is for floating-point tensors, this one is of int32"):
        hvd.allreduce(torch.ones(2, dtype=torch.int32), op=hvd.Adasum)
    with pytest.raises(ValueError, match="complex"):
        hvd.allreduce(torch.ones(2, dtype=torch.complex64), op=hvd.Adasum)


def test_a_joined_rank_changes_nothing() -> None:
    if hvd.rank() == 0:
        tensor = torch.arange(1.0, 5.0)
        assert torch.equal(hvd.allreduce(tensor, name="joined", op=hvd.Adasum), tensor)
    hvd.join()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_steps_of_all_ranks_are_reduced(kind: str) -> None:
    # Every rank can replay the steps of all others.
    model = network()
    optimizer = hvd.DistributedOptimizer(OPTIMIZERS[kind](model.parameters()), model.named_parameters(), op=hvd.Adasum)
    replicas = [network() for _ in range(hvd.size())]
    steppers = [OPTIMIZERS[kind](replica.parameters()) for replica in replicas]
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, *batch(100 * step + hvd.rank(), 4, torch.float64)).backward()
        optimizer.step()
        starts = [parameter.detach().clone() for parameter in replicas[0].parameters()]
        for rank, (replica, stepper) in enumerate(zip(replicas, steppers, strict=True)):
            stepper.zero_grad()
            loss_of(replica, *batch(100 * step + rank, 4, torch.float64)).backward()
            stepper.step()
        with torch.no_grad():
            for start, *parameters in zip(starts, *(replica.parameters() for replica in replicas), strict=True):
                changed = start + adasum_of_all([parameter - start for parameter in parameters])
                for parameter in parameters:
                    parameter.copy_(changed)
    for got, wanted in zip(model.parameters(), replicas[0].parameters(), strict=True):
        assert (got - wanted).abs().max().item() <= 1e-9
        assert_same_on_all_ranks(got)


def test_rules_around_the_step() -> None:
    model = network()
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = hvd.DistributedOptimizer(plain, model.named_parameters(), op=hvd.Adasum)
    assert optimizer is plain and isinstance(optimizer, torch.optim.SGD)
    loss_of(model, *batch(0, 4, torch.float64)).backward()
    optimizer.zero_grad()  # no gradient is in flight
    optimizer.synchronize()
    with pytest.raises(AssertionError, match="Adasum"), optimizer.skip_synchronize():
        pass
    # A second call replaces the first: gradients are averaged from now on.
    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters())
    loss_of(model, *batch(hvd.rank(), 4, torch.float64)).backward()
    optimizer.step()
    for parameter in model.parameters():
        assert_same_on_all_ranks(parameter)


@pytest.mark.parametrize("passes", [1, 2])
def test_backward_passes_are_counted(passes: int) -> None:
    if hvd.size() == 1:
        pytest.skip("one rank reduces nothing")
    model = torch.nn.Linear(2, 1)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model.named_parameters(),
        op=hvd.Adasum,
        backward_passes_per_step=passes,
    )

    def backward(count: int) -> None:
        for _ in range(count):
            model(torch.ones(1, 2)).sum().backward()

    for _ in range(2):
        backward(passes)
        optimizer.step()
    backward(passes)
    with pytest.raises(AssertionError, match="Gradients were computed more than backward_passes_per_step times"):
        backward(1)
    optimizer.zero_grad()
    backward(passes)
    optimizer.step()


def test_a_closure_that_is_called_several_times() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3), model.named_parameters(), op=hvd.Adasum
    )
    calls: list[float] = []

    def closure() -> torch.Tensor:
        model.zero_grad()
        loss = (model(torch.ones(2, 2) * (hvd.rank() + 1)) - 1).square().sum()
        loss.backward()
        calls.append(loss.item())
        return loss

    for _ in range(2):
        optimizer.step(closure)
    assert len(calls) > 2
    for parameter in model.parameters():
        assert_same_on_all_ranks(parameter)


def test_a_step_that_fails_leaves_the_parameters() -> None:
    if hvd.size() == 1:
        pytest.skip("one rank agrees with itself")
    model = torch.nn.Linear(4 if hvd.rank() == 0 else 3, 1)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), op=hvd.Adasum)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model(torch.ones(1, model.in_features)).sum().backward()
    with pytest.raises(hvd.HorovodInternalError, match=r"mismatched shape"):
        optimizer.step()
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), before, strict=True))
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == hvd.size()


def test_a_gradient_may_require_one() -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), op=hvd.Adasum)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of the cycle, which the next line ends
        model(torch.ones(1, 2)).square().sum().backward(create_graph=True)
    assert model.weight.grad is not None and model.weight.grad.requires_grad
    model.weight.grad = model.weight.grad.detach()
    optimizer.step()
