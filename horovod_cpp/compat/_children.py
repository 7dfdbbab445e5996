"""Lets processes that `multiprocessing` starts anew know Horovod's names, too.

They import the main program again before they run a function of it (data loaders with the method "forkserver", which
Horovod's examples recommend, do). Forked processes have all of it anyway.
"""

from __future__ import annotations

import functools
from multiprocessing import spawn
from typing import Any

from horovod_cpp.compat._finder import install


class _InstallInChild:
    """Calls `follow_into_children` in the process that unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _start_child, ()


def _start_child() -> None:
    install()
    follow_into_children()


def follow_into_children() -> None:
    """Install in the processes that this one starts from now on, and in theirs. Calling it again does nothing."""
    original = spawn.get_preparation_data
    if getattr(original, "follows", False):
        return

    @functools.wraps(original)
    def get_preparation_data(name: str) -> dict[str, Any]:
        data: dict[str, Any] = original(name)
        # A child unpickles this before it imports the main program; it does not look at keys that it does not know.
        data[__name__] = _InstallInChild()
        if name == "ignore":
            # The fork server takes only a path from here, so it cannot import the main program; its children can.
            data.pop("init_main_from_path", None)
        return data

    setattr(get_preparation_data, "follows", True)  # noqa: B010
    spawn.get_preparation_data = get_preparation_data
