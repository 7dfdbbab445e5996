"""DistributedOptimizer in process sets."""

from __future__ import annotations

import pytest
import torch
from test_optimizer import linear_model, mean_of_ranks, own_input, several_ranks

import horovod_cpp.torch as hvd

pytestmark = pytest.mark.usefixtures("gradients_and_bucket_views")

NOT_REGISTERED = "Process set provided does not exist, or has not been registered"


def everyone_can_go_on() -> None:
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == hvd.size()


@pytest.mark.parametrize("op", ["Average", "Adasum"])
def test_a_set_that_is_not_registered_is_refused(op: str) -> None:
    model = linear_model()
    plain = torch.optim.SGD(model.parameters(), lr=1.0)
    options = {"gradient_as_bucket_view": False} if op == "Adasum" else {}
    with pytest.raises(ValueError, match=NOT_REGISTERED):
        hvd.DistributedOptimizer(plain, op=getattr(hvd, op), process_set=hvd.ProcessSet(range(hvd.size())), **options)
    assert type(plain) is torch.optim.SGD
    model(own_input()).sum().backward()
    plain.step()
    everyone_can_go_on()


@pytest.mark.parametrize("op", ["Average", "Adasum"])
def test_a_set_that_has_been_removed_is_refused_in_it_and_outside(op: str) -> None:
    several_ranks()
    first_two = hvd.add_process_set([0, 1]) if hvd.size() > 2 else hvd.add_process_set([0])
    model = linear_model()
    options = {"gradient_as_bucket_view": False} if op == "Adasum" else {}
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0), op=getattr(hvd, op), process_set=first_two, **options
    )
    hvd.barrier()
    assert hvd.remove_process_set(first_two)
    before = model.weight.detach().clone()
    if op == "Average" and hvd.size() > 2 and hvd.rank() < 2:
        with pytest.raises(ValueError, match=NOT_REGISTERED):
            model(own_input()).sum().backward()
    with pytest.raises(ValueError, match=NOT_REGISTERED):
        optimizer.step()
    assert torch.equal(model.weight, before)
    everyone_can_go_on()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0))
    optimizer.zero_grad()
    model(own_input()).sum().backward()
    optimizer.step()
    assert torch.allclose(model.weight, torch.full_like(model.weight, 1 - mean_of_ranks()))
