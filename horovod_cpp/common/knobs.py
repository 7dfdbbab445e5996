"""HOROVOD_* variables that the library does not read, be they Horovod's or misspelt: `init` says so, once."""

from __future__ import annotations

import difflib
import fnmatch
import os
import warnings

_PREFIX = "HOROVOD_"
# What is read, after the prefix. tests/project/test_variables.py compares these with the code that reads.
_SETTINGS = (
    "CACHE_CAPACITY",
    "CYCLE_TIME",
    "DYNAMIC_PROCESS_SETS",
    "ELASTIC",
    "FAULT",
    "FUSION_COPY_LIMIT",
    "FUSION_THRESHOLD",
    "GPU_OPERATIONS",
    "HIERARCHICAL_ALLREDUCE",
    "LOG_HIDE_TIME",
    "LOG_LEVEL",
    "MODULE_PATH",
    "MPI_LIBRARY",
    "NCCL_LIBRARY",
    "NCCL_REGISTERED_BYTES",
    "PULL_FROM_BYTES",
    "SEGMENT_BYTES",
    "SMALL_LIMIT",
    "SPIN_TIME",
    "STALL_CHECK_DISABLE",
    "STALL_CHECK_TIME_SECONDS",
    "STALL_SHUTDOWN_TIME_SECONDS",
    "STANDING_AFTER",
    "STANDING_LIMIT",
    "START_TIMEOUT",
    "TIMELINE",
    "TIMELINE_MARK_CYCLES",
    "TRANSPORT",
)
# What hvdrun tells its ranks.
_OF_THE_LAUNCHER = (
    "CROSS_RANK",
    "CROSS_SIZE",
    "JOB_TOKEN",
    "LOCAL_RANK",
    "LOCAL_SIZE",
    "RANK",
    "RENDEZVOUS_ADDR",
    "RENDEZVOUS_FD",
    "RENDEZVOUS_PORT",
    "SIZE",
)
# Of Horovod's variables that are not read: pattern of names, and why. docs/migrating.md has the whole table.
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
    "HOROVOD_HIERARCHICAL_ALLGATHER": "only allreduce has a hierarchical algorithm",
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
    "HOROVOD_HIERARCHICAL_ALLGATHER",
    "HOROVOD_MPI_THREADS_DISABLE",
    "HOROVOD_TORUS_ALLREDUCE",
)
_told: set[str] = set()


def warn_of_unread() -> None:
    """Warn of each variable that is set and has no effect, once in a process."""
    for name in sorted(set(os.environ) - _told):
        reason = _why_without_effect(name)
        if reason is not None:
            _told.add(name)
            warnings.warn(f"{name} has no effect: {reason}", RuntimeWarning, stacklevel=3)


def _why_without_effect(name: str) -> str | None:
    for pattern, why in _WITHOUT_EFFECT.items():
        if fnmatch.fnmatchcase(name, pattern):
            return None if os.environ[name] in ("", "0") and name in _OFF_ALREADY else why
    own = name.removeprefix(_PREFIX)
    if own == name or own in _SETTINGS or own in _OF_THE_LAUNCHER:
        return None
    near = difflib.get_close_matches(own, _SETTINGS, n=1)
    return "nothing reads it" + (f"; {_PREFIX}{near[0]} has a similar name" if near else "")


def elastic() -> bool:
    """What HOROVOD_ELASTIC says now. ValueError for what is neither 0 nor 1."""
    value = os.environ.get("HOROVOD_ELASTIC", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"HOROVOD_ELASTIC='{value}' cannot be used: it has to be 0 or 1")
    return value == "1"
