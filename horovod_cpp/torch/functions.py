"""Whole models: what ranks have to have alike before training starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from horovod_cpp.torch.collectives import broadcast_async_, synchronize


def broadcast_parameters(params: Mapping[str, Any] | Iterable[Any], root_rank: int) -> None:
    """Overwrite the parameters of all ranks with the root's. Blocks.

    Args:
        params: a `state_dict()`, `named_parameters()`, or tensors; the same names on all ranks.
        root_rank: global rank of the root.
    Raises: ValueError for anything else; HorovodInternalError if ranks disagree or one is lost.
    """
    for handle in [broadcast_async_(tensor, root_rank, name) for name, tensor in _named_tensors(params)]:
        synchronize(handle)


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
    return entries
