"""Joins the job once; every rank runs the same tests in the same order.

Run as `mpirun -np N python -m pytest tests/python/parallel` or with hvdrun in place of mpirun.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from stuck import operations_stuck_in

import horovod_cpp.torch as hvd
from horovod_cpp.torch import buckets, gradient_names


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # ranks share the cores


@pytest.fixture(autouse=True)
def job() -> Iterator[None]:
    """A job in which process sets may be added; a test that shut it down gets a new one made for the next."""
    hvd.init(process_sets="dynamic")
    gradient_names.forget()  # each test is a program of its own
    yield


@pytest.fixture(params=["alone", "beside a stuck set"])
def alone_and_beside_a_stuck_set(job: None, request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs the test twice, the second time while the last two ranks wait for each other in a set of their own.

    With two ranks that is the set of all, in which everything else still has to go on.
    """
    if request.param == "alone":
        yield
        return
    if hvd.size() == 1:
        pytest.skip("one rank waits for nobody")
    last_two = [hvd.size() - 2, hvd.size() - 1]
    process_set = hvd.global_process_set if hvd.size() == 2 else hvd.add_process_set(last_two)
    with operations_stuck_in(process_set):
        yield
    if hvd.size() > 2:
        hvd.barrier()
        assert hvd.remove_process_set(process_set)


@pytest.fixture
def even_and_odd(job: None) -> Iterator[tuple[hvd.ProcessSet, hvd.ProcessSet]]:
    """The set of the even ranks and that of the odd ones."""
    if hvd.size() == 1:
        pytest.skip("one rank has no parts")
    even = hvd.add_process_set(range(0, hvd.size(), 2))
    odd = hvd.add_process_set(hvd.ProcessSet(range(1, hvd.size(), 2)))
    yield even, odd
    assert hvd.remove_process_set(odd)
    assert hvd.remove_process_set(even)


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts buckets so small that a test's network has several."""
    monkeypatch.setattr(buckets, "FIRST_BUCKET_BYTES", 200)
    monkeypatch.setattr(buckets, "BUCKET_BYTES", 1500)


@pytest.fixture(params=["gradients", "bucket views"])
def gradients_and_bucket_views(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, small_buckets: None
) -> None:
    """Runs the test twice, the second time with gradients that are views of buckets."""
    if request.param == "bucket views":
        views = functools.partial(hvd.DistributedOptimizer, gradient_as_bucket_view=True)
        monkeypatch.setattr(hvd, "DistributedOptimizer", views)
