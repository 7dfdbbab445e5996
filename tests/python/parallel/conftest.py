"""Joins the job once; every rank runs the same tests in the same order.

Run as `mpirun -np N python -m pytest tests/python/parallel` or with hvdrun in place of mpirun.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import horovod_cpp.torch as hvd


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # ranks share the cores


@pytest.fixture(autouse=True)
def job() -> Iterator[None]:
    """A job in which process sets may be added; a test that shut it down gets a new one made for the next."""
    hvd.init(process_sets="dynamic")
    yield
