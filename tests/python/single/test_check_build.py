"""What the package says that it has and finds: --check-build, the `_built` functions, and the C ABI below them.

A GPU, its driver and NCCL may be here or not, and the CUDA module built or not.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import horovod_cpp
import horovod_cpp.torch as hvd
from horovod_cpp import _core

HVDRUN = ("-m", "horovod_cpp.run")
PACKAGE = ("-m", "horovod_cpp")
LIBRARY = str(Path(_core.__file__).parent / "libhorovod_cpp.so")


def run(*arguments: str, **environment: object) -> str:
    """The output of a Python of its own, which must end well and say nothing to stderr."""
    result = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {name: str(value) for name, value in environment.items()},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def run_code(code: str, **environment: object) -> list[str]:
    return run("-c", textwrap.dedent(code), **environment).splitlines()


def ask_library(calls: str, **environment: object) -> list[str]:
    """What the C ABI says, without a Python module or torch in between, and without hvd_init."""
    return run_code(
        f"""
        import ctypes

        library = ctypes.CDLL({LIBRARY!r})
        library.hvd_last_error.restype = ctypes.c_char_p

        def ask(name, place):
            code = getattr(library, name)(ctypes.byref(place))
            return code, (library.hvd_last_error() if code else place.value)

        number, text = ctypes.c_int32(-1), ctypes.c_char_p(b"nothing")
        for each in [{calls}]:
            print(each)
        """,
        **environment,
    )


@pytest.fixture
def module_folder(tmp_path: Path) -> Path:
    """A folder with a CUDA module, which cannot be opened."""
    (tmp_path / "libhvd_cuda.so").write_text("no library")
    return tmp_path


@pytest.fixture
def nccl_2_28(tmp_path: Path) -> Path:
    """A library with the calls of NCCL; it can tell its version and do nothing else. One optional call is missing."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    names = "GetUniqueId CommInitRankConfig CommGetAsyncError CommFinalize CommDestroy CommAbort GetLastError "
    names += "GetErrorString GroupStart GroupEnd AllReduce AllGather ReduceScatter Broadcast Reduce Send Recv MemAlloc"
    functions = [f"int nccl{name}(void) {{ return 3; }}" for name in names.split()]
    source, library = tmp_path / "nccl.c", tmp_path / "libnccl.so.2"
    source.write_text("\n".join([*functions, "int ncclGetVersion(int* version) { *version = 22809; return 0; }"]))
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True, timeout=60)
    return library


# ---- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [PACKAGE, HVDRUN], ids=["package", "hvdrun"])
@pytest.mark.parametrize("option", ["--check-build", "-cb"])
def test_check_build(command: tuple[str, ...], option: str) -> None:
    lines = run(*command, option).splitlines()
    assert lines[0] == f"horovod_cpp v{horovod_cpp.__version__}:"
    assert [line for line in lines[1:] if line.endswith(":")] == [
        "Available Frameworks:",
        "Available Controllers:",
        "Available Tensor Operations:",
    ]
    rows = [line for line in lines if line.startswith("    [")]
    assert [row[8:].partition(":")[0] for row in rows] == [
        *("PyTorch", "MPI", "hvdrun, torchrun", "shm", "tcp", "MPI", "CUDA", "NCCL"),
    ]
    assert rows[0] == f"    [X] PyTorch: {torch.__version__}"
    assert rows[2:5] == ["    [X] hvdrun, torchrun", "    [X] shm", "    [X] tcp"]
    assert rows[5] == rows[1].partition(":")[0]
    reasons = {"MPI": "MPI", "CUDA": "CUDA", "NCCL": "NCCL"}
    for row in rows:
        name, _, text = row[8:].partition(": ")
        if row.startswith("    [ ]") and row != rows[5]:
            assert reasons[name] in text
        else:
            assert row.startswith("    [X]") or row == rows[5]


def test_check_build_says_why_not(module_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('this torch\\nis broken')\n")
    rows = run(
        *PACKAGE,
        "--check-build",
        PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]),
        HOROVOD_MODULE_PATH=module_folder,
        HOROVOD_NCCL_LIBRARY="/nowhere/libnccl.so.2",
        HOROVOD_MPI_LIBRARY="/nowhere/libmpi.so.40",
    ).splitlines()
    assert "    [ ] PyTorch: this torch is broken" in rows
    cuda = next(row for row in rows if row[8:].startswith("CUDA"))
    assert cuda.startswith("    [ ] CUDA: the CUDA module cannot be opened: ")
    assert str(module_folder / "libhvd_cuda.so") in cuda
    nccl = next(row for row in rows if row[8:].startswith("NCCL"))
    assert nccl.startswith("    [ ] NCCL: NCCL is not there: ") and "/nowhere/libnccl.so.2" in nccl
    mpi = next(row for row in rows if row[8:].startswith("MPI: "))
    assert mpi.startswith("    [ ] MPI: ") and ("/nowhere/libmpi.so.40" in mpi or not hvd.mpi_built())
    assert "    [ ] MPI" in rows


def test_the_package_alone_says_how_to_use_it() -> None:
    assert "--check-build" in run(*PACKAGE)
    assert run(*PACKAGE, "--version") == f"{horovod_cpp.__version__}\n"


# ---- the functions ---------------------------------------------------------------------------------------------------


def test_built_functions_are_of_horovods_types() -> None:
    assert isinstance(hvd.cuda_built(), bool)
    assert hvd.cuda_built() == any(
        (Path(folder) / "libhvd_cuda.so").exists()
        for folder in (Path(LIBRARY).parent, os.environ.get("HOROVOD_MODULE_PATH", "/nowhere"))
    )
    assert type(hvd.nccl_built()) is int
    assert hvd.nccl_built() == 0 or hvd.nccl_built() >= 21801


def test_nccl_is_found_at_run_time(module_folder: Path, nccl_2_28: Path) -> None:
    """Without torch, which may bring an NCCL of its own."""
    code = "from horovod_cpp.common import basics; print(basics.cuda_built(), basics.nccl_built())"
    assert run_code(code, HOROVOD_MODULE_PATH=module_folder, HOROVOD_NCCL_LIBRARY=nccl_2_28) == ["True 22809"]
    assert run_code(code, HOROVOD_MODULE_PATH=module_folder, HOROVOD_NCCL_LIBRARY="/nowhere") == ["True 0"]


def test_in_a_forked_child_nothing_is_opened() -> None:
    code = """
        import os
        import horovod_cpp.torch as hvd
        from horovod_cpp import _core
        hvd.init()
        pid = os.fork()
        if pid == 0:
            try:
                _core.nccl_version()
            except _core.ForkError:
                print(hvd.cuda_built(), flush=True)
            os._exit(0)
        os.waitpid(pid, 0)
    """
    assert run_code(code) == [str(hvd.cuda_built())]


# ---- the C ABI -------------------------------------------------------------------------------------------------------


def test_the_library_finds_nccl(nccl_2_28: Path) -> None:
    answers = ask_library("ask('hvd_nccl_version', number), ask('hvd_nccl_text', text)", HOROVOD_NCCL_LIBRARY=nccl_2_28)
    text = f"2.28.9, {nccl_2_28}, with ncclMemAlloc, without ncclCommRegister, with aborts that always end"
    assert answers == ["(0, 22809)", str((0, text.encode()))]


def test_the_library_says_where_it_looked_for_nccl() -> None:
    answers = ask_library(
        "ask('hvd_nccl_version', number), ask('hvd_nccl_text', text), number.value, text.value",
        HOROVOD_NCCL_LIBRARY="/nowhere/libnccl.so.2",
    )
    assert answers[0] == answers[1] and answers[0].startswith(f"({_core.UNAVAILABLE}, ")
    assert "NCCL is not there" in answers[0] and "/nowhere/libnccl.so.2" in answers[0]
    assert answers[2:] == ["-1", "b'nothing'"]  # untouched


def test_the_library_says_why_there_is_no_device(module_folder: Path) -> None:
    answers = ask_library(
        "library.hvd_cuda_built(), ask('hvd_cuda_devices', number), ask('hvd_cuda_text', text)",
        HOROVOD_MODULE_PATH=module_folder,
    )
    assert answers[0] == "1"
    assert answers[1] == answers[2] and answers[1].startswith(f"({_core.UNAVAILABLE}, ")
    assert str(module_folder / "libhvd_cuda.so") in answers[1]


def test_devices_are_counted_or_missed_with_a_reason() -> None:
    built, devices, text = ask_library(
        "library.hvd_cuda_built(), ask('hvd_cuda_devices', number), ask('hvd_cuda_text', text)"
    )
    if devices.startswith("(0, "):
        assert built == "1" and int(devices[4:-1]) > 0 and "CUDA" in text
    elif built == "1":
        assert "driver" in devices or "device" in devices
    else:
        assert "this build of horovod_cpp has no CUDA module: looked for [" in devices


def test_the_library_finds_mpi() -> None:
    built, mpi = ask_library("library.hvd_mpi_built(), ask('hvd_mpi_text', text)")
    assert built == str(int(hvd.mpi_built()))
    assert mpi.startswith("(0, b'") or "MPI" in mpi
