"""Ends the ranks when the launcher itself is killed.

A process of its own holds one end of a pipe. When the other end closes without a word, the launcher is gone, and the
process groups of all ranks are killed: PR_SET_PDEATHSIG alone would leave what the ranks have started.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1
_DISMISSED = 0  # in place of the number of a group


class Guard:
    """Started before the first rank; `watch` each rank, `dismiss` in the end."""

    def __init__(self) -> None:
        read_end, self._write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(self._write_end)
            _watch_over(read_end)
        os.close(read_end)
        self._pid = pid

    def watch(self, process_group: int) -> None:
        """Kill this group if the launcher dies from now on."""
        os.write(self._write_end, b"%d\n" % process_group)

    def forget(self, process_group: int) -> None:
        """This group is gone; its number may be given to another."""
        os.write(self._write_end, b"-%d\n" % process_group)

    def dismiss(self) -> None:
        """All ranks have ended: the guard goes without killing."""
        os.write(self._write_end, b"%d\n" % _DISMISSED)
        os.close(self._write_end)
        os.waitpid(self._pid, 0)


def _watch_over(read_end: int) -> None:
    """The guard process; never returns."""
    try:
        os.setsid()  # out of reach of what is sent to the launcher's group
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        silence = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(silence, descriptor)
        text = b""
        while data := os.read(read_end, 4096):
            text += data
        numbers = [int(line) for line in text.split()]
        if _DISMISSED not in numbers:
            for process_group in {number for number in numbers if -number not in numbers}:
                kill_group(process_group, signal.SIGKILL)
    finally:
        os._exit(0)


def kill_group(process_group: int, number: int) -> None:
    """Send a signal to a process group that may be gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process_group, number)


def die_with_parent(parent: int) -> None:
    """For a new child before exec: be killed when the launcher dies, also if it has died already."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
