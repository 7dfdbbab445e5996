"""Environment variables of Horovod that have no effect here; `init` says so, once."""

from __future__ import annotations

import fnmatch
import os
import warnings

# Pattern of names, and why. docs/migrating.md has the whole table.
_WITHOUT_EFFECT = {
    "HOROVOD_CONTROLLER": "the launcher decides how ranks meet",
    "HOROVOD_CPU_OPERATIONS": "HOROVOD_TRANSPORT chooses what carries the data",
    "HOROVOD_GLOO_*": "there is no Gloo",
    "HOROVOD_MPI_THREADS_DISABLE": "MPI_THREAD_SERIALIZED is enough",
    "HOROVOD_THREAD_AFFINITY": "threads that wait do the work of the background thread",
    "HOROVOD_CCL_CACHE": "there is no oneCCL",
    "HOROVOD_NUM_NCCL_STREAMS": "each device has one stream",
    "HOROVOD_BATCH_D2D_MEMCOPIES": "one kernel always packs all tensors of a call",
    "HOROVOD_ENABLE_ASYNC_COMPLETION": "an operation on a GPU is always done once its work is in line there",
    "HOROVOD_DISABLE_NVTX_RANGES": "there are no NVTX ranges",
    "HOROVOD_HIERARCHICAL_*": "there is no hierarchical algorithm",
    "HOROVOD_TORUS_ALLREDUCE": "there is no torus algorithm",
    "HOROVOD_DISABLE_GROUP_FUSION": "a group is an operation of its own",
    "HOROVOD_ADASUM_MPI_CHUNK_SIZE": "HOROVOD_SEGMENT_BYTES cuts messages",
    "HOROVOD_AUTOTUNE*": "there is no autotuning yet",
    "HOROVOD_ELASTIC_TIMEOUT": "HOROVOD_START_TIMEOUT limits the wait for ranks",
}
_told: set[str] = set()


def warn_of_unread() -> None:
    """Warn of each such variable that is set, once in a process."""
    for name in sorted(set(os.environ) - _told):
        reason = next((why for pattern, why in _WITHOUT_EFFECT.items() if fnmatch.fnmatchcase(name, pattern)), None)
        if reason is not None:
            _told.add(name)
            warnings.warn(f"{name} has no effect: {reason}", RuntimeWarning, stacklevel=3)
