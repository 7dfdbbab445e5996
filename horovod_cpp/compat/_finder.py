"""The finder and the loaders that give Horovod's module names to modules of this package.

They run within import statements, on whatever thread imports, and hold no state.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import horovod_cpp

# Programs compare `horovod.__version__` with the version that brought what they need: the API is that of 0.28.1. The
# local part of the version tells who provides it.
HOROVOD_VERSION = f"0.28.1+horovod_cpp.{horovod_cpp.__version__}"

# Packages of which nothing is left but their submodules.
_PACKAGES = {
    "horovod",
    "horovod.common",
    "horovod.runner",
    "horovod.runner.common",
    "horovod.runner.common.util",
    "horovod.runner.elastic",
    "horovod.runner.util",
}

# Horovod's name -> ours. What stands below a package here is looked for below ours.
_MODULES = {
    "horovod.common.basics": "horovod_cpp.compat.basics",
    "horovod.common.elastic": "horovod_cpp.common.elastic",
    "horovod.common.exceptions": "horovod_cpp.compat.exceptions",
    "horovod.common.process_sets": "horovod_cpp.common.process_sets",
    "horovod.common.util": "horovod_cpp.compat.util",
    "horovod.runner.common.util.env": "horovod_cpp.compat.env",
    "horovod.runner.elastic.worker": "horovod_cpp.common.elastic",
    "horovod.runner.util.threads": "horovod_cpp.compat.threads",
    "horovod.torch": "horovod_cpp.torch",
    "horovod.torch.mpi_ops": "horovod_cpp.compat.mpi_ops",
}

# What Horovod has and this package has not, and what there is in its place.
_ONLY_TORCH = "only PyTorch is supported (horovod.torch)"
_START = "start the ranks with hvdrun, mpirun or torchrun"
_RUN = f"ranks cannot be started from Python; {_START}"
_NOT_HERE = {
    "horovod.data": "torch's DataLoader with num_workers loads in the background",
    "horovod.keras": _ONLY_TORCH,
    "horovod.mxnet": _ONLY_TORCH,
    "horovod.ray": f"there is no integration with Ray; {_START}",
    "horovod.run": _RUN,
    "horovod.runner.launch": _RUN,
    "horovod.runner.run": _RUN,
    "horovod.spark": f"there is no integration with Spark; {_START}",
    "horovod.tensorflow": _ONLY_TORCH,
}


def install() -> None:
    """Make ``import horovod`` and what stands below it mean this package, from now on and in this process.

    Does not block, imports neither torch nor the job's library, and joins no job. A second call does nothing. A
    Horovod that is installed is shadowed, wherever it stands on `sys.path`.

    Raises: ImportError if Horovod itself is imported already: the process would have two of them.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    loaded = sys.modules.get("horovod") or next(
        (module for name, module in sys.modules.items() if name.startswith("horovod.") and module), None
    )
    if loaded is not None:
        raise ImportError(
            f"horovod_cpp.compat cannot take the place of Horovod: '{loaded.__name__}' is imported already, from "
            f"{getattr(loaded, '__file__', None) or 'an unknown place'}; call install() before the first import of it",
            name="horovod",
        )
    sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Answers for `horovod` and everything below it. What it does not find, no other finder of files does.

    Programs that ask `importlib.util.find_spec` see a Horovod that was built for PyTorch alone: its other packages are
    there, and importing them fails.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "horovod" and not fullname.startswith("horovod."):
            return None
        if fullname in _PACKAGES:
            return ModuleSpec(fullname, _PackageLoader(), is_package=True)
        if fullname in _NOT_HERE:
            return ModuleSpec(fullname, _RefusingLoader())
        ours = _our_name(fullname)
        if ours is None or importlib.util.find_spec(ours) is None:
            return None
        return ModuleSpec(fullname, _AliasLoader(ours), origin=ours)


def _our_name(fullname: str) -> str | None:
    """The module of ours that stands for Horovod's, which need not exist; None if there is none by that name."""
    if fullname in _MODULES:
        return _MODULES[fullname]
    parent, _, child = fullname.rpartition(".")
    above = _our_name(parent) if parent else None
    return None if above is None else f"{above}.{child}"


class _PackageLoader(Loader):
    """Makes a package that holds submodules only, and imports them when they are asked for."""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__doc__ = f"Stands for Horovod's package of this name; made by {__name__}."
        if module.__name__ == "horovod":
            vars(module)["__version__"] = HOROVOD_VERSION
        vars(module)["__getattr__"] = functools.partial(_submodule, module.__name__)


def _submodule(package: str, name: str) -> Any:
    fullname = f"{package}.{name}"
    if fullname in _PACKAGES or fullname in _MODULES:
        return importlib.import_module(fullname)
    reason = f": {_NOT_HERE[fullname]}" if fullname in _NOT_HERE else ""
    raise AttributeError(f"module '{package}' of horovod_cpp has no attribute '{name}'{reason}")


class _RefusingLoader(Loader):
    """Says what there is in place of a module of Horovod that this package has not."""

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        # Not a ModuleNotFoundError: `from horovod import spark` would turn that into a message of its own.
        raise ImportError(f"{name} is not part of horovod_cpp: {_NOT_HERE[name]}", name=name)


class _AliasLoader(Loader):
    """Puts a module of ours in the place of the one that was asked for, as the same object."""

    def __init__(self, ours: str) -> None:
        self._ours = ours

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        # The import system takes what stands in sys.modules afterwards. Were our module returned by create_module,
        # its __spec__ would be overwritten.
        ours = importlib.import_module(self._ours)
        if ours.__name__ == "horovod_cpp.torch":
            _add_attributes_of_torch(ours)
        sys.modules[module.__name__] = ours


def _add_attributes_of_torch(ours: ModuleType) -> None:
    """The module that programs reach as `hvd.mpi_ops` without importing it."""
    vars(ours)["mpi_ops"] = importlib.import_module("horovod_cpp.compat.mpi_ops")
