"""A C++ project of its own, with nothing of the source tree on its paths, uses an installed library."""

from __future__ import annotations

import sys
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


@pytest.fixture
def torch_of_2_0(tmp_path: Path) -> Path:
    folder = tmp_path / "libtorch"
    header = folder / "include" / "torch" / "csrc" / "api" / "include" / "torch" / "version.h"
    for file in (header, folder / "lib" / "libtorch_cpu.so", folder / "lib" / "libc10.so"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR 0\n")
    config = folder / "share" / "cmake" / "Torch" / "TorchConfig.cmake"
    config.parent.mkdir(parents=True)
    config.touch()
    return folder


def test_a_libtorch_that_is_too_old_is_named(prefix: Path, tmp_path: Path, torch_of_2_0: Path) -> None:
    project = copied("cpp_fashion_mnist", tmp_path)
    output = configure(project, f"-DCMAKE_PREFIX_PATH={prefix};{torch_of_2_0}", fails=True)
    assert "LibTorch 2.0" in output and "2.1 or later" in output, output


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
