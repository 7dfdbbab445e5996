"""DistributedOptimizer: training on N ranks equals training on one, and the rules around step()."""

from __future__ import annotations

import gc
import inspect
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import all_inputs, assert_reduced, assert_same_on_all_ranks, reduced

import horovod_cpp.torch as hvd
from horovod_cpp.torch import reduction

pytestmark = pytest.mark.usefixtures("gradients_and_bucket_views")

CLASSES = 4


def network(dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    torch.manual_seed(11)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 16), torch.nn.Tanh(),
        torch.nn.Linear(16, CLASSES),
    ).to(dtype)  # fmt: skip


def batch(step: int, rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole batch of a step; rank r takes the r-th of size() equal parts."""
    generator = torch.Generator().manual_seed(1000 + step)
    images = torch.randn(rows, 1, 8, 8, generator=generator, dtype=torch.float64)
    return images.to(dtype), torch.randint(0, CLASSES, (rows,), generator=generator)


def loss_of(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(images), labels)


def part(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.chunk(hvd.size())[hvd.rank()]


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_n_ranks_with_batch_b_train_like_one_rank_with_batch_n_times_b(dtype: torch.dtype, kind: str) -> None:
    per_rank = 6
    alone, together = network(dtype), network(dtype)
    if hvd.rank() > 0:
        with torch.no_grad():
            for parameter in together.parameters():
                parameter.add_(1.0)  # broadcast_parameters has to put this right
    hvd.broadcast_parameters(together.state_dict(), root_rank=0)
    plain = OPTIMIZERS[kind](alone.parameters())
    distributed = hvd.DistributedOptimizer(OPTIMIZERS[kind](together.parameters()), together.named_parameters())
    for step in range(20):
        images, labels = batch(step, per_rank * hvd.size(), dtype)
        plain.zero_grad()
        loss_of(alone, images, labels).backward()
        plain.step()
        distributed.zero_grad()
        loss_of(together, part(images), part(labels)).backward()
        distributed.step()
    moved = network(dtype)
    for got, wanted, start in zip(together.parameters(), alone.parameters(), moved.parameters(), strict=True):
        difference = (got - wanted).double()
        if dtype == torch.float64:
            assert difference.abs().max().item() <= 1e-9
        else:
            assert difference.norm().item() <= 1e-5 * wanted.double().norm().item()
        assert not torch.equal(got, start)
        assert_same_on_all_ranks(got)


def linear_model(value: float = 1.0) -> torch.nn.Linear:
    model = torch.nn.Linear(3, 2, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.fill_(value)
    return model


def own_input() -> torch.Tensor:
    return torch.full((1, 3), float(hvd.rank() + 1), dtype=torch.float64)


def mean_of_ranks() -> float:
    return (hvd.size() + 1) / 2


def test_it_is_the_users_optimizer() -> None:
    model = linear_model()
    plain = torch.optim.SGD(model.parameters(), lr=0.5)
    optimizer = hvd.DistributedOptimizer(plain, named_parameters=model.named_parameters())
    assert optimizer is plain
    assert isinstance(optimizer, torch.optim.SGD)
    assert type(optimizer).__name__ == "SGD"
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("op", ["Average", "Sum", "Max"])
def test_gradients_are_reduced_with_op(op: str) -> None:
    model = linear_model()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), op=getattr(hvd, op))
    model(own_input()).sum().backward()
    optimizer.synchronize()
    wanted = {"Average": mean_of_ranks(), "Sum": mean_of_ranks() * hvd.size(), "Max": float(hvd.size())}[op]
    assert torch.allclose(model.weight.grad, torch.full_like(model.weight, wanted))


@pytest.mark.parametrize("compression", ["none", "fp16", "bf16"])
def test_predivide_and_compression_leave_an_average(compression: str) -> None:
    model = linear_model()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0),
        compression=getattr(hvd.Compression, compression),
        gradient_predivide_factor=float(hvd.size()),
    )
    model(own_input()).sum().backward()
    optimizer.step()
    assert model.weight.grad.dtype == torch.float64
    assert torch.allclose(model.weight.grad, torch.full_like(model.weight, mean_of_ranks()), atol=2e-2)
    assert torch.allclose(model.weight, torch.full_like(model.weight, 1 - mean_of_ranks()), atol=2e-2)


def test_passes_are_summed_before_they_are_reduced() -> None:
    model = linear_model()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), backward_passes_per_step=2)
    for _ in range(2):
        optimizer.zero_grad()
        model(own_input()).sum().backward()
        model(2 * own_input()).sum().backward()
        optimizer.synchronize()
        assert torch.allclose(model.weight.grad, torch.full_like(model.weight, 3 * mean_of_ranks()))
    optimizer.set_backward_passes_per_step(1)
    assert optimizer.backward_passes_per_step == 1
    optimizer.zero_grad()
    model(own_input()).sum().backward()
    optimizer.synchronize()
    assert torch.allclose(model.weight.grad, torch.full_like(model.weight, mean_of_ranks()))


def test_fewer_passes_than_announced_are_reduced_in_step() -> None:
    model = linear_model()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), backward_passes_per_step=3)
    model(own_input()).sum().backward()
    optimizer.step()
    assert torch.allclose(model.weight, torch.full_like(model.weight, 1 - mean_of_ranks()))


def several_ranks() -> None:
    if hvd.size() == 1:
        pytest.skip("one rank reduces nothing")


def test_too_many_passes() -> None:
    several_ranks()
    model = linear_model()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0))
    model(own_input()).sum().backward()
    with pytest.raises(AssertionError, match="Gradients were computed more than backward_passes_per_step times"):
        model(own_input()).sum().backward()
    optimizer.synchronize()


def test_zero_grad_between_backward_and_step() -> None:
    several_ranks()
    model = linear_model()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0))
    model(own_input()).sum().backward()
    with pytest.raises(AssertionError, match=r"optimizer\.zero_grad\(\) was called after loss\.backward\(\)"):
        optimizer.zero_grad()
    optimizer.step()
    optimizer.zero_grad()
    assert model.weight.grad is None
    model(own_input()).sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    assert model.weight.grad.abs().max() == 0
    model(own_input()).sum().backward()
    optimizer.synchronize()
    assert torch.allclose(model.weight.grad, torch.full_like(model.weight, mean_of_ranks()))


def test_clipping_pattern() -> None:
    model = linear_model()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0))
    model(own_input()).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.synchronize()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        assert norm.item() == pytest.approx(mean_of_ranks() * 6**0.5)
        with optimizer.skip_synchronize():
            optimizer.step()
    assert (model.weight - 1).norm().item() == pytest.approx(0.1, rel=1e-4)
    optimizer.zero_grad()
    model(own_input()).sum().backward()
    optimizer.step()


def test_a_second_synchronize_warns_once() -> None:
    model = linear_model()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0))
    model(own_input()).sum().backward()
    optimizer.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    assert len(caught) == 1
    assert "optimizer.step() called without optimizer.skip_synchronize()" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert torch.allclose(model.weight, torch.full_like(model.weight, 1 - mean_of_ranks()))


def test_a_gradient_that_requires_one_is_refused() -> None:
    several_ranks()
    model = linear_model()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), model.named_parameters())
    with pytest.raises(AssertionError, match=r"The gradient of parameter 'weight' requires a gradient itself"):
        model(own_input()).square().sum().backward(create_graph=True)
    optimizer.zero_grad()
    # As the text says: a penalty on a gradient.
    inputs = own_input().requires_grad_()
    (slope,) = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
    (slope * hvd.size()).sum().backward()
    optimizer.step()
    assert torch.allclose(model.weight, torch.full_like(model.weight, 1.0 - hvd.size()))


@pytest.mark.parametrize("torch_counts_owners", [True, False])
@pytest.mark.parametrize("options", [{}, {"groups": 1}, {"compression": hvd.Compression.bf16}], ids=str)
def test_gradients_that_autograd_puts_in_one_memory(
    options: dict[str, Any], torch_counts_owners: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch_counts_owners:
        monkeypatch.setattr(reduction, "_storage_owners", None)
    weight, change = (torch.nn.Parameter(torch.zeros(1 << 18, 3)) for _ in range(2))  # too large to be fused by copying
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([weight, change], lr=1.0), op=hvd.Sum, **options)
    for step in range(2):
        optimizer.zero_grad()
        (own_input().float() @ (weight.t() + change.t())).sum().backward()
        optimizer.step()
        for parameter in (weight, change):
            assert torch.equal(parameter, torch.full_like(parameter, -(step + 1) * mean_of_ranks() * hvd.size()))


@pytest.mark.parametrize("options", [{}, {"groups": 1}], ids=str)
def test_gradients_that_the_program_keeps_in_one_memory_stay_there(options: dict[str, Any]) -> None:
    models = [linear_model(), linear_model()]
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD([model.weight for model in models], lr=1.0),
        op=hvd.Sum,
        gradient_as_bucket_view=False,
        **options,
    )
    flat = torch.zeros(12, dtype=torch.float64)
    for model, part_of in zip(models, flat.chunk(2), strict=True):
        model.weight.grad = part_of.view(2, 3)
    for _ in range(2):
        flat.zero_()
        models[0](own_input()).sum().backward()  # the other's gradient is reduced, too
        optimizer.step()
        assert torch.equal(flat[:6], torch.full((6,), mean_of_ranks() * hvd.size(), dtype=torch.float64))
        assert all(model.weight.grad._is_view() for model in models)


def test_parameters_without_gradient_are_reduced_as_zeros() -> None:
    several_ranks()
    torch.manual_seed(3)
    heads = torch.nn.ModuleList([torch.nn.Linear(3, 1, dtype=torch.float64) for _ in range(hvd.size())])
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(heads.parameters(), lr=0.1), heads.named_parameters())
    for _ in range(3):
        optimizer.zero_grad()
        heads[hvd.rank()](own_input()).sum().backward()  # each rank uses its own head
        optimizer.step()
    for rank, head in enumerate(heads):
        assert torch.allclose(head.weight.grad, torch.full_like(head.weight, (rank + 1) / hvd.size()))
        assert_same_on_all_ranks(head.weight)


def test_gradients_can_be_turned_off_and_on() -> None:
    generator = torch.nn.Linear(3, 3, dtype=torch.float64)
    judge = torch.nn.Linear(3, 1, dtype=torch.float64)
    optimizers = [
        hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), list(model.named_parameters(prefix=name)))
        for name, model in (("generator", generator), ("judge", judge))
    ]
    for step in range(6):
        trained = step % 2
        for index, model in enumerate((generator, judge)):
            for parameter in model.parameters():
                parameter.requires_grad_(index == trained)
        for optimizer in optimizers:
            optimizer.zero_grad()
        judge(generator(own_input())).sum().backward()
        optimizers[trained].step()
        for index, model in enumerate((generator, judge)):
            assert all((parameter.grad is not None) == (index == trained) for parameter in model.parameters())


@pytest.mark.parametrize("groups", [None, 2])
def test_a_parameter_that_is_unfrozen_later_is_reduced_from_then_on(groups: int | None) -> None:
    first, late = linear_model(), linear_model()
    late.weight.requires_grad_(False)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD([first.weight, late.weight], lr=1.0), backward_passes_per_step=2, groups=groups
    )
    for step in range(4):
        if step == 2:
            late.weight.requires_grad_(True)
        optimizer.zero_grad()
        for _ in range(2):
            (first(own_input()) + late(own_input())).sum().backward()
        optimizer.step()
        assert torch.allclose(first.weight, torch.full_like(first.weight, 1 - (step + 1) * 2 * mean_of_ranks()))
        assert torch.allclose(late.weight, torch.full_like(late.weight, 1 - max(0, step - 1) * 2 * mean_of_ranks()))


def test_a_parameter_may_be_frozen_between_the_passes_of_a_step() -> None:
    first, second = linear_model(), linear_model()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD([first.weight, second.weight], lr=1.0), backward_passes_per_step=2
    )
    (first(own_input()) + second(own_input())).sum().backward()
    second.weight.requires_grad_(False)
    second.weight.grad = None
    (first(own_input()) + second(own_input())).sum().backward()
    optimizer.step()
    optimizer.zero_grad()  # refused while backward passes wait for a step
    assert torch.allclose(first.weight, torch.full_like(first.weight, 1 - 2 * mean_of_ranks()))
    assert torch.equal(second.weight, torch.ones_like(second.weight))


@pytest.mark.parametrize("groups", [None, 1])
def test_a_parameter_that_is_frozen_later_stays_where_it_is(groups: int | None) -> None:
    first, second = linear_model(), linear_model()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD([first.weight, second.weight], lr=0.5, momentum=0.5, weight_decay=0.1), groups=groups
    )
    for step in range(4):
        second.weight.requires_grad_(step < 1 or step > 2)
        before = [first.weight.clone(), second.weight.clone()]
        optimizer.zero_grad()
        (first(own_input()) + second(own_input())).sum().backward()
        optimizer.step()
        assert not torch.equal(first.weight, before[0])
        assert torch.equal(second.weight, before[1]) == (step in (1, 2))
        assert (second.weight.grad is None) == (step in (1, 2))
        assert_same_on_all_ranks(first.weight)
        assert_same_on_all_ranks(second.weight)


def test_a_closure_sees_reduced_gradients() -> None:
    model = linear_model()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(own_input()).sum()
        loss.backward()
        return loss

    for step in range(3):
        loss = optimizer.step(closure)
        assert isinstance(loss, torch.Tensor)
        assert torch.allclose(model.weight, torch.full_like(model.weight, 1 - (step + 1) * mean_of_ranks()))


class Own(torch.optim.SGD):
    """With signatures of its own."""

    def zero_grad(self) -> None:
        super().zero_grad()

    def step(self, scale: Any, *, closure: Any = None, extra: int = 0) -> Any:
        self.param_groups[0]["lr"] = scale
        return super().step(closure), extra


class WithoutClosure(torch.optim.SGD):
    def step(self) -> Any:
        return super().step()


@pytest.mark.parametrize("op", [hvd.Average, hvd.Adasum])
def test_an_optimizer_with_arguments_of_its_own(op: int) -> None:
    model, plain = linear_model(), linear_model()
    options = {"gradient_as_bucket_view": False} if op == hvd.Adasum else {}
    optimizer: Any = hvd.DistributedOptimizer(Own(model.parameters(), lr=9.0), op=op, **options)
    bare: Any = hvd.DistributedOptimizer(WithoutClosure(plain.parameters(), lr=1.0), op=op, **options)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(1, 3, dtype=torch.float64)).sum()
        loss.backward()
        return loss

    loss, extra = optimizer.step(0.25, closure=closure, extra=7)
    assert (loss.item(), extra) == (6.0, 7)
    closure()
    assert optimizer.step(0.5) == (None, 0)
    optimizer.zero_grad()
    assert torch.allclose(model.weight, torch.full_like(model.weight, 1 - 0.75))
    plain(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
    bare.step()
    bare.zero_grad()
    assert torch.allclose(plain.weight, torch.zeros_like(plain.weight))
    for method in ("step", "zero_grad"):
        assert inspect.signature(getattr(type(optimizer), method)) == inspect.signature(
            getattr(torch.optim.Optimizer, method)
        )


def test_a_scheduler_made_before_or_after_works_without_a_warning() -> None:
    model = linear_model()
    plain = torch.optim.SGD(model.parameters(), lr=1.0)
    before = torch.optim.lr_scheduler.StepLR(plain, step_size=1, gamma=0.5)
    optimizer = hvd.DistributedOptimizer(plain, named_parameters=model.named_parameters())
    after = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            optimizer.zero_grad()
            model(own_input()).sum().backward()
            optimizer.step()
            before.step()
            after.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1 / 16)
    assert torch.allclose(model.weight, torch.full_like(model.weight, 1 - mean_of_ranks() * 1.25))


def test_state_and_hooks_of_the_optimizer_stay() -> None:
    model = linear_model()
    plain = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    model(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
    plain.step()
    plain.zero_grad()
    optimizer = hvd.DistributedOptimizer(plain, named_parameters=model.named_parameters())
    assert "momentum_buffer" in optimizer.state[model.weight]
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    state = optimizer.state_dict()
    model(own_input()).sum().backward()
    optimizer.step()
    assert calls == ["before", "after"]
    optimizer.load_state_dict(state)
    model(own_input()).sum().backward()
    optimizer.step()
    assert calls == ["before", "after"] * 2


def test_load_state_dict_forgets_what_was_in_flight() -> None:
    model = linear_model()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), model.named_parameters())
    model(own_input()).sum().backward()
    hvd.barrier()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.zero_grad()
    hvd.allreduce(torch.ones(1), name="everyone has come here")
    model(own_input()).sum().backward()
    optimizer.step()
    assert torch.allclose(model.weight, torch.full_like(model.weight, 1 - mean_of_ranks()))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "groups": {"groups": 2},
    "fp16": {"compression": hvd.Compression.fp16},
    "two passes": {"backward_passes_per_step": 2},
}


def end_the_job_with_reductions_in_flight(work: Callable[[], object]) -> None:
    """Rank 0 starts reductions in `work` that no other rank starts; then the last rank ends the job."""
    if hvd.rank() == 0:
        work()
    hvd.barrier()
    if hvd.rank() < hvd.size() - 1:
        with pytest.raises(hvd.HorovodInternalError, match="shut down"):
            hvd.allreduce(torch.ones(1), name="the job is up")
    hvd.shutdown()


@pytest.mark.parametrize("how", ["load_state_dict", "step that fails", "synchronize that fails"])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_new_job_reduces_nothing_of_the_one_that_ended(options: str, how: str) -> None:
    several_ranks()
    model = torch.nn.Sequential(linear_model(), torch.nn.Linear(2, 2, dtype=torch.float64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0), model.named_parameters(), **OPTIONS[options]
    )
    passes, is_first = optimizer.backward_passes_per_step, hvd.rank() == 0
    state = optimizer.state_dict()

    def backward() -> None:
        for _ in range(passes):
            model(own_input()).sum().backward()

    end_the_job_with_reductions_in_flight(backward)
    if how != "load_state_dict" and is_first:
        with pytest.raises(hvd.HorovodInternalError, match=r"shut down|not been initialized"):
            optimizer.step() if how == "step that fails" else optimizer.synchronize()
    hvd.init(process_sets="dynamic")
    if how == "load_state_dict":
        optimizer.load_state_dict(state)
    optimizer.zero_grad()
    model.load_state_dict(start)
    for turn in range(2):
        backward()
        optimizer.step()
        # The gradient of the first layer is, for each of its two outputs, the input times the column sum of the second.
        if turn == 0:
            wanted = passes * 2 * mean_of_ranks()
            assert torch.allclose(model[0].weight, torch.full_like(model[0].weight, 1 - wanted))
        optimizer.zero_grad()
    for parameter in model.parameters():
        assert_same_on_all_ranks(parameter)


def gradient_in_flight_of_an_optimizer_that_is_gone() -> weakref.ref[torch.Tensor]:
    model = linear_model()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0),
        [("forgotten", model.weight)],
        gradient_as_bucket_view=False,  # of a view it is the bucket that outlives
    )
    model(own_input()).sum().backward()
    assert optimizer._reduction.gradients[model.weight].pending is not None
    return weakref.ref(model.weight.grad)


@pytest.mark.parametrize("end", ["the job ends", "ranks disagree"])
def test_a_gradient_in_flight_outlives_its_optimizer_until_the_reduction_has_failed(end: str) -> None:
    several_ranks()
    gradients: list[weakref.ref[torch.Tensor]] = []

    def work() -> None:
        gradients.append(gradient_in_flight_of_an_optimizer_that_is_gone())
        gc.collect()
        # Nobody but the engine has it now, and may still send it.
        assert gradients[0]() is not None

    if end == "the job ends":
        end_the_job_with_reductions_in_flight(work)
        hvd.init(process_sets="dynamic")
    else:
        if hvd.rank() == 0:
            work()
        hvd.barrier()
        if hvd.rank() > 0:
            with pytest.raises(hvd.HorovodInternalError, match="'forgotten'"):
                hvd.allreduce(torch.ones(1), name="forgotten")
        hvd.allreduce(torch.ones(1))
        hvd.barrier()  # what is not needed any more is let go of by the next calls
    gc.collect()
    assert all(gradient() is None for gradient in gradients)


def test_a_group_added_later_is_reduced() -> None:
    model, late = linear_model(), linear_model()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0))
    optimizer.add_param_group({"params": list(late.parameters()), "lr": 0.5})
    (model(own_input()) + late(own_input())).sum().backward()
    optimizer.step()
    assert torch.allclose(late.weight, torch.full_like(late.weight, 1 - 0.5 * mean_of_ranks()))


def test_names_without_named_parameters() -> None:
    model = network()
    layers = list(model.children())
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD([{"params": layers[0].parameters()}, {"params": layers[3].parameters()}], lr=0.1)
    )
    assert sorted(optimizer._parameter_names.values()) == [
        f"allreduce.noname.{group}.{index}" for group in range(2) for index in range(2)
    ]


def test_options_of_a_second_call_replace_the_first() -> None:
    model = linear_model()
    plain = torch.optim.SGD(model.parameters(), lr=1.0)
    hvd.DistributedOptimizer(plain, op=hvd.Max)
    optimizer = hvd.DistributedOptimizer(plain, op=hvd.Sum)
    model(own_input()).sum().backward()
    optimizer.step()
    assert torch.allclose(model.weight, torch.full_like(model.weight, 1 - mean_of_ranks() * hvd.size()))


def test_options_of_a_second_call_let_go_of_the_first() -> None:
    model = linear_model()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0))
    former = weakref.ref(optimizer._reduction)
    hvd.DistributedOptimizer(optimizer)
    gc.collect()
    assert former() is None


def test_an_optimizer_that_is_gone_reduces_no_more() -> None:
    model = linear_model()
    hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0))
    model(own_input()).sum().backward()
    assert torch.equal(model.weight.grad, torch.full_like(model.weight, float(hvd.rank() + 1)))


def test_gradients_of_channels_last_parameters() -> None:
    torch.manual_seed(5)
    model = torch.nn.Conv2d(3, 4, 3, dtype=torch.float64).to(memory_format=torch.channels_last)
    reference = torch.nn.Conv2d(3, 4, 3, dtype=torch.float64)
    reference.load_state_dict(model.state_dict())
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), model.named_parameters())
    images = all_inputs((2, 3, 5, 5), torch.float64)
    model(images[hvd.rank()].to(memory_format=torch.channels_last)).sum().backward()
    optimizer.synchronize()
    gradients = []
    for image in images:
        reference.zero_grad()
        reference(image).sum().backward()
        gradients.append(reference.weight.grad.clone())
    assert_reduced(model.weight.grad.contiguous() / 50, reduced(gradients, hvd.Average) / 50, torch.float64)


@pytest.mark.usefixtures("alone_and_beside_a_stuck_set")
def test_only_the_process_set_reduces() -> None:
    several_ranks()
    process_set = hvd.add_process_set([0])
    model = linear_model()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), process_set=process_set)
    model(own_input()).sum().backward()
    optimizer.step()
    assert torch.allclose(model.weight, torch.full_like(model.weight, 1.0 - (hvd.rank() + 1)))
    hvd.barrier()
    assert hvd.remove_process_set(process_set)


def test_reductions_start_while_backward_runs() -> None:
    """When the gradient of the first layer arrives, that of the last is on its way already."""
    several_ranks()
    model = network()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
    last = list(model.parameters())[-1]
    seen: list[bool] = []
    first_layer = next(iter(model.children()))
    gradient = optimizer._reduction.gradients[last]
    first_layer.weight.register_hook(lambda _: seen.append((gradient.bucket or gradient).pending is not None))
    images, labels = batch(0, 4 * hvd.size(), torch.float64)
    loss_of(model, part(images), part(labels)).backward()
    optimizer.step()
    assert seen == [True]


def test_a_mismatch_in_step_is_an_error_and_training_can_go_on() -> None:
    several_ranks()
    model = torch.nn.Linear(3 + hvd.rank() % 2, 2)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), [
        ("mismatch.weight", model.weight), ("mismatch.bias", model.bias),
    ])  # fmt: skip
    model(torch.ones(1, model.in_features)).sum().backward()
    with pytest.raises(hvd.HorovodInternalError, match=r"mismatch\.(weight|bias)"):
        optimizer.step()
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == hvd.size()


BAD_ARGUMENTS: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "predivide": (ValueError, "gradient_predivide_factor not supported with op != Average",
                  {"gradient_predivide_factor": 2.0, "op": hvd.Sum}),
    "passes": (ValueError, "backward_passes_per_step must be > 0", {"backward_passes_per_step": 0}),
    "no whole number of passes": (ValueError, r"backward_passes_per_step must be an integer \(it is 1\.5\)",
                                  {"backward_passes_per_step": 1.5}),
    "predivide by 0": (ValueError, r"gradient_predivide_factor must be a finite number other than 0 \(it is 0\)",
                       {"gradient_predivide_factor": 0}),
    "predivide by nan": (ValueError, "gradient_predivide_factor must be a finite number",
                         {"gradient_predivide_factor": float("nan")}),
    "op": (ValueError, r"op must be one of hvd\.Average, .* \(it is 99\)", {"op": 99}),
    "compression": (ValueError, r"compression must be a Compressor.* \(it is 'fp16'\)", {"compression": "fp16"}),
    "numbers for names": (ValueError, "sequence of tuples", {"named_parameters": [(1, torch.ones(1))]}),
    "no tuples": (ValueError, "sequence of tuples", {"named_parameters": [torch.ones(1)]}),
    "groups": (ValueError, "non-negative integer or a list of list", {"groups": "two"}),
    "negative groups": (ValueError, "non-negative integer or a list of list", {"groups": -1}),
    "flat groups": (ValueError, "non-negative integer or a list of list", {"groups": [torch.zeros(1)]}),
    "foreign groups": (ValueError, "not a parameter of the optimizer", {"groups": [[torch.zeros(1)]]}),
    "adasum": (ValueError, "groups are of gradients", {"op": hvd.Adasum, "groups": 2}),
    "adasum and views": (ValueError, "gradient_as_bucket_view is about gradients, which op=Adasum does not reduce",
                         {"op": hvd.Adasum, "gradient_as_bucket_view": True}),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_ARGUMENTS)
def test_bad_arguments_leave_the_optimizer_as_it_was(what: str) -> None:
    kind, text, arguments = BAD_ARGUMENTS[what]
    model = linear_model()
    plain = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(kind, match=text):
        hvd.DistributedOptimizer(plain, **arguments)
    assert type(plain) is torch.optim.SGD


def test_bad_options_of_an_optimizer_that_is_one() -> None:
    model = linear_model()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), backward_passes_per_step=2)
    for passes in (0, 2.0):
        with pytest.raises(ValueError, match="backward_passes_per_step must be"):
            optimizer.set_backward_passes_per_step(passes)
    assert optimizer.backward_passes_per_step == 2
    for thing, name in ((model, "Linear"), (list(model.parameters()), "list"), (torch.optim.SGD, "type")):
        with pytest.raises(TypeError, match=rf"takes a torch\.optim\.Optimizer \(it is a {name}\)"):
            hvd.DistributedOptimizer(thing)


def test_names_have_to_be_unique_and_complete() -> None:
    model = network()
    plain = torch.optim.SGD(model.parameters(), lr=1.0)
    named = list(model.named_parameters())
    with pytest.raises(ValueError, match=r"must be unique. Found duplicates: 0\.bias, 0\.weight"):
        hvd.DistributedOptimizer(plain, named_parameters=named + named[:2])
    with pytest.raises(ValueError, match="one or more model parameters were not named"):
        hvd.DistributedOptimizer(plain, named_parameters=named[:-1])
