"""Operations in a part of the ranks."""

from __future__ import annotations

import copy
import pickle
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import all_inputs, assert_reduced, reduced
from test_adasum import adasum_of_all

import horovod_cpp.torch as hvd
from horovod_cpp import _core

pytestmark = pytest.mark.usefixtures("alone_and_beside_a_stuck_set")


Sets = tuple[hvd.ProcessSet, hvd.ProcessSet]


def mine(sets: Sets) -> hvd.ProcessSet:
    return sets[hvd.rank() % 2]


def test_global_process_set() -> None:
    assert hvd.global_process_set.process_set_id == 0
    assert hvd.global_process_set.ranks == list(range(hvd.size()))
    assert hvd.global_process_set.size() == hvd.size()
    assert hvd.global_process_set.rank() == hvd.rank()
    assert hvd.global_process_set.included()
    assert hvd.process_set_included() and hvd.process_set_included(0)


def test_sets_know_their_ranks(even_and_odd: Sets) -> None:
    for parity, process_set in enumerate(even_and_odd):
        ranks = list(range(parity, hvd.size(), 2))
        assert process_set.ranks == ranks
        assert process_set.size() == len(ranks)
        assert process_set.included() == (hvd.rank() in ranks)
        assert hvd.process_set_included(process_set.process_set_id) == (hvd.rank() in ranks)
        assert f"ranks={ranks}" in str(process_set)
        if hvd.rank() in ranks:
            assert process_set.rank() == ranks.index(hvd.rank())
        else:
            with pytest.raises(ValueError, match="Process is not part of provided process set"):
                process_set.rank()


def test_an_interrupt_ends_the_wait_for_ranks_that_add_no_set_yet() -> None:
    """The call goes on: the set is there once the others have called."""
    if hvd.size() == 1:
        pytest.skip("one rank waits for nobody")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if hvd.rank() == 0:
        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            hvd.add_process_set([0])
        signal.signal(signal.SIGALRM, before)
        hvd.broadcast_object(None, 0, name="the wait has ended")
    else:
        hvd.broadcast_object(None, 0, name="the wait has ended")
        added = hvd.add_process_set([0])
        assert hvd.remove_process_set(added)
        return
    deadline = time.monotonic() + 30
    while not (added_here := [one for one in _core.process_set_ids() if _core.process_set_ranks(one) == [0]]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    _core.process_set_remove(added_here[0])


def test_adasum_of_a_part_of_the_ranks(even_and_odd: Sets) -> None:
    inputs = all_inputs((1003,), torch.float64)
    output = hvd.allreduce(inputs[hvd.rank()], op=hvd.Adasum, process_set=mine(even_and_odd))
    expected = adasum_of_all(inputs[hvd.rank() % 2 :: 2])
    assert torch.allclose(output, expected, rtol=1e-12, atol=1e-12)


def test_operations_stay_in_their_set(even_and_odd: Sets) -> None:
    members = list(range(hvd.rank() % 2, hvd.size(), 2))
    inputs = all_inputs((1000,), torch.float32)
    part = [inputs[rank] for rank in members]
    process_set = mine(even_and_odd)
    for op in (hvd.Sum, hvd.Average, hvd.Max):
        result = hvd.allreduce(inputs[hvd.rank()], op=op, name="same name in both", process_set=process_set)
        assert_reduced(result, reduced(part, op), torch.float32)
    gathered = hvd.allgather(torch.full((hvd.rank() + 1,), hvd.rank()), process_set=process_set)
    assert gathered.tolist() == [rank for rank in members for _ in range(rank + 1)]
    root = members[-1]  # a global rank
    assert torch.equal(hvd.broadcast(inputs[hvd.rank()], root, process_set=process_set), inputs[root])
    hvd.barrier(process_set)


def test_sets_and_the_whole_job_work_at_the_same_time(even_and_odd: Sets) -> None:
    part, whole = [], []
    for i in range(20):
        part.append(hvd.allreduce_async(torch.ones(5), op=hvd.Sum, process_set=mine(even_and_odd)))
        whole.append(hvd.allreduce_async(torch.ones(5), op=hvd.Sum, name=f"whole.{i}"))
    for one, other in zip(part, reversed(whole), strict=True):
        assert hvd.synchronize(one)[0].item() == mine(even_and_odd).size()
        assert hvd.synchronize(other)[0].item() == hvd.size()


def test_unnamed_operations_are_counted_per_set(even_and_odd: Sets) -> None:
    if hvd.rank() % 2 == 0:
        for _ in range(3):
            hvd.allreduce(torch.ones(1), process_set=even_and_odd[0])
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == hvd.size()


def test_a_barrier_of_one_set_does_not_wait_for_that_of_another(even_and_odd: Sets) -> None:
    if hvd.size() < 4:
        pytest.skip("needs two ranks in each set")
    first_two = hvd.add_process_set([0, 1])
    if hvd.rank() == 0:  # comes to the barrier of its set once the other one is over
        assert hvd.broadcast_object(None, root_rank=1, process_set=first_two) == "the odd ranks have met"
    hvd.barrier(mine(even_and_odd))
    if hvd.rank() == 1:
        hvd.broadcast_object("the odd ranks have met", root_rank=1, process_set=first_two)
    hvd.barrier()
    assert hvd.remove_process_set(first_two)


def test_gradients_in_a_set(even_and_odd: Sets) -> None:
    process_set = mine(even_and_odd)
    tensor = torch.ones(3, requires_grad=True)
    hvd.allreduce(tensor, op=hvd.Sum, process_set=process_set).sum().backward()
    assert tensor.grad.tolist() == [process_set.size()] * 3
    rows = torch.ones(2, requires_grad=True)
    (hvd.allgather(rows, process_set=process_set) * float(hvd.rank())).sum().backward()
    assert rows.grad.tolist() == [sum(process_set.ranks) / process_set.size()] * 2


def test_a_rank_outside_and_a_root_outside_are_refused(even_and_odd: Sets) -> None:
    other = even_and_odd[1 - hvd.rank() % 2]
    with pytest.raises(ValueError):
        hvd.allreduce(torch.ones(2), process_set=other)
    with pytest.raises(ValueError, match="invalid root rank"):
        hvd.broadcast(torch.ones(2), other.ranks[0], process_set=mine(even_and_odd))


def test_adding_and_removing() -> None:
    if hvd.size() == 1:
        pytest.skip("one rank has no parts")
    first = hvd.add_process_set([0])
    with pytest.raises(ValueError):
        hvd.add_process_set(hvd.ProcessSet([0]))
    with pytest.raises(ValueError, match="registered already"):
        hvd.add_process_set(first)
    old_id = first.process_set_id
    assert hvd.remove_process_set(first) is True
    assert first.process_set_id is None
    assert first.size() is None and first.rank() is None and first.included() is None
    assert hvd.remove_process_set(first) is False
    assert hvd.remove_process_set(hvd.global_process_set) is False
    with pytest.raises(ValueError):
        hvd.process_set_included(old_id)
    again = hvd.add_process_set([0])
    assert hvd.remove_process_set(again)


def test_a_set_in_which_operations_wait_stays() -> None:
    if hvd.size() < 3:
        pytest.skip("needs a set of two in three")
    pair = hvd.add_process_set([0, 1])
    ones = torch.ones(2)
    handle = hvd.allreduce_async(ones, name="waits", op=hvd.Sum, process_set=pair) if hvd.rank() == 0 else None
    hvd.barrier()
    here = r"\(called at .*test_process_sets\.py:\d+\)"
    with pytest.raises(hvd.HorovodInternalError, match=rf"cannot be removed: it has operations waiting {here}"):
        hvd.remove_process_set(pair)
    if handle is not None:
        assert hvd.synchronize(handle).tolist() == [2, 2]
    if hvd.rank() == 1:
        assert hvd.allreduce(ones, name="waits", op=hvd.Sum, process_set=pair).tolist() == [2, 2]
    hvd.barrier()
    assert hvd.remove_process_set(pair) is True


def test_ranks_that_add_or_remove_different_sets_get_an_error_each() -> None:
    if hvd.size() < 3:
        pytest.skip("needs two sets that are neither empty nor all ranks")
    here = r".*\(called at .*test_process_sets\.py:\d+\)"
    with pytest.raises(hvd.HorovodInternalError, match=rf"mismatched ranks: \[0\]: rank 0; \[1\]: ranks 1-{here}"):
        hvd.add_process_set([0] if hvd.rank() == 0 else [1])
    first, second = hvd.add_process_set([0]), hvd.add_process_set([1])
    with pytest.raises(hvd.HorovodInternalError, match=rf"mismatched ranks: {here}"):
        hvd.remove_process_set(first if hvd.rank() == 0 else second)
    assert hvd.remove_process_set(first) and hvd.remove_process_set(second)


def test_the_order_of_ranks_does_not_matter() -> None:
    if hvd.size() < 3:
        pytest.skip("needs a set of two in three")
    process_set = hvd.add_process_set([1, 0] if hvd.rank() % 2 else [0, 1])
    assert process_set.ranks == [0, 1]
    assert hvd.remove_process_set(process_set)


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_the_set_itself(even_and_odd: Sets, how: str) -> None:
    for process_set in (*even_and_odd, hvd.global_process_set):
        assert COPIES[how](process_set) is process_set


def test_a_pickled_set_is_that_of_its_ranks() -> None:
    if hvd.size() == 1:
        pytest.skip("one rank has no parts")
    first = hvd.add_process_set([0])
    pickled = pickle.dumps(first)
    assert hvd.remove_process_set(first)
    assert pickle.loads(pickled).process_set_id is None
    again = hvd.add_process_set([0])
    assert pickle.loads(pickled) is again
    set_id = again.process_set_id
    del again  # the job still has the set
    other = pickle.loads(pickled)
    assert other.process_set_id == set_id
    assert other.ranks == [0]
    twin = hvd.ProcessSet([0])
    hvd.init(process_sets=[twin])  # binds it only: the job is up
    assert twin.process_set_id == set_id
    assert hvd.remove_process_set(other)
    assert twin.process_set_id is None


def test_a_layer_that_was_copied_does_not_outlive_its_set() -> None:
    if hvd.size() == 1:
        pytest.skip("one rank has no parts")
    process_set = hvd.add_process_set(range(hvd.size() - 1))
    layer = hvd.SyncBatchNorm(2, process_set=process_set)
    copied = copy.deepcopy(layer)
    assert copied.process_set is process_set
    rows = torch.arange(6.0).reshape(3, 2)
    if process_set.included():
        assert torch.equal(copied(rows), layer(rows))
    hvd.barrier()
    assert hvd.remove_process_set(process_set)
    for each in (layer, copied):
        with pytest.raises(ValueError, match="has not been registered"):
            each(rows)


def test_bad_ranks() -> None:
    with pytest.raises(ValueError, match="twice"):
        hvd.ProcessSet([0, 0])
    for strange in ([1.7], "01", ["0"], [None], 1.5):
        with pytest.raises(ValueError, match=r"^ProcessSet takes a list of global ranks, numbers from 0, not "):
            hvd.ProcessSet(strange)
    assert hvd.ProcessSet(torch.tensor([2, 0])).ranks == [0, 2]
    with pytest.raises(ValueError, match=r"^ProcessSet ranks \[1099511627776\]: global ranks are numbers from 0"):
        hvd.ProcessSet([2**40])
    for ranks in ([], [hvd.size()], [-1]):
        with pytest.raises(ValueError):
            hvd.add_process_set(ranks)
