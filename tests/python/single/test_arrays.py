"""Arrays on a device that is not there: what their interface says, what the library is given, and what comes out."""

from __future__ import annotations

import inspect
import subprocess
import sys
import types
from typing import Any

import numpy as np
import pytest

import horovod_cpp.arrays as hvd
from horovod_cpp import _core
from horovod_cpp.arrays import interfaces, outputs

ADDRESS = 0x7000_0000


class OnDevice:
    """An array that says it lies on a CUDA device."""

    def __init__(self, **changes: Any) -> None:
        interface = {"version": 3, "shape": (2, 3), "typestr": "<f4", "data": (ADDRESS, False), **changes}
        self.__cuda_array_interface__ = {key: value for key, value in interface.items() if value is not KeyError}


class FakeHandle:
    """An operation that is done, whose output the library made on device 1."""

    def __init__(self, place: tuple[int, list[int], int, int] = (ADDRESS, [2, 3], _core.FLOAT32, 1)) -> None:
        self.place = place
        self.waits: list[int] = []

    def wait(self) -> None:
        pass

    def poll(self) -> bool:
        return True

    def stream_wait(self, stream: int) -> None:
        self.waits.append(stream)

    def output_place(self, _index: int) -> tuple[int, list[int], int, int]:
        return self.place

    def to_dlpack(self, _index: int) -> object:
        return "capsule"

    def received_splits(self) -> list[int]:
        return [1, 1]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is handed to the library, which has a device 1."""
    given: list[tuple[Any, ...]] = []

    def enqueue(*arguments: Any) -> FakeHandle:
        given.append(arguments)
        return FakeHandle()

    monkeypatch.setattr(_core, "enqueue", enqueue)
    monkeypatch.setattr(_core, "enqueue_alltoall", enqueue)
    monkeypatch.setattr(_core, "cuda_device_of", lambda _address: 1)
    return given


def test_it_works_without_torch() -> None:
    code = """
        import sys
        import numpy as np
        import horovod_cpp.arrays as hvd
        hvd.init()
        assert hvd.allreduce(np.ones(3)).tolist() == [1.0] * 3
        gathered = hvd.allgather(np.arange(4))
        hvd.shutdown()
        assert gathered.tolist() == [0, 1, 2, 3] and (hvd.is_initialized(), 'torch' in sys.modules) == (False, False)
    """
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", inspect.cleandoc(code)], capture_output=True, text=True, timeout=120
    )
    assert (result.returncode, result.stderr) == (0, "")


# ---- what goes in


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({}, _core.FLOAT32),
        ({"strides": None}, _core.FLOAT32),
        ({"strides": (12, 4)}, _core.FLOAT32),
        ({"version": 2, "mask": None, "descr": [("", "<f4")]}, _core.FLOAT32),
        ({"typestr": "|u1"}, _core.UINT8),
        ({"typestr": "|i1"}, _core.INT8),
        ({"typestr": "<i2"}, _core.INT16),
        ({"typestr": "<i4"}, _core.INT32),
        ({"typestr": "<i8"}, _core.INT64),
        ({"typestr": "<f2"}, _core.FLOAT16),
        ({"typestr": "<f8"}, _core.FLOAT64),
        ({"typestr": "<c16"}, _core.COMPLEX128),
        ({"typestr": "|b1"}, _core.BOOL),
        ({"shape": (), "strides": ()}, _core.FLOAT32),
        ({"shape": (1, 3), "strides": (77, 4)}, _core.FLOAT32),  # where there is one element its stride says nothing
    ],
    ids=str,
)
def test_interfaces_that_are_taken(calls: list[tuple[Any, ...]], changes: dict[str, Any], dtype: int) -> None:
    array = OnDevice(**changes)
    assert hvd.allreduce_(array, name="x", op=hvd.Sum) is array
    (given,) = calls
    shape = array.__cuda_array_interface__["shape"]
    assert given[:6] == (_core.ALLREDUCE, dtype, shape, ADDRESS, ADDRESS, "x")
    assert given[14:16] == (1, 0)  # device and stream
    assert given[16][0].owner is array  # kept alive


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"typestr": ">f4"}, r"'>f4'\): convert it"),
        ({"typestr": "<c32"}, "has elements of type '<c32'; supported are .*<f8.*<c16"),
        ({"typestr": "<u4"}, "has elements of type '<u4'"),
        ({"typestr": "|V2"}, "has elements of type"),
        ({"typestr": ""}, "has elements of type ''"),
        ({"mask": object()}, "has a mask"),
        ({"strides": (4, 8)}, r"is not contiguous \(strides \(4, 8\)\)"),
        ({"strides": (24, 4)}, "is not contiguous"),
        ({"strides": (-12, 4)}, "is not contiguous"),
        ({"stream": 0}, "names the stream 0"),
        ({"stream": -5}, "names the stream -5"),
        ({"stream": "7"}, "names the stream '7'"),
        ({"data": (0, False)}, "comes without memory"),
        ({"data": None}, "comes without memory"),
        ({"data": (ADDRESS, True)}, "is read-only"),
    ],
    ids=str,
)
def test_interfaces_that_are_refused(calls: list[tuple[Any, ...]], changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=rf"^allreduce 'x': the OnDevice of shape \(2, 3\) .*{reason}"):
        hvd.allreduce_(OnDevice(**changes), name="x")
    assert calls == []


def test_incomplete_interfaces_are_refused(calls: list[tuple[Any, ...]]) -> None:
    for missing in ("shape", "typestr"):
        with pytest.raises(
            ValueError, match=rf"unnamed allgather: .*OnDevice is not complete: KeyError\('{missing}'\)"
        ):
            hvd.allgather(OnDevice(**{missing: KeyError}))
    with pytest.raises(ValueError, match="is not complete"):
        hvd.allgather(OnDevice(data=7))
    array = OnDevice()
    array.__cuda_array_interface__ = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match="is no dictionary: None"):
        hvd.allgather(array)
    assert calls == []


def test_read_only_memory_may_be_read(calls: list[tuple[Any, ...]]) -> None:
    hvd.allgather(OnDevice(data=(ADDRESS, True)))
    assert len(calls) == 1


def test_arrays_without_elements_need_no_memory(calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    class WithDlpack(OnDevice):
        def __dlpack_device__(self) -> tuple[int, int]:
            return 2, 3

    monkeypatch.setattr(_core, "cuda_device_of", None)  # not asked
    for kind, device in ((OnDevice, 0), (WithDlpack, 3)):
        hvd.allreduce_(kind(shape=(0, 3), data=(0, False)))
        assert calls[-1][3:5] == (0, 0) and calls[-1][14] == device


def test_memory_that_is_not_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(code: int) -> Any:
        def device_of(_address: int) -> int:
            error = _core.Error("no such memory")
            error.code = code
            raise error

        return device_of

    monkeypatch.setattr(_core, "cuda_device_of", ask(_core.INVALID_ARGUMENT))
    with pytest.raises(
        ValueError, match=r"unnamed allreduce: the OnDevice .* is said to lie on a CUDA device, but: no such"
    ):
        hvd.allreduce_(OnDevice())
    monkeypatch.setattr(_core, "cuda_device_of", ask(_core.UNAVAILABLE))
    with pytest.raises(RuntimeError, match=r"^no such memory$"):
        hvd.allreduce_(OnDevice())


@pytest.mark.skipif(hvd.nccl_built() > 0 and hvd.cuda_built(), reason="there may be a GPU here")
def test_without_cuda_a_device_array_is_a_clear_error() -> None:
    with pytest.raises(RuntimeError, match="CUDA"):
        hvd.allreduce_(OnDevice())


# ---- streams


@pytest.mark.parametrize(
    ("stream", "given", "works_there", "waits", "exported"),
    [
        (None, 0, True, [0], 1),
        (1, 0, True, [0], 1),
        (2, 0, True, [2, 0], 1),  # the library's threads have other default streams: the legacy one stands in
        (0xABC0, 0xABC0, False, [0xABC0], 0xABC0),  # it may be destroyed as soon as the operation has ended
    ],
)
def test_streams(
    calls: list[tuple[Any, ...]],
    stream: int | None,
    given: int,
    works_there: bool,
    waits: list[int],
    exported: int,
) -> None:
    output = hvd.allgather(OnDevice(stream=stream))
    assert (calls[0][13], calls[0][15]) == (works_there, given)
    assert isinstance(output, hvd.DeviceOutput)
    assert output._handle.waits == waits  # type: ignore[attr-defined]
    assert output.__cuda_array_interface__["stream"] == exported
    output, received = hvd.alltoall(OnDevice(stream=stream), splits=[1, 1])
    assert calls[1][8:11] == (works_there, 1, given) and output._handle.waits == waits
    assert received.tolist() == [1, 1]
    hvd.allgather_async(OnDevice(stream=stream))
    assert (calls[2][13], calls[2][15]) == (False, given)


# ---- what comes out


def test_a_device_output_says_where_it_lies() -> None:
    output = hvd.DeviceOutput(FakeHandle(), 0xABC0)  # type: ignore[arg-type]
    assert output.__cuda_array_interface__ == {
        "version": 3, "shape": (2, 3), "typestr": "<f4", "data": (ADDRESS, False), "strides": None, "stream": 0xABC0,
    }  # fmt: skip
    assert (output.shape, output.dtype, output.device) == ((2, 3), np.float32, 1)
    assert output.__dlpack_device__() == (2, 1)
    assert repr(output) == "DeviceOutput(shape=(2, 3), dtype=float32, device=1)"
    empty = hvd.DeviceOutput(FakeHandle((ADDRESS, [0, 3], _core.INT64, 0)), 1)  # type: ignore[arg-type]
    assert empty.__cuda_array_interface__["data"] == (0, False)


@pytest.mark.parametrize(
    ("stream", "waits"), [(None, [0]), (1, [0]), (2, [2, 0]), (0xDEF0, [0xDEF0]), (-1, [])], ids=str
)
def test_a_device_output_goes_through_dlpack(stream: int | None, waits: list[int]) -> None:
    handle = FakeHandle()
    output = hvd.DeviceOutput(handle, 1)  # type: ignore[arg-type]
    assert output.__dlpack__(stream=stream, max_version=(1, 0), dl_device=(2, 1), copy=False) == "capsule"
    assert handle.waits == waits


def test_dlpack_requests_that_cannot_be_met() -> None:
    handle = FakeHandle()
    output = hvd.DeviceOutput(handle, 1)  # type: ignore[arg-type]
    with pytest.raises(BufferError, match="copy it afterwards"):
        output.__dlpack__(copy=True)
    with pytest.raises(BufferError, match="cannot go to device"):
        output.__dlpack__(dl_device=(1, 0))
    for stream in (0, -2):
        with pytest.raises(BufferError, match=f"stream {stream} is none"):
            output.__dlpack__(stream=stream)
    assert handle.waits == []


def test_a_device_output_goes_back_in(calls: list[tuple[Any, ...]]) -> None:
    output = hvd.DeviceOutput(FakeHandle(), 0xABC0)  # type: ignore[arg-type]
    assert hvd.allreduce_(output) is output
    assert calls[0][3:5] == (ADDRESS, ADDRESS) and calls[0][14:16] == (1, 0xABC0)


def test_new_arrays_come_from_the_library_of_the_old(
    calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = OnDevice(data=(ADDRESS + 4096, False))
    entered: list[str] = []

    class Device:
        def __enter__(self) -> None:
            entered.append("its device")

        def __exit__(self, *_: object) -> None:
            pass

    class Cupy(OnDevice):
        device = Device()

    class Numba(OnDevice):
        pass

    class Other(OnDevice):
        def __array_namespace__(self) -> Any:
            return types.SimpleNamespace(empty_like=lambda array: made if array is self else None)

    Cupy.__module__ = "cupy._core.core"
    Numba.__module__ = "numba.cuda.cudadrv.devicearray"
    modules = {
        "cupy": types.SimpleNamespace(empty_like=lambda _array, order: made if order == "C" else None),
        "numba.cuda": types.SimpleNamespace(device_array_like=lambda _array: made),
    }
    monkeypatch.setattr(outputs, "importlib", types.SimpleNamespace(import_module=modules.__getitem__))
    for kind in (Cupy, Numba, Other):
        array = kind()
        assert hvd.allreduce(array) is made
        assert hvd.broadcast(array, 0) is made
        assert array.__cuda_array_interface__["data"] == (ADDRESS, False)
    assert [call[3:5] for call in calls] == [(ADDRESS, ADDRESS + 4096)] * 6
    assert entered == ["its device"] * 2


def test_new_arrays_that_cannot_be_made(calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="allreduce 'x': how to make an array like a OnDevice is not known"):
        hvd.allreduce(OnDevice(), name="x")

    class Elsewhere(OnDevice):
        def __array_namespace__(self) -> Any:
            return types.SimpleNamespace(empty_like=lambda _: OnDevice(data=(ADDRESS + 4096, False)))

    monkeypatch.setattr(_core, "cuda_device_of", lambda address: 0 if address == ADDRESS else 1)
    with pytest.raises(ValueError, match=r"on CUDA device 0 came out on device 1 .*: make device 0 the current one"):
        hvd.allreduce(Elsewhere())
    assert calls == []


def test_every_dtype_has_a_typestr_that_numpy_reads() -> None:
    for dtype in interfaces._DTYPES.values():
        typestr = interfaces.typestr_of(dtype)
        assert np.dtype(typestr).str == typestr


def test_the_public_functions_are_documented_and_typed() -> None:
    for name in hvd.__all__:
        value = getattr(hvd, name)
        if not callable(value):
            continue
        assert inspect.getdoc(value), name
        if inspect.isfunction(value):
            signature = inspect.signature(value)
            annotations = [parameter.annotation for parameter in signature.parameters.values()]
            assert inspect.Signature.empty not in [*annotations, signature.return_annotation], name
