"""TorchState without a job: models, optimizers and schedulers go back to what they were."""

from __future__ import annotations

from typing import Any

import torch

import horovod_cpp.torch as hvd
from horovod_cpp.torch.elastic.state import StateHandler


class Counting(torch.nn.BatchNorm1d):
    """With extra state, which is no tensor."""

    def __init__(self) -> None:
        super().__init__(3)
        self.notes: list[int] = []

    def get_extra_state(self) -> Any:
        return self.notes

    def set_extra_state(self, state: Any) -> None:
        self.notes = state


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.arange(12.0).reshape(4, 3).sin()).square().sum().backward()
    optimizer.step()


def numbers(*states: dict[str, Any]) -> list[Any]:
    """What state_dicts hold, as plain numbers."""

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.tolist()
        if isinstance(value, dict):
            return [(key, plain(one)) for key, one in value.items()]
        return [plain(one) for one in value] if isinstance(value, (list, tuple)) else value

    return [plain(state) for state in states]


def test_model_optimizer_and_scheduler_go_back_in_place_as_often_as_needed() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), Counting())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    state = hvd.elastic.TorchState(model, optimizer, scheduler=scheduler, batch=0)

    def advance() -> None:
        step(model, optimizer)
        scheduler.step()
        model[1].notes.append(len(model[1].notes))
        state.batch += 1

    advance()
    state.save()
    wanted = numbers(model.state_dict(), optimizer.state_dict(), scheduler.state_dict())
    parameters = [parameter.data_ptr() for parameter in model.parameters()]
    afterwards = []
    for _ in range(2):
        advance()
        afterwards.append(numbers(model.state_dict(), optimizer.state_dict(), scheduler.state_dict()))
        state.restore()
        assert numbers(model.state_dict(), optimizer.state_dict(), scheduler.state_dict()) == wanted
        assert state.batch == 1
        assert (state.model, state.optimizer, state.scheduler) == (model, optimizer, scheduler)
        assert [parameter.data_ptr() for parameter in model.parameters()] == parameters
        assert all(parameter.grad is None for parameter in model.parameters())
    assert afterwards[0] == afterwards[1] != wanted


def test_without_a_commit_it_goes_back_to_what_it_was_made_of() -> None:
    model = torch.nn.Linear(3, 1)
    before = numbers(model.state_dict())
    state = hvd.elastic.TorchState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    step(model, state.optimizer)
    assert numbers(model.state_dict()) != before
    state.restore()
    assert numbers(model.state_dict()) == before


def test_a_model_alone_goes_back_without_gradients() -> None:
    model = torch.nn.Linear(3, 1)
    state = hvd.elastic.TorchState(model)
    model(torch.ones(3)).backward()
    state.restore()
    assert [parameter.grad for parameter in model.parameters()] == [None, None]


def test_the_copies_need_no_graph_and_share_no_memory() -> None:
    model = torch.nn.Linear(3, 1)
    state = hvd.elastic.TorchState(model)
    saved = state._handlers["model"]._saved
    with torch.no_grad():
        model.weight.fill_(9.0)
    assert not any(one.requires_grad for one in saved.values())
    assert not torch.equal(saved["weight"], model.weight)


def test_a_reset_lets_gradients_go() -> None:
    model, plain = torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    step(plain, optimizer)
    before = numbers(plain.state_dict(), optimizer.state_dict())
    state = hvd.elastic.TorchState(model, optimizer)
    (model(torch.ones(3)) + plain(torch.ones(3))).backward()
    state.on_reset()
    assert [parameter.grad for parameter in [*model.parameters(), *plain.parameters()]] == [None] * 4
    assert numbers(plain.state_dict(), optimizer.state_dict()) == before


def test_an_attribute_can_be_assigned_anew() -> None:
    state = hvd.elastic.TorchState(other=3)
    assert state.model is None and state.optimizer is None
    model = torch.nn.Linear(3, 1)
    state.model = model
    state.untracked = 1
    before = numbers(model.state_dict())
    step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    state.untracked = 2
    state.restore()
    assert state.model is model and numbers(model.state_dict()) == before
    assert state.untracked == 2
    state.model = "gone"
    state.save()
    state.model = "changed"
    state.restore()
    assert state.model == "gone"


def test_handlers_of_ones_own() -> None:
    class Tape:
        notes = ""

    class TapeHandler(StateHandler):
        value: Tape

        def save(self) -> None:
            self.saved = self.value.notes

        def restore(self) -> None:
            self.value.notes = self.saved

    before = hvd.elastic.get_handler_registry()
    hvd.elastic.set_handler_registry([(Tape, TapeHandler), *before])
    try:
        assert hvd.elastic.get_handler_registry()[0] == (Tape, TapeHandler)
        tape = Tape()
        state = hvd.elastic.TorchState(tape=tape)
        tape.notes = "abc"
        state.restore()
        assert state.tape is tape and tape.notes == ""
    finally:
        hvd.elastic.set_handler_registry(before)


def test_a_handler_that_horovod_would_take() -> None:
    """Its constructor sets attributes after the base's, and saves by itself; its value may be assigned anew."""

    class Tape:
        def __init__(self, notes: str) -> None:
            self.notes = notes

    class TapeHandler(StateHandler):
        value: Tape

        def __init__(self, value: Tape) -> None:
            super().__init__(value)
            self.saved = value.notes
            self.saves = 0

        def save(self) -> None:
            self.saves += 1
            self.saved = self.value.notes

        def restore(self) -> None:
            self.value.notes = self.saved

    before = hvd.elastic.get_handler_registry()
    hvd.elastic.set_handler_registry([*before, (Tape, TapeHandler)])
    try:
        first, second = Tape("abc"), Tape("def")
        state = hvd.elastic.TorchState(tape=first)
        handler = state._handlers["tape"]
        assert isinstance(handler, TapeHandler)
        state.tape = second
        assert state._handlers["tape"] is handler and handler.value is second
        second.notes = first.notes = "lost"
        state.restore()
        assert (state.tape, second.notes, first.notes) == (second, "def", "lost")
        handler.set_value(first)
        first.notes = "lost again"
        handler.restore()
        assert first.notes == "lost"
    finally:
        hvd.elastic.set_handler_registry(before)


def test_a_model_that_is_assigned_anew_stays_with_its_handler() -> None:
    state = hvd.elastic.TorchState(torch.nn.Linear(3, 1))
    handler = state._handlers["model"]
    other = torch.nn.Linear(2, 2)
    before = numbers(other.state_dict())
    state.model = other
    assert state._handlers["model"] is handler
    step_away = torch.ones(2, 2)
    with torch.no_grad():
        other.weight += step_away
    state.restore()
    assert numbers(other.state_dict()) == before
