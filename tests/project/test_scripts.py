"""scripts/setup and scripts/demo, on machines that lack something. What they would install or build is a stub."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("bash", "cat", "cmp", "cp", "dirname", "env", "ln", "sed", "sort")
MPI = "libopenmpi-dev openmpi-bin"


class Machine:
    """A tree with the scripts, and a PATH with little more than the stubs."""

    def __init__(self, folder: Path) -> None:
        self.tree, self.programs = folder / "tree", folder / "programs"
        (self.tree / "scripts").mkdir(parents=True)
        self.programs.mkdir()
        for name in ("setup", "demo", "requirements.txt"):
            shutil.copy(ROOT / "scripts" / name, self.tree / "scripts")
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found is not None
            (self.programs / tool).symlink_to(found)
        (self.tree / ".venv" / "bin").mkdir(parents=True)
        shutil.copy(ROOT / "scripts" / "requirements.txt", self.tree / ".venv" / "requirements-installed.txt")
        self.lacks()
        self.user(1000)
        self.cmake("3.25.1")
        self.stub("apt-get", 'echo "apt-get $*" >&2')

    def stub(self, name: str, text: str, folder: Path | None = None) -> None:
        path = (folder or self.programs) / name
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)

    def lacks(self, *packages: str) -> None:
        self.stub("dpkg-query", f'[[ " {" ".join(packages)} " == *" ${{@: -1}} "* ]] || echo -n installed')

    def user(self, number: int) -> None:
        self.stub("id", f"echo {number}")

    def cmake(self, version: str) -> None:
        self.stub("cmake", f"echo 'cmake version {version}'")

    def run(self, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.tree / "scripts" / script, *arguments],
            env={"PATH": str(self.programs)},
            capture_output=True,
            text=True,
            timeout=30,
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    machine = Machine(tmp_path)
    machine.stub("python", "", machine.tree / ".venv" / "bin")
    return machine


def test_setup_is_silent_where_nothing_is_missing(machine: Machine) -> None:
    done = machine.run("setup")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_setup_goes_on_where_only_mpi_is_missing_and_nobody_is_root(machine: Machine) -> None:
    machine.lacks(*MPI.split())
    done = machine.run("setup")
    assert done.returncode == 0, done.stderr
    assert f"apt-get update && apt-get install -y --no-install-recommends {MPI}\n" in done.stderr
    assert "without MPI" in done.stderr


@pytest.mark.parametrize("missing", ["g++", f"g++ {MPI}"])
def test_setup_fails_where_more_is_missing_and_nobody_is_root(machine: Machine, missing: str) -> None:
    machine.lacks(*missing.split())
    done = machine.run("setup")
    assert done.returncode == 1
    assert f"apt-get update && apt-get install -y --no-install-recommends {missing}\n" in done.stderr
    assert "goes on" not in done.stderr


@pytest.mark.parametrize("way", ["root", "sudo"])
def test_setup_installs_what_is_missing(machine: Machine, way: str) -> None:
    machine.lacks("g++", *MPI.split())
    if way == "root":
        machine.user(0)
    else:
        machine.stub("sudo", '"$@"')
    done = machine.run("setup")
    assert done.returncode == 0, done.stderr
    assert f"apt-get install -y --no-install-recommends g++ {MPI} -qq\n" in done.stderr


@pytest.mark.parametrize(
    ("version", "is_enough"), [("3.22.1", False), ("3.9.4", False), ("3.25.0", True), ("4.0.3", True)]
)
def test_setup_wants_a_cmake_that_the_build_can_use(machine: Machine, version: str, is_enough: bool) -> None:
    machine.cmake(version)
    done = machine.run("setup")
    assert (done.returncode == 0) == is_enough, done.stderr
    assert (f"CMake 3.25 or later is needed, and {machine.programs / 'cmake'} is {version}" in done.stderr) != is_enough


def test_setup_asks_for_the_cmake_that_the_build_asks_for() -> None:
    assert "cmake_minimum_required(VERSION 3.25)" in (ROOT / "CMakeLists.txt").read_text()
    assert 'cmake.version = ">=3.25"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("has_mpirun", [True, False])
@pytest.mark.parametrize(("options", "passed_on"), [([], "--expect 88"), (["--epochs", "1"], "--epochs 1")])
def test_the_demo_ends_as_the_training_does(
    machine: Machine, has_mpirun: bool, options: list[str], passed_on: str
) -> None:
    """Without options the training is told which accuracy to reach."""
    for script in ("setup", "build"):
        machine.stub(script, "", machine.tree / "scripts")
    # In the place of mpirun and of hvdrun: says what it was asked for, and that the training has failed.
    machine.stub("python", 'echo "hvdrun: $*"; exit 7', machine.tree / ".venv" / "bin")
    if has_mpirun:
        machine.stub("mpirun", 'echo "mpirun: $*"; exit 7')
    done = machine.run("demo", *options)
    assert done.returncode == 7, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("mpirun: " if has_mpirun else "hvdrun: -m horovod_cpp.run "), done.stdout
    assert last.endswith(f" -np 2 .venv/bin/python examples/pytorch_fashion_mnist.py {passed_on}"), done.stdout
