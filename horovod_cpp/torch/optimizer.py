"""`DistributedOptimizer`: reduces gradients while backward still runs, and waits for them in `step`.

The hooks run on the thread that calls `backward()`; all else on the thread that calls the optimizer.
"""

from __future__ import annotations

import functools
import itertools
import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from horovod_cpp import _core
from horovod_cpp.common.call_site import CallSite, call_site
from horovod_cpp.common.process_sets import ProcessSet, global_process_set
from horovod_cpp.torch import operations
from horovod_cpp.torch.collectives import Adasum, Average
from horovod_cpp.torch.compression import Compression, Compressor
from horovod_cpp.torch.operations import AnyPending
from horovod_cpp.torch.sparse import PendingSparse, start_sparse_allreduce


class _Gradient:
    """One parameter: how many backward passes its reduction still waits for, and the reduction in flight."""

    __slots__ = ("context", "group", "hook", "name", "parameter", "passes_left", "pending", "reduced", "sparse_dim")

    def __init__(self, parameter: torch.Tensor, name: str, passes: int) -> None:
        self.parameter = parameter
        self.name = name
        self.passes_left = passes
        self.group: _Group | None = None
        self.pending: AnyPending | PendingSparse | _GroupPending | None = None
        self.sparse_dim = 0  # of the last gradient that was sparse
        self.reduced: torch.Tensor | None = None  # the gradient that is in flight
        self.context: Any = None  # what the compressor wants back
        self.hook: torch.utils.hooks.RemovableHandle | None = None


class _Group:
    """Gradients that are reduced together, as one operation, once backward has made the last of them."""

    __slots__ = ("compressed", "members", "name")

    def __init__(self, name: str, members: list[_Gradient]) -> None:
        self.name = name
        self.members = members
        self.compressed: dict[_Gradient, torch.Tensor] = {}  # those that are ready

    def is_ready(self) -> bool:
        return len(self.compressed) == len(self.members)


class _GroupPending:
    """The reduction of a group in flight, for each of its gradients."""

    __slots__ = ("_outputs", "_pending")

    def __init__(self, pending: operations.PendingGroup) -> None:
        self._pending = pending
        self._outputs: list[torch.Tensor] = []

    def parts(self) -> tuple[operations.Operation, ...]:
        return self._pending.parts()

    def output(self, index: int) -> torch.Tensor:
        """Block until the group is reduced. Raises HorovodInternalError if it failed."""
        if not self._outputs:
            self._outputs = self._pending.wait()
        return self._outputs[index]


class _Reduction:
    """The options of one DistributedOptimizer and the gradients that it reduces."""

    def __init__(
        self,
        compression: type[Compressor],
        backward_passes_per_step: int,
        op: int,
        gradient_predivide_factor: float,
        sparse_as_dense: bool,
        process_set: ProcessSet,
        site: CallSite,
    ) -> None:
        self.sparse_as_dense = sparse_as_dense
        self.compression = compression
        self.passes = backward_passes_per_step
        self.op = op
        self.prescale_factor = 1.0 / gradient_predivide_factor
        self.postscale_factor = gradient_predivide_factor
        self.process_set = process_set
        self.site = site
        self.gradients: dict[torch.Tensor, _Gradient] = {}
        self.active = bool(process_set.included()) and (
            (process_set.size() or 0) > 1 or os.environ.get("HOROVOD_ELASTIC") == "1"
        )

    def add(self, parameter: torch.Tensor, name: str) -> None:
        """Reduce this parameter from now on."""
        gradient = _Gradient(parameter, name, self.passes)
        gradient.hook = _register_hook(parameter, _hook(weakref.ref(self), gradient))
        self.gradients[parameter] = gradient

    def group(self, parameters: list[torch.Tensor], number: int) -> None:
        """Reduce these parameters together; those that need no gradient are left out."""
        members = [self.gradients[parameter] for parameter in parameters if parameter in self.gradients]
        if not members:
            return
        made = _Group(f"group.{number}.{members[0].name}", members)
        for member in members:
            member.group = made

    def remove_hooks(self) -> None:
        for gradient in self.gradients.values():
            if gradient.hook is not None:
                gradient.hook.remove()

    def on_accumulated(self, gradient: _Gradient) -> None:
        """Backward has added to the gradient."""
        grad = gradient.parameter.grad
        if grad is None:
            return  # a function of the user's gave no gradient; zeros are reduced at synchronize
        if gradient.passes_left <= 0:
            raise AssertionError(
                "Gradients were computed more than backward_passes_per_step times before call to step(). "
                "Increase backward_passes_per_step to accumulate gradients locally. "
                f"(parameter '{gradient.name}', backward_passes_per_step={self.passes})"
            )
        gradient.passes_left -= 1
        if gradient.passes_left == 0:
            self.start(gradient, grad)

    def start_missing(self, gradient: _Gradient) -> None:
        """Hand over what backward has not: the gradient as it is, zeros where there is none."""
        parameter = gradient.parameter
        if parameter.grad is None:
            # The others have a sparse gradient again, presumably.
            sparse = gradient.sparse_dim > 0 and gradient.group is None
            parameter.grad = _sparse_zeros(parameter, gradient.sparse_dim) if sparse else torch.zeros_like(parameter)
        self.start(gradient, parameter.grad)

    def start(self, gradient: _Gradient, grad: torch.Tensor) -> None:
        """Hand the gradient over. Runs within backward, where its code and data are in no cache: little is best."""
        gradient.passes_left = 0
        group = gradient.group
        if grad.layout is not torch.strided:
            if not self.sparse_as_dense and group is None:
                gradient.sparse_dim = grad.sparse_dim()
                gradient.pending = start_sparse_allreduce(grad, gradient.name, self.op, self.process_set, self.site)
                return
            grad = gradient.parameter.grad = grad.to_dense()
        gradient.reduced = grad
        compressed, gradient.context = self.compression.compress(grad)
        if group is not None:
            group.compressed[gradient] = compressed
            if group.is_ready():
                self.start_group(group)
            return
        gradient.pending = operations.start_allreduce(
            compressed, True, gradient.name, self.op, self.prescale_factor, self.postscale_factor,
            self.process_set, self.site,
        )  # fmt: skip

    def start_group(self, group: _Group) -> None:
        pending = _GroupPending(
            operations.start_group(
                _core.ALLREDUCE,
                [group.compressed[member] for member in group.members],
                True,
                group.name,
                self.op,
                self.prescale_factor,
                self.postscale_factor,
                self.process_set,
                self.site,
            )
        )
        for member in group.members:
            member.pending = pending

    def finish(self, gradient: _Gradient) -> None:
        """Wait for the reduced gradient and put it in its place."""
        pending, target = gradient.pending, gradient.reduced
        assert pending is not None
        if isinstance(pending, PendingSparse):
            gradient.parameter.grad = pending.wait()
            self.reset_one(gradient)
            return
        assert target is not None
        if isinstance(pending, _GroupPending):
            assert gradient.group is not None
            reduced = pending.output(gradient.group.members.index(gradient))
        else:
            reduced = pending.wait()
        output = self.compression.decompress(reduced, gradient.context)
        if output is not target:
            with torch.no_grad():
                target.copy_(output)
        gradient.parameter.grad = target
        self.reset_one(gradient)

    def reset_one(self, gradient: _Gradient) -> None:
        gradient.pending = gradient.reduced = gradient.context = None
        gradient.passes_left = self.passes
        if gradient.group is not None:
            gradient.group.compressed.clear()

    def reset(self) -> None:
        """Forget what is in flight; it goes on without us."""
        for gradient in self.gradients.values():
            self.reset_one(gradient)

    def in_progress(self) -> bool:
        """Whether a backward pass came since the last synchronize."""
        return any(gradient.passes_left != self.passes for gradient in self.gradients.values())

    def synchronize(self) -> None:
        for gradient in self.gradients.values():
            if gradient.pending is None and gradient.reduced is None:
                self.start_missing(gradient)
        in_flight = {id(gradient.pending): gradient.pending for gradient in self.gradients.values()}
        operations.wait_all(pending for pending in in_flight.values() if pending is not None)
        for gradient in self.gradients.values():
            self.finish(gradient)


def _sparse_zeros(parameter: torch.Tensor, sparse_dim: int) -> torch.Tensor:
    indices = torch.empty(sparse_dim, 0, dtype=torch.int64)
    values = torch.empty(0, *parameter.shape[sparse_dim:], dtype=parameter.dtype)
    return torch.sparse_coo_tensor(indices, values, parameter.shape, check_invariants=True)


def _hook(reduction: weakref.ref[_Reduction], gradient: _Gradient) -> Callable[[torch.Tensor], None]:
    """The hook of one parameter. It does not keep the optimizer alive, and does nothing once that is gone."""

    def on_accumulated(_parameter: torch.Tensor) -> None:
        alive = reduction()
        if alive is not None:
            alive.on_accumulated(gradient)

    return on_accumulated


def _register_hook(parameter: torch.Tensor, hook: Callable[[torch.Tensor], None]) -> torch.utils.hooks.RemovableHandle:
    handle: torch.utils.hooks.RemovableHandle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    return handle


class _DistributedOptimizer(torch.optim.Optimizer):
    """Comes before the class of the user's optimizer; see `DistributedOptimizer`."""

    _reduction: _Reduction
    _parameter_names: dict[torch.Tensor, str]
    _synchronized: bool
    _should_synchronize: bool

    @property
    def backward_passes_per_step(self) -> int:
        """How many backward passes are summed up before the gradients are reduced."""
        return self._reduction.passes

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Sum up the gradients of `passes` backward passes, from the next one on, before they are reduced."""
        _require_positive(passes)
        self._reduction.passes = passes
        self._reduction.reset()

    def load_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Load a state as torch does, and forget which gradients were in flight."""
        self._reduction.reset()
        self._synchronized = False
        self._should_synchronize = True
        super().load_state_dict(*args, **kwargs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does; its parameters are reduced, too, under names made from their position."""
        super().add_param_group(param_group)
        index = len(self.param_groups) - 1
        for name, parameter in _default_names(self.param_groups[index]["params"], index):
            self._parameter_names[parameter] = name
            if self._reduction.active and parameter.requires_grad:
                self._reduction.add(parameter, name)

    def synchronize(self) -> None:
        """Start the reductions that no backward pass has started, with zeros for missing gradients, and wait for all.

        Blocks. Raises HorovodInternalError if ranks disagree or one is lost.
        """
        try:
            self._reduction.synchronize()
        except Exception:
            self._reduction.reset()
            raise
        self._synchronized = True

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Within it `step` does not synchronise.

        For what is done with reduced gradients: `synchronize()`, clip, then `step()` in this context.
        """
        self._should_synchronize = False
        try:
            yield
        finally:
            self._should_synchronize = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Wait for the reduced gradients, then do the optimizer's step. With a closure, wait after each call of it."""
        if not self._should_synchronize:
            self._synchronized = False
            return super().step(closure)
        if self._synchronized:
            warnings.warn(
                "optimizer.step() called without optimizer.skip_synchronize() context after optimizer.synchronize(). "
                "Gradients are reduced a second time; use optimizer.skip_synchronize() around optimizer.step() if "
                "your code calls optimizer.synchronize().",
                stacklevel=2,
            )
        if closure is None:
            self.synchronize()
        else:
            closure = self._synchronizing(closure)
        self._synchronized = False
        result = super().step(closure)
        self._synchronized = False
        return result

    def _synchronizing(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def wrapped() -> Any:
            loss = closure()
            self.synchronize()
            return loss

        return wrapped

    # torch wraps each optimizer's `step` for its own hooks; the step of the user's class is wrapped already.
    setattr(step, "hooked", True)  # noqa: B010

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients as torch does. AssertionError while they are being reduced."""
        if self._reduction.in_progress():
            raise AssertionError(
                "optimizer.zero_grad() was called after loss.backward() but before optimizer.step() or "
                "optimizer.synchronize(). This is prohibited as it can cause a race condition."
            )
        super().zero_grad(set_to_none=set_to_none)


def DistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.Tensor]] | None = None,
    compression: type[Compressor] = Compression.none,
    backward_passes_per_step: int = 1,
    op: int = Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: Any = None,
    sparse_as_dense: bool = False,
    process_set: ProcessSet = global_process_set,
) -> _DistributedOptimizer:
    """Make `optimizer` reduce its gradients over all ranks before each step.

    Returns `optimizer` itself, whose class becomes a subclass of the one it had: its state, hooks and learning-rate
    schedulers stay good. A second call on it replaces the options of the first.

    Args:
        named_parameters: `model.named_parameters()`; the names are the keys of the reductions.
        compression: what travels, `Compression.none`, `Compression.fp16` or `Compression.bf16`.
        backward_passes_per_step: how many backward passes are summed up locally before their sum is reduced.
        op: Average, Sum, Min, Max or Product.
        gradient_predivide_factor: divides before and multiplies after an average, so that the sum stays small.
        num_groups: deprecated, use `groups`.
        groups: lists of parameters whose gradients are reduced together, each list as one operation, when the last of
            them is ready; or a number of groups, in which the parameters come in their order. Parameters of no group
            are reduced one by one. In a group sparse gradients are made dense.
        sparse_as_dense: make sparse gradients dense before they are reduced; otherwise their entries are gathered,
            whose number grows with the ranks. Sparse gradients can be averaged or summed only; they are not compressed.
            A rank that has had no gradient of such a parameter yet cannot know that it is sparse, and the ranks do not
            meet (the stall report names both): there, use sparse_as_dense.
        process_set: the ranks that reduce; a rank outside steps with its own gradients.
    Raises: ValueError for bad arguments or before `init`; NotImplementedError for what is not implemented yet.
    """
    if op == Adasum:
        raise NotImplementedError("DistributedOptimizer: op=Adasum is not implemented yet; use Average or Sum")
    _require_positive(backward_passes_per_step)
    if gradient_predivide_factor != 1.0 and op != Average:
        raise ValueError("gradient_predivide_factor not supported with op != Average")
    names = _parameter_names(optimizer, named_parameters)
    members = _groups(list(names), groups, num_groups)
    reduction = _Reduction(
        compression, backward_passes_per_step, op, gradient_predivide_factor, sparse_as_dense, process_set, call_site()
    )
    if isinstance(optimizer, _DistributedOptimizer):
        optimizer._reduction.remove_hooks()
    else:
        _adopt(optimizer)
    assert isinstance(optimizer, _DistributedOptimizer)
    optimizer._reduction = reduction
    optimizer._parameter_names = names
    optimizer._synchronized = False
    optimizer._should_synchronize = True
    if reduction.active:
        for parameter, name in names.items():
            if parameter.requires_grad:
                reduction.add(parameter, name)
        for number, parameters in enumerate(members):
            reduction.group(parameters, number)
    weakref.finalize(optimizer, reduction.remove_hooks).atexit = False
    return optimizer


def _groups(parameters: list[torch.Tensor], groups: Any, num_groups: int) -> list[list[torch.Tensor]]:
    """The parameters of each group, as `groups` or the old `num_groups` ask for them."""
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
        count = min(groups, len(parameters))
        size, longer = divmod(len(parameters), count) if count > 0 else (0, 0)
        bounds = [number * size + min(number, longer) for number in range(count + 1)]
        return [parameters[begin:end] for begin, end in itertools.pairwise(bounds)]
    if not isinstance(groups, list) or not all(isinstance(group, list) for group in groups):
        raise ValueError("groups should be a non-negative integer or a list of list of torch.Tensor")
    known = set(parameters)
    seen: set[torch.Tensor] = set()
    for parameter in itertools.chain.from_iterable(groups):
        if not isinstance(parameter, torch.Tensor) or parameter not in known:
            raise ValueError("groups: an entry is not a parameter of the optimizer")
        if parameter in seen:
            raise ValueError(f"groups: a parameter of shape {tuple(parameter.shape)} is in more than one group")
        seen.add(parameter)
    return [list(group) for group in groups]


def _require_positive(passes: int) -> None:
    if passes <= 0:
        raise ValueError(f"backward_passes_per_step must be > 0 (it is {passes})")


def _parameter_names(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, torch.Tensor]] | None
) -> dict[torch.Tensor, str]:
    """The name of each parameter, in the order of the optimizer."""
    given = list(named_parameters) if named_parameters is not None else []
    if not given:
        return {
            parameter: name
            for index, group in enumerate(optimizer.param_groups)
            for name, parameter in _default_names(group["params"], index)
        }
    if any(not isinstance(entry, tuple) for entry in given):
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


def _default_names(parameters: Iterable[torch.Tensor], group: int) -> list[tuple[str, torch.Tensor]]:
    return [(f"allreduce.noname.{group}.{index}", parameter) for index, parameter in enumerate(parameters)]


def _adopt(optimizer: torch.optim.Optimizer) -> None:
    """Put `_DistributedOptimizer` before the optimizer's class, in the object itself."""
    base = optimizer.__class__
    # A scheduler made before has put its own `step` into the object, which calls the step of `base`.
    scheduled = optimizer.__dict__.pop("step", None)
    optimizer.__class__ = type(base.__name__, (_DistributedOptimizer, base), {"__module__": base.__module__})
    if scheduled is not None:
        optimizer.step = _noticed_by_scheduler(optimizer)  # type: ignore[method-assign]


def _noticed_by_scheduler(optimizer: torch.optim.Optimizer) -> Any:
    reference = weakref.ref(optimizer)
    step = optimizer.__class__.step

    @functools.wraps(step)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        alive = reference()
        assert alive is not None
        setattr(alive, "_opt_called", True)  # noqa: B010 (an attribute that only torch's schedulers know)
        return step(alive, *args, **kwargs)

    setattr(wrapped, "_wrapped_by_lr_sched", True)  # noqa: B010
    return wrapped
