"""What goes wrong is an exception on all ranks, and the job goes on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import horovod_cpp.torch as hvd

several_ranks = pytest.mark.usefixtures("needs_several_ranks")


@pytest.fixture
def needs_several_ranks() -> None:
    if hvd.size() == 1:
        pytest.skip("one rank cannot disagree")


@pytest.fixture(autouse=True)
def job_stays_usable(job: None) -> object:
    yield
    assert hvd.allreduce(torch.ones(3), op=hvd.Sum).tolist() == [float(hvd.size())] * 3


def odd() -> bool:
    return hvd.rank() % 2 == 1


MISMATCHES: dict[str, tuple[str, Callable[[], object]]] = {
    "dtype": (
        "mismatched data type.*float32.*int32",
        lambda: hvd.allreduce(torch.ones(3, dtype=torch.int32 if odd() else torch.float32), name="mismatch"),
    ),
    "shape": ("mismatched shape.*4.*5", lambda: hvd.allreduce(torch.ones(4 + odd()), name="mismatch")),
    "dimensions": (
        r"mismatched shape.*\[4\].*\[2, ?2\]",
        lambda: hvd.allreduce(torch.ones((2, 2) if odd() else (4,)), name="mismatch"),
    ),
    "op": (
        "mismatched reduction",
        lambda: hvd.allreduce(torch.ones(3), op=hvd.Max if odd() else hvd.Sum, name="mismatch"),
    ),
    "factor": (
        "mismatched prescale factor.*1.*0.5",
        lambda: hvd.allreduce(torch.ones(3), prescale_factor=0.5 if odd() else 1.0, name="mismatch"),
    ),
    "root": ("mismatched root rank.*0.*1", lambda: hvd.broadcast(torch.ones(3), int(odd()), name="mismatch")),
    "broadcast shape": ("mismatched shape.*3.*4", lambda: hvd.broadcast(torch.ones(3 + odd()), 0, name="mismatch")),
    "gathered columns": ("mismatched shape", lambda: hvd.allgather(torch.ones(2, 3 + odd()), name="mismatch")),
    "gathered dtype": (
        "mismatched data type.*bool.*int8",
        lambda: hvd.allgather(torch.ones(2).to(torch.int8 if odd() else torch.bool), "mismatch"),
    ),
}


@several_ranks
@pytest.mark.parametrize("what", MISMATCHES)
def test_ranks_that_disagree_all_get_an_error_that_names_tensor_and_ranks(what: str) -> None:
    pattern, call = MISMATCHES[what]
    for _ in range(2):  # the name is free again afterwards
        with pytest.raises(hvd.HorovodInternalError, match=pattern) as caught:
            call()
        message = str(caught.value)
        assert "mismatch" in message
        assert "'mismatch'" in message, "the tensor is named"
        assert "1" in message and "0" in message, "the ranks are named"
        assert "test_errors.py" in message, "the place of the call is named"


@several_ranks
def test_a_mismatch_is_no_obstacle_for_what_is_in_flight_beside_it() -> None:
    good = [hvd.allreduce_async(torch.ones(10), name=f"good.{i}", op=hvd.Sum) for i in range(10)]
    bad = hvd.allreduce_async(torch.ones(2 + odd()), name="bad")
    good += [hvd.allreduce_async(torch.ones(10), name=f"good.{i}", op=hvd.Sum) for i in range(10, 20)]
    for handle in good:
        assert hvd.synchronize(handle).tolist() == [hvd.size()] * 10
    with pytest.raises(hvd.HorovodInternalError):
        hvd.synchronize(bad)


def test_a_scalar_cannot_be_gathered() -> None:
    with pytest.raises((ValueError, hvd.HorovodInternalError)):
        hvd.allgather(torch.tensor(1.0))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint16])
def test_a_dtype_that_is_not_supported(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"Tensor type .* is not supported\..*'strange'.*" + str(dtype)):
        hvd.allreduce(torch.ones(3, dtype=dtype), name="strange")
    with pytest.raises(ValueError, match=r"Tensor type .* is not supported\."):
        hvd.allgather(torch.ones(3).to_sparse())
    with pytest.raises(ValueError, match=r"Tensor type .* is not supported\.|meta"):
        hvd.broadcast(torch.ones(3, device="meta"), 0)


def test_a_name_twice_in_flight_is_refused_and_a_barrier_passes_meanwhile() -> None:
    def start_twice() -> None:
        hvd.allreduce_async(torch.ones(5), name="duplicate_name")
        with pytest.raises(ValueError, match="duplicate_name"):
            hvd.allreduce_async(torch.ones(5), name="duplicate_name")

    if hvd.size() == 1:
        pytest.skip("one rank is done at once")
    if hvd.rank() == 0:
        start_twice()
    hvd.barrier()
    if hvd.rank() > 0:
        hvd.allreduce_async(torch.ones(5), name="duplicate_name")
    hvd.barrier()


def test_the_same_name_for_different_operations_is_no_duplicate() -> None:
    handles = [
        hvd.allreduce_async(torch.ones(5), name="shared", op=hvd.Sum),
        hvd.allgather_async(torch.ones(1), name="shared"),
        hvd.broadcast_async(torch.ones(5), 0, name="shared"),
    ]
    assert [hvd.synchronize(handle).sum().item() for handle in handles] == [5 * hvd.size(), hvd.size(), 5]


def test_a_root_that_is_no_rank() -> None:
    for root in (-1, hvd.size()):
        with pytest.raises(ValueError, match=f"invalid root rank {root}"):
            hvd.broadcast(torch.ones(2), root)


def test_a_reduction_that_is_not_known() -> None:
    with pytest.raises(ValueError):
        hvd.allreduce(torch.ones(2), op=17)


def test_a_name_with_a_zero_byte() -> None:
    with pytest.raises(ValueError, match="zero byte"):
        hvd.allreduce(torch.ones(2), name="a\0b")


def test_a_process_set_that_is_not_registered() -> None:
    with pytest.raises(ValueError, match="does not exist, or has not been registered"):
        hvd.allreduce(torch.ones(2), process_set=hvd.ProcessSet([0]))
    stranger = hvd.ProcessSet([0])
    stranger.process_set_id = 12345
    with pytest.raises(ValueError, match="does not exist, or has not been registered"):
        hvd.allreduce(torch.ones(2), process_set=stranger)
