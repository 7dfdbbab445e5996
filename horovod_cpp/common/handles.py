"""Handles: numbers for operations in flight, which `poll` and `synchronize` take; one numbering for all frameworks.

Any thread; one wait at a time for each.
"""

from __future__ import annotations

import itertools
from typing import Any, Protocol

from horovod_cpp.common import basics


class Waitable(Protocol):
    """Something in flight that has a result in the end."""

    def done(self) -> bool:
        """Whether `wait` would return at once."""

    def wait(self) -> Any:
        """Block until it is done and return its result."""


_handles: dict[int, Waitable] = {}
basics.when_a_job_starts(_handles.clear)  # what is left of a former job failed with it, and holds its tensors
_next_handle = itertools.count()


def register(pending: Waitable) -> int:
    """A handle for `poll` and `synchronize`."""
    handle = next(_next_handle)
    _handles[handle] = pending
    return handle


def poll(handle: int) -> bool:
    """Whether the operation is done, so that `synchronize` would not block. ValueError for an unknown handle."""
    pending = _handles.get(handle)
    if pending is None:
        raise ValueError(f"Handle {handle} was not created or has been cleared.")
    return pending.done()


def synchronize(handle: int) -> Any:
    """Block until the operation is done and give the handle back.

    Returns: the output; for an in-place operation the tensor itself, for a grouped one a list of tensors, for an
        alltoall with splits the output and the received splits. None for a handle that is not known, was synchronised
        already, or is of a job before the last `init`.
    Raises: HorovodInternalError if the operation failed. Ctrl-C ends the wait only: the handle stays good.
    """
    pending = _handles.pop(handle, None)
    if pending is None:
        return None
    try:
        return pending.wait()
    except KeyboardInterrupt:
        _handles[handle] = pending
        raise
