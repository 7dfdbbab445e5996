"""Why a call was refused, in words. What is here runs only once something has gone wrong; any thread."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from horovod_cpp import _core
from horovod_cpp.common.process_sets import ProcessSet

OPERATION_NAMES = {
    _core.ALLREDUCE: "allreduce",
    _core.ALLGATHER: "allgather",
    _core.BROADCAST: "broadcast",
    _core.REDUCESCATTER: "reducescatter",
    _core.ALLTOALL: "alltoall",
    _core.BARRIER: "barrier",
}
REDUCTIONS = ("Average", "Sum", "Adasum", "Min", "Max", "Product")  # by their numbers
LAST_REDUCTION = len(REDUCTIONS) - 1

_KINDS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "op": (operator.index, f"hvd.{', hvd.'.join(REDUCTIONS[:-1])} or hvd.{REDUCTIONS[-1]}"),
    "root_rank": (operator.index, "a rank"),
    "prescale_factor": (math.fabs, "a number"),  # float() would take "2"
    "postscale_factor": (math.fabs, "a number"),
}


def label(op: int, name: object, kind: str = "") -> str:
    """An operation as messages name it: "grouped allreduce 'x'", with `kind` "grouped "."""
    what = kind + OPERATION_NAMES[op]
    if name is None:
        return what if op == _core.BARRIER else f"unnamed {what}"
    return f"{what} '{name}'" if isinstance(name, str) else what


def explained(
    error: Exception,
    label: str,
    name: object,
    process_set: object,
    numbers: Mapping[str, Any] | None = None,
) -> Exception:
    """The TypeError that says which argument of a call is of the wrong type; `error` itself if none is."""
    if name is not None and not isinstance(name, str):
        return TypeError(f"{label}: name has to be a str or None, not {described(name)}")
    if not isinstance(process_set, ProcessSet):
        return TypeError(
            f"{label}: process_set has to be a ProcessSet, as hvd.add_process_set returns it, not "
            f"{described(process_set)}"
        )
    for parameter, value in (numbers or {}).items():
        convert, wanted = _KINDS[parameter]
        try:
            convert(value)
            fits = True
        except (TypeError, ValueError):
            fits = False
        if not fits:
            return TypeError(f"{label}: {parameter} has to be {wanted}, not {described(value)}")
    return error


def unknown_reduction(label: str, op: int) -> ValueError:
    """For a number that stands for no reduction; the library would be told its last eight bits."""
    known = ", ".join(f"hvd.{name} is {number}" for number, name in enumerate(REDUCTIONS))
    return ValueError(f"{label}: reduction number {op} is not known ({known})")


def require_root(root_rank: int, name: object) -> None:
    """Of a broadcast: ValueError for a number that the library does not take; the others it checks itself."""
    if not -(2**31) <= root_rank < 2**31:
        what = label(_core.BROADCAST, name)
        raise ValueError(f"{what}: broadcast received invalid root rank {root_rank} for provided process set")


def described(value: object) -> str:
    """A value and its type, as messages show what was not expected."""
    text = repr(value)
    return f"{text if len(text) <= 60 else '...'} of type {type(value).__module__}.{type(value).__qualname__}".replace(
        "builtins.", ""
    )
