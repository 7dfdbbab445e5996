"""broadcast_parameters: what cannot be sent is refused before anything is, and an error leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import horovod_cpp.torch as hvd

BAD: dict[str, tuple[Any, str]] = {
    "dtype": (torch.ones(2).to(torch.float8_e4m3fn), r"not supported.*broadcast 'b'"),
    "layout": (torch.ones(2, 2).to_sparse(), r"not supported.*broadcast 'b'"),
    "expanded": (torch.ones(1).expand(3), "broadcast 'b': an expanded tensor cannot be the output"),
    "conjugated": (
        torch.ones(2, dtype=torch.complex64).conj(),
        "broadcast 'b': a conjugated view cannot be the output",
    ),
    "number": (3, "'b' is a int"),
    "nothing": (None, "'b' is a NoneType"),
}


def all_can_be_sent_now() -> None:
    tensors = {name: torch.full((2,), float(hvd.rank())) for name in ("a", "b", "c")}
    hvd.broadcast_parameters(tensors, hvd.size() - 1)
    assert all(tensor.tolist() == [hvd.size() - 1.0] * 2 for tensor in tensors.values())


@pytest.mark.parametrize("what", BAD)
def test_one_that_cannot_be_sent(what: str) -> None:
    bad, text = BAD[what]
    first = torch.full((2,), float(hvd.rank()))
    with pytest.raises(ValueError, match=text):
        hvd.broadcast_parameters({"a": first, "b": bad, "c": torch.ones(2)}, 0)
    assert first.tolist() == [float(hvd.rank())] * 2
    all_can_be_sent_now()


def test_bad_names() -> None:
    for params, text in (
        ([("a", torch.ones(2)), ("a", torch.ones(2))], "names are given more than once: a"),
        ([(1, torch.ones(2))], "1 is a int"),
    ):
        with pytest.raises(ValueError, match=text):
            hvd.broadcast_parameters(params, 0)
    all_can_be_sent_now()


@pytest.mark.parametrize("root", [-1, 4711])
def test_a_root_that_is_none(root: int) -> None:
    with pytest.raises(ValueError, match=r"'a'.*invalid root rank"):
        hvd.broadcast_parameters({"a": torch.ones(2), "b": torch.ones(2)}, root)
    all_can_be_sent_now()


def test_ranks_that_disagree_about_one() -> None:
    if hvd.size() == 1:
        pytest.skip("one rank agrees with itself")
    tensors = {"a": torch.ones(2 + hvd.rank()), "b": torch.full((2,), float(hvd.rank()))}
    tensors.update({f"large.{number}": torch.full((50_000,), float(hvd.rank())) for number in range(20)})
    with pytest.raises(hvd.HorovodInternalError, match="'a'"):
        hvd.broadcast_parameters(tensors, hvd.size() - 1)
    assert all(bool((tensor == hvd.size() - 1).all()) for name, tensor in tensors.items() if name != "a")
    all_can_be_sent_now()


def test_a_name_that_is_in_flight() -> None:
    if hvd.size() == 1:
        pytest.skip("one rank waits for nobody")
    tensors = {name: torch.full((2,), float(hvd.rank())) for name in ("a", "b", "c")}
    if hvd.rank() == 0:
        handle = hvd.broadcast_async_(torch.ones(2), 0, name="b")
        # 'a' is on its way by then, and is waited for.
        with pytest.raises(ValueError, match="'b'"):
            hvd.broadcast_parameters(tensors, 0)
        hvd.barrier()
        hvd.synchronize(handle)
        hvd.broadcast_(tensors["c"], 0, name="c")
    else:
        hvd.broadcast_(tensors["a"], 0, name="a")
        assert tensors["a"].tolist() == [0.0, 0.0]
        hvd.barrier()  # until then 'b' stays in flight on rank 0
        for name in ("b", "c"):
            hvd.broadcast_(tensors[name], 0, name=name)
    all_can_be_sent_now()


def test_an_optimizers_state_of_which_one_tensor_is_in_flight() -> None:
    if hvd.size() == 1:
        pytest.skip("one rank waits for nobody")
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    flats = [
        tensor.clone().reshape(-1).view(torch.uint8)
        for state in optimizer.state_dict()["state"].values()
        for tensor in state.values()
    ]
    names = [f"broadcast_optimizer_state.{index}" for index in range(len(flats))]
    if hvd.rank() == 0:
        handle = hvd.broadcast_async_(flats[1], 0, name=names[1])
        with pytest.raises(ValueError, match=r"'broadcast_optimizer_state\.1'"):
            hvd.broadcast_optimizer_state(optimizer, 0)
        hvd.barrier()
        hvd.synchronize(handle)
    else:  # what broadcast_optimizer_state does, in steps
        hvd.broadcast_object(None, 0, "broadcast_optimizer_state")
        hvd.broadcast_(flats[0], 0, name=names[0])
        hvd.barrier()  # until then the second one stays in flight on rank 0
        hvd.broadcast_(flats[1], 0, name=names[1])
    for name, flat in zip(names[2:], flats[2:], strict=True):
        hvd.broadcast_(flat, 0, name=name)
    hvd.broadcast_optimizer_state(optimizer, 0)
