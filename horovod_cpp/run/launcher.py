"""Starts the ranks, passes on output and signals, and ends all ranks when one fails.

One thread that waits in one place, a selector: for output, for signals (a child's end is one), for deadlines.
"""

from __future__ import annotations

import functools
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from horovod_cpp.run.guard import Guard, die_with_parent, kill_group
from horovod_cpp.run.output import RankStream, write_all

FAILURE_GRACE_SECONDS = 2.0  # from SIGTERM to SIGKILL when a rank has failed
SIGNAL_GRACE_SECONDS = 10.0  # from a forwarded SIGINT or SIGTERM to SIGKILL; ranks may be saving their state
_TOKEN_BYTES = 32


@dataclass(frozen=True)
class JobOptions:
    """What to run."""

    command: list[str]
    size: int
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    tag: bool = True
    output_folder: str | None = None
    verbose: bool = False


@dataclass
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    streams: list[RankStream]
    exit_code: int | None = None  # as a shell shows it: 128 + n for signal n

    def end_text(self) -> str:
        code = self.process.returncode
        if code >= 0:
            return f"exited with code {code}"
        return f"was ended by signal {-code} ({signal.strsignal(-code)})"


class Job:
    """One run of `options.command` on all ranks. Use once, on the main thread."""

    def __init__(self, options: JobOptions) -> None:
        self._options = options
        self._ranks: list[_Rank] = []
        self._selector = selectors.DefaultSelector()
        self._guard = Guard()
        self._failure: int | None = None  # the exit code, once it is decided
        self._ending = False  # a rank has failed, the others have been told to end
        self._kill_time: float | None = None

    def run(self) -> int:
        """Start all ranks and wait for them. Blocks. Returns the first failure's exit code, or 0."""
        signals = _SignalPipe()
        self._selector.register(signals.read_end, selectors.EVENT_READ, None)
        try:
            self._start_ranks()
            while any(rank.exit_code is None for rank in self._ranks):
                self._wait(signals)
        except BrokenPipeError:
            self._failure = self._failure or 128 + signal.SIGPIPE  # nobody reads our output any more
        finally:
            self._end_all()
            signals.close()
            self._guard.dismiss()
            self._selector.close()
        return self._failure or 0

    def _start_ranks(self) -> None:
        with socket.create_server(("127.0.0.1", 0), backlog=self._options.size) as rendezvous:
            token = secrets.token_hex(_TOKEN_BYTES)
            for number in range(self._options.size):
                environment = self._options.environment | rank_variables(
                    number, self._options.size, rendezvous.getsockname()[1], token
                )
                environment.pop("HOROVOD_RENDEZVOUS_FD", None)
                pass_fds: tuple[int, ...] = ()
                if number == 0:
                    environment["HOROVOD_RENDEZVOUS_FD"] = str(rendezvous.fileno())
                    pass_fds = (rendezvous.fileno(),)
                self._start_rank(number, environment, pass_fds)

    def _start_rank(self, number: int, environment: dict[str, str], pass_fds: tuple[int, ...]) -> None:
        pipes = [_OutputPipe(name, self._copy(number, name)) for name in ("stdout", "stderr")]
        process = subprocess.Popen(
            self._options.command,
            env=environment,
            stdin=None if number == 0 else subprocess.DEVNULL,
            stdout=pipes[0].write_end,
            stderr=pipes[1].write_end,
            pass_fds=pass_fds,
            start_new_session=True,
            preexec_fn=functools.partial(die_with_parent, os.getpid()),  # this process has one thread
        )
        self._guard.watch(process.pid)
        tag = b"[%d] " % number if self._options.tag else b""
        rank = _Rank(number, process, [pipe.stream(tag) for pipe in pipes])
        self._ranks.append(rank)
        for stream in rank.streams:
            self._selector.register(stream.source, selectors.EVENT_READ, stream)
        if self._options.verbose:
            self._say(f"rank {number} is process {process.pid}")

    def _copy(self, number: int, name: str) -> int | None:
        if self._options.output_folder is None:
            return None
        folder = Path(self._options.output_folder) / f"rank.{number}"
        folder.mkdir(parents=True, exist_ok=True)
        return os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)

    def _wait(self, signals: _SignalPipe) -> None:
        limit = None if self._kill_time is None else max(0.0, self._kill_time - time.monotonic())
        for key, _ in self._selector.select(limit):
            if isinstance(key.data, RankStream):
                key.data.pump()
                self._forget_if_closed(key.data)
        for number in signals.take():
            if number == signal.SIGCHLD:
                self._notice_ends()
            else:
                self._forward(number)
        if self._kill_time is not None and time.monotonic() >= self._kill_time:
            self._kill_time = None
            self._signal_ranks(signal.SIGKILL)

    def _forget_if_closed(self, stream: RankStream) -> None:
        key = self._selector.get_map().get(stream.source)
        if stream.closed and key is not None and key.data is stream:
            self._selector.unregister(stream.source)

    def _notice_ends(self) -> None:
        ended = [rank for rank in self._ranks if rank.exit_code is None and self._has_ended(rank)]
        # Of ranks that ended at once, one that a signal has ended is the likelier cause.
        failed = sorted((rank for rank in ended if rank.exit_code), key=lambda rank: rank.process.returncode >= 0)
        if failed and not self._ending:
            self._fail(failed[0])

    def _has_ended(self, rank: _Rank) -> bool:
        """Whether the rank's process has ended; then kills what it left behind, and passes on its last output."""
        pid = rank.process.pid
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return False
        kill_group(pid, signal.SIGKILL)  # before the process is reaped and its number free for others
        code = rank.process.wait()
        self._guard.forget(pid)
        rank.exit_code = code if code >= 0 else 128 - code
        for stream in rank.streams:
            stream.drain()
            self._forget_if_closed(stream)
        if self._options.verbose:
            self._say(f"rank {rank.number} {rank.end_text()}")
        return True

    def _fail(self, first: _Rank) -> None:
        self._ending = True
        if self._failure is None:
            self._failure = first.exit_code
        running = [str(rank.number) for rank in self._ranks if rank.exit_code is None]
        others = f"; ending the ranks that still run: {', '.join(running)}" if running else ""
        self._say(f"rank {first.number} was the first to fail: it {first.end_text()}{others}")
        self._signal_ranks(signal.SIGTERM)
        self._kill_time = time.monotonic() + FAILURE_GRACE_SECONDS

    def _forward(self, number: int) -> None:
        """The first signal goes to the ranks as it is; a second one kills them."""
        if self._failure is not None:
            self._signal_ranks(signal.SIGKILL)
            return
        self._failure = 128 + number
        self._say(f"passing {signal.Signals(number).name} on to all ranks")
        self._signal_ranks(number)
        self._kill_time = time.monotonic() + SIGNAL_GRACE_SECONDS

    def _signal_ranks(self, number: int) -> None:
        for rank in self._ranks:
            if rank.exit_code is None:
                kill_group(rank.process.pid, number)

    def _end_all(self) -> None:
        """Kill the ranks that are left, and pass on the last output."""
        self._signal_ranks(signal.SIGKILL)
        for rank in self._ranks:
            rank.process.wait()
            for stream in rank.streams:
                try:
                    stream.drain()
                    stream.close()
                except BrokenPipeError:
                    stream.closed = True

    def _say(self, text: str) -> None:
        write_all(sys.stderr.fileno(), f"hvdrun: {text}\n".encode())


class _OutputPipe:
    """The way of one output stream of a rank that is about to start."""

    def __init__(self, name: str, raw_copy: int | None) -> None:
        self.read_end, self.write_end = os.pipe()
        self._raw_copy = raw_copy
        self._target = sys.stdout if name == "stdout" else sys.stderr

    def stream(self, tag: bytes) -> RankStream:
        """Our end of it, now that the rank has its own."""
        os.close(self.write_end)
        self._target.flush()
        return RankStream(self.read_end, self._target.fileno(), tag, self._raw_copy)


class _SignalPipe:
    """Signals as bytes in a pipe, so that one selector waits for everything."""

    _NUMBERS = (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.read_end, self._write_end = os.pipe()
        os.set_blocking(self.read_end, False)
        os.set_blocking(self._write_end, False)
        self._old_wakeup = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._old = {number: signal.signal(number, lambda *_: None) for number in self._NUMBERS}

    def take(self) -> list[int]:
        """The signals that came since the last call, each once."""
        try:
            return list(dict.fromkeys(os.read(self.read_end, 4096)))
        except BlockingIOError:
            return []

    def close(self) -> None:
        signal.set_wakeup_fd(self._old_wakeup)
        for number, old in self._old.items():
            signal.signal(number, old)
        os.close(self.read_end)
        os.close(self._write_end)


def rank_variables(number: int, size: int, port: int, token: str) -> dict[str, str]:
    """The environment that tells a rank its place and where the ranks meet. All ranks are on this host."""
    return {
        "HOROVOD_RANK": str(number),
        "HOROVOD_SIZE": str(size),
        "HOROVOD_LOCAL_RANK": str(number),
        "HOROVOD_LOCAL_SIZE": str(size),
        "HOROVOD_CROSS_RANK": "0",
        "HOROVOD_CROSS_SIZE": "1",
        "HOROVOD_RENDEZVOUS_ADDR": "127.0.0.1",
        "HOROVOD_RENDEZVOUS_PORT": str(port),
        "HOROVOD_JOB_TOKEN": token,
    }
