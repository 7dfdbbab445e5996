"""What the others see when a rank is gone, stopped or leaves."""

from __future__ import annotations

import re
import signal
import time

import pytest

TRANSPORTS = ["shm", "tcp", "mpi"]

# Rank 1 stays away from the operation that the others wait for; they say how it ended, and when.
WAITING = """
hvd.init()
hvd.allreduce(ones(10), name="before")
say("ready")
if rank == 1:
    time.sleep(600)
try:
    hvd.{operation}
    say("no error")
except hvd.HorovodInternalError as error:
    say("ended at", time.monotonic())
    say("error:", str(error).replace("\\n", " "))
"""


LARGE = "allreduce(ones(4 << 20), name='waited')"
OPERATIONS = [
    LARGE,
    "allreduce(ones(4), name='waited')",
    "allgather(ones(4), name='waited')",
    "broadcast(ones(4), 1, name='waited')",
    "barrier()",
]


# No call has begun yet, and MPI carries nothing before that.
@pytest.mark.parametrize(
    ("operation", "transport"),
    [*((operation, transport) for operation in OPERATIONS for transport in ("shm", "tcp")), (LARGE, "mpi")],
)
def test_a_killed_rank_ends_every_wait_within_a_second(start, operation: str, transport: str) -> None:
    job = start(3, WAITING.format(operation=operation), HOROVOD_TRANSPORT=transport)
    job.wait_for_all("ready")
    time.sleep(0.2)  # not needed for the result: it makes it likely that the others wait already
    # One clock for all processes. It runs from when the rank is gone, not from the signal: on a busy machine a process
    # may need long to die. The others most often know it before this process does.
    gone = job.kill(1)
    for rank, output in job.finish([0, 2]).items():
        assert re.search(r"error:.*rank 1\b", output), output
        assert "no error" not in output, f"rank {rank}: {output}"
        assert float(re.search(r"ended at (\S+)", output)[1]) - gone < 1, output


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_rank_killed_at_work_is_named(start, victim: int, transport: str) -> None:
    """Operations of all sizes are under way when the rank dies; rank 0 is the coordinator."""
    job = start(
        3,
        """
        hvd.init()
        tensors = [ones(n) for n in (1, 1000, 100_000, 5_000_000)]
        say("ready")
        try:
            while True:
                handles = [hvd.allreduce_async_(t, op=hvd.Max, name=f"t{i}") for i, t in enumerate(tensors)]
                for handle in handles:
                    hvd.synchronize(handle)
        except hvd.HorovodInternalError as error:
            say("error:", str(error).replace("\\n", " "))
        try:
            hvd.allreduce(ones(1), name="later")
        except hvd.HorovodInternalError as error:
            say("later:", str(error).replace("\\n", " "))
        """,
        HOROVOD_TRANSPORT=transport,
    )
    job.wait_for_all("ready")
    job.send(victim, signal.SIGKILL)
    others = [rank for rank in range(3) if rank != victim]
    for output in job.finish(others).values():
        assert re.search(rf"error:.*rank {victim}\b", output), output
        assert re.search(rf"later:.*rank {victim}\b", output), output


def test_sets_without_the_lost_rank_go_on(start) -> None:
    job = start(
        4,
        """
        pair = hvd.ProcessSet([0, 3])
        hvd.init(process_sets=[pair])
        hvd.barrier()
        say("ready")
        if rank == 1:
            time.sleep(600)
        try:
            hvd.allreduce(ones(1), name="all")
        except hvd.HorovodInternalError as error:
            say("error:", str(error).replace("\\n", " "))
        if rank in (0, 3):
            for i in range(20):
                assert hvd.allreduce(ones(1000), op=hvd.Sum, process_set=pair)[7] == 2
            say("the pair goes on")
        time.sleep(600 if rank == 2 else 0)  # its end would be a shutdown for all
        os._exit(0)
        """,
    )
    job.wait_for_all("ready")
    job.send(1, signal.SIGKILL)
    assert re.search(r"rank 1\b", job.wait_for(2, "error:"))
    for output in job.finish([0, 3]).values():
        assert re.search(r"error:.*rank 1\b", output), output
        assert "the pair goes on" in output, output


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_stopped_rank_is_waited_for(start, transport: str) -> None:
    job = start(
        2,
        """
        hvd.init()
        say("ready")
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        assert hvd.allreduce(ones(3_000_000), op=hvd.Sum, name="big")[-1] == 2
        say("done")
        """,
        HOROVOD_TRANSPORT=transport,
        HOROVOD_STALL_CHECK_TIME_SECONDS="1",
    )
    job.wait_for(1, "ready")
    line = job.wait_for(0, "Missing rank 1: allreduce 'big'")
    assert line
    job.send(1, signal.SIGCONT)
    for output in job.finish().values():
        assert "done" in output, output


# Ranks that do nothing else are within a standing call nearly all the time: they wait, copy or sum.
STANDING = """
hvd.init()
x = np.zeros({count}, np.float32)
for _ in range(300):
    hvd.allreduce_(x, op=hvd.Sum, name="standing")
assert hvd.statistics()["standing_calls"] > 100
say("ready")
"""


@pytest.mark.parametrize("count", [1, 10_000, 100_000], ids=["at once", "in two steps", "large"])
@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_killed_within_a_standing_call_is_named(start, victim: int, count: int) -> None:
    job = start(
        3,
        STANDING.format(count=count)
        + """
try:
    while True:
        x[:] = 1
        hvd.allreduce_(x, op=hvd.Sum, name="standing")
        assert (x == 3).all(), x
except hvd.HorovodInternalError as error:
    say("ended at", time.monotonic())
    say("error:", str(error).replace("\\n", " "))
""",
    )
    job.wait_for_all("ready")
    gone = job.kill(victim)
    for output in job.finish([rank for rank in range(3) if rank != victim]).values():
        assert re.search(rf"error:.*rank {victim}\b", output), output
        assert float(re.search(r"ended at (\S+)", output)[1]) - gone < 1, output


@pytest.mark.parametrize("count", [1, 10_000, 100_000], ids=["at once", "in two steps", "large"])
def test_a_rank_stopped_within_a_standing_call_is_waited_for(start, count: int) -> None:
    job = start(
        3,
        STANDING.format(count=count)
        + """
for _ in range(2000):
    x[:] = 1
    hvd.allreduce_(x, op=hvd.Sum, name="standing")
    assert (x == 3).all(), x
    time.sleep(0.0005)  # so that it takes a second, and is stopped in all that it does
say("standing calls:", hvd.statistics()["standing_calls"])
""",
    )
    job.wait_for_all("ready")
    for stop in range(6):
        job.send(stop % 3, signal.SIGSTOP)
        time.sleep(0.15)  # longer than it takes the others to ask
        job.send(stop % 3, signal.SIGCONT)
        time.sleep(0.03)
    for output in job.finish([0, 1, 2]).values():
        assert int(re.search(r"standing calls: (\d+)", output)[1]) > 200, output


@pytest.mark.parametrize("transport", ["shm", "tcp"])  # MPI carries no control messages
@pytest.mark.parametrize("point", ["control_send", "control_receive"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_corrupted_message_ends_the_job_on_every_rank(start, victim: int, point: str, transport: str) -> None:
    """All three processes live, and none may wait for one that has lost trust in another."""
    job = start(
        3,
        """
        hvd.init()
        try:
            for i in range(200):
                hvd.allreduce(ones(3), name=f"n{i}")
            say("no error")
        except hvd.HorovodInternalError as error:
            say("error:", str(error).replace("\\n", " "))
        """,
        HOROVOD_TRANSPORT=transport,
        HOROVOD_FAULT=f"corrupt@{point}#9:rank={victim}",
    )
    outputs = job.finish([0, 1, 2])
    for rank, output in outputs.items():
        assert re.search(r"error: .*rank \d is lost", output), f"rank {rank}: {output}"
    assert any("a control message has a wrong checksum" in output for output in outputs.values())


def test_an_exit_without_shutdown_names_the_rank(start) -> None:
    job = start(
        3,
        """
        import torch
        import horovod_cpp.torch as hvd
        hvd.init()
        hvd.barrier()
        if rank == 2:
            raise SystemExit("I leave early")
        try:
            hvd.allreduce(torch.ones(1), name="alone")
        except hvd.HorovodInternalError as error:
            say("error:", str(error).replace("\\n", " "))
        """,
    )
    for rank, output in job.finish().items():
        if rank != 2:
            assert re.search(r"error:.*[Rr]ank 2\b", output), output


def test_settings_that_differ_are_named(start) -> None:
    job = start(
        3,
        """
        try:
            hvd.init()
            say("no error")
        except Exception as error:
            say("error:", str(error).replace("\\n", " "))
        """,
        rank_environment=lambda rank: {"HOROVOD_FUSION_THRESHOLD": "1048576"} if rank == 1 else {},
    )
    for output in job.finish().values():
        assert "HOROVOD_FUSION_THRESHOLD" in output and "1048576" in output, output
        assert re.search(r"rank 1\b", output), output
        assert "no error" not in output


def test_a_rank_that_never_comes_is_named(start) -> None:
    job = start(
        3,
        """
        if rank == 2:
            raise SystemExit(0)
        try:
            hvd.init()
            say("no error")
        except Exception as error:
            say("error:", str(error).replace("\\n", " "))
        """,
        HOROVOD_START_TIMEOUT="2",
    )
    outputs = job.finish()
    assert re.search(r"error:.*rank 2\b.*did not come in time", outputs[0]), outputs[0]
    assert "error:" in outputs[1], outputs[1]
