"""Python objects between ranks: pickled, and sent as tensors of bytes.

A rank that cannot pickle its object must not leave the others waiting: they are told, and all raise.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import torch

from horovod_cpp.common.exceptions import HorovodInternalError
from horovod_cpp.common.process_sets import ProcessSet, global_process_set, operating_rank
from horovod_cpp.torch.collectives import allgather, broadcast_


def broadcast_object(
    obj: Any, root_rank: int = 0, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Any:
    """Return the root's object on every rank of the set; the root gets `obj` itself. Blocks.

    Args:
        obj: anything that cloudpickle can serialise; ignored on other ranks than the root.
        root_rank: global rank of the root.
        name: the same on all ranks; needed only for calls of several threads at once.
    Raises: on the root, what pickling raised; HorovodInternalError on the others then, or if a rank is lost.
    """
    name = name or "broadcast_object"
    is_root = operating_rank() == root_rank
    payload, failure = _pickled(obj) if is_root else (torch.empty(0, dtype=torch.uint8), None)
    size = torch.tensor([payload.numel(), failure is not None], dtype=torch.int64)
    broadcast_(size, root_rank, name=f"{name}.size", process_set=process_set)
    if not is_root:
        payload = torch.empty(int(size[0]), dtype=torch.uint8)
    broadcast_(payload, root_rank, name=f"{name}.bytes", process_set=process_set)
    if failure is not None:
        raise failure
    if bool(size[1]):
        raise HorovodInternalError(f"broadcast_object '{name}': rank {root_rank} could not pickle: {_text(payload)}")
    return obj if is_root else _unpickled(payload)


def allgather_object(obj: Any, name: str | None = None, process_set: ProcessSet = global_process_set) -> list[Any]:
    """Return the objects of all ranks of the set, in the order of the ranks. Blocks.

    Args:
        obj: anything that cloudpickle can serialise.
        name: the same on all ranks; needed only for calls of several threads at once.
    Raises: on a rank that cannot pickle, what pickling raised; HorovodInternalError on the others then, which names it,
        or if a rank is lost.
    """
    name = name or "allgather_object"
    payload, failure = _pickled(obj)
    size = torch.tensor([[payload.numel(), failure is not None, operating_rank()]], dtype=torch.int64)
    sizes = allgather(size, name=f"{name}.sizes", process_set=process_set)
    gathered = allgather(payload, name=f"{name}.bytes", process_set=process_set)
    if failure is not None:
        raise failure
    parts: Sequence[torch.Tensor] = gathered.split(sizes[:, 0].tolist())  # type: ignore[no-untyped-call]
    failed = [
        f"rank {int(rank)}: {_text(part)}" for (_, bad, rank), part in zip(sizes, parts, strict=True) if bool(bad)
    ]
    if failed:
        raise HorovodInternalError(f"allgather_object '{name}': could not pickle: {'; '.join(failed)}")
    return [_unpickled(part) for part in parts]


def _pickled(obj: Any) -> tuple[torch.Tensor, Exception | None]:
    """The object as bytes; or why there are none, with the reason as bytes."""
    failure = None
    try:
        data = cloudpickle.dumps(obj)
    except Exception as error:
        failure = error
        data = _description(error).encode(errors="replace")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8), failure


def _description(error: Exception) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # it has a text of its own that fails
        return type(error).__name__


def _unpickled(payload: torch.Tensor) -> Any:
    return pickle.loads(payload.numpy().tobytes())


def _text(payload: torch.Tensor) -> str:
    return payload.numpy().tobytes().decode(errors="replace")
