"""Tensors whose memory is in another order than that of their dimensions: channels_last, transposed and the like."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from reference import OPS, all_inputs, assert_reduced, assert_same_on_all_ranks, reduced
from torch.utils._python_dispatch import TorchDispatchMode

import horovod_cpp.torch as hvd
from horovod_cpp import _core
from horovod_cpp.torch import operations

FORMATS: dict[str, tuple[tuple[int, ...], Callable[[torch.Tensor], torch.Tensor]]] = {
    "channels_last": ((2, 3, 5, 7), lambda t: t.contiguous(memory_format=torch.channels_last)),
    "channels_last_3d": ((2, 3, 4, 5, 3), lambda t: t.contiguous(memory_format=torch.channels_last_3d)),
    "transposed": ((37, 11), lambda t: t.t().contiguous().t()),
    "permuted": ((4, 3, 5), lambda t: t.permute(1, 2, 0).contiguous().permute(2, 0, 1)),
    "size one": ((3, 1, 5, 1), lambda t: t.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)),
    "large": ((64, 17, 13, 11), lambda t: t.contiguous(memory_format=torch.channels_last)),
}
EMPTY = torch.empty(2, 0, 4, 4).contiguous(memory_format=torch.channels_last)


class Copies(TorchDispatchMode):
    """Notes what torch copies."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten.copy_, torch.ops.aten._to_copy):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def no_copies() -> Iterator[None]:
    before = hvd.statistics()["bytes_reordered"]
    with Copies() as copies:
        yield
    assert not copies.seen
    assert hvd.statistics()["bytes_reordered"] == before


def inputs_in(name: str, dtype: torch.dtype = torch.float32) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The inputs of all ranks, and this rank's in that format."""
    shape, laid_out = FORMATS[name]
    inputs = all_inputs(shape, dtype, name)
    mine = laid_out(inputs[hvd.rank()].clone())
    assert not mine.is_contiguous()
    assert torch.equal(mine, inputs[hvd.rank()])
    return inputs, mine


def odd_one(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in that format on the last rank, contiguous on the others."""
    return FORMATS[name][1](tensor.clone()) if hvd.rank() == hvd.size() - 1 else tensor.contiguous()


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_block_is_reduced_where_it_lies(name: str, op: int) -> None:
    inputs, mine = inputs_in(name)
    strides, address = mine.stride(), mine.data_ptr()
    with no_copies():
        result = hvd.allreduce(mine, op=op)
    assert result.stride() == strides
    assert_reduced(result, reduced(inputs, op), torch.float32)
    assert torch.equal(mine, inputs[hvd.rank()])
    with no_copies():
        assert hvd.allreduce_(mine, op=op) is mine
    assert (mine.stride(), mine.data_ptr()) == (strides, address)
    assert torch.equal(mine, result)
    assert_same_on_all_ranks(mine)


@pytest.mark.parametrize("name", FORMATS)
def test_a_block_is_sent_from_where_it_lies_to_where_it_lies(name: str) -> None:
    root = hvd.size() - 1
    inputs, mine = inputs_in(name)
    with no_copies():
        result = hvd.broadcast(mine, root)
    assert result.stride() == mine.stride()
    assert torch.equal(result, inputs[root])
    with no_copies():
        assert hvd.broadcast_(mine, root) is mine
    assert torch.equal(mine, inputs[root])


def test_a_group_of_blocks_is_not_copied() -> None:
    inputs, mine = zip(*(inputs_in(name) for name in FORMATS), strict=True)
    with no_copies():
        results = hvd.grouped_allreduce(list(mine), op=hvd.Sum)
    for given, own, result in zip(inputs, mine, results, strict=True):
        assert result.stride() == own.stride()
        assert_reduced(result, reduced(given, hvd.Sum), torch.float32)
    with no_copies():
        hvd.grouped_allreduce_(list(mine), op=hvd.Sum)
    for result, own in zip(results, mine, strict=True):
        assert torch.equal(own, result)


def test_many_small_blocks_in_flight_are_fused_with_others() -> None:
    shape, laid_out = FORMATS["channels_last"]
    inputs = [all_inputs(shape, torch.float64, str(i)) for i in range(40)]
    mine = [
        laid_out(given[hvd.rank()].clone()) if i % 2 else given[hvd.rank()].clone() for i, given in enumerate(inputs)
    ]
    with no_copies():
        for handle in [hvd.allreduce_async_(own, name=f"fused.{i}", op=hvd.Sum) for i, own in enumerate(mine)]:
            hvd.synchronize(handle)
    for given, own in zip(inputs, mine, strict=True):
        assert_reduced(own, reduced(given, hvd.Sum), torch.float64)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_block_that_lies_differently_on_one_rank_is_reduced_all_the_same(name: str, op: int) -> None:
    inputs, _ = inputs_in(name)
    mine = odd_one(name, inputs[hvd.rank()])
    strides = mine.stride()
    result = hvd.allreduce(mine, op=op)
    assert result.stride() == strides
    assert_reduced(result, reduced(inputs, op), torch.float32)
    assert torch.equal(mine, inputs[hvd.rank()])
    assert hvd.allreduce_(mine, op=op) is mine
    assert mine.stride() == strides
    assert torch.equal(mine, result)
    assert_same_on_all_ranks(mine)


def test_only_what_lies_differently_is_copied() -> None:
    inputs, _ = inputs_in("channels_last")
    mine = odd_one("channels_last", inputs[hvd.rank()])
    before = hvd.statistics()["bytes_reordered"]
    hvd.allreduce_(mine, op=hvd.Sum)
    is_odd = hvd.size() > 1 and not mine.is_contiguous()
    assert hvd.statistics()["bytes_reordered"] - before == (mine.numel() * 4 if is_odd else 0)


@pytest.mark.parametrize("root", ["odd", "plain"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_block_that_lies_differently_on_one_rank_is_sent_all_the_same(name: str, root: str) -> None:
    root_rank = hvd.size() - 1 if root == "odd" else 0
    inputs, _ = inputs_in(name)
    mine = odd_one(name, inputs[hvd.rank()])
    strides = mine.stride()
    result = hvd.broadcast(mine, root_rank)
    assert result.stride() == strides
    assert torch.equal(result, inputs[root_rank])
    assert hvd.broadcast_(mine, root_rank) is mine
    assert mine.stride() == strides
    assert torch.equal(mine, inputs[root_rank])


def test_a_group_in_which_each_rank_lays_out_another_tensor_differently() -> None:
    inputs = [inputs_in(name)[0] for name in FORMATS]
    mine = [
        (FORMATS[name][1] if (i + hvd.rank()) % 2 else torch.Tensor.contiguous)(given[hvd.rank()].clone())
        for i, (name, given) in enumerate(zip(FORMATS, inputs, strict=True))
    ]
    for result, given in zip(hvd.grouped_allreduce(mine, op=hvd.Sum), inputs, strict=True):
        assert_reduced(result, reduced(given, hvd.Sum), torch.float32)
    hvd.grouped_allreduce_(mine)
    for own, given in zip(mine, inputs, strict=True):
        assert_reduced(own, reduced(given, hvd.Average), torch.float32)


def test_the_layout_of_a_name_may_change_from_step_to_step() -> None:
    shape, laid_out = FORMATS["channels_last"]
    for step in range(12):
        inputs = all_inputs(shape, torch.float32, str(step))
        mine = inputs[hvd.rank()].clone()
        if step // 2 % 3 == 1 or (step // 2 % 3 == 2 and hvd.rank() == 0):  # none, all, one; twice each
            mine = laid_out(mine)
        handle = hvd.allreduce_async_(mine, name="changes", op=hvd.Sum)
        while not hvd.poll(handle):
            pass
        assert_reduced(hvd.synchronize(handle), reduced(inputs, hvd.Sum), torch.float32)


@pytest.mark.parametrize("differ", [False, True])
def test_blocks_travel_compressed(differ: bool) -> None:
    inputs, mine = inputs_in("channels_last")
    if differ:
        mine = odd_one("channels_last", mine)
    result = hvd.allreduce(mine, op=hvd.Sum, compression=hvd.Compression.fp16)
    assert (result.dtype, result.stride()) == (torch.float32, mine.stride())
    assert torch.allclose(result.double(), reduced(inputs, hvd.Sum), atol=2e-2)


def test_complex_blocks() -> None:
    inputs = [tensor.clone() for tensor in all_inputs((5, 7), torch.float32)]
    mine = torch.complex(inputs[hvd.rank()], inputs[hvd.rank()] + 1).t().contiguous().t()
    with no_copies():
        hvd.allreduce_(mine, op=hvd.Sum)
    assert_reduced(mine.real, reduced(inputs, hvd.Sum), torch.float32)
    assert_reduced(mine.imag, reduced(inputs, hvd.Sum) + hvd.size(), torch.float32)


def test_adasum_of_blocks_is_that_of_plain_tensors() -> None:
    if hvd.size() & (hvd.size() - 1):
        pytest.skip("Adasum is for powers of two")
    inputs, mine = inputs_in("channels_last", torch.float64)
    plain = hvd.allreduce(inputs[hvd.rank()], op=hvd.Adasum)
    assert torch.allclose(hvd.allreduce(mine, op=hvd.Adasum), plain, rtol=1e-12, atol=1e-12)


def test_empty_and_single_elements() -> None:
    assert hvd.allreduce(EMPTY).shape == EMPTY.shape
    assert hvd.broadcast_(EMPTY, 0) is EMPTY
    one = torch.ones(1, 1, 1, 1).contiguous(memory_format=torch.channels_last)
    with no_copies():
        assert hvd.allreduce(one, op=hvd.Sum).item() == hvd.size()


def test_what_is_not_one_block_is_copied_on_its_rank_alone() -> None:
    inputs = all_inputs((2, 4, 5, 6), torch.float32)
    mine = inputs[hvd.rank()].clone()
    if hvd.rank() == 0:
        wide = torch.zeros(2, 4, 5, 12)
        wide[..., ::2] = mine
        mine = wide[..., ::2]
    else:
        mine = mine.contiguous(memory_format=torch.channels_last)
    hvd.allreduce_(mine, op=hvd.Sum)
    assert_reduced(mine, reduced(inputs, hvd.Sum), torch.float32)


def test_a_rank_that_has_joined_brings_nothing_to_a_block() -> None:
    inputs, mine = inputs_in("channels_last")
    others = inputs[1:] if hvd.size() > 1 else inputs
    if hvd.rank() > 0 or hvd.size() == 1:
        result = hvd.allreduce(mine, op=hvd.Sum, name="with a joined rank")
        assert_reduced(result, reduced(others, hvd.Sum), torch.float32)
    hvd.join()


def test_shapes_that_differ_are_named_in_the_order_of_their_dimensions() -> None:
    if hvd.size() == 1:
        pytest.skip("there is nobody to differ from")
    mine = torch.ones(2, 3, 4, 5 if hvd.rank() == 0 else 6).contiguous(memory_format=torch.channels_last)
    with pytest.raises(
        hvd.HorovodInternalError, match=r"mismatched shape: \[2, 3, 4, 5\]: rank 0 .*; \[2, 3, 4, 6\]: "
    ):
        hvd.allreduce_(mine)


@pytest.mark.parametrize("strides", [(8, 1), (0, 1), (1, 1), (-4, 1)])
def test_the_library_refuses_strides_with_gaps_or_overlaps(strides: tuple[int, int]) -> None:
    memory = torch.zeros(64)
    with pytest.raises(_core.Error) as refused:
        _core.enqueue(
            _core.ALLREDUCE, _core.FLOAT32, (3, 4), memory.data_ptr(), memory.data_ptr(), "gaps", 0, _core.SUM, 0, 1.0,
            1.0, None, 0, False, -1, 0, memory, strides,
        )  # fmt: skip
    assert refused.value.code == _core.INVALID_ARGUMENT
    assert f"allreduce 'gaps': strides [{strides[0]}, {strides[1]}] of shape [3, 4] are not" in str(refused.value)


# ---- training


def conv_model() -> torch.nn.Module:
    torch.manual_seed(11)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 4, 3, stride=2),
        torch.nn.Flatten(),
        torch.nn.Linear(4 * 3 * 3, 2),
    ).double()


def images_of(rank: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.rand(4, 3, 8, 8, generator=generator, dtype=torch.float64)


def train_alone(steps: int) -> torch.nn.Module:
    """All ranks' batches on one, each with statistics of its own as on the ranks."""
    model = conv_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        optimizer.zero_grad()
        for rank in range(hvd.size()):
            (model(images_of(rank, step)).square().mean() / hvd.size()).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("groups", [0, 2])
@pytest.mark.parametrize("layout", ["all", "one", "changes"])
def test_a_channels_last_model_trains_as_on_one_rank(layout: str, groups: int) -> None:
    steps = 6
    model = conv_model()
    if layout != "one" or hvd.rank() == 0:
        model = model.to(memory_format=torch.channels_last)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model.named_parameters(), groups=groups or None
    )
    for step in range(steps):
        if layout == "changes" and step in (2, 3, 4):  # one rank, then all, then the other way round
            formats = [torch.contiguous_format, torch.channels_last]
            which = (step + (hvd.rank() if step == 2 else 0)) % 2
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() == 4:
                        parameter.data = parameter.data.contiguous(memory_format=formats[which])
                        parameter.grad = None
        optimizer.zero_grad()
        images = images_of(hvd.rank(), step)
        if layout != "one" or hvd.rank() == 0:
            images = images.contiguous(memory_format=torch.channels_last)
        model(images).square().mean().backward()
        optimizer.step()
    alone = train_alone(steps)
    for (name, got), wanted in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert torch.allclose(got, wanted, rtol=0, atol=1e-9), name


def test_gradients_of_a_channels_last_model_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    model = conv_model().to(memory_format=torch.channels_last)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
    copied: list[torch.Tensor] = []
    monkeypatch.setattr(operations, "_plain_copy", lambda tensor: copied.append(tensor) or tensor.contiguous())
    before = hvd.statistics()["bytes_reordered"]
    model(images_of(hvd.rank(), 0).contiguous(memory_format=torch.channels_last)).square().mean().backward()
    optimizer.synchronize()
    assert not model[0].weight.grad.is_contiguous()
    assert not copied
    assert hvd.statistics()["bytes_reordered"] == before
