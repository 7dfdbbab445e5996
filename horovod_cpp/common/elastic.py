"""Training that survives errors: commit, restore, and form the job again, the same for all frameworks.

The ranks of the job stay those that were launched. A change of membership is not supported yet.
"""

from __future__ import annotations

import copy
import enum
import functools
import logging
import queue
import traceback
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from horovod_cpp.common import basics, process_sets
from horovod_cpp.common.exceptions import HorovodInternalError, HostsUpdatedInterrupt
from horovod_cpp.common.process_sets import ProcessSet

FAILURES_WITHOUT_COMMIT = 3

_log = logging.getLogger("horovod_cpp.elastic")


class HostUpdateResult(enum.IntFlag):
    """What an update of the hosts did."""

    no_update = 0
    removed = 1
    added = 2
    mixed = 3


class State:
    """What training needs to go on: kept in memory by `save`, brought back by `restore`, made equal by `sync`.

    Subclasses implement these three. `on_hosts_updated` may be called on any thread; all else is for the thread that
    trains.
    """

    def __init__(self, bcast_object: Callable[[Any], Any], get_rank: Callable[[], int]) -> None:
        """Args: bcast_object: returns rank 0's object on all ranks, and blocks; get_rank: the rank of this process."""
        self._bcast_object = bcast_object
        self._rank = get_rank
        self._host_messages: queue.Queue[tuple[float, int]] = queue.Queue()
        self._last_updated_timestamp: float = 0
        self._reset_callbacks: list[Callable[[], None]] = []
        self._commits = 0

    def register_reset_callbacks(self, callbacks: list[Callable[[], None]]) -> None:
        """Have these called, in this order, whenever the job was formed again: for what depends on size or rank."""
        self._reset_callbacks.extend(callbacks)

    def on_reset(self) -> None:
        """The job was formed again: forget updates of hosts, call `reset`, then the callbacks."""
        self._host_messages = queue.Queue()
        self.reset()
        for callback in self._reset_callbacks:
            callback()

    def on_hosts_updated(self, timestamp: float, update_res: int) -> None:
        """Note an update of the hosts, which the next `check_host_updates` acts on. Any thread; does not block.

        Only what rank 0 is told counts. Nothing in this version calls it: a program may, to have the job formed again.

        Args:
            timestamp: grows from update to update.
            update_res: a `HostUpdateResult`.
        """
        self._host_messages.put((timestamp, update_res))

    def commit(self) -> None:
        """Save the state, then check for updates of the hosts. All ranks call it; blocks until rank 0 has.

        Do so after whole steps, when no gradient is kept for a later one. Raises as `check_host_updates` does.
        """
        self.save()
        self._commits += 1
        self.check_host_updates()

    def check_host_updates(self) -> None:
        """Raise HostsUpdatedInterrupt on all ranks if rank 0 was told of an update.

        All ranks call it; blocks until rank 0 has. `skip_sync` is set when hosts were only removed.
        Raises: HorovodInternalError if a rank is lost or has shut down.
        """
        previous, newest, update = self._bcast_object((self._last_updated_timestamp, *self._told()))
        self._last_updated_timestamp = newest
        if newest > previous:
            raise HostsUpdatedInterrupt(update == HostUpdateResult.removed)

    def _told(self) -> tuple[float, int]:
        """The time of the newest update, and what all since the last check did together."""
        newest, update = self._last_updated_timestamp, int(HostUpdateResult.no_update)
        while True:
            try:
                timestamp, one = self._host_messages.get_nowait()
            except queue.Empty:
                return newest, update
            if timestamp > self._last_updated_timestamp:
                newest, update = max(newest, timestamp), update | int(one)

    def save(self) -> None:
        """Keep a copy of the state in memory. Does not communicate."""
        raise NotImplementedError

    def restore(self) -> None:
        """Go back to the copy. Does not communicate."""
        raise NotImplementedError

    def sync(self) -> None:
        """Take over rank 0's state, then save. All ranks call it; blocks. HorovodInternalError if one is lost."""
        raise NotImplementedError

    def merge(self) -> None:
        """Bring together what each rank has of its own, where `sync` is skipped. All ranks call it; may block."""

    def reset(self) -> None:
        """Let go of what has ended with the job. Does not communicate."""


class ObjectState(State):
    """A state of Python objects, which are its attributes."""

    def __init__(self, bcast_object: Callable[[Any], Any], get_rank: Callable[[], int], **kwargs: Any) -> None:
        """Args: kwargs: attributes by name; they are copied deeply here and by `save`, and pickled by `sync`.

        Raises: ValueError for a name that the class uses itself.
        """
        super().__init__(bcast_object, get_rank)
        for name in kwargs:
            if name.startswith("_") or hasattr(type(self), name):
                raise ValueError(f"{type(self).__name__}: '{name}' cannot be the name of a value, it has a meaning")
        self._names = list(kwargs)
        self._saved_state: dict[str, Any] = {}
        for name, value in kwargs.items():
            setattr(self, name, value)
        self._saved_state = copy.deepcopy(self._objects())

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def _object_names(self) -> Iterable[str]:
        """The attributes that are copied, pickled and assigned as a whole."""
        return self._names

    def _objects(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._object_names()}

    def save(self) -> None:
        """Keep deep copies of the values. Does not communicate."""
        self._saved_state = copy.deepcopy(self._objects())

    def restore(self) -> None:
        """Go back to the values that were kept. Does not communicate."""
        for name, value in copy.deepcopy(self._saved_state).items():
            setattr(self, name, value)

    def sync(self) -> None:
        """Take over rank 0's values, then save. All ranks call it; blocks. HorovodInternalError if one is lost."""
        for name, value in self._bcast_object(self._objects()).items():
            setattr(self, name, value)
        self.save()


_State = TypeVar("_State", bound=State)
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
Agree = Callable[[bool, int], tuple[bool, int]]


def _as_it_is(skip_sync: bool, failures: int) -> tuple[bool, int]:
    return skip_sync, failures


def run_fn(
    func: Callable[Concatenate[_State, _Arguments], _Result], reset: Callable[[], None], agree: Agree = _as_it_is
) -> Callable[Concatenate[_State, _Arguments], _Result]:
    """Make `func` start again after errors, from the last commit. What comes back blocks as long as `func` does.

    It calls `state.sync()` and `func(state, ...)`. After a HorovodInternalError in either the job is formed again, the
    state restored; after a HostsUpdatedInterrupt the job is formed again and the state kept. Then it begins anew.

    Args:
        func: takes the state first.
        reset: shuts the job down and joins it again.
        agree: collective, after a reset: the smallest `skip_sync` and the smallest number of failures of all ranks. Not
            all ranks need have been interrupted by the same thing, and those that sync would wait for the others.
    Returns: a function like `func`, which raises what `func` does, except for
        HorovodInternalError if `reset` fails, or for the third failure on end without a commit between.
    """

    @functools.wraps(func)
    def wrapper(state: _State, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        skip_sync, failures, why = False, 0, ""
        while True:
            commits = state._commits
            try:
                if why:
                    state.on_reset()
                    skip_sync, failures = agree(skip_sync, failures)
                if failures < FAILURES_WITHOUT_COMMIT:
                    if skip_sync:
                        state.merge()
                    else:
                        state.sync()
                    return func(state, *args, **kwargs)
            except HorovodInternalError as error:
                why = f"{type(error).__name__}: {error}"
                skip_sync, failures = False, 1 if state._commits != commits else failures + 1
                # As text: a handler might keep the traceback, and with it what the failed attempt had in memory.
                _log.warning("elastic: starting again from the last commit after\n%s", traceback.format_exc())
                try:
                    _reset(reset, why)
                finally:
                    # After the shutdown: operations in flight would write into what was restored.
                    state.restore()
            except HostsUpdatedInterrupt as interrupt:
                why = f"{type(interrupt).__name__}: {interrupt}"
                skip_sync, failures = interrupt.skip_sync, 0
                _reset(reset, why)
            else:
                raise HorovodInternalError(
                    f"elastic: gave up after {failures} failures without a commit between, the last of them: {why}"
                )

    return wrapper  # type: ignore[return-value] # unlike the type, it takes the state by name, too


def _reset(reset: Callable[[], None], why: str) -> None:
    try:
        reset()
    except Exception as error:
        raise HorovodInternalError(
            f"elastic: the job could not be formed again: {error}. It had been interrupted by {why}. All ranks of the "
            "launch have to come back within HOROVOD_START_TIMEOUT seconds; changes of membership are not supported "
            "yet. Start the job again from a checkpoint."
        ) from error


def reset_job() -> None:
    """Shut the job down and join it again, with the same process sets. Blocks until all ranks have come.

    Process sets may get other ids; `ProcessSet` objects are bound to them. `comm` and options of the last `init` are
    used again.
    Raises: HorovodInternalError, which says which of the two failed and why.
    """
    registered, objects = _registered_sets()
    arguments = basics.last_arguments()
    step = "shutdown()"
    try:
        basics.shutdown()
        step = "init()"
        basics.init(process_sets=[ProcessSet(ranks) for ranks in registered], **arguments)
        process_sets.bind_all(objects)
    except Exception as error:
        raise HorovodInternalError(f"{step} failed: {error}") from error


def _registered_sets() -> tuple[list[list[int]], list[ProcessSet]]:
    """The ranks of each process set but the global one, by id, and the objects that are bound to them."""
    if not basics.is_initialized():
        return [], []
    known = process_sets.get_process_set_ids_and_ranks()
    objects = [
        process_set
        for process_set in process_sets._bound
        if process_set.process_set_id is not None and known.get(process_set.process_set_id) == process_set.ranks
    ]
    return [ranks for set_id, ranks in sorted(known.items()) if set_id != 0], objects
