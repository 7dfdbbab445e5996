"""Stands for ``horovod.runner.util.threads``."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any


def in_thread(
    target: Callable[..., Any],
    args: tuple[Any, ...] = (),
    name: str | None = None,
    daemon: bool = True,
    silent: bool = False,
) -> threading.Thread:
    """Call `target(*args)` on a new thread. Does not block. Returns the thread, which has started.

    Args:
        name: of the thread; made by Python if None.
        daemon: whether the program may end before the thread does.
        silent: drop what `target` raises; otherwise Python reports it on stderr.
    Raises: ValueError if `args` is not a tuple, a text among them, whose characters would become the arguments.
    """
    if not isinstance(args, tuple):
        raise ValueError(f"args has to be a tuple of arguments, as in args=(1,); it is a {type(args).__name__}")

    def run_silently() -> None:
        with contextlib.suppress(Exception):
            target(*args)

    thread = threading.Thread(
        target=run_silently if silent else target, args=() if silent else args, name=name, daemon=daemon
    )
    thread.start()
    return thread
