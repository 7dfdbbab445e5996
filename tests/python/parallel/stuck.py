"""Operations that wait for members of their process set which do not call them yet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

import horovod_cpp.torch as hvd

LARGE = 300_000  # elements; travels in several pieces


def _start(of_rank: int, ranks: list[int], process_set: hvd.ProcessSet) -> list[tuple[int, torch.Tensor]]:
    """Hands over the operations of that rank; handles and the results that are due."""
    name, count = f"stuck.{of_rank}", len(ranks)
    return [
        (
            hvd.allreduce_async(torch.ones(elements), name=f"{name}.{elements}", op=hvd.Sum, process_set=process_set),
            torch.full((elements,), float(count)),
        )
        for elements in (3, LARGE)
    ] + [
        (
            hvd.allgather_async(torch.tensor([hvd.rank()]), name=name, process_set=process_set),
            torch.tensor(ranks),
        ),
        (
            hvd.broadcast_async(torch.tensor([hvd.rank()]), of_rank, name=name, process_set=process_set),
            torch.tensor([of_rank]),
        ),
    ]


@contextmanager
def operations_stuck_in(process_set: hvd.ProcessSet) -> Iterator[None]:
    """While the body runs, each member waits in the set for operations that the others have not handed over.

    After the body they do, and every operation has to end with its result. A set of one rank is never stuck.
    """
    ranks = list(process_set.ranks or ())
    if hvd.rank() not in ranks or len(ranks) == 1:
        yield
        return
    started = _start(hvd.rank(), ranks, process_set)
    yield
    assert not any(hvd.poll(handle) for handle, _ in started)
    # The others hand over only once all have looked.
    hvd.barrier(process_set)
    for rank in ranks:
        if rank != hvd.rank():
            started += _start(rank, ranks, process_set)
    for handle, due in started:
        assert torch.equal(hvd.synchronize(handle), due)
