"""Elastic states of objects, and the loop that starts training again, on ranks that are pretended."""

from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

import horovod_cpp.torch as hvd
from horovod_cpp.common.elastic import HostUpdateResult, ObjectState, State, run_fn
from horovod_cpp.common.exceptions import HorovodInternalError, HostsUpdatedInterrupt

# ---- states ----------------------------------------------------------------------------------------------------------


class Channel:
    """Stands for broadcast_object between ranks that are called in turn, rank 0 first."""

    def __init__(self) -> None:
        self.value: Any = None

    def of(self, rank: int) -> Callable[[Any], Any]:
        def broadcast(value: Any) -> Any:
            if rank == 0:
                self.value = value
            return self.value

        return broadcast


def object_states(size: int, **values: Any) -> list[ObjectState]:
    channel = Channel()
    return [ObjectState(channel.of(rank), lambda rank=rank: rank, **values) for rank in range(size)]


def test_objects_go_back_to_the_last_commit_as_often_as_needed() -> None:
    (state,) = object_states(1, epoch=1, history=[1])
    for _ in range(2):
        state.epoch = 5
        state.history.append(2)
        state.restore()
        assert (state.epoch, state.history) == (1, [1])
    state.epoch = 6
    state.history.append(3)
    state.commit()
    state.history.clear()
    state.epoch = 7
    state.restore()
    assert (state.epoch, state.history) == (6, [1, 3])


def test_sync_takes_over_what_rank_0_has_now_and_saves_it() -> None:
    states = object_states(2, epoch=1)
    for rank, state in enumerate(states):
        state.epoch = 10 + rank
    for state in states:
        state.sync()
    assert [state.epoch for state in states] == [10, 10]
    for state in states:
        state.epoch = 20
        state.restore()
        assert state.epoch == 10


@pytest.mark.parametrize("name", ["save", "commit", "on_reset", "_saved_state", "_x"])
def test_names_that_a_state_uses_itself_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        object_states(1, **{name: 1})


def test_all_ranks_are_interrupted_when_rank_0_was_told_of_an_update() -> None:
    states = object_states(3, step=0)
    states[0].on_hosts_updated(1.0, HostUpdateResult.added)
    for state in states:
        state.step = 1
        with pytest.raises(HostsUpdatedInterrupt) as caught:
            state.commit()
        assert caught.value.skip_sync is False
        assert state._last_updated_timestamp == 1.0
        state.step = 2
        state.restore()
        assert state.step == 1, "commit saves before it checks"
    for state in states:
        state.commit()  # once is enough


def test_what_another_rank_was_told_waits_for_rank_0() -> None:
    states = object_states(2, step=0)
    states[1].on_hosts_updated(3.0, HostUpdateResult.added)
    for state in states:
        state.check_host_updates()
    states[0].on_hosts_updated(3.0, HostUpdateResult.added)
    for state in states:
        with pytest.raises(HostsUpdatedInterrupt):
            state.check_host_updates()


REMOVED, ADDED = HostUpdateResult.removed, HostUpdateResult.added


@pytest.mark.parametrize(
    ("messages", "skip_sync"),
    [
        ([(1, REMOVED)], True),
        ([(1, REMOVED), (2, REMOVED)], True),
        ([(1, REMOVED), (2, ADDED)], False),
        ([(2, ADDED), (1, REMOVED)], False),
        ([(1, HostUpdateResult.mixed)], False),
        ([(1, HostUpdateResult.no_update)], False),
    ],
)
def test_a_sync_is_needed_unless_hosts_were_only_removed(messages: list[tuple[int, int]], skip_sync: bool) -> None:
    (state,) = object_states(1)
    for timestamp, what in messages:
        state.on_hosts_updated(timestamp, what)
    with pytest.raises(HostsUpdatedInterrupt) as caught:
        state.check_host_updates()
    assert caught.value.skip_sync is skip_sync
    assert state._host_messages.empty()
    assert state._last_updated_timestamp == max(timestamp for timestamp, _ in messages)


def test_an_update_that_is_known_already_does_not_interrupt() -> None:
    (state,) = object_states(1)
    state.on_hosts_updated(5, ADDED)
    with pytest.raises(HostsUpdatedInterrupt):
        state.check_host_updates()
    state.on_hosts_updated(5, ADDED)
    state.on_hosts_updated(4, ADDED)
    state.check_host_updates()
    state.on_hosts_updated(5, ADDED)
    state.on_hosts_updated(6, REMOVED)
    with pytest.raises(HostsUpdatedInterrupt) as caught:
        state.check_host_updates()
    assert caught.value.skip_sync, "only the removal is news"


def test_a_reset_forgets_updates_and_calls_back_in_order() -> None:
    calls: list[str] = []

    class Noted(ObjectState):
        def reset(self) -> None:
            calls.append("reset")

    state = Noted(lambda value: value, lambda: 0)
    state.register_reset_callbacks([lambda: calls.append("first"), lambda: calls.append("second")])
    state.register_reset_callbacks([lambda: calls.append("third")])
    state.on_hosts_updated(1, ADDED)
    state.on_reset()
    assert calls == ["reset", "first", "second", "third"]
    state.check_host_updates()


# ---- the loop --------------------------------------------------------------------------------------------------------


class Recorder(State):
    """Writes down what is done with it."""

    def __init__(self) -> None:
        super().__init__(lambda value: value, lambda: 0)
        self.calls: list[str] = []
        self.fail_in: dict[str, Exception] = {}

    def __getattribute__(self, name: str) -> Any:
        if name in ("save", "restore", "sync", "merge", "reset"):
            return lambda: self.note(name)
        return super().__getattribute__(name)

    def note(self, what: str) -> None:
        self.calls.append(what)
        failure = self.fail_in.pop(what, None)
        if failure is not None:
            raise failure


ERROR = HorovodInternalError("a rank has failed")


def run_with(events: list[Exception | None], state: Recorder, **options: Any) -> Any:
    """Runs a function that raises these events, one per attempt; None: it returns."""
    remaining = iter(events)

    def train(state: Recorder, *args: Any, **kwargs: Any) -> Any:
        state.note("train")
        event = next(remaining)
        if event is not None:
            raise event
        return args, kwargs

    options.setdefault("reset", lambda: state.note("form"))
    return run_fn(train, **options)(state, 1, two=2)


def test_without_an_error_the_function_runs_once_after_a_sync() -> None:
    state = Recorder()
    assert run_with([None], state) == ((1,), {"two": 2})
    assert state.calls == ["sync", "train"]


def test_after_an_error_the_state_is_restored_once_nothing_is_in_flight() -> None:
    state = Recorder()
    assert run_with([ERROR, None], state) == ((1,), {"two": 2})
    assert state.calls == ["sync", "train", "form", "restore", "reset", "sync", "train"]


@pytest.mark.parametrize(("skip_sync", "how"), [(False, "sync"), (True, "merge")])
def test_after_an_update_of_hosts_the_state_is_kept(skip_sync: bool, how: str) -> None:
    state = Recorder()
    run_with([HostsUpdatedInterrupt(skip_sync), None], state)
    assert state.calls == ["sync", "train", "form", "reset", how, "train"]


def test_a_sync_is_skipped_only_if_all_ranks_skip_it() -> None:
    state = Recorder()
    run_with([HostsUpdatedInterrupt(True), None], state, agree=lambda skip_sync, failures: (False, failures))
    assert state.calls[-2:] == ["sync", "train"]


def test_a_sync_is_not_skipped_after_an_error_that_follows() -> None:
    state = Recorder()
    run_with([HostsUpdatedInterrupt(True), ERROR, None], state)
    assert state.calls[-4:] == ["restore", "reset", "sync", "train"]


@pytest.mark.parametrize("where", ["sync", "reset"])
def test_an_error_while_ranks_come_together_is_like_one_in_training(where: str) -> None:
    state = Recorder()
    state.fail_in[where] = ERROR
    run_with([ERROR, None] if where == "reset" else [None], state)
    assert state.calls.count("form") == state.calls.count("restore") == (2 if where == "reset" else 1)
    assert state.calls[-3:] == ["reset", "sync", "train"]


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt()])
def test_other_exceptions_pass(error: Exception) -> None:
    state = Recorder()
    with pytest.raises(type(error)) as caught:
        run_with([error], state)
    assert caught.value is error
    assert state.calls == ["sync", "train"]


def test_an_error_that_always_comes_again_is_raised() -> None:
    state = Recorder()
    with pytest.raises(HorovodInternalError, match=r"gave up after 3 failures without a commit.*a rank has failed"):
        run_with([ERROR] * 10, state)
    assert state.calls.count("train") == 3
    assert state.calls.count("form") == 3, "the job is up when it is raised"


def test_errors_after_commits_are_no_reason_to_give_up() -> None:
    state = Recorder()
    attempts = 0

    def train(state: Recorder) -> None:
        nonlocal attempts
        attempts += 1
        if attempts < 10:
            state.commit()
            raise ERROR

    run_fn(train, lambda: None)(state)
    assert attempts == 10


def test_the_rank_that_has_failed_least_decides_about_giving_up() -> None:
    state = Recorder()
    run_with([ERROR] * 5 + [None], state, agree=lambda skip_sync, failures: (skip_sync, min(failures, 2)))
    assert state.calls.count("train") == 6


def test_a_reset_that_fails_ends_it_with_both_reasons_and_the_state_restored() -> None:
    state = Recorder()

    def reset() -> None:
        state.note("form")
        raise TimeoutError("init() failed: rank 7 did not come")

    with pytest.raises(HorovodInternalError) as caught:
        run_with([ERROR, None], state, reset=reset)
    message = str(caught.value)
    for part in ("rank 7 did not come", "a rank has failed", "changes of membership are not supported yet"):
        assert part in message
    assert isinstance(caught.value.__cause__, TimeoutError)
    assert state.calls == ["sync", "train", "form", "restore"]


def test_a_reset_that_fails_after_an_update_keeps_the_state() -> None:
    state = Recorder()

    def reset() -> None:
        raise HorovodInternalError("init() failed")

    with pytest.raises(HorovodInternalError, match=r"init\(\) failed.*the hosts of the job were updated"):
        run_with([HostsUpdatedInterrupt(), None], state, reset=reset)
    assert "restore" not in state.calls


def test_nothing_of_a_failed_attempt_is_kept_alive() -> None:
    """Its activations would take memory that the next attempt needs."""
    large: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []

    def train(state: Recorder) -> None:
        gc.collect()
        alive.extend(one() is not None for one in large)
        tensor = torch.ones(10)
        if not large:
            large.append(weakref.ref(tensor))
            raise HorovodInternalError("once")

    run_fn(train, lambda: None)(Recorder())
    assert alive == [False]


def test_the_decorated_function_keeps_its_name_and_takes_the_state_by_name() -> None:
    @hvd.elastic.run
    def train(state: State, steps: int) -> int:
        """Trains."""
        return steps

    assert (train.__name__, train.__doc__) == ("train", "Trains.")
    state = Recorder()
    assert train(state=state, steps=3) == 3  # type: ignore[call-arg]
    assert state.calls == ["sync"]


# ---- what is public --------------------------------------------------------------------------------------------------


def test_signatures_are_horovods() -> None:
    required = inspect.Parameter.empty
    wanted = {
        hvd.elastic.run: [("func", required)],
        hvd.elastic.State: [("bcast_object", required), ("get_rank", required)],
        hvd.elastic.ObjectState: [("bcast_object", required), ("get_rank", required), ("kwargs", required)],
        hvd.elastic.TorchState: [("model", None), ("optimizer", None), ("kwargs", required)],
        hvd.elastic.ElasticSampler: [("dataset", required), ("shuffle", True), ("seed", 0)],
        HostsUpdatedInterrupt: [("skip_sync", False)],
    }
    for what, parameters in wanted.items():
        got = inspect.signature(what).parameters.values()
        assert [(parameter.name, parameter.default) for parameter in got] == parameters
    assert issubclass(HostsUpdatedInterrupt, RuntimeError) and not issubclass(
        HostsUpdatedInterrupt, HorovodInternalError
    )
