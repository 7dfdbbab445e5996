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
    import numpy as np
    import horovod_cpp.arrays as hvd

    hvd.init()
    path = f"{os.environ['FOLDER']}/rank.{hvd.rank()}"
    own_stderr = os.dup(2)
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)


    def start(kind, name):
        if kind == "broadcast":
            return hvd.broadcast_async(np.ones(3), 0, name=name)
        return hvd.allreduce_async(np.ones(3), op=hvd.Sum, name=name)


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


# Rank 1 stops in the middle of a call that all ranks have begun.
STOPPED = """
    import os
    import signal
    import time
    import numpy as np
    import horovod_cpp.arrays as hvd

    hvd.init()
    pids = hvd.allgather(np.array([os.getpid()]), name="pids")
    path = f"{os.environ['FOLDER']}/rank.{hvd.rank()}"
    own_stderr = os.dup(2)
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    handle = hvd.allreduce_async(np.ones(3_000_000, np.float32), op=hvd.Sum, name="large")
    expected = "This rank waits in allreduce 'large' for 1 s, for rank 1"
    if hvd.rank() == 0:
        deadline = time.monotonic() + 30
        while WAITS and time.monotonic() < deadline:
            time.sleep(0.05)
            hvd.poll(handle)
        os.kill(pids[1], signal.SIGCONT)
    try:
        print(f"rank {hvd.rank()} got {hvd.synchronize(handle)[-1].item()}", flush=True)
    except hvd.HorovodInternalError as error:
        print(f"rank {hvd.rank()}: {error}", flush=True)
    os.dup2(own_stderr, 2)
    print(f"rank {hvd.rank()} was told" if expected in open(path).read() else open(path).read(), flush=True)
    assert hvd.allreduce(np.ones(3), op=hvd.Sum, name="afterwards")[0] == hvd.size()
    print(f"rank {hvd.rank()} goes on", flush=True)
"""


@pytest.mark.parametrize("transport", ["auto", "tcp"])
@pytest.mark.parametrize("ends", [False, True], ids=["goes on", "is given up"])
def test_a_call_in_flight_tells_whom_it_waits_for(tmp_path: Path, ends: bool, transport: str) -> None:
    program = STOPPED.replace("WAITS", "not hvd.poll(handle)" if ends else "expected not in open(path).read()")
    output = mpirun(
        tmp_path,
        2,
        program,
        FOLDER=str(tmp_path),
        HOROVOD_TRANSPORT=transport,
        HOROVOD_STALL_CHECK_TIME_SECONDS="1",
        HOROVOD_STALL_SHUTDOWN_TIME_SECONDS="3" if ends else "0",
        # The first segment is a pid.
        HOROVOD_FAULT="stop@segment_receive#4:rank=1",
    )
    assert "exit code 0" in output and "rank 0 was told" in output, output
    for rank in range(2):
        assert f"rank {rank} goes on" in output, output
        if ends:
            assert f"rank {rank}: allreduce 'large'" in output and "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS" in output, (
                output
            )
        else:
            assert f"rank {rank} got 2.0" in output, output
