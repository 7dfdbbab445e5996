"""What is left of a timeline when its process is killed, or its disk is full."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_leaves_a_file_that_can_be_loaded(start, victim: int, tmp_path: Path) -> None:
    """The victim stays away from what the other one waits for: what is handed over after a loss is in no timeline."""
    job = start(
        2,
        """
        hvd.init()
        tensors = [ones(n) for n in (1, 1000, 100_000)]
        try:
            for n in range(100):
                handles = [hvd.allreduce_async_(t, op=hvd.Max, name=f"t{i}") for i, t in enumerate(tensors)]
                for handle in handles:
                    hvd.synchronize(handle)
            say("ready")
            if rank == int(os.environ["VICTIM"]):
                time.sleep(600)
            hvd.allreduce(tensors[0], name="t0")
        except hvd.HorovodInternalError as error:
            say("error:", str(error).replace("\\n", " "))
        """,
        HOROVOD_TIMELINE=str(tmp_path / "of-{rank}"),
        HOROVOD_TIMELINE_MARK_CYCLES="1",
        VICTIM=str(victim),
    )
    job.wait_for_all("ready")
    time.sleep(0.3)
    job.send(victim, signal.SIGKILL)
    survivor = 1 - victim
    assert f"rank {victim}" in job.finish([survivor])[survivor]
    job.end()
    for rank in (0, 1):
        events = json.loads((tmp_path / f"of-{rank}").read_text())
        lanes = {event["args"]["name"] for event in events if event.get("name") == "process_name"}
        assert {"allreduce.t0", "allreduce.t1", "allreduce.t2"} <= lanes
        errors = [event["args"]["error"] for event in events if "error" in event.get("args", {})]
        assert bool(errors) == (rank == survivor)
        assert all(f"rank {victim}" in error for error in errors)


def test_a_full_disk_ends_the_timeline_and_nothing_else(start, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk."""
    path = tmp_path / "timeline.json"
    job = start(
        1,
        """
        import resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # as in a program that is not Python
        hvd.init()
        hvd.allreduce(ones(1), name="first")
        time.sleep(0.3)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        end = time.monotonic() + 2
        while time.monotonic() < end:
            hvd.allreduce(ones(1), name="again")
        say("well")
        hvd.stop_timeline()
        hvd.shutdown()
        """,
        HOROVOD_TIMELINE=str(path),
    )
    output = job.finish()[0]
    assert "well" in output
    assert output.count("File too large; it ends here") == 1, output
    assert json.loads(path.read_text())
    assert path.stat().st_size <= 20_000
