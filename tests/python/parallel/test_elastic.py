"""Training that is interrupted, formed again in the same processes, and goes on from the last commit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from reference import assert_same_on_all_ranks
from stuck import operations_stuck_in

import horovod_cpp.torch as hvd
from horovod_cpp.common.exceptions import HostsUpdatedInterrupt

COUNT, BATCH, EPOCHS = 42, 3, 2


@pytest.fixture
def steady(job: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A job in which sums do not depend on which gradients happen to be reduced together."""
    hvd.barrier()
    hvd.shutdown()
    monkeypatch.setenv("HOROVOD_FUSION_THRESHOLD", "0")
    hvd.init()
    yield
    hvd.barrier()
    hvd.shutdown()


class Failure(NamedTuple):
    """What goes wrong, once."""

    where: str  # in the step
    step: int
    who: str  # all, or the first or last rank alone
    kind: str
    commit_every: int = 3

    def strikes(self, where: str, step: int) -> bool:
        ranks = {"all": range(hvd.size()), "first": [0], "last": [hvd.size() - 1]}[self.who]
        return (where, step) == (self.where, self.step) and hvd.rank() in ranks

    def strike(self) -> None:
        if self.who == "all":
            hvd.barrier()  # nobody ends the job before it has struck the others
        if self.kind == "mismatch" and hvd.size() > 1:
            hvd.allreduce(torch.ones(2 + hvd.rank() % 2), name="elastic mismatch")
        elif self.kind in ("error", "mismatch"):
            raise hvd.HorovodInternalError("injected")
        elif self.kind == "hosts":
            raise HostsUpdatedInterrupt(skip_sync=False)
        elif self.kind == "hosts removed":
            raise HostsUpdatedInterrupt(skip_sync=True)
        raise AssertionError("nothing happened")


class Norm(torch.nn.BatchNorm1d):
    """Has buffers, and extra state that is no tensor."""

    def __init__(self) -> None:
        super().__init__(7)
        self.notes = [hvd.rank()]

    def get_extra_state(self) -> Any:
        return self.notes

    def set_extra_state(self, state: Any) -> None:
        self.notes = state


def new_state(middle: Callable[[], torch.nn.Module] = torch.nn.Tanh) -> Any:
    """Every rank has other parameters, and each has an optimizer that has seen other gradients."""
    torch.manual_seed(100 + hvd.rank())
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), middle(), torch.nn.Linear(7, 1))
    inner = torch.optim.Adam(model.parameters(), lr=0.05)
    model(torch.randn(4, 5)).sum().backward()
    inner.step()
    inner.zero_grad()
    return hvd.elastic.TorchState(
        model,
        hvd.DistributedOptimizer(inner, model.named_parameters()),
        scheduler=torch.optim.lr_scheduler.ExponentialLR(inner, gamma=0.5 + hvd.rank() / 10),
        sampler=hvd.elastic.ElasticSampler(range(COUNT), seed=7),
        epoch=0,
        step=0,
    )


def train(state: Any, visits: dict[int, list[int]], failure: Failure | None, attempts: list[int]) -> str:
    """Trains to the end. The visits are those that count: what is done again replaces what was done before."""
    attempts.append(state.step)

    def may_fail(where: str) -> None:
        if failure is not None and len(attempts) == 1 and failure.strikes(where, state.step):
            failure.strike()

    inputs = torch.randn(COUNT, 5, generator=torch.Generator().manual_seed(1))
    while state.epoch < EPOCHS:
        loader = torch.utils.data.DataLoader(range(COUNT), batch_size=BATCH, sampler=state.sampler)
        for index, rows in enumerate(loader):
            state.model(inputs[rows]).square().mean().backward()
            may_fail("reductions in flight")
            state.optimizer.step()
            state.optimizer.zero_grad()
            may_fail("before the record")
            state.sampler.record_batch(index, BATCH)
            visits[state.step] = rows.tolist()
            state.step += 1
            may_fail("before the commit")
            if state.step % (failure.commit_every if failure else 3) == 0:
                state.commit()
            may_fail("after the commit")
        state.epoch += 1
        state.scheduler.step()
        state.sampler.set_epoch(state.epoch)
    return "trained"


def alike(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(alike(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(alike(one, other) for one, other in zip(left, right, strict=True))
    return bool(left == right)


def everything(state: Any) -> list[Any]:
    return [
        *(part.state_dict() for part in (state.model, state.optimizer, state.scheduler, state.sampler)),
        state.epoch,
        state.step,
    ]


FAILURES = {
    "in flight": Failure("reductions in flight", 4, "all", "error"),
    "before the first commit": Failure("reductions in flight", 1, "all", "error"),
    "after a step": Failure("before the commit", 5, "all", "error"),
    "a real mismatch": Failure("before the record", 4, "all", "mismatch"),
    "a real mismatch in flight": Failure("reductions in flight", 4, "all", "mismatch"),
    "the last rank alone": Failure("reductions in flight", 4, "last", "error"),
    "the first rank alone": Failure("reductions in flight", 4, "first", "error"),
    "the first rank, and the others have committed": Failure("before the commit", 3, "first", "error", 1),
    "the last rank, and the others have committed": Failure("before the commit", 3, "last", "error", 1),
    "the first rank right after a commit": Failure("after the commit", 3, "first", "error"),
    "hosts updated": Failure("before the commit", 4, "all", "hosts"),
    "hosts updated in flight": Failure("reductions in flight", 4, "all", "hosts"),
    "hosts removed in flight": Failure("reductions in flight", 4, "all", "hosts removed"),
    "hosts removed, as only the last rank sees": Failure("reductions in flight", 4, "last", "hosts removed"),
    "hosts removed, as only the first rank sees": Failure("before the commit", 2, "first", "hosts removed"),
}


@pytest.mark.parametrize("what", FAILURES)
def test_training_that_was_interrupted_ends_as_if_it_was_not(steady: None, what: str) -> None:
    failure = FAILURES[what]
    undisturbed, disturbed = new_state(), new_state()
    wanted_visits: dict[int, list[int]] = {}
    undisturbed.sync()
    train(undisturbed, wanted_visits, None, [])

    visits: dict[int, list[int]] = {}
    attempts: list[int] = []
    resets: list[int] = []
    disturbed.register_reset_callbacks([lambda: resets.append(hvd.size())])
    assert hvd.elastic.run(train)(disturbed, visits, failure, attempts=attempts) == "trained"

    assert resets == [hvd.size()], "the job was formed again, once"
    assert len(attempts) == 2 and attempts[0] == 0
    assert alike(everything(disturbed), everything(undisturbed))
    assert visits == wanted_visits
    for parameter in disturbed.model.parameters():
        assert_same_on_all_ranks(parameter)


def test_sync_takes_everything_from_rank_0() -> None:
    state = new_state(Norm)
    state.epoch, state.step = hvd.rank(), 10 * hvd.rank()
    state.sampler.set_epoch(hvd.rank())
    state.sync()
    assert (state.epoch, state.step, state.sampler.epoch) == (0, 0, 0)
    synced = everything(state)
    ranks = hvd.allgather_object(synced)
    assert all(alike(one, ranks[0]) for one in ranks)
    assert state.scheduler.gamma == 0.5
    assert state.model[1].notes == [0]
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.add_(1.0)
    state.epoch = 5
    state.sampler.record_batch(0, BATCH)
    state.restore()
    assert alike(everything(state), ranks[0]), "it is saved, too"


def test_an_update_of_hosts_interrupts_all_ranks_at_the_commit() -> None:
    attempts: list[tuple[int, bool]] = []

    @hvd.elastic.run
    def train(state: Any) -> None:
        attempts.append((state.step, hvd.is_initialized()))
        while state.step < 4:
            state.step += 1
            if state.step == 2 and len(attempts) == 1 and hvd.rank() == 0:
                state.on_hosts_updated(1.0, hvd.elastic.HostUpdateResult.added)
            state.commit()

    state = hvd.elastic.TorchState(step=0)
    train(state)
    assert attempts == [(0, True), (2, True)]
    assert state.step == 4


INTERRUPTS = {
    "errors": hvd.HorovodInternalError("injected"),
    "hosts updated": HostsUpdatedInterrupt(),
    "hosts removed": HostsUpdatedInterrupt(skip_sync=True),
}


@pytest.mark.parametrize("what", INTERRUPTS)
def test_ranks_that_have_processed_different_numbers(what: str) -> None:
    """Each index counts once, as often as the job is formed again."""
    state = hvd.elastic.TorchState(sampler=hvd.elastic.ElasticSampler(range(101)), attempts=0)
    done: list[int] = []

    @hvd.elastic.run
    def train(state: Any) -> None:
        own = list(state.sampler)
        counts = hvd.allgather_object(len(own))
        assert counts == [len(own)] * hvd.size()
        state.attempts += 1
        batches = min(len(own), 3 * hvd.rank() + state.attempts) if state.attempts < 4 else len(own)
        for batch in range(batches):
            state.sampler.record_batch(batch, 1)
        done.extend(own[:batches])
        state.commit()
        if state.attempts < 4:
            raise INTERRUPTS[what]

    train(state)
    visits = sorted(index for of_rank in hvd.allgather_object(done) for index in of_rank)
    assert sorted(set(visits)) == list(range(101))
    assert len(visits) - 101 < hvd.size(), "more than once only to fill up the last round"
    state.sync()
    assert state.sampler.remaining_indices == []


@pytest.mark.parametrize("waiting", ["nobody waits", "beside a stuck set"])
def test_process_sets_and_their_optimizers_live_on(waiting: str) -> None:
    if hvd.size() < 3:
        pytest.skip("needs process sets of one and of two")
    first, pair = hvd.add_process_set([0]), hvd.add_process_set([1, 2])
    hvd.remove_process_set(first)
    own, other = hvd.add_process_set([0]), hvd.add_process_set([0, 2])
    stuck = other if waiting == "beside a stuck set" else own  # a set of one rank is never stuck
    model = torch.nn.Linear(2, 1, bias=False)
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = hvd.DistributedOptimizer(inner, op=hvd.Sum, process_set=pair)
    attempts: list[int] = []

    @hvd.elastic.run
    def train(state: Any) -> torch.Tensor:
        attempts.append(1)
        with operations_stuck_in(stuck):
            model(torch.full((1, 2), float(hvd.rank()))).sum().backward()
            if len(attempts) == 1:
                raise hvd.HorovodInternalError("injected")
            optimizer.step()
        return model.weight.grad

    gradient = train(hvd.elastic.TorchState(model, optimizer))
    assert gradient.tolist() == [[3.0 if hvd.rank() in (1, 2) else float(hvd.rank())] * 2]
    if hvd.rank() == 0:
        assert hvd.allreduce(torch.ones(1), op=hvd.Sum, process_set=own).item() == 1
    hvd.barrier()
    assert all(hvd.remove_process_set(process_set) for process_set in (pair, own, other))


@pytest.mark.parametrize("where", ["training", "sync"])
def test_an_error_that_always_comes_again_is_raised_on_all_ranks(where: str) -> None:
    if hvd.size() == 1 and where == "sync":
        pytest.skip("one rank cannot disagree")
    attempts: list[int] = []

    @hvd.elastic.run
    def train(state: Any) -> None:
        attempts.append(1)
        raise hvd.HorovodInternalError("it always comes")

    model = torch.nn.Linear(3 + (hvd.rank() % 2 if where == "sync" else 0), 2)
    with pytest.raises(hvd.HorovodInternalError, match=r"gave up after 3 failures") as caught:
        train(hvd.elastic.TorchState(model))
    assert ("'weight'" if where == "sync" else "it always comes") in str(caught.value)
    assert len(attempts) == (0 if where == "sync" else 3)
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == hvd.size(), "the job is up"


def test_other_errors_pass_and_leave_the_job_as_it_is() -> None:
    @hvd.elastic.run
    def train(state: Any) -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        train(hvd.elastic.TorchState(step=0))
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == hvd.size()
