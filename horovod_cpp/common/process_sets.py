"""Process sets: the subsets of ranks that operations may run in.

The library knows sets by id; a `ProcessSet` is bound to its id by `init` or `add_process_set`.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Sequence
from typing import Any

from horovod_cpp import _core
from horovod_cpp.common import exceptions
from horovod_cpp.common.call_site import call_site

DYNAMIC_OFF = "Set HOROVOD_DYNAMIC_PROCESS_SETS=1 to allow adding/removing process sets after Horovod initialization."
_bound: weakref.WeakSet[ProcessSet] = weakref.WeakSet()


class ProcessSet:
    """A subset of the global ranks. The order in which they are given does not matter.

    `process_set_id` is None until `init(process_sets=...)` or `add_process_set` registers the set. A copy is the set
    itself, and a pickle stands for its ranks: where it is loaded, it is the set that the job has of them, if any.
    """

    process_set_id: int | None = None
    ranks: list[int] | None = None
    mpi_comm: Any = None

    def __init__(self, ranks_or_comm: Sequence[int] | Any) -> None:
        """Args: ranks_or_comm: global ranks (0 .. size-1). ValueError for repeats, a communicator, and no ranks."""
        if hasattr(ranks_or_comm, "Get_group"):
            raise ValueError("ProcessSet takes a list of global ranks; communicators of mpi4py are not supported")
        try:
            self.ranks = sorted(operator.index(rank) for rank in ranks_or_comm)
        except TypeError:  # int() would make ranks of 1.7 and of "01"
            raise ValueError(
                f"ProcessSet takes a list of global ranks, numbers from 0, not {ranks_or_comm!r}"
            ) from None
        if len(set(self.ranks)) != len(self.ranks):
            raise ValueError(f"ProcessSet ranks {list(ranks_or_comm)} contain a rank twice")
        if any(not -(2**31) <= rank < 2**31 for rank in self.ranks):  # the library checks what it can be told
            raise ValueError(f"ProcessSet ranks {list(ranks_or_comm)}: global ranks are numbers from 0")

    def size(self) -> int | None:
        """Number of ranks in the set; None if it is not registered. Raises ValueError before `init`."""
        return None if self.process_set_id is None else len(registered_ranks(self.process_set_id))

    def rank(self) -> int | None:
        """Index of this process in the set; None if the set is not registered. ValueError outside the set.

        Operations such as `broadcast` are not given this number but the global rank.
        """
        if self.process_set_id is None:
            return None
        ranks = registered_ranks(self.process_set_id)
        own_rank = _core.topology().rank
        if own_rank not in ranks:
            raise ValueError(
                f"Process is not part of provided process set. (rank {own_rank}, process set {self.process_set_id} "
                f"has the ranks {ranks})"
            )
        return ranks.index(own_rank)

    def included(self) -> bool | None:
        """Whether this process is in the set; None if the set is not registered. Raises ValueError before `init`."""
        return None if self.process_set_id is None else process_set_included(self.process_set_id)

    def __str__(self) -> str:
        return f"ProcessSet(process_set_id={self.process_set_id}, ranks={self.ranks}, mpi_comm={self.mpi_comm})"

    __repr__ = __str__

    def __copy__(self) -> ProcessSet:
        """The set itself: `init` and `shutdown` would not know of another object."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> ProcessSet:
        """As `__copy__`."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """A set is pickled as its ranks, the global one as what it is: ids are those of one job."""
        return _of_ranks, (None if self is global_process_set else self.ranks,)


global_process_set = ProcessSet([])
global_process_set.process_set_id = 0


def _of_ranks(ranks: list[int] | None) -> ProcessSet:
    """The set of these ranks: that which the job has, if it has one, else one that is not registered."""
    if ranks is None:
        return global_process_set
    for process_set in _bound:
        if process_set.ranks == ranks:
            return process_set
    process_set = ProcessSet(ranks)
    if _core.is_initialized():
        for process_set_id, members in get_process_set_ids_and_ranks().items():
            if process_set_id != 0 and members == ranks:
                _bind(process_set, process_set_id)
    return process_set


def registered_ranks(process_set_id: int) -> list[int]:
    """The global ranks of a registered set in ascending order. Raises ValueError for an unknown id."""
    try:
        return _core.process_set_ranks(process_set_id)
    except _core.Error as error:
        if error.code == _core.INVALID_ARGUMENT:
            raise ValueError(f"Process set does not exist or has not been registered. ({error})") from None
        raise exceptions.query_error(error) from None


def process_set_included(process_set_id: int = 0) -> bool:
    """Whether this process is in the set with that id. Raises ValueError before `init` and for an unknown id."""
    return registered_rank() in registered_ranks(process_set_id)


def registered_rank() -> int:
    """The global rank of this process. Raises ValueError before `init`."""
    try:
        return _core.topology().rank
    except _core.Error as error:
        raise exceptions.query_error(error) from None


def operating_rank() -> int:
    """The global rank of this process, for an operation: before `init` that is a HorovodInternalError."""
    try:
        return _core.topology().rank
    except _core.Error as error:
        raise exceptions.operation_error(error) from None


def require_id(process_set: ProcessSet, what: str = "") -> int:
    """The id of a registered set; ValueError for one that is not registered. `what`: the operation and its name."""
    process_set_id = process_set.process_set_id
    if process_set_id is None:
        raise not_registered(process_set, what)
    return process_set_id


def not_registered(process_set: ProcessSet, what: str = "") -> ValueError:
    """The exception for a set that is not registered. `what`: the operation and its name, if there is one."""
    text = f"Process set provided does not exist, or has not been registered: {process_set}"
    return ValueError(f"{text} ({what})" if what else text)


def refusal(error: _core.Error, process_set_id: int, what: str = "") -> Exception:
    """The exception for an operation on a set that was refused at once: `ValueError` for the caller's mistake.

    `what`: the operation and its name.
    """
    is_outside = error.code == _core.PRECONDITION and _outside(process_set_id)
    if is_outside or (error.code == _core.INVALID_ARGUMENT and "has not been registered" in str(error)):
        return ValueError(f"{error} ({what})" if what else str(error))
    return exceptions.operation_error(error)


def _outside(process_set_id: int) -> bool:
    """Whether the reason of a refusal is that this rank is not in the set."""
    try:
        return not process_set_included(process_set_id)
    except (ValueError, exceptions.HorovodInternalError):
        return False


def add_process_set(process_set: ProcessSet | Sequence[int]) -> ProcessSet:
    """Register a set after `init`. Collective: all ranks call it with the same ranks. Blocks until all have; Ctrl-C
    ends the wait, not the call.

    Raises: ValueError if such a set is registered already, for bad ranks, or if dynamic process sets are off;
        HorovodInternalError if ranks disagree, or one is lost or has joined.
    """
    if not isinstance(process_set, ProcessSet):
        process_set = ProcessSet(process_set)
    if process_set.process_set_id is not None:
        raise ValueError(f"{process_set} is registered already")
    assert process_set.ranks is not None
    try:
        _bind(process_set, _core.process_set_add(process_set.ranks))
    except _core.Error as error:
        raise _change_error(error) from None
    return process_set


def remove_process_set(process_set: ProcessSet) -> bool:
    """Take a set out after `init`. Collective over all ranks. Blocks until all have called.

    Returns: True; False for a set that is not registered and for the global set, which stays.
    Raises: ValueError if dynamic process sets are off; HorovodInternalError, with the set as it was, if operations wait
        in it, and if ranks disagree, or one is lost or has joined.
    """
    if process_set.process_set_id is None or process_set.process_set_id == 0:
        return False
    process_set_id = process_set.process_set_id
    try:
        _core.process_set_remove(process_set_id)
    except _core.Error as error:
        if error.code == _core.INVALID_ARGUMENT:
            if str(error).endswith("does not exist"):
                return False
            raise _found_together(error) from None
        raise _change_error(error) from None
    for bound in list(_bound):
        if bound.process_set_id == process_set_id:
            _unbind(bound)
    return True


def _change_error(error: _core.Error) -> Exception:
    if isinstance(error, _core.ForkError) or error.code not in (_core.INVALID_ARGUMENT, _core.PRECONDITION):
        return exceptions.operation_error(error)
    text = str(error)
    if error.code == _core.INVALID_ARGUMENT:
        return _found_together(error) if "mismatched ranks" in text else ValueError(text)
    if not _core.is_initialized():
        return ValueError(exceptions.NOT_INITIALIZED)
    return ValueError(text) if text.startswith(DYNAMIC_OFF) else _found_together(error)


def _found_together(error: _core.Error) -> Exception:
    """What ranks find out together, with the place of this rank's call, of which the library is not told."""
    file, line = call_site()
    return exceptions.HorovodInternalError(f"{error} (called at {file}:{line})" if file is not None else str(error))


def get_process_set_ids_and_ranks() -> dict[int, list[int]]:
    """All registered sets, the global one included. Raises ValueError before `init`."""
    try:
        return {process_set_id: _core.process_set_ranks(process_set_id) for process_set_id in _core.process_set_ids()}
    except _core.Error as error:
        raise exceptions.query_error(error) from None


def bind_all(process_sets: Sequence[ProcessSet]) -> None:
    """Give each set the id under which the library has its ranks, and the global set its ranks."""
    known = get_process_set_ids_and_ranks()
    ids = {tuple(ranks): process_set_id for process_set_id, ranks in known.items() if process_set_id != 0}
    ids.setdefault(tuple(known[0]), 0)
    global_process_set.ranks = known[0]
    for process_set in process_sets:
        process_set_id = ids.get(tuple(process_set.ranks or ()))
        if process_set_id is None:
            raise ValueError(
                f"{process_set} is not registered: static process sets are made by the first hvd.init() only; "
                "call hvd.add_process_set() with HOROVOD_DYNAMIC_PROCESS_SETS=1, or hvd.shutdown() before this"
            )
        _bind(process_set, process_set_id)


def unbind_all() -> None:
    """Forget all ids, which end with the job; the global set keeps its own."""
    for process_set in list(_bound):
        _unbind(process_set)
    global_process_set.ranks = []


def _bind(process_set: ProcessSet, process_set_id: int) -> None:
    process_set.process_set_id = process_set_id
    _bound.add(process_set)


def _unbind(process_set: ProcessSet) -> None:
    process_set.process_set_id = None
    _bound.discard(process_set)
