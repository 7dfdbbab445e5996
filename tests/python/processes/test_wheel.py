"""A wheel and a prefix are made from a copy of the tree, which is gone before anything uses them.

Part of scripts/test --long: the library is compiled anew, unless ccache has seen it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest
from cpp_projects import ROOT, Command, build, check_fashion_mnist, check_mean, configure, copied, run

pytestmark = pytest.mark.long


@dataclass
class Installed:
    source: Path  # where it was built, and nothing is any more
    python: Path  # of an environment that has the wheel
    prefix: Path

    def found_by(self, way: str) -> str:
        if way == "prefix":
            return f"-DCMAKE_PREFIX_PATH={self.prefix}"
        return f"-DHorovodCpp_DIR={run(self.python, '-m', 'horovod_cpp', '--cmake-dir', alone=True).strip()}"

    def folder_of(self, way: str) -> Path:
        return self.prefix if way == "prefix" else self.python.parents[1]


def copy_of_the_tree(folder: Path) -> Path:
    listed = run("git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def build_variables(source: Path) -> dict[str, str]:
    variables = {"CMAKE_BUILD_PARALLEL_LEVEL": "2"}
    if shutil.which("ccache"):
        variables |= {"CCACHE_BASEDIR": str(source), "CCACHE_NOHASHDIR": "1"}
        variables |= {f"CMAKE_{language}_COMPILER_LAUNCHER": "ccache" for language in ("C", "CXX", "CUDA")}
    return variables


def build_wheel(source: Path, folder: Path) -> Path:
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    run(*pip, source, alone=True, limit_s=1500, **build_variables(source))
    (wheel,) = folder.glob("horovod_cpp-*.whl")
    return wheel


def environment_with(wheel: Path, folder: Path) -> Path:
    """An environment of its own, which borrows torch and the rest from the one that runs this."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    ours = Path(pytest.__file__).resolve().parents[1]
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "borrowed.pth").write_text(f"{ours}\n")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, alone=True)
    return python


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("installed")
    source = copy_of_the_tree(folder / "source")
    wheel = build_wheel(source, folder / "wheel")
    (build_folder,) = (source / "build").iterdir()
    run("cmake", "--install", build_folder, "--prefix", folder / "prefix")
    shutil.rmtree(source)
    return Installed(source, environment_with(wheel, folder / "environment"), folder / "prefix")


def launchers(installed: Installed) -> list[Command]:
    commands: list[Command] = [(installed.python.with_name("hvdrun"), "-np", "2")]
    if shutil.which("mpirun"):
        commands.append(("mpirun", "--timeout", "200", "--oversubscribe", "--bind-to", "none", "-np", "2"))
    return commands


def check_paths(project: Path, program: Path, installed: Installed, way: str) -> None:
    """The program has what it was compiled and linked with from what is installed, and from torch."""
    links = list(project.glob("build/CMakeFiles/*.dir/link.txt"))
    assert links
    for file in (project / "build" / "compile_commands.json", *links):
        for line in file.read_text().splitlines():
            assert str(installed.source) not in line
            assert str(ROOT) not in line.replace(f"{ROOT}/.venv", ""), line
    (library,) = [line for line in run("ldd", program, alone=True).splitlines() if "libhorovod_cpp.so" in line]
    assert str(installed.folder_of(way)) in library, library


def test_what_is_packaged_has_fmt_inside(installed: Installed) -> None:
    """A build in the tree may use the shared library, which few machines have."""
    for way in ("prefix", "wheel"):
        folder = installed.folder_of(way)
        libraries = [*folder.rglob("libhorovod_cpp.so"), *folder.rglob("libhvd_*.so"), *folder.rglob("_core*.so")]
        assert libraries
        for library in libraries:
            assert "libfmt" not in run("readelf", "-d", library)


def test_nothing_that_is_installed_names_where_it_was_built(installed: Installed) -> None:
    packages = [path for path in installed.python.parents[1].rglob("horovod_cpp*") if path.is_dir()]
    files = [file for folder in (installed.prefix, *packages) for file in folder.rglob("*") if file.is_file()]
    libraries = [file for file in files if file.suffix == ".so"]
    assert len([file for file in libraries if file.name == "libhorovod_cpp.so"]) == 2
    for file in libraries:
        dynamic = run("readelf", "-d", file)
        assert str(installed.source) not in dynamic and str(ROOT) not in dynamic, dynamic
    for file in set(files) - set(libraries):
        content = file.read_bytes()
        assert bytes(installed.source) not in content and bytes(ROOT) not in content, file


def test_the_python_package_runs_without_the_tree(installed: Installed) -> None:
    place = run(installed.python, "-c", "import horovod_cpp.torch as hvd; print(hvd.__file__)", alone=True).strip()
    assert Path(place).is_relative_to(installed.python.parents[1])
    program = (
        "import torch, horovod_cpp.torch as hvd; hvd.init(); mine = torch.tensor(hvd.rank() + 1); "
        "print(f'sum {hvd.allreduce(mine, op=hvd.Sum)}')"  # in one piece: mpirun mixes what ranks write
    )
    for launcher in launchers(installed):
        output = run(*launcher, installed.python, "-c", program, alone=True)
        assert output.count("sum 3") == 2, output


def test_pip_install_in_an_empty_environment(tmp_path: Path) -> None:
    """As a user would: pip fetches what the build and the package need, and nothing else is there."""
    source, environment = copy_of_the_tree(tmp_path / "source"), tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    fetched = subprocess.run([python, "-m", "pip", "download", "--no-deps", "--dest", tmp_path, "cloudpickle"])
    if fetched.returncode != 0:
        pytest.skip("pip reaches no package index")
    run(python, "-m", "pip", "install", f"{source}[arrays]", alone=True, limit_s=1500, **build_variables(source))
    shutil.rmtree(source)
    program = (
        "import numpy, horovod_cpp.arrays as hvd; hvd.init(); mine = numpy.array([hvd.rank() + 1]); "
        "print(f'sum {hvd.allreduce(mine, op=hvd.Sum)}')"
    )
    output = run(python.with_name("hvdrun"), "-np", "2", python, "-c", program, alone=True)
    assert output.count("sum [3]") == 2, output


@pytest.mark.parametrize("way", ["wheel", "prefix"])
def test_a_program_without_torch(installed: Installed, tmp_path: Path, way: str) -> None:
    project = copied("cpp_consumer", tmp_path)
    configure(project, installed.found_by(way), "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", alone=True)
    program = build(project) / "mean"
    check_paths(project, program, installed, way)
    for launcher in launchers(installed):
        check_mean(program, launcher, alone=True)


def training_program(example: str, name: str, installed: Installed, way: str, folder: Path) -> Path:
    project = copied(example, folder)
    options = (installed.found_by(way), f"-DPython_EXECUTABLE={installed.python}", "-DCMAKE_CXX_FLAGS=-O1")
    configure(project, *options, "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", alone=True)
    program = build(project) / name
    check_paths(project, program, installed, way)
    return program


def test_a_training_program_from_the_wheel(installed: Installed, tmp_path: Path) -> None:
    program = training_program("cpp_fashion_mnist", "distributed", installed, "wheel", tmp_path)
    for launcher in launchers(installed):
        check_fashion_mnist(program, launcher, alone=True)


def test_a_training_program_from_the_prefix(installed: Installed, tmp_path: Path) -> None:
    program = training_program("cpp_char_language_model", "char_language_model", installed, "prefix", tmp_path)
    for launcher in launchers(installed):
        output = run(*launcher, program, "--hidden", "64", "--steps", "40", alone=True)
        bits = re.findall(r"result: \d\.\d+ bits per character before, (\d\.\d+) after 40 steps", output)
        assert len(bits) == 1 and float(bits[0]) < 4.3, output
