"""Python objects and optimizer states between ranks."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import horovod_cpp.torch as hvd

OBJECTS: dict[str, Any] = {
    "none": None,
    "number": 17,
    "text": "grüße",
    "nested": {"a": [1, (2.5, None)], "b": {"c": {3, 4}}},
    "tensors": {"w": torch.arange(12.0).reshape(3, 4), "i": torch.tensor(5)},
    "large": bytes(range(256)) * 20_000,
}


def alike(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(alike(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(alike(a, b) for a, b in zip(left, right, strict=True))
    return type(left) is type(right) and bool(left == right)


@pytest.mark.parametrize("what", OBJECTS)
def test_every_rank_gets_the_roots_object(what: str) -> None:
    for root in {0, hvd.size() - 1}:
        given = OBJECTS[what] if hvd.rank() == root else None  # the others need not know its type
        got = hvd.broadcast_object(given, root_rank=root)
        assert alike(got, OBJECTS[what])
        if hvd.rank() == root:
            assert got is given


def test_functions_travel_too() -> None:
    offset = hvd.rank() * 10
    function = hvd.broadcast_object(lambda x: x + offset, root_rank=hvd.size() - 1)
    assert function(1) == (hvd.size() - 1) * 10 + 1


def test_objects_of_all_ranks_in_their_order() -> None:
    gathered = hvd.allgather_object({"rank": hvd.rank(), "values": list(range(hvd.rank() * 1000))})
    assert [one["rank"] for one in gathered] == list(range(hvd.size()))
    assert [len(one["values"]) for one in gathered] == [rank * 1000 for rank in range(hvd.size())]


@pytest.mark.usefixtures("alone_and_beside_a_stuck_set")
def test_a_process_set_keeps_to_itself() -> None:
    ranks = list(range(max(1, hvd.size() - 1)))
    process_set = hvd.global_process_set if hvd.size() == 1 else hvd.add_process_set(ranks)
    if hvd.rank() in ranks:
        assert hvd.allgather_object(hvd.rank(), process_set=process_set) == ranks
        root = ranks[-1]
        assert hvd.broadcast_object(f"from {hvd.rank()}", root, process_set=process_set) == f"from {root}"
    hvd.barrier()
    if hvd.size() > 1:
        assert hvd.remove_process_set(process_set)


class Stubborn:
    def __reduce__(self) -> tuple[Any, ...]:
        raise RuntimeError("I stay")


def test_what_cannot_be_pickled_is_an_error_everywhere() -> None:
    bad = hvd.size() - 1
    for call in (
        lambda: hvd.broadcast_object(Stubborn(), root_rank=bad),
        lambda: hvd.allgather_object(Stubborn() if hvd.rank() == bad else 1),
    ):
        if hvd.rank() == bad:
            with pytest.raises(RuntimeError, match="I stay"):
                call()
        else:
            with pytest.raises(hvd.HorovodInternalError, match=f"rank {bad}.*RuntimeError: I stay"):
                call()
    assert hvd.broadcast_object("goes on") == "goes on"


def test_threads_with_names_of_their_own() -> None:
    results: dict[str, Any] = {}

    def work(name: str) -> None:
        results[name] = hvd.broadcast_object(name if hvd.rank() == 0 else None, name=name)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("one", "two", "three")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {"one": "one", "two": "two", "three": "three"}


# ---- the state of optimizers -----------------------------------------------------------------------------------------

Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adam, lr a tensor": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01)),
    "adamw": lambda p: torch.optim.AdamW([{"params": p[:1], "lr": 0.5}, {"params": p[1:]}]),
    "adagrad": lambda p: torch.optim.Adagrad(p),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "adamax": lambda p: torch.optim.Adamax(p),
    "asgd": lambda p: torch.optim.ASGD(p),
    "nadam": lambda p: torch.optim.NAdam(p),
    "radam": lambda p: torch.optim.RAdam(p),
    "rmsprop": lambda p: torch.optim.RMSprop(p, momentum=0.5, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p),
}
if hasattr(torch.optim, "Adafactor"):
    OPTIMIZERS["adafactor"] = lambda p: torch.optim.Adafactor(p)
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["muon"] = lambda p: torch.optim.Muon([one for one in p if one.dim() == 2])


def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        model.zero_grad()
        model(torch.randn(4, 5, generator=generator)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("others_have_state", [False, True])
def test_state_of_the_root_everywhere(kind: str, others_have_state: bool) -> None:
    root = hvd.size() - 1
    torch.manual_seed(hvd.rank())
    model = torch.nn.Linear(5, 3)
    optimizer = OPTIMIZERS[kind](list(model.parameters()))
    if hvd.rank() == root or others_have_state:
        steps(model, optimizer, 3 + hvd.rank(), seed=hvd.rank())
    before = optimizer.state_dict()
    hvd.broadcast_parameters(model.state_dict(), root)
    hvd.broadcast_optimizer_state(optimizer, root, model=model)
    if hvd.rank() == root:
        assert alike(optimizer.state_dict(), before)
    for other in hvd.allgather_object(optimizer.state_dict()):
        assert alike(other, optimizer.state_dict())
    steps(model, optimizer, 3, seed=99)
    for other in hvd.allgather_object(model.state_dict()):
        assert alike(other, model.state_dict())


def test_state_of_a_distributed_optimizer() -> None:
    torch.manual_seed(hvd.rank())
    model = torch.nn.Linear(5, 3)
    hvd.broadcast_parameters(model.state_dict(), 0)
    inner = torch.optim.Adam(model.parameters(), lr=0.01 * (1 + hvd.rank()))
    optimizer = hvd.DistributedOptimizer(inner, model.named_parameters())
    hvd.broadcast_optimizer_state(optimizer, 0)
    assert optimizer.param_groups[0]["lr"] == 0.01
    steps(model, optimizer, 3, seed=hvd.rank())
    for other in hvd.allgather_object([model.state_dict(), optimizer.state_dict()]):
        assert alike(other, [model.state_dict(), optimizer.state_dict()])


@pytest.mark.usefixtures("alone_and_beside_a_stuck_set")
def test_models_of_a_process_set() -> None:
    if hvd.size() < 3:
        pytest.skip("needs a rank outside of a set of two")
    process_set = hvd.add_process_set([0, 2])
    torch.manual_seed(hvd.rank())
    model = torch.nn.Linear(5, 3)
    optimizer = torch.optim.Adam(model.parameters())
    steps(model, optimizer, 1 + hvd.rank(), seed=hvd.rank())
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    if hvd.rank() in (0, 2):
        hvd.broadcast_parameters(model.state_dict(), 2, process_set=process_set)
        hvd.broadcast_optimizer_state(optimizer, 2, process_set=process_set)
    now = [model.state_dict(), optimizer.state_dict()]
    assert alike(now, before) == (hvd.rank() != 0)
    gathered = hvd.allgather_object(now)
    assert alike(gathered[0], gathered[2]) and not alike(gathered[0], gathered[1])
    assert hvd.remove_process_set(process_set)


class Secretive(torch.optim.SGD):
    def state_dict(self) -> dict[str, Any]:
        raise RuntimeError("not to be told")


def test_a_root_without_a_state_is_an_error_everywhere() -> None:
    optimizer = Secretive(torch.nn.Linear(2, 2).parameters(), lr=1.0)
    if hvd.rank() == 0:
        with pytest.raises(RuntimeError, match="not to be told"):
            hvd.broadcast_optimizer_state(optimizer, 0)
    else:
        with pytest.raises(hvd.HorovodInternalError, match="rank 0 could not take its state apart"):
            hvd.broadcast_optimizer_state(optimizer, 0)
    assert hvd.broadcast_object("goes on") == "goes on"


def test_every_optimizer_of_torch_is_in_the_table() -> None:
    known = {type(make(list(torch.nn.Linear(2, 2).parameters()))) for make in OPTIMIZERS.values()}
    of_torch = {
        kind
        for kind in vars(torch.optim).values()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    }
    assert of_torch - known == {torch.optim.LBFGS, torch.optim.SparseAdam}, "these have tests of their own"


def test_state_of_an_optimizer_of_sparse_gradients() -> None:
    torch.manual_seed(hvd.rank())
    model = torch.nn.Embedding(6, 3, sparse=True)
    optimizer = torch.optim.SparseAdam(model.parameters())
    if hvd.rank() == 0:
        model(torch.tensor([1, 4])).sum().backward()
        optimizer.step()
    hvd.broadcast_optimizer_state(optimizer, 0)
    for other in hvd.allgather_object(optimizer.state_dict()):
        assert alike(other, optimizer.state_dict())
    assert optimizer.state_dict()["state"]


def test_lbfgs_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot broadcast torch\.optim\.LBFGS state"):
        hvd.broadcast_optimizer_state(torch.optim.LBFGS(torch.nn.Linear(2, 2).parameters()), 0)
