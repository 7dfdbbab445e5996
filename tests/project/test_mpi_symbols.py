"""The MPI module never blocks between its start and its end."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

MODULE = Path(__file__).resolve().parents[2] / "horovod_cpp" / "libhvd_mpi.so"

# Blocking, but only while the job starts or ends.
START_AND_END = {"MPI_Init_thread", "MPI_Finalize"}
# Return at once, whatever the other ranks do.
LOCAL = {
    "MPI_Comm_get_attr",
    "MPI_Comm_rank",
    "MPI_Comm_set_errhandler",
    "MPI_Comm_size",
    "MPI_Error_string",
    "MPI_Finalized",
    "MPI_Get_count",
    "MPI_Get_library_version",
    "MPI_Initialized",
    "MPI_Query_thread",
    "MPI_Cancel",
    "MPI_Test",
    "MPI_Test_cancelled",
    "MPI_Testsome",
}
# By name: MPI_Init begins like these.
NON_BLOCKING = {"MPI_Comm_idup", "MPI_Ibarrier", "MPI_Ibcast", "MPI_Irecv", "MPI_Isend", "MPI_Issend"}


def test_the_module_calls_nothing_that_blocks() -> None:
    if not MODULE.exists():
        pytest.skip("built without MPI")
    listing = subprocess.run(["nm", "-D", "--undefined-only", str(MODULE)], capture_output=True, text=True, check=True)
    called = set(re.findall(r"\bMPI_\w+", listing.stdout))
    assert {"MPI_Isend", "MPI_Irecv"} <= called
    assert not called - START_AND_END - LOCAL - NON_BLOCKING


def test_only_the_module_needs_mpi() -> None:
    for library in MODULE.parent.glob("*.so"):
        if library == MODULE:
            continue
        listing = subprocess.run(["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True)
        assert " MPI_" not in listing.stdout, library
