"""Handles: numbers for operations in flight, which `poll` and `synchronize` take; one numbering for all frameworks.

Any thread; one wait at a time for each.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Protocol

from horovod_cpp import _core
from horovod_cpp.common import basics
from horovod_cpp.common.exceptions import HorovodInternalError


class Waitable(Protocol):
    """Something in flight that has a result in the end."""

    def done(self) -> bool:
        """Whether `wait` would return at once."""

    def wait(self) -> Any:
        """Block until it is done and return its result. Raises HorovodInternalError or `_core.Error` if it failed."""


# What is called with the result of a wait, if anything.
Afterwards = Callable[[Any], None] | None

_handles: dict[int, tuple[Waitable, Afterwards]] = {}
basics.when_a_job_starts(_handles.clear)  # what is left of a former job failed with it, and holds its tensors
_next_handle = itertools.count()


def register(pending: Waitable, afterwards: Afterwards = None) -> int:
    """A handle for `poll` and `synchronize`; `afterwards` is called with the result by the latter."""
    handle = next(_next_handle)
    _handles[handle] = pending, afterwards
    return handle


def poll(handle: int) -> bool:
    """Whether the operation is done, so that `synchronize` would not block. ValueError for an unknown handle."""
    known = _handles.get(handle)
    if known is None:
        raise ValueError(f"Handle {handle} was not created or has been cleared.")
    return known[0].done()


def synchronize(handle: int) -> Any:
    """Block until the operation is done and give the handle back.

    Returns: the output; for an in-place operation the tensor itself, for a grouped one a list of tensors, for an
        alltoall with splits the output and the received splits. None for a handle that is not known, was synchronised
        already, or is of a job before the last `init`.
    Raises: HorovodInternalError if the operation failed. Ctrl-C ends the wait only: the handle stays good.
    """
    known = _handles.pop(handle, None)
    if known is None:
        return None
    pending, afterwards = known
    try:
        result = pending.wait()
    except _core.Error as error:
        raise HorovodInternalError(str(error)) from None
    except KeyboardInterrupt:
        _handles[handle] = known
        raise
    if afterwards is not None:
        afterwards(result)
    return result
