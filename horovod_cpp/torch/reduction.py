"""Reduces the gradients of one `DistributedOptimizer`: in hooks, as backward makes them, one by one or in groups.

The hooks run on the thread that calls `backward()`; all else on the thread that calls the optimizer.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch

from horovod_cpp import _core
from horovod_cpp.common import knobs
from horovod_cpp.common.call_site import CallSite
from horovod_cpp.common.exceptions import HorovodInternalError
from horovod_cpp.common.process_sets import ProcessSet, registered_rank, registered_ranks, require_id
from horovod_cpp.torch import freezing, operations
from horovod_cpp.torch.buckets import Bucket
from horovod_cpp.torch.compression import Compression, Compressor
from horovod_cpp.torch.freezing import Question, is_still, settle
from horovod_cpp.torch.gradient_names import Owner, claim
from horovod_cpp.torch.pending import HasParts, Operation, Pending, PendingGroup, wait_all
from horovod_cpp.torch.sparse import PendingSparse, start_sparse_allreduce
from horovod_cpp.torch.streams import Place, hand_over, place_of

OF_ANOTHER_LOSS = (
    "If a backward pass was for another optimizer, as a GAN has them, keep it from these parameters: "
    "parameter.requires_grad_(False) before its forward pass, or loss.backward(inputs=...); or call "
    "optimizer.synchronize() after it, before gradients are cleared."
)


_storage_owners: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)


def _owners(tensor: torch.Tensor) -> int:
    """How many have the memory of `tensor`; 0, as of no tensor, where this torch cannot tell."""
    return 0 if _storage_owners is None else _storage_owners(tensor.untyped_storage()._cdata)


_OWNERS_OF_ONE = _owners(torch.empty(1)) or 2


class Gradient:
    """One parameter: how many backward passes its reduction still waits for, and the reduction in flight."""

    __slots__ = (
        "at_rest", "bucket", "context", "group", "hook", "in_plan", "is_complex", "name", "parameter", "passes_left",
        "pending", "place", "plan", "process_set", "process_set_id", "reduced", "rivals", "sparse_dim", "told",
        "version",
    )  # fmt: skip

    def __init__(self, parameter: torch.Tensor, name: str, process_set: ProcessSet, passes: int) -> None:
        self.parameter = parameter
        self.is_complex = parameter.is_complex()
        self.name = name
        self.process_set = process_set
        self.passes_left = passes
        self.rivals: list[Gradient] = []  # of the same parameter, in optimizers that are alive
        self.group: Group | None = None
        self.bucket: Bucket | None = None  # see bucket_reduction.py
        self.place = 0  # in the group or bucket
        self.pending: Pending | PendingSparse | GroupPending | None = None
        self.sparse_dim = 0  # of the last gradient that was reduced as a sparse one
        self.reduced: torch.Tensor | None = None  # the gradient that is in flight
        self.version: int | None = None  # that it had then; None where changes mean nothing
        self.context: Any = None  # what the compressor wants back
        self.told = self.at_rest = False  # see freezing.py
        self.plan: object = None  # of the short way, see _hook
        self.process_set_id: int | None = None  # that is in the plan
        self.in_plan = False  # whether the reduction in flight is the plan's, in place of `pending`
        self.hook: torch.utils.hooks.RemovableHandle | None = None


class Group:
    """Gradients of one process set that are reduced together, as one operation, once backward has made the last one."""

    __slots__ = ("compressed", "members", "name", "producers")

    def __init__(self, name: str, members: list[Gradient]) -> None:
        self.name = name
        self.members = members
        self.compressed: dict[Gradient, torch.Tensor] = {}  # those that are ready
        self.producers: set[Place] = set()  # what made them: each hook runs on the stream of its forward

    def is_ready(self) -> bool:
        return len(self.compressed) == len(self.members)


class GroupPending:
    """The reduction of a group in flight, for each of its gradients."""

    __slots__ = ("_outputs", "_pending")

    def __init__(self, pending: PendingGroup) -> None:
        self._pending = pending
        self._outputs: list[torch.Tensor] = []

    def parts(self) -> tuple[Operation, ...]:
        return self._pending.parts()

    def output(self, index: int) -> torch.Tensor:
        """Block until the group is reduced. Raises HorovodInternalError if it failed."""
        if not self._outputs:
            self._outputs = self._pending.wait()
        return self._outputs[index]


Unit = Gradient | Group | Bucket
"""What is reduced as one operation."""


class Reduction:
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
        self.gradients: dict[torch.Tensor, Gradient] = {}
        self.frozen: dict[torch.Tensor, tuple[str, ProcessSet]] = {}  # what has never required a gradient
        self.at_rest: set[Unit] = set()  # what is not reduced, as all of its parameters are frozen everywhere
        self.job = freezing.job()  # in which the ranks have agreed on that
        self.has_told = False
        # For what may be reduced where it lies, each by itself.
        self.makes_plans = compression is Compression.none and type(self) is Reduction and _storage_owners is not None
        self.warned = False
        self.owner = Owner()
        self.ranks: dict[ProcessSet, tuple[int, ...]] = {}  # of the sets in which gradients are reduced
        self.active: dict[ProcessSet, bool] = {}  # whether this rank is in the set, and others are
        self.take_up(process_set)

    def take_up(self, process_set: ProcessSet) -> None:
        """Reduce in this set, too. ValueError for one that is not registered."""
        ranks = tuple(registered_ranks(require_id(process_set)))
        self.ranks[process_set] = ranks
        self.active[process_set] = registered_rank() in ranks and (len(ranks) > 1 or knobs.elastic())

    def add(self, parameter: torch.Tensor, name: str, process_set: ProcessSet) -> None:
        """Reduce this parameter from now on, in a set that was taken up, or from when it requires a gradient."""
        name = claim(name, parameter, self.ranks[process_set], self.owner)
        if parameter.requires_grad:
            self._begin(parameter, name, process_set)
        else:
            self.frozen[parameter] = name, process_set

    def _begin(self, parameter: torch.Tensor, name: str, process_set: ProcessSet) -> None:
        gradient = Gradient(parameter, name, process_set, self.passes)
        gradient.rivals = _gradients_of(parameter)
        for rival in gradient.rivals:
            rival.rivals.append(gradient)
        gradient.hook = _register_hook(parameter, _hook(weakref.ref(self), gradient))
        self.gradients[parameter] = gradient

    def add_unfrozen(self) -> None:
        """Reduce what requires a gradient by now."""
        unfrozen = [parameter for parameter in self.frozen if parameter.requires_grad]
        for parameter in unfrozen:
            self._begin(parameter, *self.frozen.pop(parameter))
        if unfrozen:
            self.arrange([])

    def arrange(self, groups: list[list[torch.Tensor]]) -> None:
        """Reduce the parameters of each group together; those that need no gradient are left out."""
        for number, parameters in enumerate(groups):
            self._group(parameters, number)

    def _group(self, parameters: list[torch.Tensor], number: int) -> None:
        members = [self.gradients[parameter] for parameter in parameters if parameter in self.gradients]
        if not members:
            return
        made = Group(f"group.{number}.{members[0].name}", members)
        for place, member in enumerate(members):
            member.group, member.place = made, place

    def remove_hooks(self) -> None:
        for gradient in self.gradients.values():
            if gradient.hook is not None:
                gradient.hook.remove()
            for rival in gradient.rivals:
                rival.rivals.remove(gradient)
            gradient.rivals = []

    def on_accumulated(self, gradient: Gradient) -> None:
        """Backward has added to the gradient."""
        grad = gradient.parameter.grad
        if grad is None:
            return  # a function of the user's gave no gradient; zeros are reduced at synchronize
        if gradient.rivals or grad.requires_grad:
            self.require_own(gradient, grad)
        if gradient.passes_left <= 0:
            gradient.version = None  # this is told of
            raise AssertionError(
                "Gradients were computed more than backward_passes_per_step times before call to step(). "
                "Increase backward_passes_per_step to accumulate gradients locally. "
                f"(parameter '{gradient.name}', backward_passes_per_step={self.passes}) {OF_ANOTHER_LOSS}"
            )
        gradient.passes_left -= 1
        if gradient.passes_left == 0:
            self.start(gradient, grad)

    def require_own(self, gradient: Gradient, grad: torch.Tensor) -> None:
        """AssertionError for a gradient that cannot be reduced in place, as others need it as it is."""
        if any(rival.reduced is not None or rival.pending is not None for rival in gradient.rivals):
            raise AssertionError(
                f"two DistributedOptimizers have parameter '{gradient.name}', and both reduce its gradient, which one "
                "of them has begun. Call DistributedOptimizer once for each parameter, or delete the former optimizer "
                "first, with all that refers to it, such as its schedulers."
            )
        if grad.requires_grad:
            raise AssertionError(
                f"The gradient of parameter '{gradient.name}' requires a gradient itself (create_graph=True), and "
                "cannot be reduced in place. Make what is differentiated twice with torch.autograd.grad(..., "
                "create_graph=True), and call backward() without create_graph."
            )

    def start_missing(self, gradient: Gradient) -> None:
        """Hand over what backward has not: the gradient as it is, zeros where there is none."""
        parameter = gradient.parameter
        if parameter.grad is None:
            # The others have a sparse gradient again, presumably.
            parameter.grad = (
                _sparse_zeros(parameter, gradient.sparse_dim) if gradient.sparse_dim else torch.zeros_like(parameter)
            )
        self.start(gradient, parameter.grad)

    def start(self, gradient: Gradient, grad: torch.Tensor) -> None:
        """Hand the gradient over. Runs within backward, where its code and data are in no cache: little is best."""
        made_now = gradient.passes_left == 0  # by the backward pass that runs
        gradient.passes_left = 0
        group = gradient.group
        if grad.layout is not torch.strided:
            if not self.sparse_as_dense and group is None:
                gradient.sparse_dim = grad.sparse_dim()
                gradient.pending = start_sparse_allreduce(grad, gradient.name, self.op, gradient.process_set, self.site)
                return
            grad = gradient.parameter.grad = grad.to_dense()
        if gradient.is_complex:
            grad = gradient.parameter.grad = grad.resolve_conj()
        sent = grad
        if _owners(grad) != _OWNERS_OF_ONE:
            # In place it would be reduced as often as it is the gradient of a parameter.
            sent = grad.clone()
            # Autograd gave one memory to several, unless something was added: that lies where the program wants it.
            made_now = made_now and grad._version == 0
            if made_now:
                grad = gradient.parameter.grad = sent
        compressed, gradient.context = self.compression.compress(sent)
        gradient.version = grad._version if made_now else None  # a compressor may work in place
        if group is not None:
            gradient.reduced = grad
            group.compressed[gradient] = compressed
            group.producers.add(place_of(compressed))
            if group.is_ready():
                self.start_group(group)
            return
        gradient.pending = operations.start_allreduce(
            compressed, True, gradient.name, self.op, self.prescale_factor, self.postscale_factor,
            gradient.process_set, self.site,
        )  # fmt: skip
        gradient.reduced = grad  # last: after a refusal synchronize tries again
        if self.makes_plans and not gradient.is_complex:
            self.make_plan(gradient)

    def make_plan(self, gradient: Gradient) -> None:
        """Let later steps go the short way."""
        gradient.process_set_id = require_id(gradient.process_set)
        gradient.plan = _core.prepare_allreduce(
            gradient.name, gradient.process_set_id, self.op, self.prescale_factor, self.postscale_factor, self.site
        )

    def start_group(self, group: Group) -> None:
        try:
            self._start_group(group)
        except Exception:
            for member in group.members:
                member.reduced = None
            group.compressed.clear()
            raise

    def _start_group(self, group: Group) -> None:
        tensors = [group.compressed[member] for member in group.members]
        hand_over(group.producers, tensors)
        pending = GroupPending(
            operations.start_group(
                _core.ALLREDUCE,
                tensors,
                True,
                group.name,
                self.op,
                self.prescale_factor,
                self.postscale_factor,
                group.members[0].process_set,
                self.site,
            )
        )
        for member in group.members:
            member.pending = pending

    def finish(self, gradient: Gradient) -> None:
        """Wait for the reduced gradient and put it in its place."""
        pending, target = gradient.pending, gradient.reduced
        assert pending is not None
        if isinstance(pending, PendingSparse):
            gradient.parameter.grad = pending.wait()
            self.reset_one(gradient)
            return
        assert target is not None
        reduced = pending.output(gradient.place) if isinstance(pending, GroupPending) else pending.wait()
        output = self.compression.decompress(reduced, gradient.context)
        if output is not target:
            with torch.no_grad():
                target.copy_(output)
        gradient.parameter.grad = target
        self.reset_one(gradient)

    def reset_one(self, gradient: Gradient) -> None:
        gradient.pending = gradient.reduced = gradient.context = None
        if gradient.in_plan:
            gradient.in_plan = False
            gradient.plan = None  # it goes on without us
        gradient.passes_left = self.passes
        if gradient.group is not None:
            gradient.group.compressed.clear()
            gradient.group.producers.clear()

    def reset(self) -> None:
        """Forget what is in flight; it goes on without us."""
        for gradient in self.gradients.values():
            self.reset_one(gradient)
            if gradient.told and not gradient.parameter.requires_grad:
                gradient.parameter.grad = None  # zeros that stood for one

    def warn_of_change(self, gradient: Gradient) -> None:
        """The program has changed what is in flight. Once is enough."""
        if not self.warned:
            self.warned = True
            warnings.warn(
                f"The gradient of parameter '{gradient.name}' was changed after loss.backward(), which has begun to "
                "reduce it: nobody can tell how much of the change is in the result. Call optimizer.synchronize() "
                "before gradients are clipped or unscaled, and optimizer.step() with optimizer.skip_synchronize().",
                stacklevel=5,
            )

    def in_progress(self) -> bool:
        """Whether a backward pass came since the last synchronize."""
        return any(gradient.passes_left != self.passes for gradient in self.gradients.values())

    def reduce_loss(self, loss: Any, process_sets: list[ProcessSet]) -> Any:
        """What a closure has returned, a tensor or a number, reduced as gradients are. Blocks.

        In the set of this optimizer, or in the one of all its param groups: `process_sets` has those, which all ranks
        know alike. With several others it stays as it is.
        """
        used = set(process_sets)
        process_set = self.process_set if self.process_set in used or len(used) != 1 else used.pop()
        first = next((each for each in self.gradients.values() if each.process_set is process_set), None)
        if first is None or not isinstance(loss, (torch.Tensor, float, int)):
            return loss
        tensor = loss.detach() if isinstance(loss, torch.Tensor) else torch.tensor(loss, dtype=torch.float64)
        reduced = operations.start_allreduce(
            tensor, False, f"loss.{first.name}", self.op, 1.0, 1.0, process_set, self.site, caller_waits=True
        ).wait()
        return reduced if isinstance(loss, torch.Tensor) else reduced.item()

    def synchronize(self) -> None:
        """Start what no backward pass has started, and wait for all."""
        missing = []
        for gradient in self.gradients.values():
            reduced = gradient.reduced
            if reduced is None:
                if gradient.pending is None:
                    missing.append(gradient)
            elif gradient.version is not None and reduced._version != gradient.version:
                self.warn_of_change(gradient)
        questions = self.questions_about(missing) if missing or self.has_told else {}
        for question in questions.values():
            question.ask()
        for gradient in missing:
            unit = self.unit_of(gradient)
            if unit in self.at_rest:
                gradient.passes_left = self.passes
            elif unit not in questions:
                self.start_missing(gradient)
        refused = self.finish_plans()
        wait_all([*self.in_flight(), *questions.values()])
        for gradient in self.gradients.values():
            if gradient.pending is None:
                continue
            try:
                self.finish(gradient)
            except HorovodInternalError as error:
                if not freezing.another_asks(error):
                    raise
                unit = self.unit_of(gradient)
                refused[unit] = refused.get(unit) or self.question(gradient)
        if questions or refused:
            self.start_settled(settle(questions.values(), refused.values()))
            wait_all(self.in_flight())
            for gradient in self.gradients.values():
                if gradient.pending is not None:
                    self.finish(gradient)
        self.leave_at_rest()

    def finish_plans(self) -> dict[Unit, Question]:
        """Wait for what has gone the short way; what to ask about that for which another rank asks."""
        planned = [gradient for gradient in self.gradients.values() if gradient.in_plan]
        if not planned:
            return {}
        failures = dict(_core.wait_prepared([gradient.plan for gradient in planned]))
        refused: dict[Unit, Question] = {}
        passes = self.passes
        for number, gradient in enumerate(planned):
            gradient.in_plan = False
            if number in failures:
                error = HorovodInternalError(failures[number])
                if not freezing.another_asks(error):
                    raise error
                refused[gradient] = self.question(gradient)
            else:
                gradient.parameter.grad = gradient.reduced
                gradient.reduced = None
                gradient.passes_left = passes
        return refused

    def in_flight(self) -> list[HasParts]:
        return list({id(each.pending): each.pending for each in self.gradients.values() if each.pending}.values())

    # ---- frozen parameters, see freezing.py

    def unit_of(self, gradient: Gradient) -> Unit:
        """What is reduced as one operation with it."""
        return gradient.group or gradient

    def question(self, gradient: Gradient) -> Question:
        """About what is reduced with it."""
        group = gradient.group
        members, name = ([gradient], gradient.name) if group is None else (group.members, group.name)
        is_sparse = group is None and gradient.sparse_dim > 0
        return Question(members, name, is_sparse, gradient.process_set, self.site)

    def questions_about(self, missing: list[Gradient]) -> dict[Unit, Question]:
        """Find what is still among that for which nothing has been reduced yet; to ask about what has become so."""
        if self.job != freezing.job():
            self.job = freezing.job()
            self.at_rest.clear()
            for gradient in self.gradients.values():
                gradient.told = gradient.at_rest = False
        questions: dict[Unit, Question] = {}
        still = {gradient for gradient in missing if is_still(gradient.parameter)}
        for gradient in self.gradients.values():
            if gradient.told and gradient not in still:
                gradient.told = gradient.at_rest = False
                self.at_rest.discard(self.unit_of(gradient))
        for gradient in missing:
            if gradient in still and not gradient.told:
                unit = self.unit_of(gradient)
                questions[unit] = questions.get(unit) or self.question(gradient)
                gradient.told = self.has_told = True
        return questions

    def start_settled(self, questions: list[Question]) -> None:
        """Reduce what is not at rest everywhere, now that all ranks know what is."""
        for question in questions:
            if question.all_at_rest():
                self.at_rest.add(self.unit_of(question.members[0]))
                self.drop(question.members)
            else:
                self.start_again(question.members)

    def drop(self, members: list[Gradient]) -> None:
        """Reduce nothing for what is at rest everywhere."""
        for member in members:
            self.reset_one(member)

    def start_again(self, members: list[Gradient]) -> None:
        """Hand over what was not, as this rank has asked, or what was refused, as another one has."""
        first = members[0]
        given = first.pending.given() if isinstance(first.pending, Pending) else None
        if first.pending is None and first.group is None:
            given = first.reduced  # of the short way
        if given is not None:
            first.pending = operations.start_allreduce(
                given, True, first.name, self.op, self.prescale_factor, self.postscale_factor,
                first.process_set, self.site,
            )  # fmt: skip
        elif isinstance(first.pending, GroupPending):
            assert first.group is not None
            self.start_group(first.group)
        elif first.pending is not None:
            assert first.parameter.grad is not None
            self.start(first, first.parameter.grad)
        else:
            for member in members:
                if member.reduced is None:
                    self.start_missing(member)

    def leave_at_rest(self) -> None:
        """Take the gradients away that stood for those of parameters at rest: the step must not move these."""
        if self.has_told:
            for gradient in self.gradients.values():
                if gradient.at_rest:
                    gradient.parameter.grad = None


class LocalGradients(Reduction):
    """With op=Adasum gradients stay on their rank: backward passes are counted only."""

    def start(self, gradient: Gradient, grad: torch.Tensor) -> None:
        """Nothing: the optimizer reduces what its step changes."""

    def require_own(self, gradient: Gradient, grad: torch.Tensor) -> None:
        """Nothing: gradients are left as they are."""

    def reduced_step(self, local_step: Callable[[], Any]) -> Any:
        """Do the optimizer's step, and reduce what that changes in each parameter that is not at rest. Blocks.

        On HorovodInternalError the parameters are as they were before.
        """
        self.add_unfrozen()
        questions = self.questions_about(list(self.gradients.values()))
        starts = {
            gradient: gradient.parameter.detach().clone()
            for gradient in self.gradients.values()
            if gradient not in self.at_rest
        }
        try:
            result = local_step()
        except BaseException:
            for gradient in self.gradients.values():
                gradient.told = gradient.at_rest  # nobody was asked
            raise
        with torch.no_grad():
            try:
                self._reduce_changes(starts, list(questions.values()))
            except BaseException:
                for gradient, start in starts.items():
                    gradient.parameter.copy_(start)
                raise
        return result

    def _reduce_changes(self, starts: dict[Gradient, torch.Tensor], questions: list[Question]) -> None:
        try:
            for question in questions:
                question.ask()
            for gradient in starts:
                if not any(gradient in question.members for question in questions):
                    self._start_change(gradient, starts[gradient])
        finally:
            wait_all([*self.in_flight(), *questions])
        refused = [self.question(gradient) for gradient in starts if gradient.pending and _is_refused(gradient.pending)]
        for question in settle(questions, refused):
            (gradient,) = question.members
            if question.all_at_rest():
                self.at_rest.add(gradient)
                gradient.pending = None
            else:
                self._start_change(gradient, starts[gradient])
        wait_all(self.in_flight())
        for gradient, start in starts.items():
            if isinstance(gradient.pending, Pending):
                change = self.compression.decompress(gradient.pending.wait(), gradient.context)
                gradient.parameter.copy_(start + change)

    def _start_change(self, gradient: Gradient, start: torch.Tensor) -> None:
        # Memory of its own: what is in flight when an error comes must not reach the parameter.
        compressed, gradient.context = self.compression.compress(gradient.parameter.detach() - start)
        gradient.pending = operations.start_allreduce(
            compressed, True, gradient.name, self.op, 1.0, 1.0, gradient.process_set, self.site
        )


def _is_refused(pending: HasParts) -> bool:
    """Whether another rank asks about it, in place of reducing. It is done."""
    try:
        for part in pending.parts():
            part.finish()
    except HorovodInternalError as error:
        if not freezing.another_asks(error):
            raise
        return True
    return False


def _sparse_zeros(parameter: torch.Tensor, sparse_dim: int) -> torch.Tensor:
    indices = torch.empty(sparse_dim, 0, dtype=torch.int64, device=parameter.device)
    values = torch.empty(0, *parameter.shape[sparse_dim:], dtype=parameter.dtype, device=parameter.device)
    return torch.sparse_coo_tensor(indices, values, parameter.shape, check_invariants=True)


def _hook(reduction: weakref.ref[Reduction], gradient: Gradient) -> Callable[[torch.Tensor], None]:
    """The hook of one parameter. It does not keep the optimizer alive, and does nothing once that is gone.

    Within backward, where its code and data are in no cache, little is best. So what most gradients are in most steps,
    dense, nobody else's and in host memory, goes a short way: it does what `Reduction.on_accumulated` would do.
    """
    owners_of, owners_of_one, start = _storage_owners, _OWNERS_OF_ONE, _core.start_prepared
    process_set = gradient.process_set

    def on_accumulated(parameter: torch.Tensor) -> None:
        alive = reduction()
        if alive is None:
            return
        plan = gradient.plan
        if (
            plan is None
            or gradient.passes_left != 1
            or gradient.rivals
            or process_set.process_set_id != gradient.process_set_id
        ):
            return alive.on_accumulated(gradient)
        grad = parameter.grad
        try:
            if (
                grad is None
                or grad.requires_grad
                or owners_of(grad.untyped_storage()._cdata) != owners_of_one  # type: ignore[misc]
                or grad.is_neg()
                or not start(plan, grad)
            ):
                return alive.on_accumulated(gradient)
        except RuntimeError:  # it is sparse and has no storage, or was refused, which is told of there
            return alive.on_accumulated(gradient)
        gradient.passes_left = 0
        gradient.version = grad._version
        gradient.in_plan = True
        gradient.reduced = grad

    setattr(on_accumulated, "gradient", gradient)  # noqa: B010 (for _gradients_of)
    return on_accumulated


def _gradients_of(parameter: torch.Tensor) -> list[Gradient]:
    """The gradients whose hooks the parameter has."""
    hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
    return [hook.gradient for hook in hooks.values() if isinstance(getattr(hook, "gradient", None), Gradient)]


def _register_hook(parameter: torch.Tensor, hook: Callable[[torch.Tensor], None]) -> torch.utils.hooks.RemovableHandle:
    handle: torch.utils.hooks.RemovableHandle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    return handle
