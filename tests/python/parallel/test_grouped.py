"""Grouped collectives: several tensors, one operation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from reference import OPS, all_inputs, assert_reduced, assert_same_on_all_ranks, rank_input, reduced

import horovod_cpp.torch as hvd
from horovod_cpp.torch import operations
from horovod_cpp.torch.streams import HOST

SHAPES = [(17,), (), (3, 17, 7), (0,), (40_000,), (5,)]
MIXED = [torch.float32, torch.float64, torch.int64, torch.float16, torch.float32, torch.float32]


def group(rank: int) -> list[torch.Tensor]:
    return [rank_input(shape, dtype, rank) for shape, dtype in zip(SHAPES, MIXED, strict=True)]


@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_grouped_allreduce_of_mixed_types_and_sizes(op: int) -> None:
    outputs = hvd.grouped_allreduce(group(hvd.rank()), op=op)
    for output, shape, dtype in zip(outputs, SHAPES, MIXED, strict=True):
        assert_reduced(output, reduced(all_inputs(shape, dtype), op), dtype, f"{shape} {dtype}")
        assert_same_on_all_ranks(output)


def test_in_place_and_async_forms() -> None:
    tensors = [torch.full((5,), float(hvd.rank())), torch.full((4, 6), float(hvd.rank())).t()]  # one is not contiguous
    total = float(sum(range(hvd.size())))
    outputs = hvd.grouped_allreduce_(tensors, op=hvd.Sum)
    assert all(output is tensor for output, tensor in zip(outputs, tensors, strict=True))
    assert all((tensor == total).all() for tensor in tensors)
    handle = hvd.grouped_allreduce_async_(tensors, name="again", op=hvd.Average)
    assert all(output is tensor for output, tensor in zip(hvd.synchronize(handle), tensors, strict=True))
    assert all((tensor == total).all() for tensor in tensors)
    handle = hvd.grouped_allreduce_async(tensors, name="new", op=hvd.Sum)
    assert all((output == total * hvd.size()).all() for output in hvd.synchronize(handle))
    assert all((tensor == total).all() for tensor in tensors)


def test_complex_members_compression_and_factors() -> None:
    tensors = [torch.full((3,), 1 + 2j), torch.full((), 0.5), torch.ones(3, dtype=torch.complex128)[:0]]
    outputs = hvd.grouped_allreduce(tensors, op=hvd.Sum, prescale_factor=2.0)
    assert outputs[0].tolist() == [(2 + 4j) * hvd.size()] * 3 and outputs[1].item() == hvd.size()
    assert outputs[2].dtype == torch.complex128 and outputs[2].shape == (0,)
    outputs = hvd.grouped_allreduce([torch.ones(3), torch.ones(2)], compression=hvd.Compression.bf16, op=hvd.Sum)
    assert [output.dtype for output in outputs] == [torch.float32] * 2
    assert outputs[1].tolist() == [hvd.size()] * 2


def calls_and_messages(work: Callable[[], object]) -> tuple[int, int]:
    hvd.barrier()
    before = hvd.statistics()
    work()
    after = hvd.statistics()
    return (
        after["collective_calls"] - before["collective_calls"],
        after["control_messages_sent"] - before["control_messages_sent"],
    )


def test_a_group_is_one_call_and_one_agreement() -> None:
    many = [torch.ones(10 + i) for i in range(50)]
    for work in (
        lambda: hvd.grouped_allreduce(many, name="many"),
        lambda: hvd.grouped_allgather(many, name="many"),
        lambda: hvd.grouped_reducescatter(many, name="many"),
    ):
        calls, messages = calls_and_messages(work)
        assert calls == 1
        # A worker tells the coordinator once; the coordinator answers each of the others.
        assert messages <= (hvd.size() - 1 if hvd.rank() == 0 else 1)


def test_all_or_none() -> None:
    if hvd.size() == 1:
        pytest.skip("one rank agrees with itself")
    odd = 4 if hvd.rank() == hvd.size() - 1 else 3
    tensors = [torch.ones(3), torch.ones(odd), torch.ones(2)]
    with pytest.raises(hvd.HorovodInternalError, match=rf"\[3\], \[4\], \[2\]: rank {hvd.size() - 1}"):
        hvd.grouped_allreduce_(tensors, name="group", op=hvd.Sum)
    assert [tensor.sum().item() for tensor in tensors] == [3, odd, 2]  # nothing was reduced
    short = tensors[:1] if hvd.rank() == 0 else tensors[:2]
    with pytest.raises(hvd.HorovodInternalError, match=r"mismatched number of tensors: 1: rank 0 .*; 2: rank"):
        hvd.grouped_allgather(short, name="group")
    assert hvd.grouped_allreduce([torch.ones(1)], name="group", op=hvd.Sum)[0].item() == hvd.size()


def test_refusals() -> None:
    for function in (hvd.grouped_allreduce, hvd.grouped_allgather, hvd.grouped_reducescatter):
        with pytest.raises(ValueError, match="of no tensors"):
            function([])
        with pytest.raises(ValueError, match="is not supported"):
            function([torch.ones(2), torch.ones(2).to_sparse()])
    with pytest.raises(hvd.HorovodInternalError, match="a scalar cannot be gathered"):
        hvd.grouped_allgather([torch.ones(2), torch.tensor(1.0)])
    with pytest.raises(ValueError, match="Reducescatter does not support scalar inputs"):
        hvd.grouped_reducescatter([torch.ones(2), torch.tensor(1.0)])


@pytest.mark.parametrize("form", ["allreduce", "allreduce_", "allgather", "reducescatter"])
def test_tensors_on_several_devices_are_no_group(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Where there is one device only, a tensor has to pretend that it is on another one.
    elsewhere = torch.ones(2)
    monkeypatch.setattr(operations, "device_of", lambda tensor: 5 if tensor is elsewhere else HOST)
    with pytest.raises(hvd.HorovodInternalError, match=r"^Tensors in list must be on same device\. .*'devices': cpu"):
        getattr(hvd, f"grouped_{form}")([torch.ones(2), elsewhere], name="devices")
    hvd.barrier()


@pytest.mark.parametrize("rows", [3, 20_000], ids=["packed", "one by one"])
def test_grouped_allgather(rows: int) -> None:
    def tensors(rank: int) -> list[torch.Tensor]:
        return [
            rank_input((rows + rank, 2), torch.float32, rank),
            rank_input((rank,), torch.int16, rank),
            rank_input((2 * rank + 1, 3), torch.bool, rank),
        ]

    expected = [torch.cat(parts) for parts in zip(*map(tensors, range(hvd.size())), strict=True)]
    outputs = hvd.grouped_allgather(tensors(hvd.rank()))
    assert all(torch.equal(output, due) for output, due in zip(outputs, expected, strict=True))
    outputs = hvd.synchronize(hvd.grouped_allgather_async(tensors(hvd.rank()), name="later"))
    assert all(torch.equal(output, due) for output, due in zip(outputs, expected, strict=True))


def test_grouped_allgather_again_with_other_rows() -> None:
    for turn in range(4):
        outputs = hvd.grouped_allgather([torch.ones(turn % 2 + hvd.rank()), torch.zeros(turn // 2, 2)], name="turns")
        assert outputs[0].numel() == sum(turn % 2 + rank for rank in range(hvd.size()))
        assert outputs[1].shape == (turn // 2 * hvd.size(), 2)


@pytest.mark.parametrize("op", [hvd.Sum, hvd.Average], ids=["sum", "average"])
def test_grouped_reducescatter(op: int) -> None:
    shapes = [(7,), (2 * hvd.size() + 1, 3), (0, 4), (30_000, 2)]
    dtypes = [torch.float32, torch.int32, torch.float32, torch.float32]
    inputs = [all_inputs(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    outputs = hvd.grouped_reducescatter([one[hvd.rank()] for one in inputs], op=op)
    singles = [hvd.reducescatter(one[hvd.rank()], op=op) for one in inputs]
    for output, single, one, dtype in zip(outputs, singles, inputs, dtypes, strict=True):
        assert torch.equal(output, single)
        gathered = hvd.allgather(output)
        assert_reduced(gathered, reduced(one, op), dtype)


@pytest.mark.parametrize("form", ["allreduce", "allgather", "reducescatter"])
def test_gradients_equal_those_of_the_single_forms(form: str) -> None:
    single: Callable[..., torch.Tensor] = getattr(hvd, form)
    grouped: Callable[..., list[torch.Tensor]] = getattr(hvd, f"grouped_{form}")
    options = {} if form == "allgather" else {"op": hvd.Sum, "prescale_factor": 0.5}
    shapes = [(4, 2), (2 * hvd.size(),)]
    gradients = []
    for together in (False, True):
        leaves = [rank_input(shape, torch.float64, hvd.rank()).requires_grad_() for shape in shapes]
        outputs = grouped(leaves, **options) if together else [single(leaf, **options) for leaf in leaves]
        weights = [torch.arange(1.0, output.numel() + 1).reshape(output.shape) for output in outputs]
        loss = sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))
        assert isinstance(loss, torch.Tensor)
        (loss * (hvd.rank() + 1)).backward()
        gradients.append([leaf.grad for leaf in leaves])
    for alone, with_others in zip(*gradients, strict=True):
        assert alone is not None and with_others is not None
        assert torch.allclose(alone, with_others, atol=1e-12)
