"""What is special about jobs that mpirun has started."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from launchers import ROOT, mpirun

pytestmark = pytest.mark.skipif(shutil.which("mpirun") is None, reason="there is no mpirun")


def test_an_mpi_of_the_program_is_respected(tmp_path: Path) -> None:
    output = mpirun(
        tmp_path,
        2,
        """
        from mpi4py import MPI
        import numpy as np
        import horovod_cpp.arrays as hvd
        for _ in range(2):
            hvd.init()
            assert hvd.rank() == MPI.COMM_WORLD.Get_rank() and hvd.size() == 2
            assert hvd.allreduce(np.ones(100_000), op=hvd.Sum)[0] == 2
            assert MPI.COMM_WORLD.allreduce(1) == 2
            hvd.shutdown()
        assert not MPI.Is_finalized() and MPI.COMM_WORLD.allreduce(1) == 2
        print("fine", flush=True)
        """,
        HOROVOD_TRANSPORT="mpi",
    )
    assert output.count("fine") == 2 and "exit code 0" in output, output


@pytest.mark.parametrize("transport", ["auto", "mpi"])
def test_results_that_are_kept_until_the_end_do_not_keep_mpi_from_ending(tmp_path: Path, transport: str) -> None:
    """Memory of the library keeps the job's objects, which mpirun must not take for a rank that failed."""
    output = mpirun(
        tmp_path,
        2,
        """
        import torch
        import horovod_cpp.torch as hvd
        kept = []
        for _ in range(2):
            hvd.init()
            kept.append(hvd.allgather(torch.ones(100_000)))
            hvd.shutdown()
        hvd.init()
        embedding = torch.nn.Embedding(3, 4)
        embedding.weight.grad = hvd.allgather(torch.ones(3, 4))[:3]
        torch.kept = kept  # what is never destroyed
        print("fine", flush=True)
        """,
        HOROVOD_TRANSPORT=transport,
    )
    assert output.count("fine") == 2 and "exit code 0" in output and "improperly" not in output, output


def test_ranks_bound_to_one_core_each(tmp_path: Path) -> None:
    """mpirun's default for two ranks: the threads of a rank share a core."""
    output = mpirun(
        tmp_path,
        2,
        """
        import numpy as np
        import horovod_cpp.arrays as hvd
        hvd.init()
        for i in range(200):
            assert hvd.allreduce(np.ones(1 + 1000 * i), op=hvd.Sum, name="x" + str(i % 7))[0] == 2
        print("fine", flush=True)
        """,
        "--bind-to",
        "core",
    )
    assert output.count("fine") == 2 and "exit code 0" in output, output


@pytest.fixture
def package_without_mpi(tmp_path: Path) -> Path:
    """The package as it is built where there is no MPI."""
    shutil.copytree(
        ROOT / "horovod_cpp",
        tmp_path / "package" / "horovod_cpp",
        ignore=shutil.ignore_patterns("libhvd_mpi.so", "engine", "bindings", "include", "__pycache__"),
    )
    return tmp_path / "package"


def test_without_the_mpi_module_one_rank_runs(tmp_path: Path, package_without_mpi: Path) -> None:
    program = """
        import numpy as np
        import horovod_cpp.arrays as hvd
        hvd.init()
        assert hvd.size() == 1 and hvd.allreduce(np.ones(3)).tolist() == [1, 1, 1]
        print("fine", flush=True)
        """
    output = mpirun(tmp_path, 1, program, package=package_without_mpi)
    assert output.count("fine") == 1 and "exit code 0" in output, output


def test_without_the_mpi_module_two_ranks_say_what_is_missing(tmp_path: Path, package_without_mpi: Path) -> None:
    program = """
        import horovod_cpp.arrays as hvd
        try:
            hvd.init()
        except Exception as error:
            print(f"error: {error}", flush=True)
        """
    output = mpirun(tmp_path, 2, program, package=package_without_mpi)
    assert output.count("error:") == 2, output
    assert "libhvd_mpi.so" in output and "hvdrun" in output, output


def test_a_killed_rank_ends_the_job(tmp_path: Path) -> None:
    output = mpirun(
        tmp_path,
        3,
        """
        import os, signal
        import numpy as np
        import horovod_cpp.arrays as hvd
        hvd.init()
        hvd.barrier()
        if hvd.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        hvd.allreduce(np.ones(1))
        print("not reached", flush=True)
        """,
    )
    assert "exit code 0" not in output and "not reached" not in output, output


def test_a_join_is_no_stall(tmp_path: Path) -> None:
    output = mpirun(
        tmp_path,
        2,
        """
        import time, torch
        import horovod_cpp.torch as hvd
        hvd.init()
        for turn in range(25 if hvd.rank() == 1 else 0):
            time.sleep(0.1)
            assert hvd.allreduce(torch.ones(1), op=hvd.Sum, name="more").item() == 1.0
        assert hvd.join() == 1
        print("fine", flush=True)
        """,
        HOROVOD_STALL_CHECK_TIME_SECONDS="1",
        HOROVOD_STALL_SHUTDOWN_TIME_SECONDS="1",
    )
    assert output.count("fine") == 2 and "exit code 0" in output, output
    assert "Missing" not in output, output
