"""Lifecycle and topology, the same for all frameworks.

Questions raise ValueError before `init`, as in Horovod; in a forked child they raise HorovodInternalError.
"""

from __future__ import annotations

import atexit
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from horovod_cpp import _core
from horovod_cpp.common import exceptions, knobs, process_sets
from horovod_cpp.common.process_sets import ProcessSet

_last_arguments: dict[str, Any] = {}
_job_starts: list[Callable[[], None]] = []


def when_a_job_starts(call: Callable[[], None]) -> None:
    """Have `call` called by each `init` that joined a job, on its thread."""
    _job_starts.append(call)


def init(
    comm: Sequence[int] | Any = None,
    process_sets: Sequence[ProcessSet] | str | None = None,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Join the ranks of the job. Blocks until all have met. A second call only binds `process_sets` again.

    Args:
        comm: ranks of the launch that form the job and are numbered in this order from 0; None or an empty list: all.
            Each of them calls with the same list. Lists that share no rank are jobs of their own, each with its own
            `shutdown` and `init`. Under MPI all ranks of the launch have to call `init` once, also those in no list.
        process_sets: static process sets, equal on all ranks, which get the ids 1, 2, ... in this order;
            "dynamic" allows `add_process_set` later, as HOROVOD_DYNAMIC_PROCESS_SETS=1 does.
        options: settings in place of HOROVOD_* variables, by their names with or without HOROVOD_, in any case:
            {"fusion_threshold": 1 << 20}. Numbers and bools are written as the variables have them.
    Raises: ValueError for bad arguments, such as a `comm` without this rank, also for process sets given twice (the job
        is up then, with the different ones); HorovodInitializationError if ranks are missing after
        HOROVOD_START_TIMEOUT seconds or differ in their settings; RuntimeError if a library is missing.
    """
    sets = _static_process_sets(process_sets)
    distinct = list({tuple(entry.ranks or ()): list(entry.ranks or ()) for entry in sets}.values())
    ranks = _comm_ranks(comm)
    knobs.elastic()  # a value that cannot be used is an error here, as with other variables
    is_first = not _core.is_initialized()
    if is_first:
        _last_arguments.update(comm=ranks, options=dict(options or {}))
    try:
        _core.init(distinct, ranks, _settings(options or {}))
    except _core.ForkError as error:
        raise exceptions.HorovodInternalError(str(error)) from None
    except _core.Error as error:
        raise exceptions.initialization_error(error) from None
    if is_first:
        for call in _job_starts:
            call()
        if rank() == 0:
            knobs.warn_of_unread()
    _bind(sets)


def last_arguments() -> dict[str, Any]:
    """What the last `init` was given as `comm` and `options`."""
    return dict(_last_arguments)


def _static_process_sets(argument: Sequence[ProcessSet] | str | None) -> list[ProcessSet]:
    if isinstance(argument, str):
        if argument.lower() != "dynamic":
            raise ValueError(f"process_sets='{argument}': the only text that it may be is 'dynamic'")
        os.environ["HOROVOD_DYNAMIC_PROCESS_SETS"] = "1"
        return []
    return [entry if isinstance(entry, ProcessSet) else ProcessSet(entry) for entry in argument or ()]


def _settings(options: Mapping[str, Any]) -> list[tuple[str, str]]:
    settings = []
    for name, value in options.items():
        variable = name.upper()
        if not variable.startswith("HOROVOD_"):
            variable = f"HOROVOD_{variable}"
        settings.append((variable, str(int(value) if isinstance(value, bool) else value)))
    return settings


def _comm_ranks(comm: Sequence[int] | Any) -> list[int]:
    if hasattr(comm, "Get_group"):
        raise ValueError("init(comm=...) takes a list of ranks; communicators of mpi4py are not supported")
    if comm is None:
        return []
    try:
        # A bool or 1.5 in the place of a rank is a mistake.
        ranks = [-1 if isinstance(rank, bool) else operator.index(rank) for rank in comm]
    except TypeError:
        ranks = [-1]
    if any(rank not in range(2**31) for rank in ranks):
        raise ValueError(f"init(comm={comm!r}): comm has to be a list of ranks of the launch, numbers from 0")
    return ranks


def _bind(sets: list[ProcessSet]) -> None:
    process_sets.bind_all(sets)
    seen: set[tuple[int, ...]] = set()
    for i, entry in enumerate(sets):
        ranks = tuple(entry.ranks or ())
        if ranks in seen:
            raise ValueError(
                f"Horovod could not be initialized because process_sets entry number {i} is a duplicate: {entry}"
            )
        seen.add(ranks)


def shutdown() -> None:
    """End the job for all ranks: operations in flight anywhere end with an error. Blocks for about 5 s at most.

    Runs at exit, too. Does nothing before `init` and in a forked child. `init` may be called again afterwards.
    """
    try:
        _core.shutdown()
    except _core.Error as error:
        raise exceptions.operation_error(error) from None
    process_sets.unbind_all()


def _shutdown_at_exit() -> None:
    _core.interpreter_ends()  # daemon threads that wait must not run Python again when their operations end
    shutdown()


atexit.register(_shutdown_at_exit)


def is_initialized() -> bool:
    """Whether `init` has been called and the job has not been shut down by this rank. Never raises."""
    return _core.is_initialized()


def topology() -> _core.Topology:
    """Place of this rank in the job."""
    try:
        return _core.topology()
    except _core.Error as error:
        raise exceptions.query_error(error) from None


def rank() -> int:
    """Global rank of this process, 0 .. size()-1."""
    return topology().rank


def size() -> int:
    """Number of ranks of the job."""
    return topology().size


def local_rank() -> int:
    """Index of this rank among the ranks of its host."""
    return topology().local_rank


def local_size() -> int:
    """Number of ranks on this host."""
    return topology().local_size


def cross_rank() -> int:
    """Index of this host among the hosts that have a rank with this local rank."""
    return topology().cross_rank


def cross_size() -> int:
    """Number of hosts that have a rank with this local rank."""
    return topology().cross_size


def is_homogeneous() -> bool:
    """Whether every host has as many ranks."""
    return topology().is_homogeneous


def mpi_threads_supported() -> bool:
    """Whether MPI gave MPI_THREAD_MULTIPLE. ValueError where the job was not joined through MPI."""
    here = topology()
    if not here.mpi_enabled:
        raise ValueError("mpi_threads_supported() has no answer: this job was not joined through MPI")
    return here.mpi_threads_supported


def mpi_enabled() -> bool:
    """Whether the job was joined through MPI."""
    return topology().mpi_enabled


def gloo_enabled() -> bool:
    """False: there is no Gloo here. Without MPI the ranks meet through a rendezvous of the library's own."""
    topology()
    return False


def mpi_built() -> bool:
    """Whether the MPI module was built with this package. Works before `init`, as all `_built` functions do."""
    return _core.mpi_built()


def gloo_built() -> bool:
    """False: the library has transports of its own."""
    return False


def nccl_built() -> int:
    """Version code of the NCCL that was found, an int as in Horovod: 22809 is 2.28.9; 0 without one or the CUDA module.

    The first call opens NCCL and may take a second. HorovodInternalError in a forked child of a rank.
    """
    if not _core.cuda_built():
        return 0
    try:
        return _core.nccl_version()
    except _core.Error as error:
        if error.code != _core.UNAVAILABLE:
            raise exceptions.query_error(error) from None
        return 0


def ddl_built() -> bool:
    """False: IBM DDL is not supported."""
    return False


def ccl_built() -> bool:
    """False: oneCCL is not supported."""
    return False


def cuda_built() -> bool:
    """Whether the CUDA module was built with this package (whether or not this machine has a GPU)."""
    return _core.cuda_built()


def rocm_built() -> bool:
    """False: ROCm is not supported."""
    return False


def start_timeline(file_path: str | os.PathLike[str], mark_cycles: bool = False) -> None:
    """Record what happens to operations in a file for chrome://tracing or Perfetto, from now on; see docs/timeline.md.

    Each rank calls it for itself, at any time; `HOROVOD_TIMELINE=DYNAMIC` is not needed. Rank 0 records for all; other
    ranks do nothing, unless `{rank}` in the path makes it one file for each rank. While another file is being written
    that one is ended first; the same file goes on.

    Args:
        file_path: the file, which is made or emptied.
        mark_cycles: mark when the engine takes up new operations.
    Raises: ValueError before `init`, and, with path and reason, if the file cannot be written.
    """
    try:
        _core.timeline_start(os.fsencode(file_path), mark_cycles)
    except _core.Error as error:
        raise exceptions.query_error(error) from None


def stop_timeline() -> None:
    """End the timeline. Blocks until everything is in the file. Does nothing if none is recorded.

    `shutdown` does it, too. Raises: ValueError before `init`.
    """
    try:
        _core.timeline_stop()
    except _core.Error as error:
        raise exceptions.query_error(error) from None


def statistics() -> dict[str, int]:
    """Counters of this rank since `init`: operations, bytes, messages; see `hvd_statistics` in c_api.h."""
    try:
        return _core.statistics()
    except _core.Error as error:
        raise exceptions.query_error(error) from None
