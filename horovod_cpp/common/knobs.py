"""Environment variables of Horovod that the library does not read: most have no effect; `init` says so, once."""

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
    "HOROVOD_HIERARCHICAL_ALLREDUCE": "there is no hierarchical algorithm",
    "HOROVOD_HIERARCHICAL_ALLGATHER": "there is no hierarchical algorithm",
    "HOROVOD_TORUS_ALLREDUCE": "there is no torus algorithm",
    "HOROVOD_DISABLE_GROUP_FUSION": "a group is an operation of its own",
    "HOROVOD_ADASUM_MPI_CHUNK_SIZE": "HOROVOD_SEGMENT_BYTES cuts messages",
    "HOROVOD_AUTOTUNE*": "there is no autotuning yet",
    "HOROVOD_ELASTIC_TIMEOUT": "HOROVOD_START_TIMEOUT limits the wait for ranks",
    "DDL_OPTIONS": "there is no DDL",
    "HOROVOD_ENABLE_XLA_OPS": "only PyTorch is supported",
    "HOROVOD_SPARK_*": "there is no integration with Spark",
    "HOROVOD_MIXED_INSTALL": "factors of half-precision numbers are applied in float32",
    "HOROVOD_HOSTNAME": "ranks find out by themselves who is on their host",
    "HOROVOD_SECRET_KEY": "there is no service that it would open",
    **dict.fromkeys(
        (
            "HOROVOD_WITH_*",
            "HOROVOD_WITHOUT_*",
            "HOROVOD_GPU",
            "HOROVOD_GPU_ALLREDUCE",
            "HOROVOD_GPU_ALLGATHER",
            "HOROVOD_GPU_BROADCAST",
            "HOROVOD_GPU_ALLTOALL",
            "HOROVOD_GPU_REDUCESCATTER",
            "HOROVOD_ALLOW_MIXED_GPU_IMPL",
            "HOROVOD_CUDA_HOME",
            "HOROVOD_NCCL_HOME",
            "HOROVOD_NCCL_INCLUDE",
            "HOROVOD_NCCL_LIB",
            "HOROVOD_NCCL_LINK",
            "HOROVOD_ROCM_*",
            "HOROVOD_BUILD_*",
        ),
        "it is for building Horovod",
    ),
}
# Set to 0 they ask for what is done anyway.
_OFF_ALREADY = (
    "HOROVOD_AUTOTUNE",
    "HOROVOD_CCL_CACHE",
    "HOROVOD_DISABLE_GROUP_FUSION",
    "HOROVOD_ENABLE_XLA_OPS",
    "HOROVOD_HIERARCHICAL_ALLREDUCE",
    "HOROVOD_HIERARCHICAL_ALLGATHER",
    "HOROVOD_MPI_THREADS_DISABLE",
    "HOROVOD_TORUS_ALLREDUCE",
)
_told: set[str] = set()


def warn_of_unread() -> None:
    """Warn of each such variable that is set, once in a process."""
    for name in sorted(set(os.environ) - _told):
        reason = next((why for pattern, why in _WITHOUT_EFFECT.items() if fnmatch.fnmatchcase(name, pattern)), None)
        if reason is None or (os.environ[name] in ("", "0") and name in _OFF_ALREADY):
            continue
        _told.add(name)
        warnings.warn(f"{name} has no effect: {reason}", RuntimeWarning, stacklevel=3)


def elastic() -> bool:
    """What HOROVOD_ELASTIC says now. ValueError for what is neither 0 nor 1."""
    value = os.environ.get("HOROVOD_ELASTIC", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"HOROVOD_ELASTIC='{value}' cannot be used: it has to be 0 or 1")
    return value == "1"
