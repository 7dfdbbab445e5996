"""Starts ranks as processes of their own, with no launcher that would end them all when one ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PREAMBLE = """
import os, signal, sys, time
import torch
import horovod_cpp.torch as hvd
torch.set_num_threads(1)
rank = int(os.environ["RANK"])

def say(*what):
    # In one piece: lines of the log go to the same pipe.
    os.write(1, (" ".join(map(str, what)) + "\\n").encode())
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
        jobs.append(Job(program, size, environment, rank_environment))
        return jobs[-1]

    yield starter
    for job in jobs:
        job.end()
