"""`TorchState`: models, optimizers and samplers in memory, to go back to and to make equal on all ranks."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from horovod_cpp.common.basics import rank
from horovod_cpp.common.elastic import ObjectState
from horovod_cpp.torch.collectives import Max, allreduce
from horovod_cpp.torch.elastic.sampler import ElasticSampler, Progress
from horovod_cpp.torch.functions import broadcast_optimizer_state, broadcast_parameters
from horovod_cpp.torch.objects import broadcast_object


class StateHandler:
    """Keeps one value of a `TorchState`, in place: the object stays the same. Subclasses implement the first three."""

    def __init__(self, value: Any) -> None:
        """Args: value: the object. `TorchState` saves it later, as a subclass may have more to set first."""
        self.value = value

    def save(self) -> None:
        """Keep a copy in memory. Does not communicate."""
        raise NotImplementedError

    def restore(self) -> None:
        """Go back to the copy. Does not communicate."""
        raise NotImplementedError

    def sync(self) -> None:
        """Take over rank 0's. All ranks call it; blocks. HorovodInternalError if one is lost. A `save` follows."""
        raise NotImplementedError

    def merge(self) -> None:
        """Bring together what each rank has of its own, where `sync` is skipped. All ranks call it; may block."""

    def reset(self) -> None:
        """Let go of what has ended with the job. Does not communicate."""

    def set_value(self, value: Any) -> None:
        """Keep another object of the same kind from now on, and save it."""
        self.value = value
        self.save()


class _SavedAtOnce(StateHandler):
    """Those of this package, which are good to go back from when they are made."""

    def __init__(self, value: Any) -> None:
        super().__init__(value)
        self.save()


class ModelStateHandler(_SavedAtOnce):
    """A module: its parameters and buffers."""

    value: torch.nn.Module

    def save(self) -> None:
        """Keep a deep copy of the state_dict."""
        self._saved = copy.deepcopy(self.value.state_dict())

    def restore(self) -> None:
        """Load the copy; there are no gradients afterwards, for those that there are belong to other parameters."""
        state = copy.copy(self._saved)  # keeps its `_metadata`
        extra = {name: one for name, one in state.items() if not isinstance(one, torch.Tensor)}
        state.update(copy.deepcopy(extra))  # tensors are copied into the parameters, extra state is handed over
        self.value.load_state_dict(state)
        self.value.zero_grad()

    def sync(self) -> None:
        """Take over rank 0's parameters, buffers and extra state."""
        state = self.value.state_dict()
        broadcast_parameters({name: one for name, one in state.items() if isinstance(one, torch.Tensor)}, 0)
        extra = {name: one for name, one in state.items() if not isinstance(one, torch.Tensor)}
        if extra:
            state.update(broadcast_object(extra))
            self.value.load_state_dict(state)

    def reset(self) -> None:
        """Let go of gradients, which may have been reduced in part."""
        self.value.zero_grad()


class OptimizerStateHandler(_SavedAtOnce):
    """An optimizer, which may be a DistributedOptimizer."""

    value: torch.optim.Optimizer

    def save(self) -> None:
        """Keep a deep copy of the state_dict."""
        self._saved = copy.deepcopy(self.value.state_dict())

    def restore(self) -> None:
        """Load the copy; there are no gradients afterwards."""
        self.value.load_state_dict(copy.deepcopy(self._saved))  # torch takes over the tensors that it is given
        self._clear_gradients()

    def sync(self) -> None:
        """Take over rank 0's state and options."""
        broadcast_optimizer_state(self.value, 0)

    def reset(self) -> None:
        """Let go of reductions in flight, and of gradients, which may have been reduced in part."""
        self.value.load_state_dict(self.value.state_dict())  # this is what a DistributedOptimizer forgets them at
        self._clear_gradients()

    def _clear_gradients(self) -> None:
        for group in self.value.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


class SchedulerStateHandler(_SavedAtOnce):
    """A learning-rate scheduler. As an object of its own it could not be copied without its optimizer."""

    value: torch.optim.lr_scheduler.LRScheduler

    def save(self) -> None:
        """Keep a deep copy of the state_dict."""
        self._saved = copy.deepcopy(self.value.state_dict())

    def restore(self) -> None:
        """Load the copy."""
        self.value.load_state_dict(copy.deepcopy(self._saved))

    def sync(self) -> None:
        """Take over rank 0's state."""
        state = broadcast_object(self.value.state_dict())
        if rank() != 0:
            self.value.load_state_dict(state)


class _Root(NamedTuple):
    """Where rank 0's sampler stands."""

    syncs: int
    saves: int
    number: int  # that of its last save, or the next if it did not go back to it
    epoch: int


class SamplerStateHandler(_SavedAtOnce):
    """An ElasticSampler, of which each rank knows what it has processed itself.

    Ranks may go back to different commits: an error can reach one after it has saved, another before. The model that
    all go on with is rank 0's, so what counts as processed is what each rank had recorded when rank 0 had that model:
    at its save of the same number, or, if it did not come so far, until the error. A save has an even number, what was
    recorded after it the next odd one.
    """

    value: ElasticSampler

    def __init__(self, value: ElasticSampler) -> None:
        self._forget()
        super().__init__(value)

    def _forget(self) -> None:
        self._syncs = 0
        self._saves = 0  # since the first sync as many as rank 0's
        self._kept: dict[int, Progress] = {}

    def set_value(self, value: ElasticSampler) -> None:
        """Keep another sampler from now on, on all ranks alike; what was kept of the other one counts no more."""
        self._forget()
        super().set_value(value)

    def save(self) -> None:
        """Keep a copy of the progress, and the one before, to which other ranks may have to go back."""
        last = self._kept.get(2 * self._saves)
        self._kept = {} if last is None else {2 * self._saves: last}
        self._saves += 1
        self._kept[2 * self._saves] = self.value.progress()
        self._is_restored = False

    def restore(self) -> None:
        """Go back to the last save; what is left is split on the assumption that all ranks have done as much."""
        self._keep_what_came_after()
        self._is_restored = True
        self.value.settle(self._kept[2 * self._saves])

    def sync(self) -> None:
        """Take over rank 0's epoch, and as processed what any rank has processed of it."""
        root = self._gather()
        # If a later part of the sync fails, rank 0 goes back to its last save.
        saved = self._counted(root, 2 * root.saves)
        self._kept = {2 * root.saves: Progress.of_all(root.epoch, saved)}
        self._syncs, self._saves = root.syncs + 1, root.saves

    def merge(self) -> None:
        """Take as processed what any rank has processed."""
        self._gather()

    def _keep_what_came_after(self) -> None:
        if not self._is_restored:
            self._kept[2 * self._saves + 1] = self.value.progress()

    def _counted(self, root: _Root, number: int) -> torch.Tensor:
        """What this rank had recorded of rank 0's epoch up to that number."""
        kept = max((one for one in self._kept if one <= number), default=None)
        # Where rank 0 has had one more sync, it counted this rank then, and here nothing was done since.
        if kept is None or self._kept[kept].epoch != root.epoch or self._syncs < root.syncs:
            return torch.zeros(len(self.value.dataset), dtype=torch.bool)
        return self._kept[kept].recorded

    def _gather(self) -> _Root:
        self._keep_what_came_after()
        number = 2 * self._saves + (not self._is_restored)
        root = _Root(*broadcast_object((self._syncs, self._saves, number, self.value.epoch)))
        processed = allreduce(self._counted(root, root.number), op=Max, name="elastic.processed")
        self.value.settle(Progress.of_all(root.epoch, processed))
        return root


Registry = list[tuple[type, type[StateHandler]]]

_registry: Registry = [
    (torch.nn.Module, ModelStateHandler),
    (torch.optim.Optimizer, OptimizerStateHandler),
    (torch.optim.lr_scheduler.LRScheduler, SchedulerStateHandler),
    (ElasticSampler, SamplerStateHandler),
]


def get_handler_registry() -> Registry:
    """Which class of handler keeps which class of values; the first that fits does."""
    return _registry


def set_handler_registry(registry: Registry) -> None:
    """Replace the registry for values that states are given from now on. Equal on all ranks."""
    global _registry
    _registry = registry


class TorchState(ObjectState):
    """A state of models, optimizers, learning-rate schedulers, samplers, and Python objects, which are its attributes.

    Objects of the first four kinds stay the same, and what they hold is kept, restored and made equal; all others are
    copied as a whole. Gradients and random generators are not part of it. An attribute may be assigned anew, on all
    ranks alike; an object of the four kinds is saved at once then.
    """

    def __init__(
        self, model: torch.nn.Module | None = None, optimizer: torch.optim.Optimizer | None = None, **kwargs: Any
    ) -> None:
        """Args: kwargs: further attributes by name. Raises: ValueError for a name that the class uses itself."""
        self._handlers: dict[str, StateHandler] = {}
        super().__init__(broadcast_object, rank, model=model, optimizer=optimizer, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name.startswith("_") or name not in self._names:
            return
        kind = next((handler for kind, handler in _registry if isinstance(value, kind)), None)
        if kind is None:
            self._handlers.pop(name, None)
            return
        self._saved_state.pop(name, None)
        known = self._handlers.get(name)
        if type(known) is kind:
            known.set_value(value)
            return
        handler = self._handlers[name] = kind(value)
        if not isinstance(handler, _SavedAtOnce):
            handler.save()

    def _object_names(self) -> Iterable[str]:
        return [name for name in self._names if name not in self._handlers]

    def save(self) -> None:
        """Keep copies of everything in memory. Does not communicate."""
        for handler in self._handlers.values():
            handler.save()
        super().save()

    def restore(self) -> None:
        """Go back to the copies. Does not communicate."""
        for handler in self._handlers.values():
            handler.restore()
        super().restore()

    def sync(self) -> None:
        """Take over rank 0's state, then save. All ranks call it; blocks.

        Raises: HorovodInternalError if ranks disagree or one is lost; ValueError for torch.optim.LBFGS.
        """
        for handler in self._handlers.values():
            handler.sync()
        super().sync()

    def merge(self) -> None:
        """Bring together what the samplers of all ranks have recorded. All ranks call it; blocks."""
        for handler in self._handlers.values():
            handler.merge()

    def reset(self) -> None:
        """Let go of gradients, and of reductions in flight, which have ended with the job. Does not communicate."""
        for handler in self._handlers.values():
            handler.reset()
