"""What the checks for a GPU share: the job, the device of this rank, and one JSON line for each result.

A part is a plain script: `python tests/gpu/PART.py`, or for several ranks `python -m horovod_cpp.run -np N python ...`.
With `--device cpu` it runs on CPU tensors, which checks the check. Rank 0 prints every result, the others what failed.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import horovod_cpp.torch as hvd

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python" / "parallel"))  # reference.py

DEFAULT_SECONDS = 110  # of one process, if nobody says otherwise; then it shows where it hangs and ends


def one_gpu_environment(rank: int) -> dict[str, str]:
    """Variables with which NCCL accepts several processes on one GPU. To be set before the first call of NCCL."""
    return {
        # NCCL refuses two ranks of one host on one GPU; a host of its own for each rank makes it use sockets.
        "NCCL_HOSTID": f"rank{rank}",
        "NCCL_NET": "Socket",
        "NCCL_IB_DISABLE": "1",
        "NCCL_SOCKET_IFNAME": "lo",
        "NCCL_MNNVL_ENABLE": "0",
        "NCCL_NVLS_ENABLE": "0",
        "NCCL_P2P_DISABLE": "1",
        "NCCL_SHM_DISABLE": "1",
        # Little of the GPU for each, and few round trips: only one process has the GPU at a time.
        "NCCL_MAX_CTAS": "1",
        "NCCL_BUFFSIZE": "1048576",
        "NCCL_NSOCKS_PERTHREAD": "1",
        "NCCL_SOCKET_NTHREADS": "1",
        "NCCL_ALGO": "Ring",
        "NCCL_PROTO": "Simple",
        "NCCL_RAS_ENABLE": "0",
        "NCCL_DEBUG": "WARN",
    }


def say(**fields: Any) -> None:
    """One line of JSON, in one piece: NCCL and the library write to the same pipe."""
    sys.stdout.flush()
    os.write(1, (json.dumps(fields) + "\n").encode())


def argument_parser(text: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--short", action="store_true", help="fewer and smaller tensors, for slow tools")
    return parser


class Checks:
    """One part on one rank. Made after the arguments are read; joins the job."""

    def __init__(self, part: str, device: str, short: bool = False) -> None:
        seconds = float(os.environ.get("HVD_CHECK_SECONDS", DEFAULT_SECONDS))
        faulthandler.dump_traceback_later(seconds, exit=True)
        torch.set_num_threads(1 if device == "cpu" else 2)  # ranks share the cores
        self.part = part
        self.short = short
        self.on_gpu = device == "cuda"
        self._failed: list[str] = []
        self._passed = 0
        self._start = time.monotonic()
        # A rank that waits in vain is told so before the time of the part is over.
        os.environ.setdefault("HOROVOD_STALL_CHECK_TIME_SECONDS", "10")
        os.environ.setdefault("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", "25")
        index = 0
        if self.on_gpu:
            devices = torch.cuda.device_count()
            if devices == 0:
                say(part=part, check="a CUDA device", ok=False, message="torch sees no CUDA device")
                sys.exit(1)
            if int(os.environ.get("HOROVOD_SIZE", "1")) > devices:
                for name, value in one_gpu_environment(int(os.environ["HOROVOD_RANK"])).items():
                    os.environ.setdefault(name, value)
            index = int(os.environ.get("HOROVOD_LOCAL_RANK", "0")) % devices
            torch.cuda.set_device(index)
        hvd.init(process_sets="dynamic")
        self.rank = hvd.rank()
        self.size = hvd.size()
        self.device = torch.device("cuda", index) if self.on_gpu else torch.device("cpu")

    def run(self, name: str, function: Callable[[], object]) -> None:
        """Do one check: it fails by an exception. A string that it returns is reported as a note."""
        start = time.monotonic()
        message = None
        note: object = None
        try:
            note = function()
            self.finish_device()
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            own = [frame for frame in frames if "tests/gpu" in frame.filename] or list(frames)
            place = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "?"
            message = f"{type(error).__name__}: {error} ({place})"[:1000]
        if self.size > 1:
            # Ranks that failed in the middle have fewer operations behind them: a join counts from the start again.
            try:
                hvd.join()
            except Exception as error:
                message = message or f"join after the check: {error}"
        if message is None:
            self._passed += 1
        else:
            self._failed.append(name)
        if message is not None or self.rank == 0:
            fields: dict[str, Any] = {"part": self.part, "check": name, "np": self.size, "rank": self.rank}
            fields |= {"ok": message is None, "seconds": round(time.monotonic() - start, 3)}
            if message is not None:
                fields["message"] = message
            elif isinstance(note, str):
                fields["note"] = note
            say(**fields)

    def measure(self, name: str, **values: Any) -> None:
        """A result that is no yes or no. From rank 0 only."""
        if self.rank == 0:
            say(part=self.part, measure=name, np=self.size, **values)

    def finish_device(self) -> None:
        """Wait for the GPU, so that its errors belong to who made them."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def end(self) -> int:
        """The last line of this rank. Returns the exit code."""
        if self.on_gpu and self.rank == 0:
            with contextlib.suppress(Exception):
                self.measure("statistics", nccl_built=hvd.nccl_built(), counters=hvd.statistics())
        seconds = round(time.monotonic() - self._start, 1)
        say(part=self.part, np=self.size, rank=self.rank, passed=self._passed, failed=self._failed, seconds=seconds)
        with contextlib.suppress(Exception):
            hvd.barrier()  # the launcher ends the others when one ends with a failure
        return 1 if self._failed else 0


@contextlib.contextmanager
def reducing_alone() -> Iterator[None]:
    """A DistributedOptimizer that is made in here reduces its gradients also where there is only one rank."""
    before = os.environ.get("HOROVOD_ELASTIC")
    os.environ["HOROVOD_ELASTIC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HOROVOD_ELASTIC"]
        else:
            os.environ["HOROVOD_ELASTIC"] = before


def keep_gpu_busy(milliseconds: float) -> None:
    """A kernel on the current stream that takes about this long: what does not wait for it comes too early."""
    torch.cuda._sleep(int(milliseconds * 1.8e6))  # cycles
