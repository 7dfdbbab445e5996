"""`python -m horovod_cpp.compat` shows a program the same surroundings as Python itself."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

COMPAT = ("-m", "horovod_cpp.compat")

# What a program may look at, as a list of texts.
PROBE = """
import __main__, atexit, builtins, sys
if __name__ == "__main__":
    print(sys.argv, __name__, __file__, sys.path, __package__, __cached__)
    print(__spec__ and __spec__.name, type(__loader__).__name__)
    print(vars(__main__) is globals(), sys.modules["__main__"] is __main__, __doc__)
    # Not compared after a module: there `__builtins__` is a dict, and at exit `__main__` is ours again.
    atexit.register(lambda: print(vars(sys.modules["__main__"]) is globals(), __builtins__ is builtins))
"""


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=60)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "probe.py").write_text(PROBE)
    (tmp_path / "link.py").symlink_to("inner/probe.py")
    (tmp_path / "program").mkdir()
    (tmp_path / "program" / "__main__.py").write_text("import sys\nprint(sys.argv[1:], __name__, sys.path)\n")
    return tmp_path


@pytest.mark.parametrize("flags", [(), ("-P",)] if sys.version_info >= (3, 11) else [()])
@pytest.mark.parametrize(
    "program",
    [("inner/probe.py",), ("./inner/../inner/probe.py", "-m", "x"), ("link.py", "--flag=1"), ("program", "a")],
)
def test_a_script_sees_what_python_shows(folder: Path, program: tuple[str, ...], flags: tuple[str, ...]) -> None:
    expected = python(folder, *flags, *program)
    assert expected.returncode == 0 and "__main__" in expected.stdout, expected.stderr
    got = python(folder, *flags, *COMPAT, *program)
    assert (got.stdout, got.stderr) == (expected.stdout, "")


@pytest.mark.parametrize("program", [("inner.probe", "a", "-m", "b"), ("program", "c")])
def test_a_module_sees_what_python_shows(folder: Path, program: tuple[str, ...]) -> None:
    expected = python(folder, "-m", *program)
    assert expected.returncode == 0 and "__main__" in expected.stdout, expected.stderr
    got = python(folder, *COMPAT, "-m", *program)
    assert got.stdout.splitlines()[:3] == expected.stdout.splitlines()[:3]
    assert got.stderr == ""


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("raise SystemExit(7)", 7, ""),
        ("raise KeyError('lost')", 1, "KeyError: 'lost'"),
        ("def broken(:", 1, "SyntaxError"),
        ("import horovod.tensorflow", 1, "ImportError: horovod.tensorflow is not part of horovod_cpp"),
    ],
)
def test_how_a_program_ends(tmp_path: Path, code: str, status: int, said: str) -> None:
    (tmp_path / "ends.py").write_text(code)
    result = python(tmp_path, *COMPAT, "ends.py")
    assert result.returncode == status
    assert said in result.stderr and bool(said) == bool(result.stderr)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    expected = python(tmp_path, "nowhere.py")
    got = python(tmp_path, *COMPAT, "nowhere.py")
    assert (got.returncode, got.stderr) == (expected.returncode, expected.stderr)
    assert python(tmp_path, *COMPAT, "-m", "nowhere").returncode == 1


@pytest.mark.parametrize("arguments", [(), ("-m",), ("--unknown", "x.py"), ("-c", "pass")])
def test_a_wrong_command_line(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    result = python(tmp_path, *COMPAT, *arguments)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("usage: python -m horovod_cpp.compat ")


def test_help(tmp_path: Path) -> None:
    result = python(tmp_path, *COMPAT, "--help")
    assert result.returncode == 0 and result.stdout.startswith("usage: ") and result.stderr == ""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_processes_that_import_the_program_again_know_the_names_too(tmp_path: Path, method: str) -> None:
    (tmp_path / "pool.py").write_text(
        textwrap.dedent("""
        import multiprocessing, sys
        import horovod
        from horovod.common.util import split_list

        def halves(n):
            return split_list(range(n), 2), "horovod_cpp" in horovod.__version__

        def of_child(n):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                return pool.map(halves, [n])

        if __name__ == "__main__":
            context = multiprocessing.get_context(sys.argv[1])
            with context.Pool(1) as pool:
                print(pool.map(halves, [3, 4]))
            with __import__("concurrent.futures").futures.ProcessPoolExecutor(1, context) as pool:
                print(pool.submit(of_child, 2).result())
        """)
    )
    result = python(tmp_path, *COMPAT, "pool.py", method)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "[([[0, 1], [2]], True), ([[0, 1], [2, 3]], True)]\n[([[0], [1]], True)]\n"
