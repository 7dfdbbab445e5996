"""What each rank reads while ranks wait for each other: the likely mistake, in the words of its own operation."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from launchers import mpirun

pytestmark = pytest.mark.skipif(shutil.which("mpirun") is None, reason="there is no mpirun")

# Every rank reads its own standard error until it has what it should, and then gives the others what they wait for.
PROGRAM = """
    import os
    import time
    import torch
    import horovod_cpp.torch as hvd

    hvd.init()
    path = f"{os.environ['FOLDER']}/rank.{hvd.rank()}"
    own_stderr = os.dup(2)
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)


    def start(kind, name):
        if kind == "broadcast":
            return hvd.broadcast_async(torch.ones(3), 0, name=name)
        return hvd.allreduce_async(torch.ones(3), op=hvd.Sum, name=name)


    is_odd_one = hvd.rank() == 2
    mine, theirs = (ODD, COMMON) if is_odd_one else (COMMON, ODD)
    handles = [start(*mine)]
    others = "ranks 0-1" if is_odd_one else "rank 2"
    expected = (
        f"Perhaps: {mine[0]} '{mine[1]}' waits for {others}, while {others} asked for {theirs[0]} '{theirs[1]}' (WHY)"
    )
    deadline = time.monotonic() + 30
    while expected not in open(path).read() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.dup2(own_stderr, 2)
    said = open(path).read()
    print(f"rank {hvd.rank()} read it" if expected in said else f"{hvd.rank()}: no {expected!r} in {said}", flush=True)
    hvd.barrier()
    handles.append(start(*theirs))
    for handle in handles:
        hvd.synchronize(handle)
    print(f"rank {hvd.rank()} goes on", flush=True)
"""


@pytest.mark.parametrize(
    ("common", "odd", "why"),
    [
        (("allreduce", "grad.3.weight"), ("allreduce", "grad.3.weigth"), "a name that is nearly the same"),
        (("allreduce", "grad.3.weight"), ("broadcast", "grad.3.weight"), "another operation under the same name"),
    ],
    ids=["name", "operation"],
)
def test_every_rank_reads_what_the_others_wait_for_instead(
    tmp_path: Path, common: tuple[str, str], odd: tuple[str, str], why: str
) -> None:
    program = PROGRAM.replace("COMMON", repr(common)).replace("ODD", repr(odd)).replace("WHY", why)
    output = mpirun(tmp_path, 3, program, FOLDER=str(tmp_path), HOROVOD_STALL_CHECK_TIME_SECONDS="1")
    assert "exit code 0" in output, output
    for rank in range(3):
        assert f"rank {rank} read it" in output and f"rank {rank} goes on" in output, output
