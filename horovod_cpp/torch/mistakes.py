"""As `common.mistakes`, for calls that take torch tensors. Any thread."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from horovod_cpp.common import mistakes


def explained(
    error: Exception,
    label: str,
    tensors: Iterable[Any],
    name: object,
    process_set: object,
    numbers: Mapping[str, Any] | None = None,
) -> Exception:
    """The TypeError that says which argument of a call is of the wrong type; `error` itself if none is."""
    for tensor in tensors:
        if not isinstance(tensor, torch.Tensor):
            return TypeError(f"{label}: takes torch tensors, not {mistakes.described(tensor)}")
    return mistakes.explained(error, label, name, process_set, numbers)
