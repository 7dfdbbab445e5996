"""`init(comm=[ranks])`: several jobs of one launch, each of its own ranks."""

from __future__ import annotations

import re
import shutil
import signal
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from launchers import hvdrun, mpirun

# With numpy, as torch is ten times as long to import.
PREAMBLE = """
import os, sys, time
from pathlib import Path
import numpy as np
import horovod_cpp.arrays as hvd
launched = next(int(os.environ[name]) for name in ("OMPI_COMM_WORLD_RANK", "HOROVOD_RANK") if name in os.environ)

def say(*what):
    os.write(1, (" ".join(map(str, what)) + "\\n").encode())  # in one piece
"""

Launch = Callable[..., str]


@pytest.fixture(params=["mpirun", "hvdrun"])
def launch(request: pytest.FixtureRequest, tmp_path: Path) -> Launch:
    """Runs a program on that many ranks; what they said, and the exit code."""
    launcher = {"mpirun": mpirun, "hvdrun": hvdrun}[request.param]
    if request.param == "mpirun" and shutil.which("mpirun") is None:
        pytest.skip("there is no mpirun")

    def starter(ranks: int, text: str, **environment: str) -> str:
        return launcher(tmp_path, ranks, PREAMBLE + textwrap.dedent(text), **environment)

    return starter


def assert_all_well(output: str, ranks: int) -> None:
    assert output.count("fine") == ranks and "exit code 0" in output, output


LISTS = {
    "another order": [[1, 0]],
    "rank 0 alone": [[1, 2], [0]],
    "two pairs": [[0, 2], [3, 1]],
    "three and one": [[3, 1, 2], [0]],
}


@pytest.mark.parametrize("what", LISTS)
def test_each_list_is_a_job_of_its_own(launch: Launch, what: str) -> None:
    lists = LISTS[what]
    size = sum(map(len, lists))
    output = launch(
        size,
        f"""
        lists = {lists}
        own = next(ranks for ranks in lists if launched in ranks)
        # Another number of jobs in each list, and then one job of all: nothing of one is left in the way of the next.
        for turn in range(1 + 2 * lists.index(own)):
            hvd.init(comm=own)
            hvd.init(comm=[])  # does nothing
            place = own.index(launched)
            assert (hvd.rank(), hvd.size()) == (place, len(own))
            assert (hvd.local_rank(), hvd.local_size()) == (place, len(own))
            assert hvd.allgather(np.array([launched])).tolist() == own
            summed = hvd.allreduce(np.full(100_000, float(launched)), op=hvd.Sum, name="same name everywhere")
            assert (summed == sum(own)).all()
            assert hvd.broadcast(np.array(launched), len(own) - 1).item() == own[-1]
            hvd.shutdown()
            # Process sets have the numbers of the job.
            last = hvd.ProcessSet([len(own) - 1])
            hvd.init(comm=own, process_sets=[last] if len(own) > 1 else [])
            if len(own) > 1:
                assert last.included() == (launched == own[-1])
            hvd.barrier()
            hvd.shutdown()
        hvd.init()
        assert (hvd.rank(), hvd.size()) == (launched, {size})
        assert hvd.allgather(np.array([launched])).tolist() == list(range({size}))
        say("fine")
        """,
    )
    assert_all_well(output, size)


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_outside_its_list_is_told_and_is_in_nobodys_way(launch: Launch, size: int, tmp_path: Path) -> None:
    """It goes on with something else, without a word to the library, for as long as the job lives."""
    output = launch(
        size,
        f"""
        own, done = list(range({size - 1})), Path({str(tmp_path / "done")!r})
        if launched == {size - 1}:
            try:
                hvd.init(comm=own)
            except ValueError as error:
                say("error:", error)
            assert not hvd.is_initialized()
            while not done.exists():
                time.sleep(0.01)
        else:
            hvd.init(comm=own)
            assert hvd.allgather(np.array([launched])).tolist() == own
            hvd.barrier()
            done.touch()
        say("fine")
        """,
    )
    assert_all_well(output, size)
    ranks = ", ".join(map(str, range(size - 1)))
    assert f"error: init(comm=[{ranks}]): rank {size - 1}, which called it, is not in it" in output, output


def test_junk_is_an_error_with_its_values_and_init_can_be_called_again(launch: Launch) -> None:
    output = launch(
        2,
        """
        for comm in ([0, 1, 0], [0, 2], [-1, 0], [0.0, 1.0], [True, False], "01", 1, [2**31]):
            try:
                hvd.init(comm=comm)
            except ValueError as error:
                assert f"init(comm={comm!r})" in str(error), error
            else:
                raise SystemExit(f"{comm} was taken")
        hvd.init()
        assert hvd.allreduce(np.ones(1), op=hvd.Sum).item() == 2
        say("fine")
        """,
    )
    assert_all_well(output, 2)


def test_lists_that_differ_are_an_error_with_the_list_on_every_rank(launch: Launch, tmp_path: Path) -> None:
    output = launch(
        3,
        f"""
        try:
            hvd.init(comm=[0, 2] if launched == 2 else [0, 1, 2])
            say("no error")
        except ValueError as error:
            say(f"error of {{launched}}:", error)
        # mpirun ends all ranks when the first one ends without MPI's consent.
        Path({str(tmp_path)!r}, f"told.{{launched}}").touch()
        while len(list(Path({str(tmp_path)!r}).glob("told.*"))) < 3:
            time.sleep(0.01)
        """,
        HOROVOD_START_TIMEOUT="2",
    )
    for rank, ranks in enumerate(("0, 1, 2", "0, 1, 2", "0, 2")):
        assert re.search(rf"error of {rank}: .*comm=\[{ranks}\]: each of these ranks", output), output
    assert "no error" not in output, output


def test_an_elastic_job_of_some_ranks_is_formed_again_without_the_others(launch: Launch) -> None:
    output = launch(
        3,
        """
        import torch
        import horovod_cpp.torch as hvd
        own = [0] if launched == 0 else [2, 1]
        hvd.init(comm=own)
        attempts = []

        @hvd.elastic.run
        def train(state):
            attempts.append(hvd.allgather(torch.tensor([launched])).tolist())
            if len(attempts) < 3 and launched != 0:
                state.commit()
                raise hvd.HorovodInternalError("injected")
            return hvd.allreduce(torch.ones(1), op=hvd.Sum).item()

        assert train(hvd.elastic.TorchState(step=0)) == len(own)
        assert attempts == [own] * (1 if launched == 0 else 3), attempts
        say("fine")
        """,
    )
    assert_all_well(output, 3)


def test_a_rank_that_dies_is_lost_to_its_own_job_only(start, tmp_path: Path) -> None:
    ended = tmp_path / "ended"
    job = start(
        4,
        f"""
        from pathlib import Path
        hvd.init(comm=[0, 1] if rank < 2 else [3, 2])
        hvd.barrier()
        say("ready")
        if rank == 1:
            time.sleep(600)
        if rank == 0:
            try:
                hvd.allreduce(ones(1), name="waits for the dead")
                say("no error")
            except hvd.HorovodInternalError as error:
                say("error:", str(error).replace("\\n", " "))
        else:
            while not Path({str(ended)!r}).exists():
                time.sleep(0.01)
            assert hvd.allreduce(ones(1000), op=hvd.Sum)[7] == 2
            say("goes on")
        """,
    )
    job.wait_for_all("ready")
    job.send(1, signal.SIGKILL)
    output = job.finish([0])[0]
    assert re.search(r"error:.*rank 1\b", output), output
    ended.touch()
    for output in job.finish([2, 3]).values():
        assert "goes on" in output, output
