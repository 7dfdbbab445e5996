"""Values, forms and gradients of the collective operations."""

from __future__ import annotations

import gc
import os
import time
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
from operations import ASYNC, equal_rows
from reference import (
    DTYPES,
    OPS,
    SHAPES,
    all_inputs,
    assert_reduced,
    assert_same_on_all_ranks,
    rank_input,
    reduced,
)

import horovod_cpp.torch as hvd
from horovod_cpp import _core


def own(inputs: list[torch.Tensor]) -> torch.Tensor:
    return inputs[hvd.rank()]


@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_allreduce_equals_the_reference_in_and_out_of_place(dtype: torch.dtype, op: int) -> None:
    for shape in SHAPES:
        inputs = all_inputs(shape, dtype)
        expected = reduced(inputs, op)
        before = own(inputs).clone()
        result = hvd.allreduce(own(inputs), op=op)
        assert_reduced(result, expected, dtype, f"{shape}")
        assert torch.equal(own(inputs), before)
        assert result.data_ptr() != own(inputs).data_ptr() or result.numel() == 0
        in_place = own(inputs).clone()
        assert hvd.allreduce_(in_place, op=op) is in_place
        assert torch.equal(in_place, result)
        assert_same_on_all_ranks(result)


@pytest.mark.parametrize("elements", [1, 4095, 65536, 1_000_003])
def test_allreduce_of_many_sizes(elements: int) -> None:
    inputs = all_inputs((elements,), torch.float32)
    assert_reduced(hvd.allreduce(own(inputs), op=hvd.Sum), reduced(inputs, hvd.Sum), torch.float32)


def test_default_is_average() -> None:
    inputs = all_inputs((9,), torch.float64)
    assert_reduced(hvd.allreduce(own(inputs)), reduced(inputs, hvd.Average), torch.float64)
    assert_reduced(hvd.allreduce_(own(inputs).clone()), reduced(inputs, hvd.Average), torch.float64)


def test_positions_of_parameters_are_horovods() -> None:
    inputs = all_inputs((9,), torch.float64)
    assert_reduced(
        hvd.allreduce_(own(inputs).clone(), None, "positional", hvd.Sum), reduced(inputs, hvd.Sum), torch.float64
    )
    result = hvd.allreduce(own(inputs), None, "positional", hvd.Compression.none, hvd.Sum, 2.0, 0.5)
    assert_reduced(result, reduced(inputs, hvd.Sum), torch.float64)


def test_average_is_deprecated_and_excludes_op() -> None:
    inputs = all_inputs((4,), torch.float64)
    with pytest.warns(DeprecationWarning) as caught:
        result = hvd.allreduce(own(inputs), average=False)
    assert caught[0].filename == __file__
    assert_reduced(result, reduced(inputs, hvd.Sum), torch.float64)
    with pytest.raises(ValueError, match="The op parameter supersedes average"):
        hvd.allreduce(own(inputs), average=True, op=hvd.Sum)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_factors_are_applied_before_and_after(dtype: torch.dtype) -> None:
    inputs = all_inputs((33,), dtype)
    expected = reduced([tensor.double() * 0.5 for tensor in inputs], hvd.Sum) * 1.5
    result = hvd.allreduce(own(inputs), op=hvd.Sum, prescale_factor=0.5, postscale_factor=1.5)
    assert_reduced(result, expected, dtype)
    handle = hvd.allreduce_async_(own(inputs).clone(), op=hvd.Sum, prescale_factor=0.5, postscale_factor=1.5)
    assert torch.equal(hvd.synchronize(handle), result)


def test_factors_of_integers_are_truncated() -> None:
    values = torch.tensor([-3, -2, -1, 0, 1, 2, 3, 100], dtype=torch.int32)
    result = hvd.allreduce(values, op=hvd.Sum, prescale_factor=0.5)
    assert torch.equal(result, (values.double() * 0.5).trunc().int() * hvd.size())
    result = hvd.allreduce(values, op=hvd.Sum, postscale_factor=0.3)
    assert torch.equal(result, (values.double() * hvd.size() * 0.3).trunc().int())
    wide = torch.tensor([2**40 + 1, -(2**40) - 1])
    result = hvd.allreduce(wide, op=hvd.Max, prescale_factor=0.25, postscale_factor=2.0)
    assert result.tolist() == [2**39, -(2**39)]


def test_half_precision_is_scaled_in_single() -> None:
    # 3e-8 is nothing in float16, and 3e4 times four is infinite.
    tiny = hvd.allreduce(torch.full((3,), 2.0**14, dtype=torch.float16), op=hvd.Max, prescale_factor=3e-8)
    assert torch.equal(tiny, torch.full((3,), 2.0**14 * 3e-8).half())
    large = hvd.allreduce(torch.full((3,), 3e4, dtype=torch.float16), op=hvd.Max, prescale_factor=0.25)
    assert torch.equal(large, torch.full((3,), 7500.0).half())


def test_compression_fp16_keeps_the_dtype() -> None:
    inputs = all_inputs((33,), torch.float32)
    result = hvd.allreduce(own(inputs), op=hvd.Sum, compression=hvd.Compression.fp16)
    assert result.dtype == torch.float32
    assert torch.allclose(result.double(), reduced(inputs, hvd.Sum), atol=2e-2)
    whole = hvd.allreduce(torch.ones(3, dtype=torch.int32), op=hvd.Sum, compression=hvd.Compression.fp16)
    assert whole.tolist() == [hvd.size()] * 3


def test_tensors_that_are_not_contiguous_are_copied_and_copied_back() -> None:
    inputs = all_inputs((6, 4), torch.float32)
    expected = reduced(inputs, hvd.Sum)
    transposed = own(inputs).clone().t()
    assert_reduced(hvd.allreduce(transposed, op=hvd.Sum), expected.t(), torch.float32)
    assert hvd.allreduce_(transposed, op=hvd.Sum) is transposed
    assert_reduced(transposed, expected.t(), torch.float32)

    big = own(inputs).clone()
    columns = big[:, 1:3]
    hvd.synchronize(hvd.allreduce_async_(columns, op=hvd.Sum))
    assert_reduced(big[:, 1:3].contiguous(), expected[:, 1:3], torch.float32)
    assert torch.equal(big[:, 0], own(inputs)[:, 0])
    assert hvd.allgather(columns).shape == (6 * hvd.size(), 2)
    assert hvd.broadcast_(columns, 0) is columns


def test_memory_formats_may_differ_between_ranks() -> None:
    inputs = all_inputs((2, 3, 4, 5), torch.float32)
    mine = own(inputs).clone()
    if hvd.rank() % 2 == 0:
        mine = mine.to(memory_format=torch.channels_last)
    hvd.allreduce_(mine, op=hvd.Sum)
    assert_reduced(mine, reduced(inputs, hvd.Sum), torch.float32)
    assert mine.is_contiguous(memory_format=torch.channels_last) == (hvd.rank() % 2 == 0)


def test_expanded_tensors_are_read_but_not_written() -> None:
    expanded = torch.full((1,), float(hvd.rank())).expand(5)
    total = hvd.size() * (hvd.size() - 1) / 2
    assert hvd.allreduce(expanded, op=hvd.Sum).tolist() == [total] * 5
    with pytest.raises(ValueError, match="expanded"):
        hvd.allreduce_(expanded, op=hvd.Sum)


def test_many_operations_in_flight_in_an_order_of_each_rank() -> None:
    count = 60
    inputs = [all_inputs((i * 13 % 97,), torch.float32, key=str(i)) for i in range(count)]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(hvd.rank())).tolist()
    handles = {i: hvd.allreduce_async(own(inputs[i]), name=f"shuffled.{i}", op=hvd.Sum) for i in order}
    for i in range(count):
        assert_reduced(hvd.synchronize(handles[i]), reduced(inputs[i], hvd.Sum), torch.float32, f"tensor {i}")


def test_mixed_dtypes_and_operations_in_flight() -> None:
    handles = []
    for i in range(30):
        for dtype in (torch.float32, torch.float16, torch.int64):
            inputs = all_inputs((50 + i,), dtype, key=f"mixed{i}")
            handle = hvd.allreduce_async(own(inputs), name=f"mixed.{dtype}.{i}", op=hvd.Sum)
            handles.append((handle, reduced(inputs, hvd.Sum), dtype))
        gathered = hvd.allgather_async(torch.full((hvd.rank() + 1,), float(i)), name=f"mixed.{i}")
        expected = torch.full((hvd.size() * (hvd.size() + 1) // 2,), float(i), dtype=torch.float64)
        handles.append((gathered, expected, torch.float32))
    for handle, expected, dtype in handles:
        assert_reduced(hvd.synchronize(handle), expected, dtype)


def test_poll_is_false_before_all_ranks_have_called() -> None:
    if hvd.size() == 1:
        pytest.skip("one rank never waits for another")
    for first in range(hvd.size()):
        handle = None
        if hvd.rank() == first:
            handle = hvd.allreduce_async(torch.ones(3), name="poll")
            assert not hvd.poll(handle)
        hvd.barrier()  # the others call after it
        if handle is None:
            handle = hvd.allreduce_async(torch.ones(3), name="poll")
        deadline = time.monotonic() + 30
        while not hvd.poll(handle):  # nothing is waited for here: the library has to get on by itself
            assert time.monotonic() < deadline
        assert hvd.synchronize(handle).tolist() == [1.0] * 3


def test_handles_that_are_not_known() -> None:
    handle = hvd.allreduce_async(torch.ones(2))
    assert isinstance(handle, int)
    assert hvd.synchronize(handle) is not None
    assert hvd.synchronize(handle) is None
    assert hvd.synchronize(None) is None
    with pytest.raises(ValueError, match=f"Handle {handle} was not created or has been cleared"):
        hvd.poll(handle)


def test_tensors_live_as_long_as_their_operation() -> None:
    tensor = torch.full((1000,), float(hvd.rank()))
    gone = weakref.ref(tensor)
    handle = hvd.allreduce_async(tensor, name="kept", op=hvd.Sum)
    del tensor
    gc.collect()
    filler = [torch.full((1000,), -1.0) for _ in range(100)]
    result = hvd.synchronize(handle)
    assert result is not None
    assert result.tolist() == [hvd.size() * (hvd.size() - 1) / 2] * 1000
    hvd.barrier()
    assert gone() is None
    del filler


def test_a_handle_that_is_dropped_does_no_harm() -> None:
    for _ in range(20):
        hvd.allreduce_async(torch.ones(10), op=hvd.Sum)
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == hvd.size()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_allgather_of_uneven_rows(dtype: torch.dtype) -> None:
    for rows in ([1] * hvd.size(), [3 * rank for rank in range(hvd.size())], [0] * hvd.size()):
        pieces = [rank_input((rows[rank], 2, 5), dtype, rank) for rank in range(hvd.size())]
        result = hvd.allgather(pieces[hvd.rank()])
        assert result.dtype == dtype
        assert torch.equal(result, torch.cat(pieces))
        handle = hvd.allgather_async(pieces[hvd.rank()])
        assert torch.equal(hvd.synchronize(handle), torch.cat(pieces))


def test_gathered_memory_outlives_its_handle_and_other_operations() -> None:
    results = [hvd.allgather(torch.full((100,), float(i))) for i in range(50)]
    gc.collect()
    for i, result in enumerate(results):
        assert result.unique().tolist() == [float(i)]
        result += 1  # it is ordinary memory


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_broadcast_from_every_root(dtype: torch.dtype) -> None:
    for root in range(hvd.size()):
        for shape in SHAPES:
            inputs = all_inputs(shape, dtype)
            before = own(inputs).clone()
            assert torch.equal(hvd.broadcast(own(inputs), root), inputs[root])
            assert torch.equal(own(inputs), before)
            assert torch.equal(hvd.synchronize(hvd.broadcast_async(own(inputs), root)), inputs[root])
            mine = own(inputs).clone()
            assert hvd.broadcast_(mine, root) is mine
            assert torch.equal(mine, inputs[root])
            mine = own(inputs).clone()
            assert hvd.synchronize(hvd.broadcast_async_(mine, root)) is mine
            assert torch.equal(mine, inputs[root])


def test_barrier_waits_for_the_last_rank_and_for_nothing_else() -> None:
    def start() -> list[int]:
        return [ASYNC[operation](equal_rows(), name=f"behind {operation}") for operation in ASYNC]

    handles = start() if hvd.rank() == 0 else []
    hvd.barrier()
    hvd.barrier()
    assert not any(hvd.poll(handle) for handle in handles) or hvd.size() == 1
    hvd.barrier()  # the others hand over only once rank 0 has looked
    for handle in handles or start():
        hvd.synchronize(handle)


@pytest.mark.parametrize("unfinished", ["allreduce", "allgather", "broadcast", "alltoall", "reducescatter"])
def test_barriers_pass_between_operations_that_nobody_waits_for(unfinished: str) -> None:
    for turn in range(20):
        handle = ASYNC[unfinished](equal_rows(), name=f"unfinished.{turn}")
        hvd.barrier()
        if turn % 2 == 0:
            hvd.synchronize(handle)
    hvd.barrier()


@pytest.mark.parametrize("op", ["sum", "average"])
def test_gradient_of_allreduce_is_the_same_reduction(op: str) -> None:
    tensor = own(all_inputs((5, 3), torch.float64)).requires_grad_()
    weights = all_inputs((5, 3), torch.float64, key="weights")
    (hvd.allreduce(tensor, op=OPS[op]) * own(weights)).sum().backward()
    assert_reduced(tensor.grad, reduced(weights, OPS[op]), torch.float64)


def test_gradient_of_allreduce_has_the_same_factors_and_goes_through_compression() -> None:
    tensor = torch.ones(4, requires_grad=True)
    hvd.allreduce(tensor, op=hvd.Sum, prescale_factor=0.5, compression=hvd.Compression.fp16).sum().backward()
    assert tensor.grad.dtype == torch.float32
    assert tensor.grad.tolist() == [0.5 * hvd.size()] * 4


def test_gradient_of_allgather_is_the_own_slice_of_the_average() -> None:
    rows = [2 * rank + 1 for rank in range(hvd.size())]
    tensor = rank_input((rows[hvd.rank()], 3), torch.float64, hvd.rank()).requires_grad_()
    weights = all_inputs((sum(rows), 3), torch.float64, key="weights")
    (hvd.allgather(tensor) * own(weights)).sum().backward()
    expected = torch.split(reduced(weights, hvd.Average), rows)[hvd.rank()]
    assert_reduced(tensor.grad, expected, torch.float64)


def test_gradient_of_broadcast_is_the_average_on_the_root_and_zero_elsewhere() -> None:
    root = hvd.size() - 1
    tensor = own(all_inputs((4,), torch.float64)).requires_grad_()
    weights = all_inputs((4,), torch.float64, key="weights")
    (hvd.broadcast(tensor, root) * own(weights)).sum().backward()
    expected = reduced(weights, hvd.Average)
    assert_reduced(tensor.grad, expected if hvd.rank() == root else torch.zeros_like(expected), torch.float64)


def test_no_gradient_is_recorded_without_need() -> None:
    with torch.no_grad():
        assert not hvd.allreduce(torch.ones(2, requires_grad=True)).requires_grad
    assert not hvd.allreduce(torch.ones(2)).requires_grad
    assert hvd.allreduce(torch.ones(2, requires_grad=True)).requires_grad


def test_broadcast_parameters_of_a_state_dict_and_of_named_parameters() -> None:
    torch.manual_seed(hvd.rank())
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(3, 2))
    model = model.to(memory_format=torch.channels_last)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    torch.manual_seed(0)
    expected = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(3, 2))
    for got, wanted in zip(model.state_dict().values(), expected.state_dict().values(), strict=True):
        assert torch.equal(got, wanted)
    last = hvd.size() - 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(hvd.rank())
    hvd.broadcast_parameters(model.named_parameters(), root_rank=last)
    hvd.broadcast_parameters(list(model.parameters()), root_rank=last)
    assert all(torch.equal(p, torch.full_like(p, last)) for p in model.parameters())
    with pytest.raises(ValueError, match="invalid params of type"):
        hvd.broadcast_parameters(torch.ones(2), root_rank=0)


def test_statistics_count_what_was_reduced() -> None:
    before = hvd.statistics()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hvd.allreduce(torch.ones(1000))
    after = hvd.statistics()
    assert after["bytes_reduced"] - before["bytes_reduced"] == 4000
    assert after["operations_done"] > before["operations_done"]
    assert after["operations_failed"] == before["operations_failed"]


def test_what_is_repeated_alone_goes_on_without_negotiation() -> None:
    before = hvd.statistics()["standing_calls"]
    for turn in range(60):
        for dtype, elements in (
            (torch.float32, 5),
            (torch.float64, 3000),
            (torch.float32, 40_003),
            (torch.int32, 2**18),
        ):
            tensor = torch.full((elements,), turn + hvd.rank(), dtype=dtype)
            total = hvd.allreduce_(tensor, op=hvd.Sum, name=f"repeated.{dtype}.{elements}")
            expected = turn * hvd.size() + hvd.size() * (hvd.size() - 1) // 2
            assert (total == expected).all()
    begun = hvd.statistics()["standing_calls"] - before
    if hvd.size() == 1:
        assert begun == 0
    elif os.environ.get("HOROVOD_TRANSPORT", "auto") in ("auto", "shm"):
        assert begun > 0


IN_PLACE: dict[str, Callable[[torch.Tensor], object]] = {
    "allreduce_": lambda tensor: hvd.allreduce_(tensor),
    "allreduce_async_": lambda tensor: hvd.synchronize(hvd.allreduce_async_(tensor)),
    "grouped_allreduce_": lambda tensor: hvd.grouped_allreduce_([torch.ones(2), tensor]),
    "grouped_allreduce_async_": lambda tensor: hvd.synchronize(hvd.grouped_allreduce_async_((tensor,))),
    "broadcast_": lambda tensor: hvd.broadcast_(tensor, 0),
    "broadcast_async_": lambda tensor: hvd.synchronize(hvd.broadcast_async_(tensor, 0)),
    "broadcast_parameters": lambda tensor: hvd.broadcast_parameters({"changed": tensor}, 0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("operation", IN_PLACE)
def test_backward_refuses_what_an_operation_has_changed_in_place(operation: str, dtype: torch.dtype) -> None:
    leaf = torch.ones(3, dtype=dtype, requires_grad=True)
    saved = leaf * 2
    product = saved * saved
    IN_PLACE[operation](saved)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.abs().sum().backward()
    with torch.inference_mode():
        IN_PLACE[operation](torch.ones(3, dtype=dtype))


def test_an_operation_out_of_place_changes_nothing_for_backward() -> None:
    leaf = torch.ones(3, requires_grad=True)
    saved = leaf * 2
    product = saved * saved
    hvd.allreduce(saved)
    hvd.broadcast(saved, 0)
    hvd.synchronize(hvd.allreduce_async(saved))
    product.sum().backward()
    assert leaf.grad.tolist() == [8.0] * 3


def started_in_place(**given: object) -> _core.InPlace | None:
    arguments = {"tensor": torch.ones(3), "name": "short", "op": hvd.Sum, "prescale": 1.0, "postscale": 1.0}
    arguments |= {"process_set": hvd.global_process_set, "caller_waits": False} | given
    return _core.start_in_place(*arguments.values())


def test_what_is_in_flight_in_place_has_its_tensor_until_it_is_gone() -> None:
    tensor = torch.ones(3)
    started = started_in_place(tensor=tensor)
    assert started is not None
    assert started.wait() is tensor and started.wait() is tensor and started.done()
    with pytest.raises(TypeError, match="cannot create"):
        type(started)()
    assert tensor.tolist() == [hvd.size()] * 3
    tensor.loop = started  # what keeps itself alive is found by the garbage collector
    watched = weakref.ref(tensor)
    del tensor, started
    hvd.barrier()  # the library lets go of what it was given in a later call
    gc.collect()
    assert watched() is None
    for i in range(3):
        assert started_in_place(name=f"dropped {i}") is not None  # it goes on


@pytest.mark.parametrize(
    "given",
    [
        {"tensor": [1.0]},
        {"tensor": torch.ones(2, 3).t()},
        {"tensor": torch.ones(1).expand(3)},
        {"tensor": torch.tensor([1 + 2j]).conj().imag},
        {"tensor": torch.ones(2, dtype=torch.complex64).conj()},
        {"name": 7},
        {"name": "a\0b"},
        {"op": 9},
        {"op": True},
        {"op": "Sum"},
        {"prescale": 2},
        {"postscale": None},
        {"process_set": None},
        {"process_set": hvd.ProcessSet([0])},
    ],
    ids=str,
)
def test_what_is_out_of_the_ordinary_goes_the_long_way(given: dict[str, object]) -> None:
    assert started_in_place(**given) is None
    started = started_in_place()
    assert started is not None, "nothing is left in flight, nor an error"
    started.wait()
