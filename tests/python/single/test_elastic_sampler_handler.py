"""What is made of the samplers of ranks that differ, on ranks that are pretended."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import horovod_cpp.torch as hvd
from horovod_cpp.common.exceptions import HorovodInternalError
from horovod_cpp.torch.elastic import sampler as sampler_module
from horovod_cpp.torch.elastic import state as state_module
from horovod_cpp.torch.elastic.sampler import ElasticSampler
from horovod_cpp.torch.elastic.state import SamplerStateHandler


class Ranks:
    """Handlers of pretended ranks; what is collective runs on a thread for each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, size: int, count: int) -> None:
        self.here = threading.local()  # the rank that this thread is
        self.size = size
        self.values: list[Any] = [None] * size
        self.meeting = threading.Barrier(size)
        self.broken: set[int] = set()
        monkeypatch.setattr(sampler_module, "rank", lambda: self.here.rank)
        monkeypatch.setattr(sampler_module, "size", lambda: size)
        monkeypatch.setattr(state_module, "broadcast_object", lambda value: self.exchange(value)[0])
        monkeypatch.setattr(state_module, "allreduce", self.allreduce)
        self.handlers = []
        for rank in range(size):
            self.here.rank = rank
            self.handlers.append(SamplerStateHandler(ElasticSampler(range(count), shuffle=False)))

    def exchange(self, value: Any) -> list[Any]:
        self.values[self.here.rank] = value
        self.meeting.wait()
        values = list(self.values)
        self.meeting.wait()
        return values

    def allreduce(self, mask: torch.Tensor, op: int, name: str) -> torch.Tensor:
        assert op == hvd.Max and mask.dtype == torch.bool
        result = torch.stack(self.exchange(mask)).any(0)
        if self.here.rank in self.broken:
            raise HorovodInternalError("the allreduce failed")
        return result

    def together(self, do: Callable[[SamplerStateHandler], None]) -> None:
        failures: list[Exception] = []

        def work(rank: int) -> None:
            self.here.rank = rank
            try:
                do(self.handlers[rank])
            except HorovodInternalError:
                assert rank in self.broken
            except Exception as error:
                failures.append(error)
                self.meeting.abort()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []

    def sync(self) -> None:
        def sync_and_save(handler: SamplerStateHandler) -> None:
            handler.sync()
            handler.save()

        self.together(sync_and_save)

    def record(self, rank: int, *batches: int) -> None:
        for batch in batches:
            self.handlers[rank].value.record_batch(batch, 1)

    def commit(self, *ranks: int) -> None:
        """These ranks, or all."""
        for rank in ranks or range(self.size):
            self.handlers[rank].save()

    def restore(self, *ranks: int) -> None:
        """These ranks, or all."""
        for rank in ranks or range(self.size):
            self.here.rank = rank
            self.handlers[rank].restore()

    def left(self) -> list[int]:
        """What is left, on which all ranks have to agree."""
        lefts = [handler.value.remaining_indices for handler in self.handlers]
        assert all(left == lefts[0] for left in lefts)
        shares = [list(handler.value) for handler in self.handlers]
        assert {len(share) for share in shares} == {-(-len(lefts[0]) // self.size)}
        assert set(lefts[0]) <= {index for share in shares for index in share}
        return lefts[0]


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], Ranks]:
    return lambda size, count: Ranks(monkeypatch, size, count)


def test_ranks_that_have_done_different_numbers(ranks: Callable[[int, int], Ranks]) -> None:
    three = ranks(3, 12)
    three.sync()
    three.record(0, 0)
    three.record(1, 0, 1, 2)
    three.sync()
    assert three.left() == [2, 3, 5, 6, 8, 9, 10, 11]
    state = three.handlers[2].value.state_dict()
    assert state == {"epoch": 0, "processed_num": 4, "processed_indices": [0, 1, 4, 7]}
    three.record(2, 0)  # its first is the third of what is left
    three.sync()
    assert three.left() == [2, 3, 6, 8, 9, 10, 11]


def test_a_sync_that_is_skipped_still_brings_samplers_together(ranks: Callable[[int, int], Ranks]) -> None:
    two = ranks(2, 8)
    two.sync()
    two.record(0, 0, 1)
    two.together(SamplerStateHandler.merge)
    assert two.left() == [1, 3, 4, 5, 6, 7]
    two.restore()
    two.sync()
    assert two.left() == list(range(8)), "merge does not commit"


@pytest.mark.parametrize("sync_before", [False, True])
def test_a_rank_that_has_saved_once_more_than_rank_0(ranks: Callable[[int, int], Ranks], sync_before: bool) -> None:
    """The model goes back to rank 0's commit: what the other has done since has to be done again."""
    two = ranks(2, 8)
    if sync_before:
        two.sync()
    for batch in range(3):
        two.record(0, batch)
        two.record(1, batch)
        two.commit(*([1] if batch == 2 else []))
    two.restore()
    two.sync()
    assert two.left() == [4, 5, 6, 7]


def test_a_rank_that_could_not_save_what_rank_0_has(ranks: Callable[[int, int], Ranks]) -> None:
    """The model is that of rank 0's commit, with the other's gradients: what it has done is not done again."""
    two = ranks(2, 8)
    two.sync()
    for batch in range(2):
        two.record(0, batch)
        two.record(1, batch)
        two.commit(*([0] if batch == 1 else []))
    two.restore()
    two.sync()
    assert two.left() == [4, 5, 6, 7]


def test_a_rank_that_goes_back_while_rank_0_goes_on(ranks: Callable[[int, int], Ranks]) -> None:
    two = ranks(2, 8)
    two.sync()
    two.record(0, 0, 1)
    two.record(1, 0)
    two.restore(1)
    two.sync()
    assert two.left() == [3, 4, 5, 6, 7]


def test_a_rank_that_goes_on_while_rank_0_goes_back(ranks: Callable[[int, int], Ranks]) -> None:
    two = ranks(2, 8)
    two.sync()
    two.record(0, 0)
    two.record(1, 0)
    two.commit()
    two.record(0, 1)
    two.record(1, 1)
    two.restore(0)
    two.sync()
    assert two.left() == [2, 3, 4, 5, 6, 7]


def test_ranks_go_back_as_often_as_needed(ranks: Callable[[int, int], Ranks]) -> None:
    two = ranks(2, 8)
    two.sync()
    two.record(0, 0)
    two.record(1, 0)
    two.commit()
    for _ in range(2):
        two.record(0, 1)
        two.record(1, 1)
        two.restore()
        assert two.left() == [2, 3, 4, 5, 6, 7], "without a sync, if all have done as much"
    two.sync()
    assert two.left() == [2, 3, 4, 5, 6, 7]


def test_what_was_done_after_a_commit_that_followed_a_restore(ranks: Callable[[int, int], Ranks]) -> None:
    two = ranks(2, 8)
    two.sync()
    two.restore()
    two.sync()
    two.restore()
    two.commit()
    two.record(0, 0)
    two.record(1, 0)
    two.sync()  # without a restore: hosts were updated
    assert two.left() == [2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(("further", "left"), [(None, [2, 3, 4, 5, 6, 7]), (0, [4, 5, 6, 7]), (1, [2, 3, 4, 5, 6, 7])])
@pytest.mark.parametrize("restored", [False, True])
def test_a_sync_that_is_not_followed_by_a_save_is_undone(
    ranks: Callable[[int, int], Ranks], further: int | None, left: list[int], restored: bool
) -> None:
    """A later part of it has failed: the model goes back to rank 0's commit; one of the ranks has one more."""
    two = ranks(2, 8)
    two.sync()
    two.record(0, 0)
    two.record(1, 0)
    two.commit()
    two.record(0, 1)
    two.record(1, 1)
    if further is not None:
        two.commit(further)
    if restored:
        two.restore()
    two.together(SamplerStateHandler.sync)
    two.restore()
    two.sync()
    assert two.left() == left


def test_what_belongs_to_another_epoch_does_not_count(ranks: Callable[[int, int], Ranks]) -> None:
    two = ranks(2, 8)
    two.sync()
    two.here.rank = 0
    two.handlers[0].value.set_epoch(1)
    two.record(0, 1)
    two.record(1, 0, 1, 2)
    two.sync()
    assert [handler.value.epoch for handler in two.handlers] == [1, 1]
    assert two.left() == [0, 1, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("goes_back", [False, True])
@pytest.mark.parametrize("broken", [0, 1])
def test_a_sync_that_fails_on_one_rank(ranks: Callable[[int, int], Ranks], broken: int, goes_back: bool) -> None:
    """It saves on the other rank only, and is done again; rank 1 had been a commit ahead."""
    two = ranks(2, 8)
    two.sync()
    two.record(0, 0)
    two.record(1, 0)
    two.commit()
    two.record(1, 1)
    two.commit(1)
    two.restore()
    two.broken = {broken}
    two.sync()
    two.broken = set()
    if goes_back:
        two.restore()
    else:
        two.restore(broken)
    two.sync()
    assert two.left() == [2, 3, 4, 5, 6, 7]
    two.record(0, 0)
    two.record(1, 0)
    two.commit()
    two.restore()
    two.sync()
    assert two.left() == [4, 5, 6, 7], "from here on all is as ever"


def test_another_sampler_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    two = Ranks(monkeypatch, 2, 8)
    for rank, handler in enumerate(two.handlers):
        two.here.rank = rank
        handler.value.record_batch(0, 2)
        handler.save()
        other = ElasticSampler(range(6), shuffle=False)
        handler.set_value(other)
        other.record_batch(0, 1)
        handler.restore()
        assert other.processed_num == 0 and list(other) == [rank, rank + 2, rank + 4]
        other.record_batch(0, rank + 1)
        handler.save()
    two.together(SamplerStateHandler.sync)
    for handler in two.handlers:
        assert handler.value.remaining_indices == [2, 4, 5]
