"""A C++ project of its own, with nothing of the source tree on its paths, uses an installed library."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
from cpp_projects import EXAMPLES, ROOT, build, check_fashion_mnist, check_mean, configure, copied, run

BUILD = ROOT / "build" / "release"

pytestmark = pytest.mark.skipif(not (BUILD / "CMakeCache.txt").exists(), reason="there is no build to install")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prefix")
    run("cmake", "--install", BUILD, "--prefix", folder)
    return folder


@pytest.fixture
def consumer(tmp_path: Path) -> Path:
    return copied("cpp_consumer", tmp_path)


def test_from_a_prefix(prefix: Path, consumer: Path) -> None:
    configure(consumer, f"-DCMAKE_PREFIX_PATH={prefix}", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON")
    check_mean(build(consumer) / "mean")
    assert str(ROOT) not in (consumer / "build" / "compile_commands.json").read_text()


def test_from_the_python_package(consumer: Path) -> None:
    folder = run(sys.executable, "-m", "horovod_cpp", "--cmake-dir").strip()
    configure(consumer, f"-DHorovodCpp_DIR={folder}")
    check_mean(build(consumer) / "mean")


def test_with_pkg_config(prefix: Path, tmp_path: Path) -> None:
    file = prefix / "lib" / "pkgconfig" / "horovod_cpp.pc"
    flags = run("pkg-config", "--cflags", "--libs", file).split()
    program = tmp_path / "mean"
    source = EXAMPLES / "cpp_consumer" / "mean.cc"
    run("g++", source, "-o", program, *flags, f"-Wl,-rpath,{prefix / 'lib'}")
    check_mean(program)


def test_a_version_that_is_not_there_is_refused(prefix: Path, consumer: Path) -> None:
    lists = consumer / "CMakeLists.txt"
    lists.write_text(lists.read_text().replace("HorovodCpp 0.1", "HorovodCpp 0.99"))
    output = configure(consumer, f"-DCMAKE_PREFIX_PATH={prefix}", fails=True)
    assert "0.1.0" in output and "0.99" in output


def test_a_component_that_is_not_there_is_named(prefix: Path, consumer: Path) -> None:
    lists = consumer / "CMakeLists.txt"
    lists.write_text(lists.read_text().replace("COMPONENTS core", "COMPONENTS core fortran"))
    output = configure(consumer, f"-DCMAKE_PREFIX_PATH={prefix}", fails=True)
    assert "there is no component fortran" in output


@pytest.fixture(scope="module")
def training_project(prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch")
    project = copied("cpp_fashion_mnist", tmp_path_factory.mktemp("training"))
    options = (f"-DCMAKE_PREFIX_PATH={prefix}", f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_CXX_FLAGS=-O1")
    # The headers of LibTorch take longer to read than all files of the library to compile.
    options += ("-DCMAKE_UNITY_BUILD=ON", "-DCMAKE_UNITY_BUILD_BATCH_SIZE=0")
    configure(project, *options, "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON")
    commands = (project / "build" / "compile_commands.json").read_text()
    assert str(ROOT) not in commands.replace(f"{ROOT}/.venv", "")
    return project


# Two tests, as each takes up to a minute.
def test_the_torch_component_compiles(training_project: Path) -> None:
    build(training_project, "hvd_torch")


def test_a_training_program(training_project: Path) -> None:
    check_fashion_mnist(build(training_project, "distributed") / "distributed")


def test_a_libtorch_that_was_found_before_is_taken(prefix: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    project = copied("cpp_fashion_mnist", tmp_path)
    lists = project / "CMakeLists.txt"
    lists.write_text(
        lists.read_text().replace("find_package(HorovodCpp", "find_package(Torch)\nfind_package(HorovodCpp")
    )
    configure(project, f"-DCMAKE_PREFIX_PATH={prefix};{torch.utils.cmake_prefix_path}")
    assert "libtorch_cpu.so" in (project / "build" / "CMakeFiles" / "distributed.dir" / "link.txt").read_text()


def make_libtorch(folder: Path, minor: int, symbols: str = "std::__cxx11::basic_string", cuda: bool = False) -> Path:
    """What the configuration looks at: a folder that has version 2.`minor`, and libraries with these symbols."""
    header = folder / "include" / "torch" / "csrc" / "api" / "include" / "torch" / "version.h"
    config = folder / "share" / "cmake" / "Torch" / "TorchConfig.cmake"
    libraries = ["libtorch_cpu.so", "libc10.so", *(["libtorch_cuda.so", "libc10_cuda.so"] if cuda else [])]
    for file in (header, config, *(folder / "lib" / name for name in libraries)):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(symbols)
    header.write_text(f"#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR {minor}\n")
    config.write_text('message(FATAL_ERROR "the configuration of torch asks for a CUDA toolkit")\n')
    return folder


def configure_with(libtorch: Path, prefix: Path, tmp_path: Path, fails: bool) -> str:
    project = copied("cpp_fashion_mnist", tmp_path)
    return configure(project, f"-DCMAKE_PREFIX_PATH={prefix};{libtorch}", fails=fails)


def test_a_libtorch_that_is_too_old_is_named(prefix: Path, tmp_path: Path) -> None:
    libtorch = make_libtorch(tmp_path / "libtorch", minor=0)
    output = configure_with(libtorch, prefix, tmp_path, fails=True)
    assert f"LibTorch 2.0 in {libtorch} is too old: gradient hooks need 2.1 or later" in output, output


def test_a_libtorch_with_the_old_strings_is_named(prefix: Path, tmp_path: Path) -> None:
    libtorch = make_libtorch(tmp_path / "libtorch", minor=6, symbols="std::basic_string")
    output = configure_with(libtorch, prefix, tmp_path, fails=True)
    assert f"LibTorch 2.6 in {libtorch} was built with the old std::string" in output, output
    assert "take the package of torch 2.7 or later" in output, output


def test_no_libtorch_is_told_with_the_ways_to_name_one(prefix: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "environment", with_pip=False)
    python = tmp_path / "environment" / "bin" / "python"
    project = copied("cpp_fashion_mnist", tmp_path)
    output = configure(project, f"-DCMAKE_PREFIX_PATH={prefix}", f"-DPython_EXECUTABLE={python}", fails=True)
    assert "there is no LibTorch: name one with -DTorch_DIR=" in output and "-DPython_EXECUTABLE=" in output, output


def test_a_libtorch_with_cuda_needs_no_toolkit(prefix: Path, tmp_path: Path) -> None:
    libtorch = make_libtorch(tmp_path / "libtorch", minor=9, cuda=True)
    configure_with(libtorch, prefix, tmp_path, fails=False)
    build = tmp_path / "cpp_fashion_mnist" / "build"
    assert "CUDA" not in (build / "CMakeCache.txt").read_text(), "a toolkit was looked for"
    link = (build / "CMakeFiles" / "distributed.dir" / "link.txt").read_text()
    kept = link[link.index("--no-as-needed") : link.index("--pop-state")]
    assert str(libtorch / "lib" / "libtorch_cuda.so") in kept, link


@pytest.fixture
def other_libtorch() -> Iterator[Path]:
    """HVD_TEST_LIBTORCH names it, or it is taken from a package index on this disk: gigabytes, removed afterwards."""
    torch = pytest.importorskip("torch")
    if named := os.environ.get("HVD_TEST_LIBTORCH"):
        yield Path(named)
        return
    indexes = re.findall(r"file://[^\s'\"]+", run(sys.executable, "-m", "pip", "config", "list"))
    if not indexes:
        pytest.skip("no other LibTorch: HVD_TEST_LIBTORCH names none, and pip knows of no package index on this disk")
    with tempfile.TemporaryDirectory() as folder:
        # What the program needs when it runs: torch itself and, of a CUDA build, NVIDIA's libraries.
        install_from_disk(indexes, folder, "--no-deps", f"torch!={torch.__version__.split('+')[0]}")
        (other,) = importlib.metadata.distributions(name="torch", path=[folder])
        required = [text.split(";")[0] for text in other.requires or []]
        nvidia = [text for text in required if text.startswith(("nvidia-", "cuda-toolkit"))]
        if nvidia:
            install_from_disk(indexes, folder, *nvidia)
        yield Path(folder) / "torch"


def install_from_disk(indexes: list[str], folder: str, *packages: str) -> None:
    """Skips the test where they are not there."""
    options = ["--quiet", "--no-compile", "--no-cache-dir", "--target", folder, "--index-url", indexes[0]]
    for index in indexes[1:]:
        options += ["--extra-index-url", index]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, *packages],
        env=os.environ | {"PIP_CONFIG_FILE": os.devnull, "PIP_EXTRA_INDEX_URL": ""},  # nothing from a network
        capture_output=True,
        text=True,
        timeout=600,
    )
    if "No matching distribution" in done.stderr:
        pytest.skip(f"no other LibTorch: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_another_libtorch(prefix: Path, tmp_path: Path, other_libtorch: Path) -> None:
    project = copied("cpp_fashion_mnist", tmp_path)
    configure(project, f"-DCMAKE_PREFIX_PATH={prefix};{other_libtorch}", "-DCMAKE_CXX_FLAGS=-O1")
    assert "CUDA" not in (project / "build" / "CMakeCache.txt").read_text(), "a toolkit was looked for"
    program = build(project, "distributed") / "distributed"
    assert f"=> {other_libtorch}/lib/libtorch_cpu.so" in run("ldd", program)
    check_fashion_mnist(program)


def test_the_headers_are_valid_c_and_stand_alone(prefix: Path, tmp_path: Path) -> None:
    folder = prefix / "include"
    run("gcc", "-std=c99", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-I{folder}", "-x", "c",
        folder / "horovod_cpp" / "c_api.h")  # fmt: skip
    headers = sorted(file.name for file in (folder / "horovod_cpp").glob("*.h") if file.name != "torch.h")
    for header in headers:
        source = tmp_path / f"{header}.cc"
        source.write_text(f"#include <horovod_cpp/{header}>\n#include <horovod_cpp/{header}>\n")
    run("g++", "-std=c++20", "-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion", "-Werror", "-fsyntax-only",
        f"-I{folder}", *tmp_path.glob("*.cc"))  # fmt: skip
