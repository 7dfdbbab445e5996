"""Stands for ``horovod.common.util``: helpers that programs and tests of Horovod's users import from there.

Nothing here needs a job to be joined, and only `gpu_available` and `extension_available` touch torch.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from horovod_cpp.common import basics

_T = TypeVar("_T")
_IMPORT_SECONDS = 120.0

_cache = functools.cache


# ---- what is built ---------------------------------------------------------------------------------------------------


def get_ext_suffix() -> str:
    """How the names of this Python's extension modules end, such as '.cpython-311-x86_64-linux-gnu.so'."""
    return str(sysconfig.get_config_var("EXT_SUFFIX"))


def get_extension_full_path(pkg_path: str, *args: str) -> str:
    """Path of an extension: `args` are folders below that of the file `pkg_path`, and last its name without ending."""
    *folders, name = args
    return str(Path(pkg_path).parent.joinpath(*folders, name + get_ext_suffix()))


def check_extension(ext_name: str, ext_env_var: str, pkg_path: str, *args: str) -> None:
    """Return if the extension is there: always for 'horovod.torch', otherwise if its file is.

    Args:
        ext_name: the package, such as 'horovod.torch'.
        ext_env_var: what asks Horovod's build for it; for the message.
        pkg_path, args: as in `get_extension_full_path`.
    Raises: ImportError if it is not.
    """
    path = get_extension_full_path(pkg_path, *args)
    if ext_name != "horovod.torch" and not os.path.exists(path):
        raise ImportError(
            f"Extension {ext_name} has not been built: there is no file {path}. horovod_cpp supports PyTorch only; "
            f"{ext_env_var} does not change that.",
            name=ext_name,
        )


@_cache
def extension_available(ext_base_name: str, verbose: bool = False) -> bool:
    """Whether `horovod.<ext_base_name>` can be imported: 'torch', where torch is installed; no other.

    The first question blocks for some seconds, while a process of its own tries; this one imports nothing.

    Args: verbose: print to stderr why it cannot.
    """
    if ext_base_name != "torch":
        return False
    if "horovod_cpp.torch" in sys.modules:
        return True
    try:
        trial = subprocess.run(
            [sys.executable, "-c", "import horovod_cpp.torch"],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_IMPORT_SECONDS,
        )
        failure = trial.stderr if trial.returncode != 0 else ""
    except subprocess.TimeoutExpired:
        failure = f"it took longer than {_IMPORT_SECONDS:.0f} s"
    if failure and verbose:
        print(f"horovod.{ext_base_name} cannot be imported: {failure}", file=sys.stderr)
    return not failure


def gpu_available(ext_base_name: str, verbose: bool = False) -> bool:
    """Whether `horovod.<ext_base_name>` takes tensors on GPUs and there is one. Imports torch only if it takes them."""
    if ext_base_name != "torch" or not basics.cuda_built():
        return False
    import torch

    return torch.cuda.is_available()


def mpi_built(verbose: bool = False) -> bool:
    """As `hvd.mpi_built`; `verbose` has no effect."""
    return basics.mpi_built()


def gloo_built(verbose: bool = False) -> bool:
    """As `hvd.gloo_built`; `verbose` has no effect."""
    return basics.gloo_built()


def nccl_built(verbose: bool = False) -> int:
    """As `hvd.nccl_built`; `verbose` has no effect."""
    return basics.nccl_built()


def ddl_built(verbose: bool = False) -> bool:
    """As `hvd.ddl_built`; `verbose` has no effect."""
    return basics.ddl_built()


def ccl_built(verbose: bool = False) -> bool:
    """As `hvd.ccl_built`; `verbose` has no effect."""
    return basics.ccl_built()


# ---- versions --------------------------------------------------------------------------------------------------------


def check_installed_version(name: str, version: str, exception: Exception | None = None) -> None:
    """Return: the package is built without the framework, so no version of it can be the wrong one.

    Args: as Horovod's: the framework, its version that is in use, and the exception to which a mismatch is the cause.
    """


def is_version_greater_equal_than(ver: str, target: str) -> bool:
    """Whether `ver` is at least `target`, both such as '2.1', '2.1.0rc1' or '2.1.0+cpu'. What follows a '+' is ignored.

    Raises: ValueError for arguments that are no versions.
    """
    return _comparable(ver) >= _comparable(target)


def _comparable(version: str) -> tuple[tuple[int, ...], bool]:
    """The numbers without zeros at the end, and whether it is a release: what comes before one is less."""
    match = re.match(r"\s*v?(\d+(?:\.\d+)*)(.*)", version.partition("+")[0]) if isinstance(version, str) else None
    if match is None:
        raise ValueError(f"a version is a text such as '2.1.0'; this is none: {version!r}")
    numbers = [int(number) for number in match[1].split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers), re.match(r"[._-]?(a|b|c|rc|alpha|beta|pre|dev)", match[2]) is None


# ---- reduce operations -----------------------------------------------------------------------------------------------


class _ReduceOps(Protocol):
    Average: int
    Sum: int


def get_average_backwards_compatibility_fun(
    reduce_ops: _ReduceOps,
) -> Callable[[int | None, bool | None], int]:
    """A function of `op` and the old parameter `average` that returns the operation that they ask for.

    Args: reduce_ops: has the operations Average and Sum as attributes.
    Returns: a function that returns Average if neither is given, warns (DeprecationWarning) of `average`, and raises
        ValueError if both are given.
    """

    def handle_average_backwards_compatibility(op: int | None, average: bool | None) -> int:
        if average is None:
            return reduce_ops.Average if op is None else op
        if op is not None:
            raise ValueError("The op parameter supersedes average. Please provide only one of them.")
        warnings.warn("the parameter average is deprecated; use op=hvd.Average or op=hvd.Sum", DeprecationWarning, 2)
        return reduce_ops.Average if average else reduce_ops.Sum

    return handle_average_backwards_compatibility


def num_rank_is_power_2(num_rank: int) -> bool:
    """Whether `num_rank` is 1, 2, 4, 8, ..."""
    return num_rank > 0 and num_rank.bit_count() == 1


# ---- the rest --------------------------------------------------------------------------------------------------------


@contextmanager
def env(**kwargs: str | None) -> Iterator[None]:
    """A context in which environment variables have other values, or are not set (None); afterwards all is as before.

    Other threads see the change, too.
    """
    before = {name: os.environ.get(name) for name in kwargs}
    try:
        _set_variables(kwargs)
        yield
    finally:
        _set_variables(before)


def _set_variables(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def split_list(l: Iterable[_T], n: int) -> list[list[_T]]:  # noqa: E741 (Horovod's name of the parameter)
    """`l` in `n` consecutive parts; their lengths differ by one at most, longer parts come first.

    Raises: ValueError if `n` is not positive.
    """
    if n <= 0:
        raise ValueError(f"a list can be split in 1 part or more; n is {n}")
    items = list(l)
    shorter, longer_parts = divmod(len(items), n)
    rest = iter(items)
    return [list(itertools.islice(rest, shorter + (part < longer_parts))) for part in range(n)]


def is_iterable(x: Any) -> bool:
    """Whether `iter(x)` works."""
    try:
        iter(x)
    except TypeError:
        return False
    return True
