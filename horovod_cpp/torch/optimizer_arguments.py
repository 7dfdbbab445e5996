"""What `DistributedOptimizer` is given: checks it, and reads names, groups and process sets of the parameters.

Communicates nothing. The thread of the caller.
"""

from __future__ import annotations

import itertools
import math
import operator
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from horovod_cpp.common.process_sets import ProcessSet
from horovod_cpp.torch.collectives import Adasum, Average, Max, Min, Product, Sum
from horovod_cpp.torch.compression import Compressor

_OPS = {"Average": Average, "Sum": Sum, "Adasum": Adasum, "Min": Min, "Max": Max, "Product": Product}


def check(
    optimizer: torch.optim.Optimizer,
    compression: type[Compressor],
    passes: int,
    op: int,
    predivide_factor: float,
    has_groups: bool,
    has_views: bool,
) -> None:
    """Raises ValueError for what cannot be or does not go together, TypeError for what is no optimizer."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"DistributedOptimizer takes a torch.optim.Optimizer (it is a {type(optimizer).__name__})")
    if op not in _OPS.values():
        raise ValueError(f"op must be one of {', '.join(f'hvd.{name}' for name in _OPS)} (it is {op!r})")
    if op == Adasum and has_groups:
        raise ValueError("groups are of gradients, which op=Adasum does not reduce")
    if op == Adasum and has_views:
        raise ValueError("gradient_as_bucket_view is about gradients, which op=Adasum does not reduce")
    if not (hasattr(compression, "compress") and hasattr(compression, "decompress")):
        raise ValueError(f"compression must be a Compressor, such as hvd.Compression.fp16 (it is {compression!r})")
    require_passes(passes)
    if not isinstance(predivide_factor, (int, float)) or not math.isfinite(predivide_factor) or predivide_factor == 0:
        raise ValueError(f"gradient_predivide_factor must be a finite number other than 0 (it is {predivide_factor!r})")
    if predivide_factor != 1.0 and op != Average:
        raise ValueError("gradient_predivide_factor not supported with op != Average")


def require_passes(passes: int) -> None:
    """ValueError for a number of backward passes that cannot be."""
    try:
        number = operator.index(passes)
    except TypeError:
        raise ValueError(f"backward_passes_per_step must be an integer (it is {passes!r})") from None
    if number <= 0:
        raise ValueError(f"backward_passes_per_step must be > 0 (it is {passes})")


# ---- names


def parameter_names(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, torch.Tensor]] | None
) -> dict[torch.Tensor, str]:
    """The name of each parameter, in the order of the optimizer."""
    given = list(named_parameters) if named_parameters is not None else []
    if not given:
        return {
            parameter: name
            for index, group in enumerate(optimizer.param_groups)
            for name, parameter in default_names(group["params"], index)
        }
    if any(not isinstance(entry, tuple) or len(entry) != 2 or not isinstance(entry[0], str) for entry in given):
        raise ValueError(
            "named_parameters should be a sequence of tuples (name, parameter), usually produced by "
            "model.named_parameters()."
        )
    names = [name for name, _ in given]
    duplicates = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if duplicates:
        raise ValueError(
            f"Parameter names in named_parameters must be unique. Found duplicates: {', '.join(duplicates)}"
        )
    by_parameter = {parameter: name for name, parameter in given}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    unnamed = [tuple(parameter.shape) for parameter in parameters if parameter not in by_parameter]
    if unnamed:
        raise ValueError(
            f"named_parameters was specified, but one or more model parameters were not named. Their shapes: {unnamed}"
        )
    return {parameter: by_parameter[parameter] for parameter in parameters}


def default_names(parameters: Iterable[torch.Tensor], group: int) -> list[tuple[str, torch.Tensor]]:
    """Names made from the positions of parameters in the group of that number."""
    return [(f"allreduce.noname.{group}.{index}", parameter) for index, parameter in enumerate(parameters)]


# ---- process sets


def set_of_group(group: Mapping[str, Any], index: int, process_set: ProcessSet) -> ProcessSet:
    """The set in which the parameters of a group of the optimizer are reduced; `process_set` unless it has its own."""
    own = group.get("process_set", process_set)
    if not isinstance(own, ProcessSet):
        where = f"param group {index}: process_set" if "process_set" in group else "process_set"
        raise ValueError(f"{where} must be a hvd.ProcessSet (it is {own!r})")
    return own


def without_sets(state: dict[str, Any]) -> dict[str, Any]:
    """The state of an optimizer without the process sets of its param groups, which belong to this job."""
    groups = [{key: value for key, value in group.items() if key != "process_set"} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


@contextmanager
def keeping_sets(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Param groups have their own process sets afterwards, whatever state is loaded within."""
    own = [group.get("process_set") for group in optimizer.param_groups]
    try:
        yield
    finally:
        for group, process_set in zip(optimizer.param_groups, own, strict=False):
            group.pop("process_set", None)
            if process_set is not None:
                group["process_set"] = process_set


# ---- groups


def gradient_groups(
    names: Mapping[torch.Tensor, str],
    groups: Any,
    num_groups: int,
    sets: Mapping[torch.Tensor, tuple[int, ...]],
) -> list[list[torch.Tensor]]:
    """The parameters of each group, as `groups` or the old `num_groups` ask for them. `sets`: ranks of each one's set.

    A number of groups is of those that require a gradient, and becomes more where the set changes within one.
    """
    if num_groups != 0:
        warnings.warn("the parameter num_groups is deprecated; use groups", DeprecationWarning, 3)
        if groups is None:
            groups = num_groups
    if groups is None:
        return []
    if isinstance(groups, int) and not isinstance(groups, bool):
        if groups < 0:
            raise ValueError(
                f"groups should be a non-negative integer or a list of list of torch.Tensor (got {groups})"
            )
        return [
            list(run)
            for part in _equal_parts([parameter for parameter in names if parameter.requires_grad], groups)
            for _, run in itertools.groupby(part, key=lambda parameter: sets[parameter])
        ]
    if not isinstance(groups, list) or not all(isinstance(group, list) for group in groups):
        raise ValueError("groups should be a non-negative integer or a list of list of torch.Tensor")
    seen: set[torch.Tensor] = set()
    for parameter in itertools.chain.from_iterable(groups):
        if not isinstance(parameter, torch.Tensor) or parameter not in names:
            raise ValueError("groups: an entry is not a parameter of the optimizer")
        if parameter in seen:
            raise ValueError(f"groups: a parameter of shape {tuple(parameter.shape)} is in more than one group")
        seen.add(parameter)
    for group in groups:
        _require_one_set(group, names, sets)
    return [list(group) for group in groups]


def _equal_parts(parameters: list[torch.Tensor], groups: int) -> list[list[torch.Tensor]]:
    count = min(groups, len(parameters))
    size, longer = divmod(len(parameters), count) if count > 0 else (0, 0)
    bounds = [number * size + min(number, longer) for number in range(count + 1)]
    return [parameters[begin:end] for begin, end in itertools.pairwise(bounds)]


def _require_one_set(
    group: Sequence[torch.Tensor], names: Mapping[torch.Tensor, str], sets: Mapping[torch.Tensor, tuple[int, ...]]
) -> None:
    for parameter in group:
        if sets[parameter] != sets[group[0]]:
            raise ValueError(
                f"groups: parameter '{names[group[0]]}' is reduced by the ranks {list(sets[group[0]])}, and "
                f"'{names[parameter]}' of the same group by the ranks {list(sets[parameter])}; a group is of one "
                "process set"
            )
