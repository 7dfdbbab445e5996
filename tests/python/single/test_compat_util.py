"""What programs import from `horovod.common` and `horovod.runner`: exceptions, helpers, threads, the environment."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import textwrap
import threading
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import horovod_cpp.torch as ours


def run(code: str, **environment: str) -> str:
    """The output of a Python of its own, which must end well."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


# ---- horovod.common.exceptions ---------------------------------------------------------------------------------------


def test_exceptions() -> None:
    exceptions = importlib.import_module("horovod_cpp.compat.exceptions")
    assert exceptions.HorovodInternalError is ours.HorovodInternalError
    error = exceptions.HorovodVersionMismatchError("pytorch", "2.4.0", "2.3.1")
    assert isinstance(error, ImportError)
    assert (error.name, error.version, error.installed_version) == ("pytorch", "2.4.0", "2.3.1")
    assert str(error) == exceptions.get_version_mismatch_message("pytorch", "2.4.0", "2.3.1")
    assert all(text in str(error) for text in ("pytorch", "2.4.0", "2.3.1"))


def test_hosts_updated_interrupt_is_the_one_of_the_package() -> None:
    exceptions = importlib.import_module("horovod_cpp.compat.exceptions")
    assert (
        exceptions.HostsUpdatedInterrupt is importlib.import_module("horovod_cpp.torch.elastic").HostsUpdatedInterrupt
    )
    assert exceptions.HostsUpdatedInterrupt(True).skip_sync is True


# ---- horovod.common.util ---------------------------------------------------------------------------------------------


@pytest.fixture
def util() -> ModuleType:
    return importlib.import_module("horovod_cpp.compat.util")


def test_extensions(util: ModuleType, tmp_path: Path) -> None:
    package = str(tmp_path / "__init__.py")
    path = util.get_extension_full_path(package, "folder", "library")
    assert path == str(tmp_path / "folder" / f"library{util.get_ext_suffix()}")
    assert path.endswith(".so")
    with pytest.raises(ImportError, match=r"Extension horovod\.tensorflow has not been built"):
        util.check_extension("horovod.tensorflow", "HOROVOD_WITH_TENSORFLOW", package, "folder", "library")
    util.check_extension("horovod.torch", "HOROVOD_WITH_PYTORCH", package, "folder", "library")
    Path(path).parent.mkdir()
    Path(path).touch()
    util.check_extension("horovod.tensorflow", "HOROVOD_WITH_TENSORFLOW", package, "folder", "library")


def test_torch_is_the_only_extension(util: ModuleType) -> None:
    assert util.extension_available("torch") is True
    assert util.extension_available("tensorflow", verbose=True) is False
    assert util.gpu_available("torch") is (ours.cuda_built() and torch.cuda.is_available())
    assert util.gpu_available("mxnet", True) is False


def test_an_extension_is_tried_in_a_process_of_its_own(tmp_path: Path) -> None:
    """There, without being imported here; the reason of a failure is told on request."""
    output = run("""
        import sys
        from horovod_cpp.compat import util
        print(util.extension_available("torch"), "torch" in sys.modules)
    """)  # fmt: skip
    assert output == "True False\n"
    (tmp_path / "torch.py").write_text("raise ImportError('this torch is broken')\n")
    output = run(
        """
        import contextlib, io, sys
        from horovod_cpp.compat import util
        told = io.StringIO()
        with contextlib.redirect_stderr(told):
            print(util.extension_available("torch", verbose=True))
        print("this torch is broken" in told.getvalue())
        """,
        PYTHONPATH=f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    )
    assert output == "False\nTrue\n"


def test_what_is_built(util: ModuleType) -> None:
    for name in ("mpi_built", "gloo_built", "nccl_built", "ddl_built", "ccl_built"):
        assert getattr(util, name)(verbose=True) == getattr(util, name)() == getattr(ours, name)()


def test_cache_calls_once_for_the_same_arguments(util: ModuleType) -> None:
    calls = []

    @util._cache
    def ask(value: int, verbose: bool = False) -> int:
        calls.append(value)
        return value + 1

    assert [ask(1), ask(1), ask(2), ask(1, verbose=True)] == [2, 2, 3, 2]
    assert calls == [1, 2, 1]


def test_env_sets_and_restores(util: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPAT_CHANGED", "before")
    monkeypatch.setenv("COMPAT_REMOVED", "before")
    monkeypatch.delenv("COMPAT_NEW", raising=False)

    def values() -> list[str | None]:
        return [os.environ.get(name) for name in ("COMPAT_CHANGED", "COMPAT_REMOVED", "COMPAT_NEW")]

    with pytest.raises(KeyError), util.env(COMPAT_CHANGED="within", COMPAT_REMOVED=None, COMPAT_NEW="within"):
        assert values() == ["within", None, "within"]
        raise KeyError
    assert values() == ["before", "before", None]


def test_op_and_the_old_average(util: ModuleType) -> None:
    resolve = util.get_average_backwards_compatibility_fun(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [resolve(None, None), resolve(ours.Max, None), resolve(ours.Average, None)] == [0, 4, 0]
    with pytest.warns(DeprecationWarning, match="average"):
        assert resolve(None, True) == ours.Average
    with pytest.warns(DeprecationWarning, match="average"):
        assert resolve(op=None, average=False) == ours.Sum
    with pytest.raises(ValueError, match="The op parameter supersedes average"):
        resolve(ours.Sum, False)


def test_numbers_and_lists(util: ModuleType) -> None:
    assert [n for n in range(-1, 20) if util.num_rank_is_power_2(n)] == [1, 2, 4, 8, 16]
    assert util.split_list([1, 2, 3, 4, 5, 6, 7], 3) == [[1, 2, 3], [4, 5], [6, 7]]
    assert util.split_list(list(range(6)), 3) == [[0, 1], [2, 3], [4, 5]]
    assert util.split_list([1], 3) == [[1], [], []]
    with pytest.raises(ValueError, match="n is 0"):
        util.split_list([1], 0)
    assert [util.is_iterable(x) for x in ([], "a", {1: 2}, iter(()), 3, None)] == [True, True, True, True, False, False]


@pytest.mark.parametrize(
    ("version", "target", "enough"),
    [
        ("2.1.0", "2.1.0", True), ("2.1", "2.1.0", True), ("2.1.0", "2.1", True), ("2.13.0+cpu", "2.2", True),
        ("1.10.0", "1.9.0", True), ("1.9.1", "1.10.0", False), ("2.1.0rc1", "2.1.0", False),
        ("2.1.0", "2.1.0rc1", True), ("2.1.0.dev20230101", "2.1", False), ("2.1.0.post1", "2.1.0", True),
        ("2.0.9", "2.1.0a0", False),
    ],
)  # fmt: skip
def test_versions(util: ModuleType, version: str, target: str, enough: bool) -> None:
    assert util.is_version_greater_equal_than(version, target) is enough


@pytest.mark.parametrize("nonsense", ["", "abc", None, 2.1])
def test_what_is_no_version(util: ModuleType, nonsense: object) -> None:
    with pytest.raises(ValueError, match="a version is a text"):
        util.is_version_greater_equal_than("1.0", nonsense)
    with pytest.raises(ValueError, match="a version is a text"):
        util.is_version_greater_equal_than(nonsense, "1.0")


def test_every_version_of_the_framework_is_good(util: ModuleType) -> None:
    assert util.check_installed_version("pytorch", "0.0.1") is None
    assert util.check_installed_version("pytorch", "0.0.1", ImportError("reason")) is None


# ---- horovod.runner --------------------------------------------------------------------------------------------------


def test_in_thread(capfd: pytest.CaptureFixture[str]) -> None:
    in_thread = importlib.import_module("horovod_cpp.compat.threads").in_thread
    seen: list[Any] = []

    def note(*arguments: Any) -> None:
        seen.append((*arguments, threading.current_thread()))
        if arguments == ("bad",):
            raise ValueError("dropped")

    for thread in (in_thread(note, (1, 2), name="with a name", daemon=False), in_thread(note, ("bad",), silent=True)):
        assert isinstance(thread, threading.Thread)
        thread.join(10)
        assert not thread.is_alive()
    assert seen[0][:2] == (1, 2) and seen[0][2].name == "with a name" and not seen[0][2].daemon
    assert seen[1][0] == "bad" and seen[1][1].daemon
    assert "dropped" not in capfd.readouterr().err
    with pytest.raises(ValueError, match="tuple"):
        in_thread(note, "text")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1)),
        ({"HOROVOD_RANK": "3", "HOROVOD_SIZE": "4", "RANK": "0", "WORLD_SIZE": "9"}, (3, 4)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, (1, 2)),
        ({"PMI_RANK": "5", "PMI_SIZE": "6"}, (5, 6)),
        ({"RANK": "7", "WORLD_SIZE": "8"}, (7, 8)),
        ({"PMI_RANK": "5", "RANK": "1", "WORLD_SIZE": "2"}, (1, 2)),
    ],
)
def test_rank_and_size_of_the_launcher(
    variables: dict[str, str], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert importlib.import_module("horovod_cpp.compat.env").get_env_rank_and_size() == expected
