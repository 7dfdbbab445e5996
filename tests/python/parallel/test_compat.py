"""A job under Horovod's names: operations, training, and errors that `except` clauses of Horovod's classes catch."""

from __future__ import annotations

import importlib
import time
from types import ModuleType

import pytest
import torch

import horovod_cpp.torch as ours
from horovod_cpp import compat


@pytest.fixture
def hvd() -> ModuleType:
    """What a program imports; the names stay, for they are in nobody's way."""
    compat.install()
    return importlib.import_module("horovod.torch")


@pytest.fixture
def mpi_ops(hvd: ModuleType) -> ModuleType:
    return importlib.import_module("horovod.torch.mpi_ops")


def test_it_is_one_job_under_both_names(hvd: ModuleType, mpi_ops: ModuleType) -> None:
    assert hvd is ours
    assert (mpi_ops.rank(), mpi_ops.size()) == (ours.rank(), ours.size())
    assert mpi_ops._basics.local_size() == ours.local_size()
    assert mpi_ops.is_homogeneous() is True  # one host


def test_the_launcher_tells_the_same_rank(hvd: ModuleType) -> None:
    env = importlib.import_module("horovod.runner.common.util.env")
    assert env.get_env_rank_and_size() == (hvd.rank(), hvd.size())


def test_handles_of_mpi_ops(mpi_ops: ModuleType) -> None:
    rank, size = mpi_ops.rank(), mpi_ops.size()
    tensor = torch.full((5,), float(rank))
    handle = mpi_ops.allreduce_async_(tensor, name="compat", op=mpi_ops.Sum)
    deadline = time.monotonic() + 60
    while not mpi_ops.poll(handle):
        assert time.monotonic() < deadline
    assert mpi_ops.synchronize(handle) is tensor
    assert tensor.tolist() == [size * (size - 1) / 2] * 5
    assert mpi_ops.synchronize(handle) is None
    with pytest.raises(ValueError, match="was not created or has been cleared"):
        mpi_ops.poll(handle)


def test_old_arguments_by_position(hvd: ModuleType, mpi_ops: ModuleType) -> None:
    tensor = torch.full((3,), float(hvd.rank() + 1))
    assert hvd.allreduce_(tensor, None, "compat.position", hvd.Max).tolist() == [float(hvd.size())] * 3
    with pytest.warns(DeprecationWarning):
        summed = hvd.allreduce(torch.ones(3), False, "compat.average")
    assert summed.tolist() == [float(hvd.size())] * 3
    with pytest.warns(DeprecationWarning):
        assert mpi_ops.handle_average_backwards_compatibility(None, False) == hvd.Sum


def test_an_operation_on_a_thread_of_in_thread(hvd: ModuleType) -> None:
    threads = importlib.import_module("horovod.runner.util.threads")
    results = []
    thread = threads.in_thread(lambda name: results.append(hvd.allgather(torch.ones(2), name=name)), ("compat.thread",))
    thread.join(60)
    assert results[0].tolist() == [1.0] * (2 * hvd.size())


def test_ranks_that_disagree_raise_horovods_exception(hvd: ModuleType) -> None:
    exceptions = importlib.import_module("horovod.common.exceptions")
    if hvd.size() > 1:
        with pytest.raises(exceptions.HorovodInternalError, match=r"compat\.shapes"):
            hvd.allreduce(torch.ones(3 + hvd.rank()), name="compat.shapes")
    assert hvd.allreduce(torch.ones(2), name="compat.shapes").tolist() == [1.0, 1.0]


@pytest.mark.usefixtures("alone_and_beside_a_stuck_set")
def test_process_sets(hvd: ModuleType, mpi_ops: ModuleType) -> None:
    process_sets = importlib.import_module("horovod.common.process_sets")
    everyone = list(range(hvd.size()))
    assert mpi_ops._basics._get_process_set_ids_and_ranks()[0] == everyone
    assert process_sets.global_process_set.size() == hvd.size()
    if hvd.size() == 1:
        return
    first = process_sets.add_process_set(process_sets.ProcessSet([0]))
    assert isinstance(first, hvd.ProcessSet)
    assert mpi_ops._basics._get_process_set_ids_and_ranks()[first.process_set_id] == [0]
    assert process_sets.process_set_included(first.process_set_id) is (hvd.rank() == 0)
    assert process_sets.remove_process_set(first)


def test_training_with_a_compressor_of_the_programs_own(hvd: ModuleType) -> None:
    """Two steps on a share of the data each are two steps on all of it."""
    compression = importlib.import_module("horovod.torch.compression")

    class Halves(compression.Compressor):
        @staticmethod
        def compress(tensor):
            return tensor / 2, None

        @staticmethod
        def decompress(tensor, ctx):
            return tensor * 2

    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(3)
        model = torch.nn.Linear(4, 2).double()
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, inputs: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    everything = torch.randn(6 * hvd.size(), 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    expected = train(*make(), everything)

    model, optimizer = make()
    if hvd.rank() != 0:
        torch.nn.init.zeros_(model.weight)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters(), compression=Halves)
    assert isinstance(optimizer, torch.optim.SGD)
    got = train(model, optimizer, everything[6 * hvd.rank() : 6 * (hvd.rank() + 1)])
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
