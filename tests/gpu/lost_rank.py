"""One of three ranks is killed while all reduce large tensors: the others get an error that names it, and can end.

Starts its ranks itself, since hvdrun would end them all when one ends.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from checks import Checks, argument_parser, say

import horovod_cpp.torch as hvd
from horovod_cpp.run.launcher import rank_variables

RANKS = 3
START_SECONDS = 60.0
ERROR_SECONDS = 15.0  # from the kill to the error
EXIT_SECONDS = 20.0  # from the kill to the end of the process


def be_rank(device: str, waits: bool) -> int:
    """Reduce until it fails. `waits`: for the GPU after each round, where a kernel may wait for the lost rank."""
    checks = Checks("lost_rank", device)
    tensors = [torch.ones(count, device=checks.device) for count in (1, 1000, 1 << 20, 1 << 22)]
    rounds = 0
    try:
        while True:
            handles = [
                hvd.allreduce_async_(tensor, op=hvd.Max, name=f"t{index}") for index, tensor in enumerate(tensors)
            ]
            for handle in handles:
                hvd.synchronize(handle)
            if waits:
                checks.finish_device()
            rounds += 1
            if rounds == 3:
                say(ready=checks.rank)
    except Exception as error:
        say(error=str(error)[:1000], type=type(error).__name__, at=time.monotonic(), rounds=rounds)
    try:
        hvd.allreduce(torch.ones(1, device=checks.device), name="later")
        say(later="no error")
    except Exception as error:
        say(later=str(error)[:1000], type=type(error).__name__)
    return 0


class Job:
    """The ranks as processes, with their output in files."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        self.outputs = [folder / f"rank.{rank}" for rank in range(RANKS)]
        self.processes = []
        token = secrets.token_hex(32)
        with socket.create_server(("127.0.0.1", 0), backlog=RANKS) as rendezvous:
            for rank, output in enumerate(self.outputs):
                variables = rank_variables(rank, RANKS, rendezvous.getsockname()[1], token)
                descriptors: tuple[int, ...] = ()
                if rank == 0:
                    variables["HOROVOD_RENDEZVOUS_FD"] = str(rendezvous.fileno())
                    descriptors = (rendezvous.fileno(),)
                with output.open("wb") as file:
                    self.processes.append(
                        subprocess.Popen(
                            [sys.executable, __file__, "--rank", *arguments],
                            env=os.environ | variables,
                            stdout=file,
                            stderr=subprocess.STDOUT,
                            pass_fds=descriptors,
                        )
                    )

    def text(self, rank: int) -> str:
        return self.outputs[rank].read_text(errors="replace")

    def wait_until_ready(self) -> bool:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if all('"ready"' in self.text(rank) for rank in range(RANKS)):
                return True
            if any(process.poll() is not None for process in self.processes):
                return False
            time.sleep(0.05)
        return False

    def exit_times(self, ranks: list[int], deadline: float) -> dict[int, float]:
        """When each ended, of those that ended in time."""
        times: dict[int, float] = {}
        while len(times) < len(ranks) and time.monotonic() < deadline:
            for rank in ranks:
                if rank not in times and self.processes[rank].poll() is not None:
                    times[rank] = time.monotonic()
            time.sleep(0.02)
        return times

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def stacks_of(process: int) -> str:
    """Where the threads of a process are, if there is a debugger."""
    debugger = shutil.which("gdb") or shutil.which("cuda-gdb")
    if debugger is None:
        return "(no debugger)"
    command = [debugger, "-batch", "-p", str(process), "-ex", "thread apply all bt 14"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return "(the debugger took too long)"
    return "\n".join(line for line in done.stdout.splitlines() if line.startswith(("#", "Thread")))


def kill_one(victim: int, waits: bool, device: str) -> dict[str, Any]:
    """Run one job; what to report of it."""
    arguments = ["--device", device, *(["--waits"] if waits else [])]
    with tempfile.TemporaryDirectory() as folder:
        job = Job(arguments, Path(folder))
        try:
            if not job.wait_until_ready():
                last = {rank: job.text(rank)[-500:] for rank in range(RANKS)}
                return {"ok": False, "message": f"the ranks did not get to work: {last}"}
            time.sleep(0.3)  # into the middle of the work
            killed = time.monotonic()
            job.processes[victim].send_signal(signal.SIGKILL)
            others = [rank for rank in range(RANKS) if rank != victim]
            ended = job.exit_times(others, killed + EXIT_SECONDS)
            problems = []
            errors = {}
            for rank in others:
                text = job.text(rank)
                if rank not in ended:
                    stacks = stacks_of(job.processes[rank].pid)
                    problems.append(f"rank {rank} still runs after {EXIT_SECONDS} s: {text[-800:]}\n{stacks}")
                    continue
                found = re.search(r'"error": .*"type": "HorovodInternalError", "at": ([\d.]+)', text)
                if not found:
                    problems.append(f"rank {rank} has no HorovodInternalError: {text[-800:]}")
                    continue
                errors[rank] = round(float(found[1]) - killed, 2)
                if errors[rank] > ERROR_SECONDS:
                    problems.append(f"rank {rank} had its error after {errors[rank]} s")
                if not re.search(rf'"error": .*\brank {victim}\b', text):
                    problems.append(f"the error of rank {rank} does not name rank {victim}: {text[-800:]}")
                if '"later": "no error"' in text:
                    problems.append(f"rank {rank} could go on with a later operation")
                if job.processes[rank].returncode != 0:
                    problems.append(f"rank {rank} ended with {job.processes[rank].returncode}: {text[-800:]}")
            exits = {rank: round(when - killed, 2) for rank, when in ended.items()}
            if problems:
                return {"ok": False, "message": "; ".join(problems)[:3000]}
            return {"ok": True, "note": f"error after {errors} s, exit after {exits} s"}
        finally:
            job.end()


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--rank", action="store_true", help="for the ranks that this program starts")
    parser.add_argument("--waits", action="store_true", help="the ranks wait for the GPU in each round")
    arguments = parser.parse_args()
    if arguments.rank:
        return be_rank(arguments.device, arguments.waits)
    failed = []
    cases = [(1, True), (0, False)]
    for victim, waits in cases:
        name = f"rank {victim} is killed, the others {'wait for the GPU' if waits else 'do not wait for the GPU'}"
        start = time.monotonic()
        result = kill_one(victim, waits, arguments.device)
        if not result["ok"]:
            failed.append(name)
        say(part="lost_rank", check=name, np=RANKS, rank=0, **result, seconds=round(time.monotonic() - start, 1))
    say(part="lost_rank", np=RANKS, rank=0, passed=len(cases) - len(failed), failed=failed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
