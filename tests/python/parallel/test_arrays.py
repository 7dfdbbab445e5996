"""Collectives on numpy arrays, and on other arrays in host memory, against references in double precision."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import horovod_cpp.arrays as hvd
import horovod_cpp.torch as hvd_torch

FLOATS = ["float16", "float32", "float64"]
INTEGERS = ["uint8", "int8", "int16", "int32", "int64"]
DTYPES = ["bool", *INTEGERS, *FLOATS]
SHAPES: list[tuple[int, ...]] = [(), (0,), (1,), (17,), (5, 0, 3), (3, 17, 7)]
TOLERANCE = {"float16": 2e-3, "float32": 1e-6, "float64": 1e-14}
OPS: dict[str, tuple[int, Callable[[Any, Any], Any]]] = {
    "sum": (hvd.Sum, operator.add),
    "min": (hvd.Min, np.minimum),
    "max": (hvd.Max, np.maximum),
    "product": (hvd.Product, operator.mul),
}


def input_of(rank: int, shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, Any]:
    numbers = np.random.default_rng(100 * rank + len(shape))
    if dtype in FLOATS:
        return numbers.uniform(-1.5, 1.5, shape).astype(dtype)
    if dtype == "bool":
        return numbers.integers(0, 2, shape).astype(bool)
    return numbers.integers(0 if dtype == "uint8" else -3, 4, shape).astype(dtype)


def inputs(shape: tuple[int, ...], dtype: str) -> list[np.ndarray[Any, Any]]:
    return [input_of(rank, shape, dtype) for rank in range(hvd.size())]


def in_double(arrays: list[np.ndarray[Any, Any]], combine: Callable[[Any, Any], Any]) -> np.ndarray[Any, Any]:
    wide = np.float64 if arrays[0].dtype.kind == "f" else np.int64
    return np.asarray(functools.reduce(combine, [array.astype(wide) for array in arrays]))


def assert_near(got: Any, expected: np.ndarray[Any, Any], dtype: str) -> None:
    assert type(got) is np.ndarray and got.dtype == dtype and got.shape == expected.shape
    assert got.flags.writeable
    if dtype in FLOATS:
        np.testing.assert_allclose(got.astype(float), expected, rtol=0, atol=TOLERANCE[dtype] * 6 * hvd.size())
    else:
        np.testing.assert_array_equal(got, expected.astype(dtype))


class Exporter:
    """An array of another library, in host memory."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array
        self.__array_interface__ = array.__array_interface__


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_allreduce(op: str, dtype: str, shape: tuple[int, ...]) -> None:
    number, combine = OPS[op]
    mine = input_of(hvd.rank(), shape, dtype)
    before = mine.copy()
    if dtype == "bool":  # the sum of bools is "or", their product "and"
        combine = np.minimum if op == "product" else np.maximum if op == "sum" else combine
    expected = in_double(inputs(shape, dtype), combine)
    assert_near(hvd.allreduce(mine, op=number), expected, dtype)
    np.testing.assert_array_equal(mine, before)
    handle = hvd.allreduce_async(mine, op=number)
    in_place = mine.copy()
    other = hvd.allreduce_async_(in_place, op=number)
    assert hvd.synchronize(other) is in_place
    assert_near(in_place, expected, dtype)
    assert_near(hvd.synchronize(handle), expected, dtype)


def test_averages_and_factors() -> None:
    expected = in_double(inputs((3, 5), "float64"), operator.add)
    mine = input_of(hvd.rank(), (3, 5), "float64")
    assert_near(hvd.allreduce(mine), expected / hvd.size(), "float64")
    scaled = hvd.allreduce(mine, op=hvd.Sum, prescale_factor=0.5, postscale_factor=3.0)
    assert_near(scaled, expected * 1.5, "float64")
    assert_near(hvd.allreduce(np.float64(hvd.rank()), op=hvd.Sum), np.asarray(sum(range(hvd.size())) * 1.0), "float64")


LAYOUTS: dict[str, Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]] = {
    "c order": lambda array: array.copy(),
    "fortran": lambda array: np.asfortranarray(array),
    "transposed": lambda array: np.ascontiguousarray(array.transpose(2, 0, 1)).transpose(1, 2, 0),
    "with gaps": lambda array: np.repeat(array, 2, axis=1)[:, ::2],
    "backwards": lambda array: array[::-1].copy()[::-1],
    "not aligned": lambda array: np.frombuffer(bytearray(b"x" + array.tobytes()), array.dtype, -1, 1).reshape(
        array.shape
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts(layout: str) -> None:
    shape = (3, 17, 4)
    mine = LAYOUTS[layout](input_of(hvd.rank(), shape, "float32"))
    expected = in_double(inputs(shape, "float32"), operator.add)
    assert_near(hvd.allreduce(mine, op=hvd.Sum), expected, "float32")
    root = input_of(hvd.size() - 1, shape, "float32")
    assert_near(hvd.broadcast(mine, hvd.size() - 1), root.astype(float), "float32")
    assert_near(hvd.allgather(mine), np.concatenate(inputs(shape, "float32")).astype(float), "float32")
    assert hvd.allreduce_(mine, op=hvd.Sum) is mine
    assert_near(mine, expected, "float32")
    mine[...] = input_of(hvd.rank(), shape, "float32")
    assert hvd.broadcast_(mine, hvd.size() - 1) is mine
    np.testing.assert_array_equal(mine, root)


def test_ranks_may_differ_in_layout() -> None:
    shape = (4, 6)
    mine = input_of(hvd.rank(), shape, "float64")
    if hvd.rank() == 0:
        mine = np.asfortranarray(mine)
    assert_near(hvd.allreduce(mine, op=hvd.Sum), in_double(inputs(shape, "float64"), operator.add), "float64")


@pytest.mark.parametrize("dtype", DTYPES)
def test_allgather_of_different_rows(dtype: str) -> None:
    every = [input_of(rank, (rank, 3), dtype) for rank in range(hvd.size())]
    got = hvd.allgather(every[hvd.rank()])
    assert got.dtype == dtype and got.flags.writeable
    np.testing.assert_array_equal(got, np.concatenate(every))
    nothing = hvd.synchronize(hvd.allgather_async(np.empty((0, 2), dtype)))
    assert nothing.shape == (0, 2) and nothing.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_broadcast_from_each_rank(dtype: str) -> None:
    for root in range(hvd.size()):
        mine = input_of(hvd.rank(), (5, 3), dtype)
        got = hvd.synchronize(hvd.broadcast_async(mine, root))
        np.testing.assert_array_equal(got, input_of(root, (5, 3), dtype))
        assert hvd.synchronize(hvd.broadcast_async_(mine, root)) is mine
        np.testing.assert_array_equal(mine, input_of(root, (5, 3), dtype))


def test_reducescatter() -> None:
    rows = 2 * hvd.size() + 1  # the first rank gets one more
    expected = in_double(inputs((rows, 3), "float64"), operator.add)
    first = 2 * hvd.rank() + min(hvd.rank(), 1)
    own = expected[first : first + (3 if hvd.rank() == 0 else 2)]
    mine = input_of(hvd.rank(), (rows, 3), "float64")
    assert_near(hvd.reducescatter(mine, op=hvd.Sum), own, "float64")
    assert_near(hvd.synchronize(hvd.reducescatter_async(mine, postscale_factor=2.0)), 2 * own / hvd.size(), "float64")


def test_alltoall() -> None:
    rank, size = hvd.rank(), hvd.size()
    # Rank r sends s + 1 rows to rank s, each of them 100 r + s.
    splits = [to + 1 for to in range(size)]
    mine = np.concatenate([np.full((to + 1, 2), 100 * rank + to) for to in range(size)])
    expected = np.concatenate([np.full((rank + 1, 2), 100 * source + rank) for source in range(size)])
    for given in (splits, np.array(splits)):
        output, received = hvd.alltoall(mine, splits=given)
        np.testing.assert_array_equal(output, expected)
        assert received.dtype == np.int32 and received.tolist() == [rank + 1] * size
    equal = hvd.synchronize(hvd.alltoall_async(np.full(size, float(rank), np.float32)))
    np.testing.assert_array_equal(equal, np.arange(size))


def test_what_the_library_made_outlives_its_operation() -> None:
    kept = [hvd.allgather(np.full(1000, float(hvd.rank() + i))) for i in range(20)]
    for i, got in enumerate(kept):
        np.testing.assert_array_equal(got, np.repeat(np.arange(hvd.size()) + float(i), 1000))
    first = kept[0]
    assert not first.flags.owndata and first.base is not None  # adopted, not copied
    view = torch.from_dlpack(first)
    assert view.data_ptr() == first.ctypes.data


def test_arrays_of_other_libraries() -> None:
    array = np.full(3, float(hvd.rank()))
    total = float(sum(range(hvd.size())))
    got = hvd.allreduce(Exporter(array), op=hvd.Sum)
    assert type(got) is np.ndarray and got.tolist() == [total] * 3
    exporter = Exporter(array)
    assert hvd.allreduce_(exporter, op=hvd.Sum) is exporter
    assert array.tolist() == [total] * 3


def test_ranks_may_use_different_modules() -> None:
    mine = np.full(3, float(hvd.rank()), np.float32)
    if hvd.rank() % 2 == 0:
        got = hvd.allreduce(mine, name="mixed", op=hvd.Sum)
    else:
        got = hvd_torch.allreduce(torch.from_numpy(mine), name="mixed", op=hvd_torch.Sum).numpy()
    assert got.tolist() == [float(sum(range(hvd.size())))] * 3
    handle = hvd.allreduce_async(mine, op=hvd.Max)  # one numbering of handles
    assert hvd_torch.synchronize(handle).tolist() == [hvd.size() - 1.0] * 3
    assert hvd.synchronize(handle) is None


@pytest.mark.usefixtures("alone_and_beside_a_stuck_set")
def test_process_sets() -> None:
    if hvd.size() < 2:
        pytest.skip("needs two ranks")
    even = range(0, hvd.size(), 2)
    process_set = hvd.add_process_set(even)
    mine = np.full(2, float(hvd.rank()))
    if process_set.included():
        assert hvd.allreduce(mine, op=hvd.Sum, process_set=process_set).tolist() == [float(sum(even))] * 2
    else:
        with pytest.raises(ValueError, match=r"not a member|not part"):
            hvd.allreduce(mine, process_set=process_set)
    hvd.barrier()
    assert hvd.remove_process_set(process_set)


def test_ranks_that_disagree_get_an_error_and_go_on() -> None:
    if hvd.size() < 2:
        pytest.skip("needs two ranks")
    with pytest.raises(hvd.HorovodInternalError, match="odd one"):
        hvd.allreduce(np.ones(3 if hvd.rank() == 0 else 4), name="odd one")
    assert hvd.allreduce(np.ones(3), name="odd one", op=hvd.Sum).tolist() == [hvd.size()] * 3


@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
def test_complex_numbers(dtype: str) -> None:
    mine = (np.arange(6) * (1 - 2j) * (hvd.rank() + 1)).astype(dtype).reshape(2, 3)
    factors = sum(range(1, hvd.size() + 1))
    whole = (np.arange(6) * (1 - 2j) * factors).astype(dtype).reshape(2, 3)
    got = hvd.allreduce(mine, op=hvd.Sum)
    assert got.dtype == dtype
    np.testing.assert_allclose(got, whole, rtol=1e-6)
    in_order_of_columns = np.asfortranarray(mine)
    hvd.allreduce_(in_order_of_columns, op=hvd.Sum)
    np.testing.assert_allclose(in_order_of_columns, whole, rtol=1e-6)
    gathered = hvd.allgather(mine)
    assert gathered.dtype == dtype and gathered.shape == (2 * hvd.size(), 3)
    np.testing.assert_array_equal(gathered[2 * hvd.rank() : 2 * hvd.rank() + 2], mine)
    with pytest.raises(ValueError, match="complex numbers can be summed and averaged only"):
        hvd.allreduce(mine, op=hvd.Max)


def test_what_cannot_be_used_is_refused_by_name() -> None:
    read_only = np.ones(3)
    read_only.flags.writeable = False
    refused: list[tuple[Any, str]] = [
        (np.ones(3, ">f4"), "in the order of other machines"),
        (np.ones(3, np.clongdouble), "has elements of type '<c32'"),
        (np.array(["text"]), "has elements of type '<U4'"),
        (np.ma.masked_array([1.0, 2.0], [True, False]), "has a mask"),
        ([1.0, 2.0], "a list is no array"),
    ]
    for array, reason in refused:
        for call in (hvd.allreduce, hvd.allreduce_, hvd.allgather, hvd.reducescatter, hvd.alltoall):
            with pytest.raises(ValueError, match=f"'odd': .*{reason}"):
                call(array, name="odd")
    for call in (hvd.allreduce_, functools.partial(hvd.broadcast_, root_rank=0)):
        with pytest.raises(ValueError, match=r"'odd': the ndarray of shape \(3,\) is read-only"):
            call(read_only, name="odd")
        with pytest.raises(ValueError, match=r"'odd': the float64 of shape .* is read-only"):
            call(np.float64(1), name="odd")
    shared = np.lib.stride_tricks.as_strided(np.ones(1), (4,), (0,), writeable=True)
    with pytest.raises(ValueError, match=r"'odd': the elements of the ndarray .* share memory"):
        hvd.allreduce_(shared, name="odd")
    with pytest.raises(ValueError, match="unnamed alltoall: splits have to be whole numbers"):
        hvd.alltoall(np.ones(3), splits=[0.5])
    with pytest.raises(ValueError, match="Handle 123456789 was not created"):
        hvd.poll(123456789)
    assert hvd.allreduce(read_only, op=hvd.Sum).tolist() == [hvd.size()] * 3  # to read it is fine


# Each takes an array and name=, process_set=.
FORMS: dict[str, Callable[..., Any]] = {
    "allreduce": hvd.allreduce,
    "allreduce_": hvd.allreduce_,
    "allreduce_async": hvd.allreduce_async,
    "broadcast": functools.partial(hvd.broadcast, root_rank=0),
    "allgather": hvd.allgather,
    "reducescatter": hvd.reducescatter,
    "alltoall": hvd.alltoall,
}


@pytest.mark.parametrize("form", FORMS)
def test_names_and_sets_of_the_wrong_type_are_named_with_their_operation(form: str) -> None:
    call, operation = FORMS[form], form.split("_")[0]
    with pytest.raises(TypeError, match=f"^{operation}: name has to be a str or None, not 5 of type int$"):
        call(np.ones(hvd.size()), name=5)
    for wrong in ([0], None, 0):
        expected = rf"^{operation} 'odd': process_set has to be a ProcessSet, .*{type(wrong).__name__}$"
        with pytest.raises(TypeError, match=expected):
            call(np.ones(hvd.size()), name="odd", process_set=wrong)
    with pytest.raises(ValueError, match=rf"not been registered: .* \({operation} 'odd'\)$"):
        call(np.ones(hvd.size()), name="odd", process_set=hvd.ProcessSet([0]))
    with pytest.raises(TypeError, match=r"^barrier: process_set has to be a ProcessSet"):
        hvd.barrier([0])  # type: ignore[arg-type]


@pytest.mark.parametrize("operation", ["allreduce", "reducescatter"])
def test_numbers_that_cannot_be_used_are_named_with_their_operation(operation: str) -> None:
    for op in (6, -1, 256, 261, 2**40):  # also where the last eight bits would be known
        with pytest.raises(ValueError, match=f"^{operation} 'odd': reduction number {op} is not known"):
            FORMS[operation](np.ones(hvd.size()), name="odd", op=op)
    wrong = "of type (str|float|NoneType)$"
    for op in ("sum", 1.0, None):
        with pytest.raises(TypeError, match=f"^{operation} 'odd': op has to be hvd.Average, .*{wrong}"):
            FORMS[operation](np.ones(hvd.size()), name="odd", op=op)
    for parameter in ("prescale_factor", "postscale_factor"):
        for factor in ("2", None):
            with pytest.raises(TypeError, match=f"^{operation} 'odd': {parameter} has to be a number, .*{wrong}"):
                FORMS[operation](np.ones(hvd.size()), name="odd", **{parameter: factor})
    with pytest.raises(TypeError, match=f"^broadcast 'odd': root_rank has to be a rank, .*{wrong}"):
        hvd.broadcast(np.ones(3), "0", name="odd")  # type: ignore[arg-type]
    assert hvd.allreduce(np.ones(3), name="odd", op=hvd.Sum).tolist() == [hvd.size()] * 3
