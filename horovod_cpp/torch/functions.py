"""Whole models: what ranks have to have alike before training starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from types import NoneType
from typing import Any, NamedTuple

import torch

from horovod_cpp.common.call_site import CallSite, call_site
from horovod_cpp.common.exceptions import HorovodInternalError
from horovod_cpp.common.process_sets import ProcessSet, global_process_set, operating_rank
from horovod_cpp.torch import operations
from horovod_cpp.torch.objects import allgather_object as allgather_object  # where Horovod has it
from horovod_cpp.torch.objects import broadcast_object as broadcast_object
from horovod_cpp.torch.optimizer_arguments import keeping_sets, without_sets
from horovod_cpp.torch.pending import Pending, wait_all


def broadcast_parameters(
    params: Mapping[str, Any] | Iterable[Any], root_rank: int, process_set: ProcessSet = global_process_set
) -> None:
    """Overwrite the parameters of all ranks of the set with the root's. Blocks.

    Args:
        params: a `state_dict()`, `named_parameters()`, or tensors; the same names on all ranks.
        root_rank: global rank of the root.
    Raises: ValueError for anything else, before anything is sent; HorovodInternalError if ranks disagree or one is
        lost. All is over then: the same names can be used again.
    """
    _broadcast_all(_named_tensors(params), root_rank, process_set, call_site())


def _broadcast_all(
    entries: list[tuple[str | None, torch.Tensor]], root_rank: int, process_set: ProcessSet, site: CallSite
) -> None:
    """Broadcast all, wait for all, and raise the first error, if there is one."""
    for name, tensor in entries:
        operations.check_broadcast(tensor, name)
    started: list[Pending] = []
    try:
        for name, tensor in entries:
            started.append(operations.start_broadcast(tensor, True, root_rank, name, process_set, site))
            operations.mark_changed((tensor,))
    finally:
        wait_all(started)
    for pending in started:
        pending.wait()


def _named_tensors(params: Mapping[str, Any] | Iterable[Any]) -> list[tuple[str | None, torch.Tensor]]:
    if isinstance(params, Mapping):
        entries: list[Any] = sorted(params.items())
    elif isinstance(params, Iterable) and not isinstance(params, (str, bytes, torch.Tensor)):
        entries = [entry if isinstance(entry, tuple) else (None, entry) for entry in params]
    else:
        raise ValueError(f"invalid params of type: {type(params)}")
    for name, tensor in entries:
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"broadcast_parameters takes tensors; '{name}' is a {type(tensor).__name__}")
        if not isinstance(name, (str, NoneType)):
            raise ValueError(f"broadcast_parameters takes names that are text; {name!r} is a {type(name).__name__}")
    repeated = sorted(name for name, count in Counter(name for name, _ in entries).items() if name and count > 1)
    if repeated:
        raise ValueError(f"broadcast_parameters: names are given more than once: {', '.join(repeated)}")
    return entries


_STATE = "broadcast_optimizer_state"


class _TensorPlace(NamedTuple):
    """Stands for a tensor in a structure that travels without its tensors."""

    dtype: torch.dtype
    shape: torch.Size


def broadcast_optimizer_state(
    optimizer: torch.optim.Optimizer,
    root_rank: int,
    model: torch.nn.Module | None = None,
    process_set: ProcessSet = global_process_set,
) -> None:
    """Overwrite state and options of the optimizers of all ranks of the set with the root's. Blocks.

    Values keep their types: tensors stay tensors, numbers numbers. No step is made to create state that is missing. The
    process sets of param groups stay each rank's own.

    Args:
        optimizer: of the same parameters, in the same groups, on all ranks.
        root_rank: global rank of the root.
        model: not needed; accepted as Horovod does.
    Raises: ValueError for torch.optim.LBFGS, and where the optimizers do not fit; HorovodInternalError if a rank is
        lost.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("cannot broadcast torch.optim.LBFGS state")
    is_root = operating_rank() == root_rank
    tensors: list[torch.Tensor] = []
    described: Any = None
    failure: Exception | None = None
    if is_root:
        try:
            described = _without_tensors(without_sets(optimizer.state_dict()), tensors)
            flats = [_as_bytes(tensor) for tensor in tensors]
        except Exception as error:  # the others are told
            failure = error
    structure, failed = broadcast_object((described, failure is not None), root_rank, _STATE, process_set)
    if failure is not None:
        raise failure
    if failed:
        raise HorovodInternalError(f"broadcast_optimizer_state: rank {root_rank} could not take its state apart")
    if not is_root:
        state = _with_empty_tensors(structure, tensors)
        flats = [_as_bytes(tensor) for tensor in tensors]
    named: list[tuple[str | None, torch.Tensor]] = [(f"{_STATE}.{index}", flat) for index, flat in enumerate(flats)]
    _broadcast_all(named, root_rank, process_set, call_site())
    if not is_root:
        with keeping_sets(optimizer):
            optimizer.load_state_dict(state)


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Bytes travel, so that every data type does. Of a contiguous tensor on the CPU, the same memory."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _without_tensors(value: Any, tensors: list[torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return _TensorPlace(value.dtype, value.shape)
    if isinstance(value, dict):
        return {key: _without_tensors(item, tensors) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_without_tensors(item, tensors) for item in value)
    return value


def _with_empty_tensors(value: Any, tensors: list[torch.Tensor]) -> Any:
    """The structure with new tensors in the places of the root's, which come to `tensors` in the same order."""
    if isinstance(value, _TensorPlace):
        tensors.append(torch.empty(value.shape, dtype=value.dtype))
        return tensors[-1]
    if isinstance(value, dict):
        return {key: _with_empty_tensors(item, tensors) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_with_empty_tensors(item, tensors) for item in value)
    return value
