"""Arrays of CuPy and Numba, through `__cuda_array_interface__`. A library that is not installed is skipped.

With `--device cpu`: arrays of numpy, which checks the checks.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from checks import Checks, argument_parser, keep_gpu_busy, say

import horovod_cpp.arrays as hvd


class Library:
    """How a library makes an array, reads it, and takes in memory of others."""

    name = "numpy"

    def make(self, values: Any) -> Any:
        return np.array(values)

    def adopt(self, array: Any) -> Any:
        return np.asarray(array)

    def to_host(self, array: Any) -> Any:
        return np.asarray(array)

    def address(self, array: Any) -> int:
        return int(array.__array_interface__["data"][0])

    def on_side_stream(self) -> contextlib.AbstractContextManager[Any]:
        """What is called in here is put on a stream of its own."""
        return contextlib.nullcontext()

    def stays_behind(self) -> None:
        """Keep the stream busy for a while, if there is one."""


class OnDevice(Library):
    def address(self, array: Any) -> int:
        return int(array.__cuda_array_interface__["data"][0])


class Cupy(OnDevice):
    name = "CuPy"

    def __init__(self) -> None:
        self.cupy = importlib.import_module("cupy")

    def make(self, values: Any) -> Any:
        return self.cupy.array(values)

    def adopt(self, array: Any) -> Any:
        return self.cupy.asarray(array)

    def to_host(self, array: Any) -> Any:
        return self.cupy.asnumpy(array)

    def on_side_stream(self) -> contextlib.AbstractContextManager[Any]:
        stream: contextlib.AbstractContextManager[Any] = self.cupy.cuda.Stream(non_blocking=True)
        return stream

    def stays_behind(self) -> None:
        import torch

        stream = torch.cuda.ExternalStream(self.cupy.cuda.get_current_stream().ptr)
        with torch.cuda.stream(stream):
            keep_gpu_busy(50)


class Numba(OnDevice):
    name = "Numba"

    def __init__(self) -> None:
        self.cuda = importlib.import_module("numba.cuda")

    def make(self, values: Any) -> Any:
        return self.cuda.to_device(np.array(values))

    def adopt(self, array: Any) -> Any:
        return self.cuda.as_cuda_array(array)

    def to_host(self, array: Any) -> Any:
        return self.adopt(array).copy_to_host()


def expect(got: Any, expected: Any, dtype: Any, what: str) -> None:
    assert got.dtype == dtype, f"{what}: {got.dtype} in place of {dtype}"
    assert np.array_equal(got, np.asarray(expected).astype(dtype)), f"{what}: {got} in place of {expected}"


def check_operations(library: Library, checks: Checks, dtype: str) -> None:
    rank, size = checks.rank, checks.size
    every = [np.arange(12).reshape(6, 2) % 5 + each for each in range(size)]
    mine = every[rank].astype(dtype)
    total = sum(every)
    array = library.make(mine)
    reduced = hvd.allreduce(array, op=hvd.Sum)
    assert type(reduced) is type(array), f"{type(reduced)} in place of {type(array)}"
    expect(library.to_host(reduced), total, dtype, "allreduce")
    expect(library.to_host(array), mine, dtype, "the input of allreduce")
    sent = hvd.broadcast(array, root_rank=size - 1)
    expect(library.to_host(sent), every[-1], dtype, "broadcast")
    gathered = hvd.allgather(library.make(mine[: rank + 1]))
    shares = np.concatenate([each[: i + 1] for i, each in enumerate(every)])
    expect(library.to_host(gathered), shares, dtype, "allgather")
    rows = np.concatenate([np.full((2, 3), each) for each in range(size)])
    scattered = hvd.reducescatter(library.make(rows.astype(dtype)), op=hvd.Sum)
    expect(library.to_host(scattered), np.full((2, 3), rank * size), dtype, "reducescatter")
    exchanged, received = hvd.alltoall(library.make(rows.astype(dtype)), splits=[2] * size)
    expect(library.to_host(exchanged), np.full((2 * size, 3), rank), dtype, "alltoall")
    assert received.tolist() == [2] * size, f"alltoall: splits {received}"
    handles = [hvd.allreduce_async_(library.make(mine), op=hvd.Max, name=f"many.{i}") for i in range(20)]
    for handle in handles:
        expect(library.to_host(hvd.synchronize(handle)), every[-1], dtype, "allreduce_async_")
    assert hvd.broadcast_(array, root_rank=0) is array
    expect(library.to_host(array), every[0], dtype, "broadcast_")


def check_adoption(library: Library, checks: Checks) -> None:
    made = hvd.allgather(library.make(np.full(1000, float(checks.rank))))
    adopted = library.adopt(made)
    assert library.address(adopted) == library.address(made), "what the library made was copied"
    expected = np.repeat(np.arange(checks.size), 1000)
    del made  # the array that adopted it keeps the memory
    for _ in range(5):
        hvd.allgather(library.make(np.full(1000, -1.0)))
    expect(library.to_host(adopted), expected, "float64", "adopted memory")


def check_dlpack(library: Library, checks: Checks) -> None:
    import torch

    made = hvd.allgather(library.make(np.full(3, float(checks.rank))))
    tensor = torch.from_dlpack(made)
    assert tensor.data_ptr() == library.address(made), "what the library made was copied"
    expect(tensor.cpu().numpy(), np.repeat(np.arange(checks.size), 3), "float64", "through DLPack")


def check_streams(library: Library, checks: Checks) -> None:
    """The input is made late on a stream of its own, and the result used there at once."""
    for waits in (True, False):
        with library.on_side_stream():
            array = library.make(np.zeros(1 << 16))
            library.stays_behind()
            array += checks.rank + 1
            if waits:
                array = hvd.allreduce(array, op=hvd.Sum)
            else:
                array = hvd.synchronize(hvd.allreduce_async(array, op=hvd.Sum))
            array *= 2
            got = library.to_host(array)
        expect(got, np.full(1 << 16, checks.size * (checks.size + 1)), "float64", "in the order of its stream")


def check_refusals(library: Library, checks: Checks) -> None:
    if isinstance(library, OnDevice):
        try:
            hvd.allreduce(library.make(np.ones((4, 6), np.float32))[:, ::2], name="gaps")
        except ValueError as error:
            assert "'gaps'" in str(error) and "not contiguous" in str(error), error
        else:
            raise AssertionError("an array with gaps was taken")
    try:
        hvd.allgather(library.make(np.ones(3, np.complex64)), name="complex")
    except ValueError as error:
        assert "'complex'" in str(error) and "<c8" in str(error), error
    else:
        raise AssertionError("complex numbers were taken")


def main() -> int:
    arguments = argument_parser(__doc__).parse_args()
    checks = Checks("interop", arguments.device, arguments.short)
    kinds: list[Callable[[], Library]] = [Cupy, Numba] if arguments.device == "cuda" else [Library]
    for kind in kinds:
        try:
            library = kind()
        except ImportError as error:
            if checks.rank == 0:
                say(part="interop", check=kind.__name__, ok=True, note=f"skipped: {error}")
            continue
        for dtype in ("float32", "float16", "int64", "uint8"):
            checks.run(
                f"{library.name}, operations, {dtype}", functools.partial(check_operations, library, checks, dtype)
            )
        checks.run(f"{library.name}, memory of the library", functools.partial(check_adoption, library, checks))
        checks.run(f"{library.name}, DLPack", functools.partial(check_dlpack, library, checks))
        if not isinstance(library, Numba):  # it has no arithmetic on arrays without a kernel of one's own
            checks.run(f"{library.name}, streams", functools.partial(check_streams, library, checks))
        checks.run(f"{library.name}, refusals", functools.partial(check_refusals, library, checks))
    return checks.end()


if __name__ == "__main__":
    sys.exit(main())
