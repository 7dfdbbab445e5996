"""The names of Horovod's modules, without a job: what they stand for, and what Horovod has in them."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import horovod_cpp
import horovod_cpp.torch as ours
from horovod_cpp import compat

SAME_MODULES = {
    "horovod.torch": "horovod_cpp.torch",
    "horovod.torch.compression": "horovod_cpp.torch.compression",
    "horovod.torch.functions": "horovod_cpp.torch.functions",
    "horovod.torch.optimizer": "horovod_cpp.torch.optimizer",
    "horovod.torch.sync_batch_norm": "horovod_cpp.torch.sync_batch_norm",
    "horovod.torch.mpi_ops": "horovod_cpp.compat.mpi_ops",
    "horovod.torch.elastic": "horovod_cpp.torch.elastic",
    "horovod.torch.elastic.sampler": "horovod_cpp.torch.elastic.sampler",
    "horovod.torch.elastic.state": "horovod_cpp.torch.elastic.state",
    "horovod.common.elastic": "horovod_cpp.common.elastic",
    "horovod.common.process_sets": "horovod_cpp.common.process_sets",
    "horovod.common.basics": "horovod_cpp.compat.basics",
    "horovod.common.exceptions": "horovod_cpp.compat.exceptions",
    "horovod.common.util": "horovod_cpp.compat.util",
    "horovod.runner.util.threads": "horovod_cpp.compat.threads",
    "horovod.runner.common.util.env": "horovod_cpp.compat.env",
    "horovod.runner.elastic.worker": "horovod_cpp.common.elastic",
}


def of_horovod(name: str) -> bool:
    return name == "horovod" or name.startswith("horovod.")


@pytest.fixture
def installed() -> Iterator[None]:
    """Horovod's names work within the test, and are gone after it."""
    finders = list(sys.meta_path)
    compat.install()
    yield
    sys.meta_path[:] = finders
    for name in [name for name in sys.modules if of_horovod(name)]:
        del sys.modules[name]


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


# ---- modules ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", SAME_MODULES)
def test_a_name_stands_for_the_same_module(name: str) -> None:
    module = importlib.import_module(name)
    assert module is importlib.import_module(SAME_MODULES[name])
    assert sys.modules[name] is module
    parent, _, child = name.rpartition(".")
    assert getattr(sys.modules[parent], child) is module
    assert module.__spec__ is not None and module.__spec__.name == SAME_MODULES[name]  # not that of the alias


def test_without_install_there_is_no_horovod() -> None:
    assert importlib.util.find_spec("horovod") is None
    assert run(
        "import horovod_cpp, horovod_cpp.compat, importlib.util; print(importlib.util.find_spec('horovod'))"
    ) == ("None\n")


@pytest.mark.usefixtures("installed")
def test_horovod_has_a_version_and_its_submodules() -> None:
    import horovod

    assert horovod.__version__ == compat.HOROVOD_VERSION
    assert horovod.__version__.split("+") == ["0.28.1", f"horovod_cpp.{horovod_cpp.__version__}"]
    assert horovod.torch is ours  # not imported by its name before
    assert horovod.common.util.split_list is importlib.import_module("horovod_cpp.compat.util").split_list
    assert not hasattr(horovod, "nothing_of_this_name")
    with pytest.raises(AttributeError, match="hvdrun"):
        horovod.run(lambda: None, num_proc=2)


@pytest.mark.usefixtures("installed")
def test_import_statements_of_all_forms() -> None:
    namespace: dict[str, Any] = {}
    exec(
        textwrap.dedent("""
        import horovod.torch
        import horovod.torch as hvd
        from horovod import torch as hvd_from
        from horovod.torch import mpi_ops, compression, DistributedOptimizer, allreduce_async_
        from horovod.torch.mpi_ops import synchronize, poll, is_homogeneous, Average, Sum, rank
        from horovod.torch.mpi_ops import *
        from horovod.torch.compression import Compression as C
        from horovod.common import exceptions, util
        from horovod.common.exceptions import HorovodInternalError, HorovodVersionMismatchError
        from horovod.runner.util.threads import in_thread
        from horovod.runner.common.util import env
        """),
        namespace,
    )
    assert namespace["hvd"] is namespace["hvd_from"] is namespace["horovod"].torch is ours
    assert namespace["hvd"].mpi_ops is namespace["mpi_ops"]
    assert namespace["hvd"].elastic.run is importlib.import_module("horovod_cpp.torch.elastic").run
    assert namespace["C"] is ours.Compression
    assert namespace["DistributedOptimizer"] is ours.DistributedOptimizer
    assert namespace["HorovodInternalError"] is ours.HorovodInternalError
    assert namespace["allgather"] is ours.allgather  # by the star
    assert namespace["Sum"] == 1


def test_modules_that_need_no_import_of_their_own() -> None:
    assert run("""
        import sys
        from horovod_cpp import compat
        compat.install()
        import horovod.torch as hvd
        print(hvd.mpi_ops.allreduce_async_ is hvd.allreduce_async_, hvd.elastic.run.__name__)
        print("horovod.torch.mpi_ops" in sys.modules)
        import horovod.torch.mpi_ops
        print(horovod.torch.mpi_ops is hvd.mpi_ops)
    """) == "True run\nFalse\nTrue\n"  # fmt: skip


@pytest.mark.usefixtures("installed")
def test_mpi_ops_has_all_that_is_public() -> None:
    mpi_ops = importlib.import_module("horovod.torch.mpi_ops")
    assert {name: getattr(mpi_ops, name) for name in ours.__all__} == {
        name: getattr(ours, name) for name in ours.__all__
    }
    assert set(ours.__all__) < set(mpi_ops.__all__)
    assert "is_homogeneous" in mpi_ops.__all__
    with pytest.raises(ValueError, match="not been initialized"):
        mpi_ops._basics.size()
    with pytest.raises(ValueError, match="not been initialized"):
        mpi_ops._basics._get_process_set_ids_and_ranks()
    assert mpi_ops._basics.Product == ours.Product


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    "name", ["tensorflow", "keras", "mxnet", "spark", "ray", "data", "run", "tensorflow.keras", "spark.run"]
)
def test_what_is_not_here_says_so(name: str) -> None:
    with pytest.raises(ImportError, match=rf"horovod\.{name.split('.')[0]} is not part of horovod_cpp: ") as caught:
        importlib.import_module(f"horovod.{name}")
    assert not isinstance(caught.value, ModuleNotFoundError)
    top = name.split(".")[0]
    with pytest.raises(ImportError, match="is not part of horovod_cpp"):
        exec(f"from horovod import {top}")
    assert not hasattr(importlib.import_module("horovod"), top)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("statement", ["from horovod.runner import run", "import horovod.runner.launch"])
def test_starting_ranks_from_python_says_what_does(statement: str) -> None:
    with pytest.raises(ImportError, match=r"ranks cannot be started from Python; start the ranks with hvdrun, mpirun"):
        exec(statement)


@pytest.mark.usefixtures("installed")
def test_names_stand_where_horovod_has_them() -> None:
    functions = importlib.import_module("horovod.torch.functions")
    for name in ("allgather_object", "broadcast_object", "broadcast_optimizer_state", "broadcast_parameters"):
        assert getattr(functions, name) is getattr(ours, name)
    worker = importlib.import_module("horovod.runner.elastic.worker")
    assert worker.HostUpdateResult is importlib.import_module("horovod_cpp.torch.elastic").HostUpdateResult


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", ["horovod.nothing", "horovod.torch.nothing", "horovod.common.nothing"])
def test_other_names_are_not_found(name: str) -> None:
    assert importlib.util.find_spec(name) is None
    with pytest.raises(ModuleNotFoundError, match=f"^No module named '{name}'$") as caught:
        importlib.import_module(name)
    assert caught.value.name == name
    assert name not in sys.modules


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", [*SAME_MODULES, "horovod", "horovod.runner", "horovod.torch.operations"])
def test_what_is_here_is_found_without_an_import(name: str) -> None:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.name in (name, SAME_MODULES.get(name))
    assert name not in sys.modules


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", ["tensorflow", "keras", "mxnet", "spark", "ray", "data", "runner.launch"])
def test_what_is_not_here_is_found_as_in_a_horovod_without_it(name: str) -> None:
    """Its files are there, and only an import fails."""
    assert importlib.util.find_spec(f"horovod.{name}") is not None
    with pytest.raises(ImportError, match=rf"^horovod\.{name} is not part of horovod_cpp: "):
        importlib.import_module(f"horovod.{name}")
    assert f"horovod.{name}" not in sys.modules


@pytest.mark.usefixtures("installed")
def test_a_module_that_comes_later_is_found_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "__path__", [*ours.__path__, str(tmp_path)])
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("horovod.torch.comes_later")
    (tmp_path / "comes_later.py").write_text("class TorchState: pass\n")
    importlib.invalidate_caches()
    try:
        module = importlib.import_module("horovod.torch.comes_later")
        assert module is sys.modules["horovod_cpp.torch.comes_later"]
        assert module.TorchState.__module__ == "horovod_cpp.torch.comes_later"
    finally:
        sys.modules.pop("horovod_cpp.torch.comes_later", None)
        vars(ours).pop("comes_later", None)


# ---- install ---------------------------------------------------------------------------------------------------------


def test_install_twice_adds_one_finder() -> None:
    assert run("""
        import sys
        from horovod_cpp import compat
        before = list(sys.meta_path)
        compat.install()
        after_one = list(sys.meta_path)
        compat.install()
        import horovod
        compat.install()  # `horovod` is imported, but it is ours
        print(len(after_one) - len(before), sys.meta_path == after_one, "torch" in sys.modules)
    """) == "1 True False\n"  # fmt: skip


@pytest.fixture
def another_horovod(tmp_path: Path) -> Path:
    """A package of this name that is not ours."""
    (tmp_path / "horovod").mkdir()
    (tmp_path / "horovod" / "__init__.py").write_text("print('another one')\n")
    (tmp_path / "horovod" / "data.py").write_text("print('data of another one')\n")
    return tmp_path


def test_a_horovod_that_is_only_installed_is_shadowed(another_horovod: Path) -> None:
    assert run(
        """
        import sys
        from horovod_cpp import compat
        sys.path.insert(0, sys.path.pop(sys.path.index(__import__("os").environ["ANOTHER"])))
        compat.install()
        import horovod
        print(horovod.__version__)
        try:
            import horovod.data
        except ImportError as error:
            print(error.name)
        """,
        PYTHONPATH=f"{os.environ.get('PYTHONPATH', '')}{os.pathsep}{another_horovod}",
        ANOTHER=str(another_horovod),
    ) == f"{compat.HOROVOD_VERSION}\nhorovod.data\n"  # fmt: skip


def test_a_horovod_that_is_imported_already_is_an_error(another_horovod: Path) -> None:
    output = run(
        """
        import sys
        from horovod_cpp import compat
        import horovod
        before = list(sys.meta_path)
        try:
            compat.install()
        except ImportError as error:
            print(error.name, error, sys.meta_path == before)
        """,
        PYTHONPATH=f"{os.environ.get('PYTHONPATH', '')}{os.pathsep}{another_horovod}",
    )
    assert output.startswith("another one\nhorovod horovod_cpp.compat cannot take the place of Horovod")
    assert str(another_horovod / "horovod" / "__init__.py") in output
    assert output.endswith("True\n")
