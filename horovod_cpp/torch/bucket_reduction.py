"""Reduces gradients that are views of buckets: what `gradient_as_bucket_view` makes of a `DistributedOptimizer`.

Threads as in reduction.py.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from horovod_cpp.common.exceptions import HorovodInternalError
from horovod_cpp.torch import freezing, operations
from horovod_cpp.torch.buckets import Bucket, Named, cut, split_by_kind
from horovod_cpp.torch.freezing import Question, settle
from horovod_cpp.torch.pending import HasParts, wait_all
from horovod_cpp.torch.reduction import Gradient, Reduction, Unit
from horovod_cpp.torch.streams import hand_over


class BucketReduction(Reduction):
    """A reduction in which every gradient has a place in a bucket."""

    def __init__(self, *options: Any) -> None:
        super().__init__(*options)
        self.buckets: list[Bucket] = []
        self._made: Counter[tuple[int, ...]] = Counter()  # buckets of each set, by its ranks

    def arrange(self, groups: list[list[torch.Tensor]]) -> None:
        """Make each group a bucket, or one for each dtype in it; without groups, cut what is in no bucket yet.

        With groups, a parameter of none of them has a bucket of its own.
        """
        for parameters in groups:
            members = [self.gradients[parameter] for parameter in parameters if parameter in self.gradients]
            for part in split_by_kind(_named(members)):
                self._add_bucket(part, takes_sparse=True)
        rest: dict[tuple[int, ...], list[Gradient]] = {}
        for gradient in self.gradients.values():
            if gradient.bucket is None:
                rest.setdefault(self.ranks[gradient.process_set], []).append(gradient)
        for of_set in map(_named, rest.values()):
            for part in [[member] for member in of_set] if groups else cut(of_set):
                self._add_bucket(part, takes_sparse=self.sparse_as_dense)

    def _add_bucket(self, members: list[Named], takes_sparse: bool) -> None:
        process_set = self.gradients[members[0][1]].process_set
        ranks = self.ranks[process_set]
        # Numbered in each set: ranks outside it do not have its buckets.
        bucket = Bucket(self._made[ranks], members, takes_sparse, process_set)
        self._made[ranks] += 1
        self.buckets.append(bucket)
        for place, (_, parameter) in enumerate(members):
            gradient = self.gradients[parameter]
            gradient.bucket, gradient.place = bucket, place

    def on_accumulated(self, gradient: Gradient) -> None:
        """Backward has added to the gradient: while that is in the caches it moves to its place."""
        grad = gradient.parameter.grad
        if grad is not None and gradient.passes_left > 0:
            if gradient.rivals or grad.requires_grad:
                self.require_own(gradient, grad)
            _move(gradient, grad)
        super().on_accumulated(gradient)

    def start_missing(self, gradient: Gradient) -> None:
        """Hand over what backward has not: the gradient as it is, zeros where there is none."""
        self.start(gradient, _move(gradient, gradient.parameter.grad))

    def start(self, gradient: Gradient, grad: torch.Tensor) -> None:
        """Count the gradient as ready; the last one of a bucket starts its reduction."""
        bucket = gradient.bucket
        assert bucket is not None
        made_now = gradient.passes_left == 0
        gradient.passes_left = 0
        gradient.reduced = view = bucket.view(gradient.place)
        gradient.version = view._version if made_now else None
        if bucket.count_ready():
            self._start_bucket(bucket)

    def _start_bucket(self, bucket: Bucket) -> None:
        hand_over(bucket.producers)
        compressed, bucket.context = self.compression.compress(bucket.flat)
        bucket.pending = operations.start_allreduce(
            compressed, True, bucket.name, self.op, self.prescale_factor, self.postscale_factor,
            bucket.process_set, self.site,
        )  # fmt: skip

    def synchronize(self) -> None:
        """Start what no backward pass has started, wait for all buckets, and let each gradient be its view."""
        missing = []
        for gradient in self.gradients.values():
            if gradient.reduced is None:
                missing.append(gradient)
            elif gradient.version is not None and gradient.reduced._version != gradient.version:
                self.warn_of_change(gradient)
        questions = self.questions_about(missing) if missing or self.has_told else {}
        for question in questions.values():
            question.ask()
        for gradient in missing:
            if gradient.bucket not in questions and gradient.bucket not in self.at_rest:
                self.start_missing(gradient)
        for bucket in self.buckets:
            if bucket.pending is None and bucket not in questions and bucket not in self.at_rest:
                self._start_bucket(bucket)  # it was refused in backward
        wait_all([*self.in_flight(), *questions.values()])
        refused = self._finish_buckets()
        if questions or refused:
            self.start_settled(settle(questions.values(), refused))
            wait_all(self.in_flight())
            for bucket in self.buckets:
                if bucket.pending is not None:
                    self._finish_bucket(bucket)
        for gradient in self.gradients.values():
            assert gradient.bucket is not None
            if gradient.bucket not in self.at_rest:
                gradient.parameter.grad = gradient.bucket.view(gradient.place)
        self._forget_in_flight()
        self.leave_at_rest()

    def in_flight(self) -> list[HasParts]:
        return [bucket.pending for bucket in self.buckets if bucket.pending is not None]

    def unit_of(self, gradient: Gradient) -> Unit:
        assert gradient.bucket is not None
        return gradient.bucket

    def question(self, gradient: Gradient) -> Question:
        """About its bucket."""
        bucket = gradient.bucket
        assert bucket is not None
        members = sorted((each for each in self.gradients.values() if each.bucket is bucket), key=lambda one: one.place)
        return Question(members, bucket.name, False, bucket.process_set, self.site)

    def start_again(self, members: list[Gradient]) -> None:
        """Hand over what was not, as this rank has asked, or what was refused, as another one has."""
        bucket = members[0].bucket
        assert bucket is not None
        if bucket.pending is None:
            for member in members:
                if member.reduced is None:
                    self.start_missing(member)
        else:
            bucket.pending = operations.start_allreduce(
                bucket.pending.given(), True, bucket.name, self.op, self.prescale_factor, self.postscale_factor,
                bucket.process_set, self.site,
            )  # fmt: skip

    def drop(self, members: list[Gradient]) -> None:
        """Reduce nothing for what is at rest everywhere."""
        super().drop(members)
        assert members[0].bucket is not None
        members[0].bucket.reset()

    def _finish_buckets(self) -> list[Question]:
        """Put the results into the buckets that are reduced. Returns: what to ask about those for which a rank asks."""
        refused = []
        for bucket in self.buckets:
            if bucket.pending is None:
                continue
            try:
                self._finish_bucket(bucket)
            except HorovodInternalError as error:
                if not freezing.another_asks(error):
                    raise
                refused.append(next(self.question(each) for each in self.gradients.values() if each.bucket is bucket))
        return refused

    def _finish_bucket(self, bucket: Bucket) -> None:
        assert bucket.pending is not None
        output = self.compression.decompress(bucket.pending.wait(), bucket.context)
        bucket.pending = None  # nothing is in flight any more
        if output is not bucket.flat:
            with torch.no_grad():
                bucket.flat.copy_(output)

    def reset(self) -> None:
        """Forget what is in flight; it goes on without us, in memory that it keeps."""
        super().reset()
        for bucket in self.buckets:
            bucket.reset()

    def _forget_in_flight(self) -> None:
        for gradient in self.gradients.values():
            self.reset_one(gradient)
        for bucket in self.buckets:
            bucket.reset()


def _named(gradients: list[Gradient]) -> list[Named]:
    return [(gradient.name, gradient.parameter) for gradient in gradients]


def _move(gradient: Gradient, grad: torch.Tensor | None) -> torch.Tensor:
    """Let the parameter's gradient be its view, with the values of `grad` or zeros. Nothing if it is the view."""
    bucket = gradient.bucket
    assert bucket is not None
    view = bucket.view(gradient.place)
    if grad is view:
        return view
    if grad is None:
        view.zero_()
    else:
        view.copy_(_dense(gradient, grad, bucket).detach())
    gradient.parameter.grad = view
    return view


def _dense(gradient: Gradient, grad: torch.Tensor, bucket: Bucket) -> torch.Tensor:
    """The gradient as it fits into its bucket. ValueError if it does not."""
    flat = bucket.flat
    if grad.dtype is not flat.dtype or grad.device != flat.device:
        raise ValueError(
            f"gradient_as_bucket_view: the gradient of '{gradient.name}' is of {grad.dtype} on {grad.device}, its "
            f"bucket of {flat.dtype} on {flat.device}; move the model before DistributedOptimizer is called"
        )
    if grad.layout is torch.strided:
        return grad
    if not bucket.takes_sparse:
        raise ValueError(
            f"gradient_as_bucket_view: parameter '{gradient.name}' has a sparse gradient, which cannot be a view of a "
            "bucket; use sparse_as_dense=True"
        )
    return grad.to_dense()
