"""Names of gradients where optimizers that are used side by side give the same ones.

The first keeps its names, which users know from timelines and stall reports; the second's end with "#2". What a name
becomes follows from the order in which this rank has made and first used its optimizers, never from which of them are
still alive: garbage is not collected at the same time on all ranks. The thread that calls `DistributedOptimizer`.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch

from horovod_cpp.common import basics


class Owner:
    """One optimizer. Once it is used, those that are made later may take its names: as a rule they follow it."""

    __slots__ = ("used",)

    def __init__(self) -> None:
        self.used = False


class _Claim(NamedTuple):
    owner: Owner
    parameter: weakref.ref[torch.Tensor]
    number: int


_claims: dict[tuple[tuple[int, ...], str], list[_Claim]] = {}
forget = _claims.clear
basics.when_a_job_starts(forget)  # ranks that failed at different points begin alike again


def claim(name: str, parameter: torch.Tensor, ranks: tuple[int, ...], owner: Owner) -> str:
    """The name under which `owner` reduces `parameter` in the set of `ranks`; the same again for one that has it."""
    claims = _claims.setdefault((ranks, name), [])
    own = next((each for each in claims if each.parameter() is parameter), None)
    others = [each for each in claims if each is not own and not each.owner.used]
    number = own.number if own is not None else 1 + max((each.number for each in others), default=0)
    claims[:] = [*others, _Claim(owner, weakref.ref(parameter), number)]
    return name if number == 1 else f"{name}#{number}"
