"""DistributedOptimizer: a gradient that is not as in the steps before, once these have been prepared for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import horovod_cpp.torch as hvd
from horovod_cpp.torch import reduction

SHAPE = (4, 3)


class _Given(torch.autograd.Function):
    """Gives the parameters the gradients that `make` makes."""

    @staticmethod
    def forward(ctx: Any, make: Callable[[], tuple[torch.Tensor, ...]], *parameters: torch.Tensor) -> torch.Tensor:
        ctx.make = make
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return None, *ctx.make()


def values() -> torch.Tensor:
    return torch.arange(1.0, 13.0).reshape(SHAPE) * (hvd.rank() + 1)


def alike() -> tuple[torch.Tensor, ...]:
    return values(), values()


def negated() -> tuple[torch.Tensor, ...]:
    return torch._neg_view(-values()), values()


def of_one_memory() -> tuple[torch.Tensor, ...]:
    both = values()
    return both.view(SHAPE), both.view(SHAPE)


def kept() -> tuple[torch.Tensor, ...]:
    keepers.append(values())
    return keepers[-1].view(SHAPE), values()


def transposed() -> tuple[torch.Tensor, ...]:
    return values().t().contiguous().t(), values()


def with_gaps() -> tuple[torch.Tensor, ...]:
    wide = torch.zeros(4, 6)
    wide[:, ::2] = values()
    return wide[:, ::2], values()


def sparse() -> tuple[torch.Tensor, ...]:
    return values().to_sparse(1), values()


def none_for_one() -> tuple[torch.Tensor, ...]:
    return values(), None  # type: ignore[return-value]


keepers: list[torch.Tensor] = []
KINDS = [alike, negated, of_one_memory, kept, transposed, with_gaps, sparse, none_for_one]


def made(**options: Any) -> tuple[list[torch.Tensor], Any]:
    parameters: list[torch.Tensor] = [torch.nn.Parameter(torch.ones(SHAPE)) for _ in range(2)]
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    named = [(f"p{index}", each) for index, each in enumerate(parameters)]
    return parameters, hvd.DistributedOptimizer(optimizer, named, op=hvd.Sum, **options)


def expect_sums(parameters: list[torch.Tensor], left_out: int | None = None) -> None:
    total = hvd.size() * (hvd.size() + 1) // 2
    for index, parameter in enumerate(parameters):
        assert parameter.grad is not None
        wanted = torch.arange(1.0, 13.0).reshape(SHAPE) * (0 if index == left_out else total)
        assert torch.equal(parameter.grad.to_dense(), wanted), index


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_gradients_of_all_kinds_in_turns(kind: Callable[[], tuple[torch.Tensor, ...]], passes: int) -> None:
    if kind is none_for_one and hvd.size() == 1:
        pytest.skip("one rank reduces nothing, so there are no zeros")
    parameters, optimizer = made(backward_passes_per_step=passes)
    keepers.clear()
    zeros = tuple(torch.zeros(SHAPE) for _ in parameters)
    for step in range(6):
        optimizer.zero_grad()
        make = kind if step in (2, 4) else alike
        for number in range(passes):
            _Given.apply(make if number == 0 else lambda: zeros, *parameters).backward()
        optimizer.step()
        expect_sums(parameters, left_out=1 if make is none_for_one else None)
    if passes == 1:  # otherwise torch adds to it
        assert all(torch.equal(keeper, values()) for keeper in keepers)


def test_what_is_forgotten_in_flight_is_made_anew() -> None:
    parameters, optimizer = made()
    for step in range(6):
        _Given.apply(alike, *parameters).backward()
        if step in (1, 3):
            hvd.barrier()
            optimizer.load_state_dict(optimizer.state_dict())  # forgets what is in flight, on all ranks
            hvd.barrier()
            for parameter in parameters:
                parameter.grad = None
            continue
        optimizer.step()
        expect_sums(parameters)
        optimizer.zero_grad()


def test_a_backward_pass_too_many_is_refused_as_in_the_first_step() -> None:
    if hvd.size() == 1:
        pytest.skip("one rank reduces nothing")
    parameters, optimizer = made()
    for _ in range(3):
        _Given.apply(alike, *parameters).backward()
        optimizer.step()
        optimizer.zero_grad()
    _Given.apply(alike, *parameters).backward()
    with pytest.raises(AssertionError, match="more than backward_passes_per_step times"):
        _Given.apply(alike, *parameters).backward()
    optimizer.synchronize()


def test_a_change_of_what_is_in_flight_is_warned_of_in_a_later_step() -> None:
    parameters, optimizer = made()
    for step in range(4):
        _Given.apply(alike, *parameters).backward()
        if step == 3 and hvd.size() > 1:
            assert parameters[0].grad is not None
            parameters[0].grad.mul_(1.0)
            with pytest.warns(UserWarning, match="'p0' was changed after loss.backward"):
                optimizer.step()
        else:
            optimizer.step()
        optimizer.zero_grad()


def test_it_goes_the_short_way() -> None:
    if hvd.size() == 1:
        pytest.skip("one rank reduces nothing")
    parameters, optimizer = made()
    found: list[reduction.Gradient] = [optimizer._reduction.gradients[each] for each in parameters]
    for step in range(3):
        _Given.apply(alike, *parameters).backward()
        assert all(gradient.in_plan == (step > 0) for gradient in found)
        optimizer.step()
        optimizer.zero_grad()
