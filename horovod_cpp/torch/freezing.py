"""Which parameters are frozen on all ranks, so that nothing is reduced for them.

A parameter is *still* on a rank where it requires no gradient and has none. A rank knows that of itself alone: another
one may have begun to reduce the gradient. So a rank on which a parameter has become still *asks*, in place of the
reduction that the parameter is part of and under its name, by a reduction of another kind: the minimum of bytes that
are 1 for what is still. Either all ranks ask at once, and know the answer. Or others reduce: then all ranks get the
error of ranks that disagree, whose text has the bytes' type, ask together, and reduce after that. Either way all do the
same. What is still everywhere is *at rest*. Where ranks differ, zeros stand for the gradients that some do not have.

The thread that calls the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from horovod_cpp import _core
from horovod_cpp.common import basics
from horovod_cpp.common.call_site import CallSite
from horovod_cpp.common.exceptions import HorovodInternalError
from horovod_cpp.common.process_sets import ProcessSet
from horovod_cpp.torch import operations
from horovod_cpp.torch.pending import Operation, Pending, wait_all

if TYPE_CHECKING:
    from horovod_cpp.torch.reduction import Gradient


class Question:
    """Whether the parameters of one reduction are still on all ranks."""

    def __init__(
        self, members: list[Gradient], name: str, is_sparse: bool, process_set: ProcessSet, site: CallSite
    ) -> None:
        self.members = members
        self._name = name
        self._is_sparse = is_sparse  # its gradients are gathered
        self._process_set = process_set
        self._site = site
        self._pending: Pending | None = None

    def parts(self) -> tuple[Operation, ...]:
        return () if self._pending is None else self._pending.parts()

    def ask(self) -> None:
        """Tell the others what is still here. Does not block."""
        told = torch.tensor([member.told for member in self.members], dtype=torch.uint8)
        if self._is_sparse:
            self._pending = operations.start_allgather(told, self._name, self._process_set, self._site)
        else:
            self._pending = operations.start_allreduce(
                told, True, self._name, _core.MIN, 1.0, 1.0, self._process_set, self._site
            )

    def is_answered(self) -> bool:
        """Block until the others have told theirs: false where one of them reduces."""
        assert self._pending is not None
        try:
            answer = self._pending.wait()
        except HorovodInternalError as error:
            if not another_asks(error):
                raise
            return False
        everywhere = answer.view(-1, len(self.members)).amin(dim=0).tolist()
        for member, at_rest in zip(self.members, everywhere, strict=True):
            member.at_rest = bool(at_rest)
        return True

    def all_at_rest(self) -> bool:
        return all(member.at_rest for member in self.members)


def is_still(parameter: torch.Tensor) -> bool:
    return not parameter.requires_grad and parameter.grad is None


def another_asks(error: HorovodInternalError) -> bool:
    """Whether a reduction failed, with this error, as another rank asks. No gradient is of bytes."""
    text = str(error)
    return "mismatched" in text and "uint8" in text


def settle(asked: Iterable[Question], refused: Iterable[Question]) -> list[Question]:
    """Block until all questions are answered: those that were asked, and those in place of which this rank reduced."""
    questions = [*asked]
    open_ones = [question for question in questions if not question.is_answered()]
    for question in refused:
        questions.append(question)
        open_ones.append(question)
    for question in open_ones:
        question.ask()
    wait_all(open_ones)
    for question in open_ones:
        if not question.is_answered():
            raise HorovodInternalError("a rank has asked out of turn which parameters are frozen")
    return questions


_jobs = 0


def job() -> int:
    """The number of the job, of those that this process has been in: what ranks have agreed on ends with it."""
    return _jobs


def _count_job() -> None:
    global _jobs
    _jobs += 1


basics.when_a_job_starts(_count_job)
