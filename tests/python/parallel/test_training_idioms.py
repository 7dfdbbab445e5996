"""What training scripts do around an optimizer: each trains N ranks as one process does with the whole batch."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import assert_same_on_all_ranks
from test_optimizer import batch, loss_of, network, part

import horovod_cpp.torch as hvd

pytestmark = pytest.mark.usefixtures("gradients_and_bucket_views")

STEPS = 5
ROWS = 4

Step = Callable[[torch.nn.Module, Any, torch.Tensor, torch.Tensor], None]


def plain_step(model: torch.nn.Module, optimizer: Any, images: torch.Tensor, labels: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss_of(model, images, labels).backward()
    optimizer.step()


def train(make: Callable[[Any], torch.optim.Optimizer], step: Step, together: bool) -> list[torch.Tensor]:
    """The parameters after a few steps, on this rank's part of each batch or on all of it."""
    model = network()
    optimizer: Any = make(model.parameters())
    if together:
        optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters())
    for number in range(STEPS):
        images, labels = batch(number, ROWS * hvd.size(), torch.float64)
        if together:
            images, labels = part(images), part(labels)
        step(model, optimizer, images, labels)
    return [parameter.detach() for parameter in model.parameters()]


def assert_trains_alike(make: Callable[[Any], torch.optim.Optimizer], step: Step = plain_step) -> None:
    alone, together = train(make, step, False), train(make, step, True)
    for got, wanted in zip(together, alone, strict=True):
        assert (got - wanted).abs().max().item() <= 1e-9
        assert_same_on_all_ranks(got)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd foreach": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, foreach=True),
    "sgd fused": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, fused=True),
    "adam foreach": lambda parameters: torch.optim.Adam(parameters, lr=1e-3, foreach=True),
    "adamw fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=1e-2),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_kinds_of_optimizers(kind: str) -> None:
    assert_trains_alike(OPTIMIZERS[kind])


def test_clipping_of_the_reduced_gradients() -> None:
    def step(model: torch.nn.Module, optimizer: Any, images: torch.Tensor, labels: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss_of(model, images, labels).backward()
        if hasattr(optimizer, "skip_synchronize"):
            optimizer.synchronize()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            with optimizer.skip_synchronize():
                optimizer.step()
        else:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()

    assert_trains_alike(lambda parameters: torch.optim.SGD(parameters, lr=0.5), step)


@pytest.mark.parametrize("change", ["clip", "assign"])
@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"compression": hvd.Compression.fp16}], ids=str)
def test_a_gradient_that_is_changed_in_flight_is_told_of_once(options: dict[str, Any], change: str) -> None:
    if hvd.size() == 1:
        pytest.skip("one rank has nothing in flight")
    model = network()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), **options
    )
    for first in (True, False):
        optimizer.zero_grad()
        images, labels = batch(0, ROWS * hvd.size(), torch.float64)
        loss_of(model, part(images), part(labels)).backward()
        if change == "clip":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        else:
            next(iter(model.parameters())).grad[0] = 0.0
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        assert len(caught) == first
        if first:
            assert re.match(r"The gradient of parameter '0\.weight' was changed", str(caught[0].message))
            assert caught[0].filename == __file__


def test_a_schedule_of_the_learning_rate() -> None:
    schedulers: dict[int, torch.optim.lr_scheduler.LRScheduler] = {}

    def step(model: torch.nn.Module, optimizer: Any, images: torch.Tensor, labels: torch.Tensor) -> None:
        scheduler = schedulers.setdefault(id(optimizer), torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.1))
        plain_step(model, optimizer, images, labels)
        scheduler.step()

    assert_trains_alike(lambda parameters: torch.optim.SGD(parameters, lr=0.5), step)


@pytest.mark.parametrize("unscales", [True, False])
@pytest.mark.parametrize("kind", ["sgd foreach", "sgd fused", "adamw fused"])
def test_a_gradient_scaler(kind: str, unscales: bool) -> None:
    """A fused optimizer divides by the scale within its step, where nobody has done it before."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)

    def step(model: torch.nn.Module, optimizer: Any, images: torch.Tensor, labels: torch.Tensor) -> None:
        optimizer.zero_grad()
        scaler.scale(loss_of(model, images, labels)).backward()
        if hasattr(optimizer, "skip_synchronize"):
            assert getattr(optimizer, "_step_supports_amp_scaling", False) == ("fused" in kind)
            optimizer.synchronize()
            if unscales:
                scaler.unscale_(optimizer)
            with optimizer.skip_synchronize():
                scaler.step(optimizer)
        else:
            scaler.step(optimizer)
        scaler.update()

    assert_trains_alike(OPTIMIZERS[kind], step)
    assert scaler.get_scale() == 1024.0


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_on_one_rank_skips_the_step_of_all(fused: bool) -> None:
    model = network(torch.float32)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1, fused=fused), model.named_parameters()
    )
    images, labels = batch(0, ROWS * hvd.size(), torch.float32)
    loss = loss_of(model, part(images), part(labels)) * (float("inf") if hvd.rank() == 0 else 1.0)
    scaler.scale(loss).backward()
    optimizer.synchronize()
    with optimizer.skip_synchronize():
        scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 32.0
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), before, strict=True))


def test_autocast() -> None:
    def trained(together: bool) -> list[torch.Tensor]:
        model = network(torch.float32)
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.05)
        if together:
            optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters())
        for number in range(STEPS):
            images, labels = batch(number, ROWS * hvd.size(), torch.float32)
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(model, *((part(images), part(labels)) if together else (images, labels)))
            loss.backward()
            optimizer.step()
        return [parameter.detach() for parameter in model.parameters()]

    for got, wanted, start in zip(trained(True), trained(False), network(torch.float32).parameters(), strict=True):
        # Parts of a batch are rounded otherwise than the whole: to 8 bits, in each layer.
        assert (got - wanted).norm() <= 0.05 * (wanted - start).norm()
        assert_same_on_all_ranks(got)


def test_a_checkpoint_goes_on_as_if_there_had_been_no_break() -> None:
    def trained(breaks: bool) -> list[torch.Tensor]:
        model = network()
        optimizer: Any = hvd.DistributedOptimizer(
            torch.optim.Adam(model.parameters(), lr=1e-3), model.named_parameters()
        )
        for number in range(6):
            if breaks and number == 3:
                saved = hvd.broadcast_object(
                    (model.state_dict(), optimizer.state_dict()) if hvd.rank() == 0 else None, root_rank=0
                )
                model = network()
                optimizer = hvd.DistributedOptimizer(
                    torch.optim.Adam(model.parameters(), lr=0.7), model.named_parameters()
                )
                if hvd.rank() == 0:
                    model.load_state_dict(saved[0])
                    optimizer.load_state_dict(saved[1])
                hvd.broadcast_parameters(model.state_dict(), root_rank=0)
                hvd.broadcast_optimizer_state(optimizer, root_rank=0)
            images, labels = batch(number, ROWS * hvd.size(), torch.float64)
            plain_step(model, optimizer, part(images), part(labels))
        return [parameter.detach() for parameter in model.parameters()]

    for with_break, without in zip(trained(True), trained(False), strict=True):
        assert torch.equal(with_break, without)


@pytest.mark.parametrize("as_number", [False, True])
@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_a_closure_that_is_called_several_times(line_search: str | None, as_number: bool) -> None:
    def step(model: torch.nn.Module, optimizer: Any, images: torch.Tensor, labels: torch.Tensor) -> None:
        losses: list[float] = []

        def closure() -> Any:
            optimizer.zero_grad()
            loss = loss_of(model, images, labels)
            loss.backward()
            losses.append(loss.item())
            return loss.item() if as_number else loss

        first = torch.as_tensor(optimizer.step(closure)).item()
        if hasattr(optimizer, "skip_synchronize"):
            assert first == pytest.approx(sum(hvd.allgather_object(losses[0])) / hvd.size())

    rate = 1.0 if line_search else 0.1
    assert_trains_alike(
        lambda parameters: torch.optim.LBFGS(parameters, lr=rate, max_iter=3, line_search_fn=line_search), step
    )


def test_a_compiled_module() -> None:
    def step(model: torch.nn.Module, optimizer: Any, images: torch.Tensor, labels: torch.Tensor) -> None:
        optimizer.zero_grad()
        compiled = torch.compile(model, backend="aot_eager")
        torch.nn.functional.cross_entropy(compiled(images), labels).backward()
        optimizer.step()

    assert_trains_alike(lambda parameters: torch.optim.SGD(parameters, lr=0.05), step)


def test_two_optimizers_of_two_networks_in_turns() -> None:
    # As a GAN does: the second network's loss goes through the first, whose optimizer is not stepped then.
    def trained(together: bool) -> list[torch.Tensor]:
        torch.manual_seed(5)
        maker = torch.nn.Linear(4, 6, dtype=torch.float64)
        judge = torch.nn.Linear(6, 1, dtype=torch.float64)
        optimizers: list[Any] = []
        for name, network_ in (("maker", maker), ("judge", judge)):
            optimizer: Any = torch.optim.SGD(network_.parameters(), lr=0.1)
            if together:
                named = [(f"{name}.{key}", parameter) for key, parameter in network_.named_parameters()]
                optimizer = hvd.DistributedOptimizer(optimizer, named)
            optimizers.append(optimizer)
        for number in range(4):
            generator = torch.Generator().manual_seed(number)
            noise = torch.randn(ROWS * hvd.size(), 4, generator=generator, dtype=torch.float64)
            noise = part(noise) if together else noise
            optimizers[1].zero_grad()
            judge(maker(noise).detach()).mean().backward()
            optimizers[1].step()
            optimizers[0].zero_grad()
            (-judge(maker(noise))).mean().backward(inputs=list(maker.parameters()))
            optimizers[0].step()
        return [parameter.detach() for parameter in (*maker.parameters(), *judge.parameters())]

    for got, wanted in zip(trained(True), trained(False), strict=True):
        assert (got - wanted).abs().max().item() <= 1e-9
