"""ElasticSampler on ranks that are pretended, which record as much as each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import horovod_cpp.torch as hvd
from horovod_cpp.torch.elastic import sampler as sampler_module

Place = Callable[[int, int], None]


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Makes this process some rank of some number of ranks."""

    def put(rank: int, size: int) -> None:
        monkeypatch.setattr(sampler_module, "rank", lambda: rank)
        monkeypatch.setattr(sampler_module, "size", lambda: size)

    yield put


def samplers(place: Place, size: int, count: int, **options: Any) -> list[hvd.elastic.ElasticSampler]:
    made = []
    for rank in range(size):
        place(rank, size)
        made.append(hvd.elastic.ElasticSampler(range(count), **options))
    return made


COUNTS = [(1, 7), (2, 8), (2, 7), (3, 10), (4, 3), (4, 1), (3, 0), (4, 103)]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("size", "count"), COUNTS)
def test_a_new_epoch_is_split_as_torch_does(place: Place, size: int, count: int, shuffle: bool) -> None:
    for rank, sampler in enumerate(samplers(place, size, count, shuffle=shuffle, seed=5)):
        for epoch in (0, 1, 2):
            place(rank, size)
            sampler.set_epoch(epoch)
            reference = torch.utils.data.DistributedSampler(range(count), size, rank, shuffle=shuffle, seed=5)
            reference.set_epoch(epoch)
            assert list(sampler) == list(reference)
            assert len(sampler) == len(reference)


def test_before_init_there_is_no_rank() -> None:
    with pytest.raises(ValueError, match="Horovod has not been initialized"):
        hvd.elastic.ElasticSampler(range(3))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("size", "count"), [(2, 24), (2, 23), (3, 25), (4, 37)])
def test_a_run_that_was_interrupted_goes_on_as_if_it_was_not(
    place: Place, size: int, count: int, shuffle: bool
) -> None:
    for rank, sampler in enumerate(samplers(place, size, count, shuffle=shuffle)):
        place(rank, size)
        whole = list(sampler)
        done = []
        for batches in (2, 1):
            done += list(sampler)[: 2 * batches]
            for batch in range(batches):
                sampler.record_batch(batch, 2)
            sampler.reset()
        assert done + list(sampler) == whole


@pytest.mark.parametrize("new_size", [1, 2, 3, 5])
@pytest.mark.parametrize("through_a_checkpoint", [False, True])
def test_other_ranks_take_what_is_left(place: Place, new_size: int, through_a_checkpoint: bool) -> None:
    count, size, batch_size = 41, 3, 4
    done: list[int] = []
    state: dict[str, Any] = {}
    for rank, sampler in enumerate(samplers(place, size, count)):
        place(rank, size)
        sampler.set_epoch(4)
        for batch in range(2):
            done += list(sampler)[batch * batch_size : (batch + 1) * batch_size]
            sampler.record_batch(batch, batch_size)
        assert sampler.processed_num == 24
        assert sampler.state_dict() == {"epoch": 4, "processed_num": 24}
        state = sampler.state_dict()
    left: list[int] = []
    lengths = set()
    if through_a_checkpoint:
        for rank, sampler in enumerate(samplers(place, new_size, count)):
            place(rank, new_size)
            sampler.load_state_dict(state)
            left += list(sampler)
            lengths.add(len(sampler))
            assert sampler.epoch == 4 and sampler.processed_num == 24
    else:
        for rank in range(new_size):
            place(rank % size, size)
            sampler = hvd.elastic.ElasticSampler(range(count))
            sampler.set_epoch(4)
            for batch in range(2):
                sampler.record_batch(batch, batch_size)
            place(rank, new_size)
            sampler.reset()
            left += list(sampler)
            lengths.add(len(sampler))
            assert len(sampler.remaining_indices) == count - 24
    assert len(lengths) == 1, "ranks take equally many steps"
    assert len(done) == len(set(done)) == 24
    assert set(left).isdisjoint(done) or count - 24 < len(left)
    assert sorted(set(done) | set(left)) == list(range(count))
    padding = len(left) - (count - 24)
    assert 0 <= padding < new_size, "each index once, less than one round of them twice"


def test_the_last_batch_counts_what_it_has(place: Place) -> None:
    for rank, sampler in enumerate(samplers(place, 2, 9)):
        place(rank, 2)
        sampler.record_batch(0, 4)
        assert sampler.processed_num == 8
        assert len(sampler.remaining_indices) == 9, "at the last split"
        before = sampler.progress()
        sampler.record_batch(1, 4)
        assert int(before.assumed().sum()) == 8
        sampler.record_batch(1, 4)  # twice is once
        sampler.record_batch(2, 4)  # there is none
        assert sampler.processed_num == 9
        sampler.reset()
        assert list(sampler) == [] and len(sampler) == 0 and sampler.remaining_indices == []
        sampler.set_epoch(1)
        assert len(sampler) == 5 and sampler.processed_num == 0


def test_an_iterator_begins_where_the_last_split_was(place: Place) -> None:
    """So that the numbers of batches mean the same as long as nothing is reset."""
    place(0, 1)
    sampler = hvd.elastic.ElasticSampler(range(6), shuffle=False)
    sampler.record_batch(0, 2)
    assert list(sampler) == [0, 1, 2, 3, 4, 5]
    sampler.reset()
    assert list(sampler) == [2, 3, 4, 5]


def test_indices_in_any_order(place: Place) -> None:
    place(0, 1)
    sampler = hvd.elastic.ElasticSampler(range(6), shuffle=False)
    sampler.record_indices([4, 1])
    sampler.record_indices(iter([]))
    state = sampler.state_dict()
    assert state == {"epoch": 0, "processed_num": 2, "processed_indices": [1, 4]}
    sampler.reset()
    assert list(sampler) == [0, 2, 3, 5]
    other = hvd.elastic.ElasticSampler(range(6), shuffle=False)
    other.load_state_dict(state)
    assert list(other) == [0, 2, 3, 5] and other.state_dict() == state
    with pytest.raises(IndexError):
        sampler.record_indices([6])


def test_recorded_indices_stand_for_those_beside_them(place: Place) -> None:
    lefts = []
    for rank, sampler in enumerate(samplers(place, 2, 8, shuffle=False)):
        place(rank, 2)
        sampler.record_indices(list(sampler)[1:2])
        sampler.reset()
        lefts.append(sampler.remaining_indices)
    assert lefts == [[0, 1, 4, 5, 6, 7]] * 2


def test_no_negative_batches(place: Place) -> None:
    place(0, 1)
    sampler = hvd.elastic.ElasticSampler(range(6))
    with pytest.raises(ValueError, match="no batch -1"):
        sampler.record_batch(-1, 2)
    assert sampler.processed_num == 0


def test_between_jobs_a_sampler_keeps_its_split(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state is restored also when the job could not be formed again."""
    place(1, 3)
    sampler = hvd.elastic.ElasticSampler(range(12), shuffle=False)
    monkeypatch.setattr(sampler_module, "size", hvd.size)
    sampler.load_state_dict({"epoch": 0, "processed_num": 6})
    assert list(sampler) == [7, 10]


def test_a_data_loader_takes_it(place: Place) -> None:
    place(1, 2)
    sampler = hvd.elastic.ElasticSampler(range(10), shuffle=False)
    loader = torch.utils.data.DataLoader(range(10), batch_size=2, sampler=sampler)
    assert [batch.tolist() for batch in loader] == [[1, 3], [5, 7], [9]]
    sampler.record_batch(0, 2)
    sampler.reset()
    assert [batch.tolist() for batch in loader] == [[5, 7], [9]]


@pytest.mark.parametrize("shuffle", [False, True])
def test_processed_num_may_be_assigned(place: Place, shuffle: bool) -> None:
    for rank, sampler in enumerate(samplers(place, 2, 10, shuffle=shuffle)):
        place(rank, 2)
        order = torch.tensor(sampler.remaining_indices)
        assert sampler.indices == list(sampler) == order[rank::2].tolist()
        sampler.processed_num = 4
        assert sampler.processed_num == 4
        assert sampler.remaining_indices == order[4:].tolist()
        assert sampler.indices == list(sampler) == order[4 + rank :: 2].tolist()
        sampler.record_batch(0, 1)
        sampler.reset()
        assert sampler.state_dict() == {"epoch": 0, "processed_num": 6}
        sampler.processed_num = 0
        assert sampler.remaining_indices == order.tolist()
        for count in (-1, 11):
            with pytest.raises(ValueError, match=rf"processed_num={count}: the data set has 10 indices"):
                sampler.processed_num = count
