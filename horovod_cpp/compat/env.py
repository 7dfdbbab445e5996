"""Stands for ``horovod.runner.common.util.env``."""

from __future__ import annotations

import os

# In the order in which init looks: hvdrun, Open MPI, other MPIs and Slurm, torchrun.
_VARIABLES = (
    ("HOROVOD_RANK", "HOROVOD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("RANK", "WORLD_SIZE"),
)


def get_env_rank_and_size() -> tuple[int, int]:
    """Rank and number of ranks as the launcher told them, also before `init`; (0, 1) without a launcher.

    Raises: ValueError if a launcher's variable is not a number.
    """
    for rank, size in _VARIABLES:
        if rank in os.environ and size in os.environ:
            return int(os.environ[rank]), int(os.environ[size])
    return 0, 1
