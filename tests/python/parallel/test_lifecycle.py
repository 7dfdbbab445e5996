"""Start, end, start again; topology; forks."""

from __future__ import annotations

import gc
import os
import sys
import weakref
from collections.abc import Callable

import pytest
import torch
from stuck import operations_stuck_in

import horovod_cpp.torch as hvd
from horovod_cpp.common.process_sets import get_process_set_ids_and_ranks


def launched_rank_and_size() -> tuple[int, int]:
    for rank, size in (("HOROVOD_RANK", "HOROVOD_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
                       ("PMI_RANK", "PMI_SIZE"), ("RANK", "WORLD_SIZE")):  # fmt: skip
        if rank in os.environ:
            return int(os.environ[rank]), int(os.environ[size])
    return 0, 1


def test_topology_is_the_launchers() -> None:
    assert (hvd.rank(), hvd.size()) == launched_rank_and_size()
    assert hvd.local_rank() == hvd.rank() and hvd.local_size() == hvd.size(), "all ranks are on this host"
    assert (hvd.cross_rank(), hvd.cross_size()) == (0, 1)
    assert hvd.is_homogeneous()
    assert hvd.gloo_enabled() is False
    if hvd.mpi_enabled():
        assert hvd.mpi_built() and isinstance(hvd.mpi_threads_supported(), bool)
    else:
        with pytest.raises(ValueError):
            hvd.mpi_threads_supported()


def test_init_again_does_nothing() -> None:
    handle = hvd.allreduce_async(torch.ones(2), op=hvd.Sum)
    for _ in range(100):
        hvd.init()
    assert hvd.synchronize(handle).tolist() == [hvd.size()] * 2


def with_gradient() -> torch.Tensor:
    return torch.ones(4, requires_grad=True)


def adam() -> torch.optim.Optimizer:
    return torch.optim.Adam([with_gradient()])


# What is not a question about the topology but an operation, blocking, with a gradient, or made of several.
OPERATIONS: dict[str, Callable[[], object]] = {
    "allreduce": lambda: hvd.allreduce(with_gradient()),
    "allreduce_": lambda: hvd.allreduce_(torch.ones(1)),
    "allgather": lambda: hvd.allgather(with_gradient()),
    "broadcast": lambda: hvd.broadcast(with_gradient(), 0),
    "alltoall": lambda: hvd.alltoall(with_gradient()),
    "reducescatter": lambda: hvd.reducescatter(with_gradient()),
    "reducescatter sum": lambda: hvd.reducescatter(with_gradient(), op=hvd.Sum),
    "grouped_allreduce": lambda: hvd.grouped_allreduce([with_gradient()]),
    "grouped_allgather": lambda: hvd.grouped_allgather([with_gradient()]),
    "grouped_reducescatter": lambda: hvd.grouped_reducescatter([with_gradient()], op=hvd.Sum),
    "sparse_allreduce_async": lambda: hvd.sparse_allreduce_async(torch.eye(2).to_sparse(), "sparse", hvd.Average),
    "barrier": hvd.barrier,
    "join": hvd.join,
    "broadcast_object": lambda: hvd.broadcast_object(1),
    "allgather_object": lambda: hvd.allgather_object(1),
    "broadcast_parameters": lambda: hvd.broadcast_parameters({"a": torch.ones(1)}, 0),
    "broadcast_optimizer_state": lambda: hvd.broadcast_optimizer_state(adam(), 0),
    "SyncBatchNorm": lambda: hvd.SyncBatchNorm(2)(torch.ones(3, 2)),
}
QUESTIONS: dict[str, Callable[[], object]] = {
    "rank": hvd.rank,
    "local_size": hvd.local_size,
    "process set": hvd.global_process_set.size,
    "included": hvd.process_set_included,
    "DistributedOptimizer": lambda: hvd.DistributedOptimizer(adam()),
}


def test_before_init_operations_and_questions_have_errors_of_their_own() -> None:
    hvd.barrier()
    hvd.shutdown()
    text = r"Horovod has not been initialized; use hvd\.init\(\)\."
    for operation in OPERATIONS.values():
        with pytest.raises(hvd.HorovodInternalError, match=text):
            operation()
    for question in QUESTIONS.values():
        with pytest.raises(ValueError, match=text):
            question()


def test_a_reducescatter_in_a_set_that_is_not_registered() -> None:
    nowhere = hvd.ProcessSet([0])
    for call in (
        lambda: hvd.reducescatter(with_gradient(), process_set=nowhere),
        lambda: hvd.grouped_reducescatter([with_gradient()], op=hvd.Sum, process_set=nowhere),
    ):
        with pytest.raises(ValueError, match="has not been registered"):
            call()


def test_shutdown_and_init() -> None:
    place = hvd.rank(), hvd.size()
    for round_number in range(3):
        hvd.barrier()
        hvd.shutdown()
        hvd.shutdown()
        assert not hvd.is_initialized()
        with pytest.raises(ValueError, match=r"Horovod has not been initialized; use hvd\.init\(\)\."):
            hvd.rank()
        with pytest.raises(hvd.HorovodInternalError, match="not been initialized"):
            hvd.allreduce(torch.ones(1))
        hvd.init()
        assert hvd.is_initialized()
        assert (hvd.rank(), hvd.size()) == place
        total = hvd.allreduce(torch.full((3,), float(round_number)), op=hvd.Sum)
        assert total.tolist() == [round_number * hvd.size()] * 3


def test_shutdown_ends_what_is_in_flight_on_all_ranks() -> None:
    if hvd.size() == 1:
        pytest.skip("one rank is done at once")
    handle = hvd.allreduce_async(torch.ones(3), name=f"only rank {hvd.rank()} asks for this")
    hvd.barrier()
    if hvd.rank() == hvd.size() - 1:
        hvd.shutdown()
    with pytest.raises(hvd.HorovodInternalError):
        hvd.synchronize(handle)
    hvd.shutdown()


@pytest.mark.skipif(launched_rank_and_size()[1] == 1, reason="one rank is done at once")
def test_the_next_job_forgets_handles_that_nobody_synchronised() -> None:
    def start() -> tuple[int, weakref.ref[torch.Tensor]]:
        tensor = torch.ones(100)
        return hvd.allreduce_async(tensor, name="forgotten"), weakref.ref(tensor)

    handle, tensor = start() if hvd.rank() == 0 else (None, None)
    hvd.barrier()
    hvd.shutdown()
    if handle is not None:
        assert hvd.poll(handle), "it failed with its job"
    hvd.init()
    if handle is not None and tensor is not None:
        with pytest.raises(ValueError, match="was not created or has been cleared"):
            hvd.poll(handle)
        assert hvd.synchronize(handle) is None
        gc.collect()
        assert tensor() is None
    hvd.barrier()


def test_static_process_sets() -> None:
    if hvd.size() == 1:
        pytest.skip("one rank has no parts")
    others = range(1, hvd.size())
    hvd.barrier()
    hvd.shutdown()
    first, rest, again = hvd.ProcessSet([0]), hvd.ProcessSet(others), hvd.ProcessSet([0])
    with pytest.raises(ValueError, match="entry number 2 is a duplicate"):
        hvd.init(process_sets=[first, rest, again])
    assert hvd.is_initialized()
    first, rest = hvd.ProcessSet([0]), hvd.ProcessSet(reversed(others))
    hvd.init(process_sets=[first, rest])
    assert (first.process_set_id, rest.process_set_id) == (1, 2)
    assert get_process_set_ids_and_ranks() == {
        0: list(range(hvd.size())), 1: [0], 2: list(others),
    }  # fmt: skip
    own = first if hvd.rank() == 0 else rest
    # With two ranks it is the set of all that is stuck, with more the second one.
    with operations_stuck_in(hvd.global_process_set if hvd.size() == 2 else rest):
        assert hvd.allreduce(torch.ones(1), op=hvd.Sum, process_set=own).item() == own.size()
        assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == hvd.size()
    hvd.barrier()
    hvd.shutdown()
    assert first.process_set_id is None, "ids end with the job"


def test_process_sets_cannot_be_added_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    hvd.barrier()
    hvd.shutdown()
    monkeypatch.delenv("HOROVOD_DYNAMIC_PROCESS_SETS", raising=False)
    hvd.init()
    with pytest.raises(ValueError, match="Set HOROVOD_DYNAMIC_PROCESS_SETS=1"):
        hvd.add_process_set([0])
    hvd.barrier()
    hvd.shutdown()


def test_a_variable_that_is_set_after_the_import_lets_process_sets_be_added(monkeypatch: pytest.MonkeyPatch) -> None:
    if hvd.size() == 1:
        pytest.skip("one rank has no parts")
    hvd.barrier()
    hvd.shutdown()
    monkeypatch.setenv("HOROVOD_DYNAMIC_PROCESS_SETS", "1")
    hvd.init()
    first = hvd.add_process_set([0])
    assert hvd.remove_process_set(first) is True


def test_the_environment_is_read_at_init(monkeypatch: pytest.MonkeyPatch) -> None:
    hvd.barrier()
    hvd.shutdown()
    monkeypatch.setenv("HOROVOD_CYCLE_TIME", "rubbish")
    with pytest.raises(ValueError, match="HOROVOD_CYCLE_TIME='rubbish'"):
        hvd.init()
    assert not hvd.is_initialized()


def test_bad_arguments_of_init() -> None:
    with pytest.raises(ValueError, match="dynamic"):
        hvd.init(process_sets="static")


def test_a_forked_child_is_no_rank() -> None:
    hvd.allreduce(torch.ones(10))
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        answers = []
        for call in (hvd.rank, hvd.init, hvd.barrier, lambda: hvd.allreduce(torch.ones(1)), hvd.statistics):
            try:
                call()
                answers.append("no error")
            except hvd.HorovodInternalError as error:
                answers.append(str(error))
        hvd.shutdown()  # does nothing
        answers.append(str(hvd.is_initialized()))
        os.write(write_end, "\n".join(answers).encode())
        os._exit(0)
    os.close(write_end)
    with open(read_end) as pipe:
        *errors, initialized = pipe.read().split("\n")
    assert os.waitpid(pid, 0)[1] == 0
    assert len(errors) == 5 and all("used after fork" in error for error in errors)
    assert initialized == "False"
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == hvd.size()


def test_a_forked_child_that_exits_shuts_nothing_down() -> None:
    pid = os.fork()
    if pid == 0:
        # Leave as a program does, with everything that Python runs at exit, but not through pytest.
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        import atexit

        atexit._run_exitfuncs()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert hvd.is_initialized()
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == hvd.size()


class Squares(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(float(index * index))


def test_data_loader_workers_do_no_harm() -> None:
    loader = torch.utils.data.DataLoader(Squares(), batch_size=4, num_workers=2, multiprocessing_context="fork")
    for _ in range(2):
        for batch in loader:
            assert torch.equal(hvd.allreduce(batch), batch)
