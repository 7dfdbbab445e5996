"""Arrays of CuPy and Numba, through `__cuda_array_interface__`. Skipped as long as there is no module for arrays."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

from checks import Checks, argument_parser, say

import horovod_cpp.torch as hvd


def module_for_arrays() -> Any:
    try:
        return importlib.import_module("horovod_cpp.numpy")
    except ImportError:
        return None


def to_host(array: Any) -> list[float]:
    """A CuPy array has `get`, a Numba one `copy_to_host`, others become lists by themselves."""
    for name in ("get", "copy_to_host"):
        if hasattr(array, name):
            return [float(value) for value in getattr(array, name)()]
    return [float(value) for value in array]


def check_arrays(arrays: Any, checks: Checks, make: Callable[[list[float]], Any]) -> None:
    mine = [float(checks.rank + index) for index in range(7)]
    size = checks.size
    total = [sum(rank + index for rank in range(size)) for index in range(7)]
    reduced = to_host(arrays.allreduce(make(mine), op=hvd.Sum, name="array"))
    assert reduced == total, f"allreduce: {reduced} in place of {total}"
    sent = to_host(arrays.broadcast(make(mine), root_rank=size - 1, name="array"))
    assert sent == [size - 1.0 + index for index in range(7)], f"broadcast: {sent}"
    gathered = to_host(arrays.allgather(make(mine), name="array"))
    assert gathered == [rank + index for rank in range(size) for index in range(7)], f"allgather: {gathered}"


def with_cupy(values: list[float]) -> Any:
    import cupy  # type: ignore[import-not-found]

    return cupy.asarray(values, dtype=cupy.float32)


def with_numba(values: list[float]) -> Any:
    import numpy
    from numba import cuda  # type: ignore[import-not-found]

    return cuda.to_device(numpy.asarray(values, dtype=numpy.float32))


def main() -> int:
    arguments = argument_parser(__doc__).parse_args()
    arrays = module_for_arrays()
    if arrays is None or arguments.device == "cpu":
        reason = "there is no horovod_cpp.numpy" if arrays is None else "arrays of a GPU need one"
        say(part="interop", check="all", ok=True, note=f"skipped: {reason}")
        return 0
    checks = Checks("interop", arguments.device, arguments.short)
    for name, make in (("CuPy", with_cupy), ("Numba", with_numba)):
        try:
            make([0.0])
        except ImportError as error:
            say(part="interop", check=name, ok=True, note=f"skipped: {error}")
            continue
        checks.run(name, functools.partial(check_arrays, arrays, checks, make))
    return checks.end()


if __name__ == "__main__":
    sys.exit(main())
