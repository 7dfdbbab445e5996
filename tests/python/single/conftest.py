"""These tests need no launcher; what they run gets no rank from the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

LAUNCHER_PREFIXES = ("HOROVOD_", "OMPI_", "PMIX_", "PMI_", "SLURM_")
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in list(os.environ):
        if name.startswith(LAUNCHER_PREFIXES) or name in TORCHRUN:
            monkeypatch.delenv(name)
    yield
