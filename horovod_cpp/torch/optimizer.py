"""`DistributedOptimizer`: reduces gradients while backward still runs, and waits for them in `step`.

All runs on the thread that calls the optimizer; see reduction.py for the hooks.
"""

from __future__ import annotations

import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from horovod_cpp.common.call_site import CallSite, call_site
from horovod_cpp.common.process_sets import ProcessSet, global_process_set, require_id
from horovod_cpp.torch import optimizer_arguments
from horovod_cpp.torch.bucket_reduction import BucketReduction
from horovod_cpp.torch.collectives import Adasum, Average
from horovod_cpp.torch.compression import Compression, Compressor
from horovod_cpp.torch.reduction import OF_ANOTHER_LOSS, LocalGradients, Reduction


def _documented_as_in_torch(method: Any) -> Any:
    """Shows torch's signature of a method that forwards what it is given: optimizers have arguments of their own."""
    method.__signature__ = inspect.signature(getattr(torch.optim.Optimizer, method.__name__))
    return method


def _with_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any], wrap: Callable[[Callable[[], Any]], Callable[[], Any]]
) -> tuple[tuple[Any, ...], dict[str, Any], bool]:
    """The arguments of a step, with the closure wrapped, and whether there is one."""
    if args and callable(args[0]):
        return (wrap(args[0]), *args[1:]), kwargs, True
    if kwargs.get("closure") is not None:
        return args, {**kwargs, "closure": wrap(kwargs["closure"])}, True
    return args, kwargs, False


class _DistributedOptimizer(torch.optim.Optimizer):
    """Comes before the class of the user's optimizer; see `DistributedOptimizer`."""

    _reduction: Reduction
    _forget: weakref.finalize[..., _DistributedOptimizer]  # removes its hooks, once
    _parameter_names: dict[torch.Tensor, str]
    _process_sets: list[ProcessSet]  # of each param group
    _groups: list[list[torch.Tensor]]
    _synchronized: bool
    _should_synchronize: bool

    @property
    def backward_passes_per_step(self) -> int:
        """How many backward passes are summed up before the gradients are reduced."""
        return self._reduction.passes

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Sum up the gradients of `passes` backward passes, from the next one on, before they are reduced."""
        optimizer_arguments.require_passes(passes)
        self._reduction.passes = passes
        self._reduction.reset()

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        """To deepcopy and pickle: what torch keeps of an optimizer, and the options. Nothing is in flight in a copy."""
        reduction = self._reduction
        options = {
            "compression": reduction.compression,
            "backward_passes_per_step": reduction.passes,
            "op": reduction.op,
            "gradient_predivide_factor": reduction.postscale_factor,
            "groups": self._groups or None,
            "sparse_as_dense": reduction.sparse_as_dense,
            "process_set": reduction.process_set,
            "gradient_as_bucket_view": isinstance(reduction, BucketReduction),
        }
        named = [(name, parameter) for parameter, name in self._parameter_names.items()]
        return _made_again, (_class_of_user(self), self.__getstate__(), named, options, reduction.site)

    def __copy__(self) -> Any:
        """Raises TypeError."""
        raise TypeError(
            "a shallow copy of a DistributedOptimizer would reduce the gradients of the same parameters a second time; "
            "use copy.deepcopy((model, optimizer))"
        )

    def state_dict(self) -> dict[str, Any]:
        """The state as torch has it; process sets of param groups, which belong to this job, are not in it."""
        return optimizer_arguments.without_sets(super().state_dict())

    def load_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Load a state as torch does, and forget which gradients were in flight. Param groups keep their sets."""
        self._reduction.reset()
        self._synchronized = False
        self._should_synchronize = True
        with optimizer_arguments.keeping_sets(self):
            super().load_state_dict(*args, **kwargs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does; its parameters are reduced, too, under names made from their position."""
        index = len(self.param_groups)
        if not isinstance(param_group, dict):
            return super().add_param_group(param_group)  # torch says what is wrong
        process_set = optimizer_arguments.set_of_group(param_group, index, self._reduction.process_set)
        self._reduction.take_up(process_set)
        super().add_param_group(param_group)
        self._process_sets.append(process_set)
        for name, parameter in optimizer_arguments.default_names(self.param_groups[index]["params"], index):
            self._parameter_names[parameter] = name
            self._reduce(parameter, process_set)
        self._reduction.arrange([])

    def _reduce(self, parameter: torch.Tensor, process_set: ProcessSet) -> None:
        """Take care of the gradients of `parameter` from now on, if there are other ranks."""
        if self._reduction.active[process_set]:
            self._reduction.add(parameter, self._parameter_names[parameter], process_set)

    def _require_sets(self) -> None:
        """ValueError if a process set has been removed or a param group was given another one."""
        own = self._reduction.process_set
        for index, (group, process_set) in enumerate(zip(self.param_groups, self._process_sets, strict=False)):
            if group.get("process_set", own) is not process_set:
                raise ValueError(
                    f"param group {index}: process_set is {group.get('process_set', own)}, and was {process_set} when "
                    "DistributedOptimizer was called; call it again"
                )
            require_id(process_set)

    def synchronize(self) -> None:
        """Start the reductions that no backward pass has started, with zeros for missing gradients, and wait for all.

        A parameter that was frozen and requires a gradient now is reduced from here on. For one that is frozen and has
        no gradient on all ranks nothing is reduced; while others have a gradient, zeros stand for it. Blocks. Raises
        HorovodInternalError if ranks disagree or one is lost, and ValueError, also outside the process set, once the
        set has been removed.
        """
        self._reduction.owner.used = True
        try:
            self._require_sets()
            self._reduction.add_unfrozen()
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

    @_documented_as_in_torch
    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Wait for the reduced gradients, then do the optimizer's step, which gets all arguments.

        With a closure, wait after each call of it. Its loss, a tensor or a number, is detached and reduced as the
        gradients are, so that optimizers that decide by it (LBFGS) decide alike on all ranks.
        """
        if not self._should_synchronize:
            self._synchronized = False
            return super().step(*args, **kwargs)
        if self._synchronized and not self._reduction.in_progress():
            warnings.warn(
                "optimizer.step() called without optimizer.skip_synchronize() context after optimizer.synchronize(). "
                "Gradients are reduced a second time; use optimizer.skip_synchronize() around optimizer.step() if "
                "your code calls optimizer.synchronize().",
                stacklevel=2,
            )
        args, kwargs, has_closure = _with_closure(args, kwargs, self._synchronizing)
        if not has_closure:
            self.synchronize()
        self._synchronized = False
        result = super().step(*args, **kwargs)
        self._synchronized = False
        return result

    def _synchronizing(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def wrapped() -> Any:
            loss = closure()
            self.synchronize()
            return self._reduction.reduce_loss(loss, self._process_sets)

        return wrapped

    # torch wraps each optimizer's `step` for its own hooks; the step of the user's class is wrapped already.
    setattr(step, "hooked", True)  # noqa: B010

    @_documented_as_in_torch
    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Clear the gradients as torch does. AssertionError while they are being reduced."""
        if self._reduction.in_progress():
            raise AssertionError(
                "optimizer.zero_grad() was called after loss.backward() but before optimizer.step() or "
                f"optimizer.synchronize(). This is prohibited as it can cause a race condition. {OF_ANOTHER_LOSS}"
            )
        super().zero_grad(*args, **kwargs)


class _DistributedAdasumOptimizer(_DistributedOptimizer):
    """With op=Adasum: the step of the user's optimizer is done on each rank, and what it changed is reduced."""

    _reduction: LocalGradients

    def synchronize(self) -> None:
        """Nothing: there are no gradients in flight."""

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Raises AssertionError: what is reduced does not exist before the step."""
        raise AssertionError("Skipping synchronization is not supported when using Adasum optimizer.")
        yield

    @_documented_as_in_torch
    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Do the optimizer's step, and replace the change of each parameter by the Adasum of all ranks' changes.

        The step gets all arguments. Blocks. On HorovodInternalError the parameters are as they were before.
        """
        # Past the step of the other class, which reduces gradients.
        local_step = super(_DistributedOptimizer, self).step
        self._reduction.owner.used = True
        self._require_sets()
        try:
            args, kwargs, _ = _with_closure(args, kwargs, self._counting_anew)
            return self._reduction.reduced_step(functools.partial(local_step, *args, **kwargs))
        finally:
            self._reduction.reset()

    setattr(step, "hooked", True)  # noqa: B010

    @_documented_as_in_torch
    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Clear the gradients as torch does, and count backward passes from the start."""
        self._reduction.reset()
        super().zero_grad(*args, **kwargs)

    def _counting_anew(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def wrapped() -> Any:
            self._reduction.reset()
            return closure()

        return wrapped


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
    gradient_as_bucket_view: bool = False,
) -> _DistributedOptimizer:
    """Make `optimizer` reduce its gradients over all ranks before each step.

    Returns `optimizer` itself, whose class becomes a subclass of the one it had: its state, hooks and learning-rate
    schedulers stay good. A second call on it replaces the options of the first. It can be copied with
    `copy.deepcopy((model, optimizer))` and pickled, with the options, on all ranks alike; a copy has no gradients in
    flight.

    Args:
        named_parameters: `model.named_parameters()`; the names are the keys of the reductions. Of optimizers that are
            made with the same names before the first step, the second's get "#2" at the end, and so on: all ranks make
            them in the same order.
        compression: what travels, `Compression.none`, `Compression.fp16` or `Compression.bf16`.
        backward_passes_per_step: how many backward passes are summed up locally before their sum is reduced.
        op: Average, Sum, Min, Max or Product of the gradients. Adasum: each rank does its own step, and the changes of
            the parameters are reduced, which blocks in `step`; learning rates need not grow with the ranks.
        gradient_predivide_factor: divides before and multiplies after an average, so that the sum stays small.
        num_groups: deprecated, use `groups`.
        groups: lists of parameters whose gradients are reduced together, each list as one operation, when the last of
            them is ready; or a number of groups, in which the parameters that require a gradient come in their order.
            Parameters of no group are reduced one by one. In a group sparse gradients are made dense.
        sparse_as_dense: make sparse gradients dense before they are reduced; otherwise their entries are gathered,
            whose number grows with the ranks. Sparse gradients can be averaged or summed only; they are not compressed.
            A rank that has had no gradient of such a parameter yet cannot know that it is sparse, and the ranks do not
            meet (the stall report names both): there, use sparse_as_dense.
        process_set: the ranks that reduce; a rank outside steps with its own gradients. A param group of the optimizer
            that has a key "process_set" is reduced in that set: `SGD([{"params": shared}, {"params": experts,
            "process_set": mine}])`. It is not in `state_dict()`, and stays when a state is loaded. A number of `groups`
            is cut further where the set changes; each of their lists is of one set.
        gradient_as_bucket_view: let gradients be views of buckets, each of which is one flat tensor that is reduced in
            place as one operation: nothing is packed or copied back, `step` finds the results where they are. What
            backward makes is copied to its view at once; a gradient that is the view already (`set_to_none=False`,
            later passes) is not. Buckets are cut from the parameters' end, where backward begins, at 16 MiB (the first
            at 1 MiB), or are the `groups`, in parts of one dtype. A compressor gets a whole bucket. Sparse gradients
            need `sparse_as_dense`, or a group. All ranks have the same setting and the same order of memory; not with
            op=Adasum. It pays where gradients are many and small. The model keeps its device and dtype from here on,
            and a gradient that you keep beyond `zero_grad` is cloned: its memory is used again.
    Raises: TypeError for what is no torch.optim.Optimizer; ValueError for other bad arguments, for a process set that
        is not registered, or before `init`. `backward` and `step` raise it once the set has been removed; with
        gradient_as_bucket_view also for a gradient that is sparse or of another dtype or device than its bucket.
    """
    has_groups = groups is not None or num_groups != 0
    optimizer_arguments.check(
        optimizer, compression, backward_passes_per_step, op, gradient_predivide_factor, has_groups,
        gradient_as_bucket_view,
    )  # fmt: skip
    names = optimizer_arguments.parameter_names(optimizer, named_parameters)
    optimizer_arguments.set_of_group({}, 0, process_set)
    process_sets = [
        optimizer_arguments.set_of_group(group, index, process_set)
        for index, group in enumerate(optimizer.param_groups)
    ]
    kind = LocalGradients if op == Adasum else BucketReduction if gradient_as_bucket_view else Reduction
    reduction = kind(
        compression, backward_passes_per_step, op, gradient_predivide_factor, sparse_as_dense, process_set, call_site()
    )
    for each in process_sets:
        reduction.take_up(each)
    sets = {
        parameter: each
        for group, each in zip(optimizer.param_groups, process_sets, strict=True)
        for parameter in group["params"]
    }
    ranks = {parameter: reduction.ranks[each] for parameter, each in sets.items()}
    members = optimizer_arguments.gradient_groups(names, groups, num_groups, ranks)
    if isinstance(optimizer, _DistributedOptimizer):
        optimizer._forget()
        optimizer.__class__ = _class_of_user(optimizer)
    _adopt(optimizer, _DistributedAdasumOptimizer if op == Adasum else _DistributedOptimizer)
    assert isinstance(optimizer, _DistributedOptimizer)
    optimizer._reduction = reduction
    optimizer._parameter_names = names
    optimizer._process_sets = process_sets
    optimizer._groups = members
    optimizer._synchronized = False
    optimizer._should_synchronize = True
    for parameter, each in sets.items():
        optimizer._reduce(parameter, each)
    reduction.arrange(members)
    optimizer._forget = weakref.finalize(optimizer, reduction.remove_hooks)
    optimizer._forget.atexit = False
    return optimizer


def _class_of_user(optimizer: _DistributedOptimizer) -> Any:
    classes = type(optimizer).__mro__
    return classes[classes.index(_DistributedOptimizer) + 1]


def _made_again(
    of_user: type[torch.optim.Optimizer],
    state: dict[str, Any],
    named_parameters: list[tuple[str, torch.Tensor]],
    options: dict[str, Any],
    site: CallSite,
) -> torch.optim.Optimizer:
    """A copy of an optimizer; ValueError before `init`, and where its process set is not registered."""
    optimizer = of_user.__new__(of_user)
    optimizer.__setstate__(state)
    made = DistributedOptimizer(optimizer, named_parameters, **options)
    made._reduction.site = site
    return made


def _adopt(optimizer: torch.optim.Optimizer, first: type[_DistributedOptimizer]) -> None:
    """Put `first` before the optimizer's class, in the object itself."""
    base = optimizer.__class__
    # A scheduler made before has put its own `step` into the object, which calls the step of `base`.
    scheduled = optimizer.__dict__.pop("step", None)
    optimizer.__class__ = type(base.__name__, (first, base), {"__module__": base.__module__})
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
