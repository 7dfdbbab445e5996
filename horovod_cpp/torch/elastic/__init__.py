"""`hvd.elastic`: training that goes on after errors, from the last commit.

    state = hvd.elastic.TorchState(model, optimizer, sampler=sampler, epoch=0)

    @hvd.elastic.run
    def train(state): ...  # steps, state.sampler.record_batch(...), state.commit()

    train(state)

The ranks stay those that were launched. A rank that is lost ends the training, with an error that says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch

from horovod_cpp.common.elastic import HostUpdateResult, ObjectState, State, reset_job, run_fn
from horovod_cpp.common.exceptions import HorovodInternalError, HostsUpdatedInterrupt
from horovod_cpp.torch.collectives import Min, allreduce
from horovod_cpp.torch.elastic.sampler import ElasticSampler
from horovod_cpp.torch.elastic.state import TorchState, get_handler_registry, set_handler_registry

__all__ = [
    "ElasticSampler",
    "HorovodInternalError",
    "HostUpdateResult",
    "HostsUpdatedInterrupt",
    "ObjectState",
    "State",
    "TorchState",
    "get_handler_registry",
    "run",
    "set_handler_registry",
]

_State = TypeVar("_State", bound=State)
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def run(
    func: Callable[Concatenate[_State, _Arguments], _Result],
) -> Callable[Concatenate[_State, _Arguments], _Result]:
    """Decorate a training function so that it starts again after errors, from the last commit.

    All ranks call the decorated function, after `hvd.init()`; it blocks until `func` returns. First rank 0's state is
    taken over by all. After a HorovodInternalError the job is shut down and joined again, with the same process sets,
    and the state restored; after a HostsUpdatedInterrupt the state stays as it is. Then it begins anew. An error of one
    rank ends the operations of all, so that all come to the reset.

    What ended with the job and is not in the state has to be made anew within `func` or by a reset callback: handles,
    and DistributedOptimizers whose gradients were being reduced. The options of the last `hvd.init` are used again.

    Args:
        func: takes the state first, then any arguments.
    Returns: a function that takes and returns what `func` does. It raises what `func` does, except for
        HorovodInternalError if the job cannot be formed again (a rank is gone: changes of membership are not supported
        yet), or for the third failure on end without a commit between.
    """
    return run_fn(func, reset_job, _agree)


def _agree(skip_sync: bool, failures: int) -> tuple[bool, int]:
    least = allreduce(torch.tensor([int(skip_sync), failures]), op=Min, name="elastic.agree")
    return bool(least[0]), int(least[1])
