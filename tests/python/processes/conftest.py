"""Starts ranks as processes of their own, with no launcher that would end them all when one ends."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import pytest

# With numpy, as torch is ten times as long to import.
PREAMBLE = """
import os, signal, sys, time
import numpy as np
import horovod_cpp.arrays as hvd
rank = int(os.environ.get("RANK") or os.environ["OMPI_COMM_WORLD_RANK"])

def say(*what):
    # In one piece: lines of the log go to the same pipe.
    os.write(1, (" ".join(map(str, what)) + "\\n").encode())

def ones(count):
    return np.ones(count, np.float32)
"""

# Of a rank that mpirun has started: output goes to the test, and not through mpirun, which mixes that of all ranks.
MPI_PREAMBLE = """
import os, socket
output = socket.create_connection(("127.0.0.1", int(os.environ["TEST_PORT"])))
output.sendall(f"{os.environ['OMPI_COMM_WORLD_RANK']} {os.getpid()}\\n".encode())
os.dup2(output.fileno(), 1)
os.dup2(output.fileno(), 2)
"""


class Job:
    """`size` processes that run the same program, each with torchrun's variables."""

    def __init__(self, program: Path, size: int, environment: dict[str, str], rank_environment) -> None:
        port = free_port()
        self.ranks = []
        for rank in range(size):
            variables = {
                "RANK": str(rank),
                "WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "TORCHELASTIC_RUN_ID": f"test-{port}",
                "OMP_NUM_THREADS": "1",
            }
            self.ranks.append(
                subprocess.Popen(
                    [sys.executable, str(program)],
                    env=os.environ | variables | environment | rank_environment(rank),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )

    def wait_for(self, rank: int, text: str) -> str:
        """Reads a rank's output up to a line with `text`; the test fails when the output ends before."""
        stream = self.ranks[rank].stdout
        assert stream is not None
        seen = []
        for line in stream:
            seen.append(line)
            if text in line:
                return line.strip()
        raise AssertionError(f"rank {rank} never said {text!r}:\n{''.join(seen)}")

    def wait_for_all(self, text: str) -> None:
        for rank in range(len(self.ranks)):
            self.wait_for(rank, text)

    def send(self, rank: int, number: signal.Signals) -> None:
        self.ranks[rank].send_signal(number)

    def kill(self, rank: int) -> float:
        """When the process was gone, as time.monotonic() has it."""
        self.send(rank, signal.SIGKILL)
        self.ranks[rank].wait(60)
        return time.monotonic()

    def finish(self, ranks: list[int] | None = None, seconds: float = 60) -> dict[int, str]:
        """The rest of the output of each rank; each must end in time."""
        deadline = time.monotonic() + seconds
        chosen = range(len(self.ranks)) if ranks is None else ranks
        return {rank: self.ranks[rank].communicate(timeout=deadline - time.monotonic())[0] for rank in chosen}

    def end(self) -> None:
        for process in self.ranks:
            process.kill()
            process.wait()
            if process.stdout:
                process.stdout.close()


class RankOfMpirun:
    """What a Job does with a rank, for one that is no child of this process."""

    def __init__(self, pid: int, stdout: TextIO) -> None:
        self._process = os.pidfd_open(pid)
        self.stdout = stdout

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._process, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float = 60) -> None:
        if not select.select([self._process], [], [], timeout)[0]:
            raise TimeoutError("the rank still runs")

    def communicate(self, timeout: float) -> tuple[str, None]:
        self.wait(timeout)
        return self.stdout.read(), None


class MpiJob(Job):
    """The same under an mpirun that lets the others run when a rank has been killed."""

    def __init__(self, program: Path, size: int, environment: dict[str, str], rank_environment) -> None:
        if shutil.which("mpirun") is None:
            pytest.skip("there is no mpirun")
        assert not any(map(rank_environment, range(size))), "mpirun gives all ranks the same environment"
        program.write_text(MPI_PREAMBLE + program.read_text())
        variables = {
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "OMP_NUM_THREADS": "1",
        }
        command = ["mpirun", "--enable-recovery", "--oversubscribe", "--bind-to", "none", "--timeout", "100"]
        with socket.create_server(("127.0.0.1", 0), backlog=size) as listener:
            variables["TEST_PORT"] = str(listener.getsockname()[1])
            self._mpirun = subprocess.Popen(
                [*command, "-np", str(size), sys.executable, str(program)],
                env=os.environ | variables | environment,
            )
            listener.settimeout(60)
            try:
                ranks = dict(self._accept(listener) for _ in range(size))
            except BaseException:
                self._mpirun.terminate()  # which ends the ranks that there are
                self._mpirun.wait()
                raise
        self.ranks = [ranks[rank] for rank in range(size)]

    @staticmethod
    def _accept(listener: socket.socket) -> tuple[int, RankOfMpirun]:
        connection = listener.accept()[0]
        with connection:
            stdout = connection.makefile()
        rank, pid = map(int, stdout.readline().split())
        return rank, RankOfMpirun(pid, stdout)

    def end(self) -> None:
        super().end()
        try:
            self._mpirun.wait(10)
        finally:
            self._mpirun.kill()
            self._mpirun.wait()


def free_port() -> int:
    """The engine takes one of the sixteen ports after it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return min(int(listener.getsockname()[1]), 65000)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    jobs = []

    def starter(size: int, text: str, *, rank_environment=lambda rank: {}, **environment: str) -> Job:
        program = tmp_path / f"program{len(jobs)}.py"
        program.write_text(PREAMBLE + textwrap.dedent(text))
        kind = MpiJob if environment.get("HOROVOD_TRANSPORT") == "mpi" else Job
        jobs.append(kind(program, size, environment, rank_environment))
        return jobs[-1]

    yield starter
    for job in jobs:
        job.end()
