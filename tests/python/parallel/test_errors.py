"""What goes wrong is an exception on all ranks, and the job goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from operations import ASYNC, REDUCING, equal_rows, run

import horovod_cpp.torch as hvd
from horovod_cpp import arrays

several_ranks = pytest.mark.usefixtures("needs_several_ranks")


@pytest.fixture
def needs_several_ranks() -> None:
    if hvd.size() == 1:
        pytest.skip("one rank cannot disagree")


@pytest.fixture(autouse=True)
def job_stays_usable(job: None) -> Iterator[None]:
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


Arguments = tuple[torch.Tensor, dict[str, Any]]

# What differs, of which operations, and what each rank hands over.
DIFFERENCES: dict[str, tuple[list[str], str, Callable[[], Arguments]]] = {
    "dtype": (
        list(ASYNC),
        "mismatched data type.*float32.*int32",
        lambda: (equal_rows(3, dtype=torch.int32 if odd() else torch.float32), {}),
    ),
    "columns": (list(ASYNC), r"mismatched shape.*\b3\b.*\b4\b", lambda: (equal_rows(3 + odd()), {})),
    "dimensions": (list(ASYNC), "mismatched shape", lambda: (equal_rows(*([3] if odd() else [])), {})),
    "rows": (
        [name for name in ASYNC if "allgather" not in name and name != "alltoall"],
        "mismatched shape",
        lambda: (torch.ones(2 * hvd.size() * (1 + odd())), {}),
    ),
    "reduction": (REDUCING, "mismatched reduction", lambda: (equal_rows(), {"op": hvd.Average if odd() else hvd.Sum})),
    "prescale factor": (
        REDUCING,
        r"mismatched prescale factor.*\b1\b.*0\.5",
        lambda: (equal_rows(), {"prescale_factor": 0.5 if odd() else 1.0}),
    ),
    "postscale factor": (
        REDUCING,
        r"mismatched postscale factor.*\b1\b.*0\.5",
        lambda: (equal_rows(), {"postscale_factor": 0.5 if odd() else 1.0}),
    ),
}


@several_ranks
@pytest.mark.parametrize(
    ("what", "operation"), [(what, operation) for what, (names, _, _) in DIFFERENCES.items() for operation in names]
)
def test_a_difference_between_ranks_is_an_error_on_each_of_them(what: str, operation: str) -> None:
    _, pattern, arguments = DIFFERENCES[what]
    tensor, options = arguments()
    with pytest.raises(hvd.HorovodInternalError, match=pattern) as caught:
        run(operation, tensor, name="difference", **options)
    assert "'difference'" in str(caught.value) and "rank" in str(caught.value)
    run(operation, equal_rows(), name="difference")  # the name is free


@several_ranks
def test_a_mismatch_is_no_obstacle_for_what_is_in_flight_beside_it() -> None:
    good = [hvd.allreduce_async(torch.ones(10), name=f"good.{i}", op=hvd.Sum) for i in range(10)]
    bad = hvd.allreduce_async(torch.ones(2 + odd()), name="bad")
    good += [hvd.allreduce_async(torch.ones(10), name=f"good.{i}", op=hvd.Sum) for i in range(10, 20)]
    for handle in good:
        assert hvd.synchronize(handle).tolist() == [hvd.size()] * 10
    with pytest.raises(hvd.HorovodInternalError):
        hvd.synchronize(bad)


@pytest.mark.parametrize("form", [hvd.allgather_async, lambda tensor: hvd.grouped_allgather_async([tensor])])
@pytest.mark.parametrize("trained", [False, True])
def test_a_scalar_cannot_be_gathered_as_all_ranks_are_told(form: Callable[..., int], trained: bool) -> None:
    """Horovod's type and moment: where only some ranks bring a scalar, the others do not wait."""
    handle = form(torch.tensor(1.0, requires_grad=trained))
    with pytest.raises(hvd.HorovodInternalError, match="a scalar cannot be gathered"):
        hvd.synchronize(handle)
    handle = form(torch.tensor(1.0) if odd() else torch.ones(1))
    if hvd.size() > 1:
        with pytest.raises(hvd.HorovodInternalError, match="mismatched number of dimensions"):
            hvd.synchronize(handle)
    else:
        hvd.synchronize(handle)
    with pytest.raises(hvd.HorovodInternalError, match="a scalar cannot be gathered"):
        hvd.allgather(torch.tensor(1.0, requires_grad=trained))
    assert hvd.allgather(torch.ones(1)).tolist() == [1.0] * hvd.size()


@pytest.mark.parametrize("operation", ["alltoall", "reducescatter", "grouped_reducescatter"])
def test_a_scalar_has_no_rows(operation: str) -> None:
    with pytest.raises(ValueError, match="scalar"):
        run(operation, torch.tensor(1.0))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint16])
def test_a_dtype_that_is_not_supported(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"Tensor type .* is not supported\..*'strange'.*" + str(dtype)):
        hvd.allreduce(torch.ones(3, dtype=dtype), name="strange")
    with pytest.raises(ValueError, match=r"Tensor type .* is not supported\."):
        hvd.allgather(torch.ones(3).to_sparse())
    with pytest.raises(ValueError, match=r"Tensor type .* is not supported\.|meta"):
        hvd.broadcast(torch.ones(3, device="meta"), 0)


@pytest.mark.parametrize("operation", ASYNC)
def test_no_operation_takes_a_dtype_that_is_not_supported(operation: str) -> None:
    with pytest.raises(ValueError, match=r"Tensor type .* is not supported\..*'strange'"):
        run(operation, equal_rows().to(torch.float8_e5m2), name="strange")


def test_op_and_average_exclude_each_other_in_every_form() -> None:
    forms: list[Callable[..., Any]] = [hvd.allreduce, hvd.allreduce_, hvd.allreduce_async, hvd.allreduce_async_]
    groups: list[Callable[..., Any]] = [
        hvd.grouped_allreduce, hvd.grouped_allreduce_, hvd.grouped_allreduce_async, hvd.grouped_allreduce_async_,
    ]  # fmt: skip
    for form, given in [(form, equal_rows()) for form in forms] + [(form, [equal_rows()]) for form in groups]:
        with pytest.raises(
            ValueError, match=r"The op parameter supersedes average\. Please provide only one of them\."
        ):
            form(given, average=True, op=hvd.Sum)
        with pytest.warns(DeprecationWarning):
            result = form(given, average=True)
        if isinstance(result, int):
            result = hvd.synchronize(result)
        assert all((tensor == 1).all() for tensor in (result if isinstance(result, list) else [result]))


@several_ranks
@pytest.mark.parametrize("operation", ASYNC)
def test_no_operation_takes_a_name_that_is_in_flight(operation: str) -> None:
    def start() -> int:
        return ASYNC[operation](equal_rows(), name="twice")

    first_rank = hvd.rank() == 0
    handle = start() if first_rank else None
    if first_rank:
        with pytest.raises(ValueError, match=r"^Requested to .* with the same name as another tensor .*'twice'"):
            start()
    hvd.barrier()
    hvd.synchronize(start() if handle is None else handle)
    run(operation, equal_rows(), name="twice")


@several_ranks
def test_one_name_in_two_kinds_of_operations_is_two_operations() -> None:
    # In whatever order ranks come to them; neither is taken for the other.
    starts: list[Callable[[], int]] = [
        lambda: hvd.allreduce_async(torch.ones(4), name="kinds", op=hvd.Sum),
        lambda: hvd.allgather_async(torch.ones(1), name="kinds"),
    ]
    order = (0, 1) if odd() else (1, 0)
    first = starts[order[0]]()
    hvd.barrier()
    assert not hvd.poll(first)
    hvd.barrier()  # a rank that went on would complete what a slower one has yet to look at
    handles = {order[0]: first, order[1]: starts[order[1]]()}
    assert hvd.synchronize(handles[0]).tolist() == [float(hvd.size())] * 4
    assert hvd.synchronize(handles[1]).tolist() == [1.0] * hvd.size()


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
    for root in (-1, hvd.size(), 2**40, -(2**70)):
        for tensor in (torch.ones(2), torch.ones(2, 2)[:, 0]):  # one takes a longer way to the library
            with pytest.raises(ValueError, match=f"broadcast received invalid root rank {root} for"):
                hvd.broadcast(tensor, root)
        with pytest.raises(ValueError, match=f"broadcast received invalid root rank {root} for"):
            hvd.broadcast_object(1, root)
        with pytest.raises(ValueError, match=f"broadcast received invalid root rank {root} for"):
            arrays.broadcast(numpy.ones(2), root)


@pytest.mark.parametrize("op", [6, 17, -1, 256, 257, 259, 2**40])
def test_a_reduction_that_is_not_known(op: int) -> None:
    """Also where its last eight bits would be known."""
    for call, what in (
        (lambda: hvd.allreduce(torch.ones(2), name="odd", op=op), "allreduce 'odd'"),
        (lambda: hvd.allreduce_async_(torch.ones(2).double().t(), op=op), "unnamed allreduce"),
        (lambda: hvd.grouped_allreduce([torch.ones(2)], name="odd", op=op), "grouped allreduce 'odd'"),
        (lambda: hvd.reducescatter(torch.ones(2), name="odd", op=op), "reducescatter 'odd'"),
        (lambda: hvd.grouped_reducescatter([torch.ones(2)], "odd", op=op), "grouped reducescatter 'odd'"),
    ):
        with pytest.raises(ValueError, match=f"^{what}: reduction number {op} is not known"):
            call()
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == hvd.size()


@pytest.mark.parametrize("operation", ASYNC)
@pytest.mark.parametrize("wrong", [[1.0, 2.0], numpy.ones(3), 3.0, None], ids=["list", "array", "number", "none"])
def test_what_is_no_tensor_is_named_with_its_operation(operation: str, wrong: Any) -> None:
    given = [torch.ones(2), wrong] if operation.startswith("grouped") else wrong
    root = [0] if operation.startswith("broadcast") else []
    in_place = "_" if operation.endswith("_") else ""
    for form in (operation, f"{operation.rstrip('_')}_async{in_place}"):
        expected = f"^{in_words(operation)} 'odd': takes torch tensors, not .*{type(wrong).__name__}$"
        with pytest.raises(TypeError, match=expected):
            getattr(hvd, form)(given, *root, name="odd")
    run(operation, equal_rows(), name="odd")


def in_words(operation: str) -> str:
    return operation.rstrip("_").replace("grouped_", "grouped ")


@pytest.mark.parametrize("operation", ASYNC)
def test_names_and_sets_of_the_wrong_type_are_named_with_their_operation(operation: str) -> None:
    kind = in_words(operation)
    with pytest.raises(TypeError, match=f"^{kind}: name has to be a str or None, not 5 of type int$"):
        run(operation, equal_rows(), name=5)
    for wrong in ([0], None, 0):
        expected = rf"^{kind} 'odd': process_set has to be a ProcessSet, .*{type(wrong).__name__}$"
        with pytest.raises(TypeError, match=expected):
            run(operation, equal_rows(), name="odd", process_set=wrong)
    with pytest.raises(TypeError, match=r"^barrier: process_set has to be a ProcessSet"):
        hvd.barrier([0])  # type: ignore[arg-type]


def test_numbers_of_the_wrong_type_are_named_with_their_operation() -> None:
    ones, wrong = torch.ones(hvd.size()), "of type (str|float|NoneType)$"
    for op in ("sum", 1.0):
        with pytest.raises(TypeError, match=f"^allreduce 'odd': op has to be hvd.Average, .*{wrong}"):
            hvd.allreduce(ones, name="odd", op=op)  # type: ignore[arg-type]
    for forms, given in (([hvd.reducescatter], ones), ([hvd.grouped_reducescatter], [ones])):
        with pytest.raises(TypeError, match=f"reducescatter 'odd': op has to be hvd.Average, .*{wrong}"):
            forms[0](given, name="odd", op=None)
    for factor in ("half", "2"):
        with pytest.raises(TypeError, match=f"^allreduce 'odd': prescale_factor has to be a number, .*{wrong}"):
            hvd.allreduce(ones, name="odd", prescale_factor=factor)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=f"^broadcast 'odd': root_rank has to be a rank, .*{wrong}"):
        hvd.broadcast(ones, "0", name="odd")  # type: ignore[arg-type]
    assert hvd.broadcast(ones, 0, name="odd").tolist() == ones.tolist()


def test_refusals_name_the_operation() -> None:
    with pytest.raises(ValueError, match=r"supersedes average\. .*\(allreduce 'odd'\)$"):
        hvd.allreduce(torch.ones(2), True, "odd", op=hvd.Sum)
    with pytest.raises(ValueError, match=r"\(grouped allreduce 'odd'\)$"):
        hvd.grouped_allreduce([torch.ones(2)], True, "odd", op=hvd.Sum)
    with pytest.raises(ValueError, match=r"^allreduce 'odd': an expanded tensor cannot be the output"):
        hvd.allreduce_(torch.ones(1).expand(3), name="odd")


def test_a_name_with_a_zero_byte() -> None:
    with pytest.raises(ValueError, match="zero byte"):
        hvd.allreduce(torch.ones(2), name="a\0b")


def test_a_process_set_that_is_not_registered() -> None:
    with pytest.raises(ValueError, match="does not exist, or has not been registered"):
        hvd.allreduce(torch.ones(2), process_set=hvd.ProcessSet([0]))
    stranger = hvd.ProcessSet([0])
    stranger.process_set_id = 12345
    with pytest.raises(ValueError, match=r"does not exist, or has not been registered.*\(allreduce 'odd'\)$"):
        hvd.allreduce(torch.ones(2), name="odd", process_set=stranger)


@pytest.mark.parametrize("operation", ASYNC)
def test_no_operation_runs_in_a_set_that_is_not_registered(operation: str) -> None:
    with pytest.raises(ValueError, match=r"does not exist, or has not been registered.* 'odd'\)$"):
        run(operation, equal_rows(), name="odd", process_set=hvd.ProcessSet([0]))


@several_ranks
@pytest.mark.usefixtures("alone_and_beside_a_stuck_set")
def test_no_operation_runs_in_a_set_without_the_rank() -> None:
    first = hvd.add_process_set([0])
    for operation in ASYNC:
        if hvd.rank() == 0:
            run(operation, equal_rows(), process_set=first)
        else:
            with pytest.raises(ValueError, match=rf"Rank {hvd.rank()} is not a member of the provided process set"):
                run(operation, equal_rows(), process_set=first)
            with pytest.raises(ValueError, match=r"is not a member of the provided process set.* 'odd'\)$"):
                run(operation, equal_rows(), name="odd", process_set=first)
    if hvd.rank() > 0:
        with pytest.raises(ValueError, match=rf"Rank {hvd.rank()} is not a member.* \(barrier\)$"):
            hvd.barrier(first)
    hvd.barrier()
    assert hvd.remove_process_set(first)


def test_before_init_every_operation_says_so() -> None:
    hvd.barrier()
    hvd.shutdown()
    for operation in ASYNC:
        with pytest.raises(hvd.HorovodInternalError, match=r"^Horovod has not been initialized; use hvd\.init\(\)\.$"):
            run(operation, torch.ones(12))
    for call in (hvd.barrier, hvd.join):
        with pytest.raises(hvd.HorovodInternalError, match=r"^Horovod has not been initialized; use hvd\.init\(\)\.$"):
            call()
    for question in (hvd.rank, hvd.size, hvd.local_rank, hvd.local_size, hvd.cross_rank, hvd.cross_size,
                     hvd.is_homogeneous, hvd.mpi_threads_supported, hvd.mpi_enabled, hvd.gloo_enabled):  # fmt: skip
        with pytest.raises(ValueError, match=r"^Horovod has not been initialized; use hvd\.init\(\)\.$"):
            question()
    hvd.init(process_sets="dynamic")


@several_ranks
def test_once_a_rank_has_shut_down_every_operation_of_the_others_says_so() -> None:
    last = hvd.size() - 1
    waiting = {
        operation: ASYNC[operation](equal_rows(), name=f"waits.{operation}") for operation in ASYNC if hvd.rank() == 0
    }
    hvd.barrier()
    if hvd.rank() == last:
        hvd.shutdown()
    else:
        for handle in waiting.values():
            with pytest.raises(hvd.HorovodInternalError, match=rf"^Horovod has been shut down\. Rank {last} "):
                hvd.synchronize(handle)
        for operation in ASYNC:
            with pytest.raises(hvd.HorovodInternalError, match=rf"^Horovod has been shut down\. Rank {last} "):
                run(operation, equal_rows())
        for call in (hvd.barrier, hvd.join):
            with pytest.raises(hvd.HorovodInternalError, match=rf"^Horovod has been shut down\. Rank {last} "):
                call()
        hvd.shutdown()
    hvd.init(process_sets="dynamic")
