"""torch.compile around what the library does: every rank has the results of one process that does not compile."""

from __future__ import annotations

import shutil
import textwrap
from pathlib import Path

import pytest
from launchers import mpirun

pytestmark = pytest.mark.skipif(shutil.which("mpirun") is None, reason="there is no mpirun")

PREAMBLE = """
import torch
from torch import nn
import horovod_cpp.torch as hvd

torch.set_num_threads(1)
hvd.init()
compiled = torch.compile(backend="aot_eager")
whole = torch.randn(8, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
own = whole.chunk(hvd.size())[hvd.rank()]


def network(normalize):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), normalize(6), nn.ReLU(), nn.Linear(6, 2)).double()
"""

PROGRAMS = {
    "an allreduce is right": """
        @compiled
        def shifted_sum(tensor):
            return hvd.allreduce(tensor * 2, op=hvd.Sum, name="within") + 1

        for _ in range(2):
            tensor = torch.ones(3, requires_grad=True)
            result = shifted_sum(tensor * (hvd.rank() + 1))
            result.sum().backward()
            assert result.tolist() == [7] * 3 and tensor.grad.tolist() == [4 * (hvd.rank() + 1)] * 3
        """,
    "SyncBatchNorm is right": """
        here, alone = network(hvd.SyncBatchNorm), network(nn.BatchNorm1d)
        model = compiled(here)
        for _ in range(2):
            got, wanted = model(own), alone(whole)
            assert torch.allclose(got, wanted.chunk(hvd.size())[hvd.rank()], rtol=1e-9)
            for each, output in ((here, got), (alone, wanted)):
                each.zero_grad()
                output.pow(2).sum().backward()
            for mine, of_all in zip(here.parameters(), alone.parameters(), strict=True):
                assert torch.allclose(hvd.allreduce(mine.grad, op=hvd.Sum), of_all.grad, rtol=1e-9)
        """,
    "a training step is right": """
        def step(model, optimizer, batch):
            optimizer.zero_grad()
            model(batch).pow(2).mean().backward()
            optimizer.step()

        here, alone = network(nn.Identity), network(nn.Identity)
        optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
        distributed = hvd.DistributedOptimizer(torch.optim.SGD(here.parameters(), lr=0.1), here.named_parameters())
        compiled_step = compiled(step)
        for _ in range(2):
            compiled_step(here, distributed, own)
            step(alone, optimizer, whole)
        for mine, of_all, start in zip(
            here.parameters(), alone.parameters(), network(nn.Identity).parameters(), strict=True
        ):
            assert torch.allclose(mine, of_all, rtol=1e-9) and not torch.equal(mine, start)
        """,
}


def test_what_is_compiled_gives_the_results_of_one_process(tmp_path: Path) -> None:
    # In one job, as torch's compiler is long to import.
    parts = [textwrap.dedent(text) + f"print({what!r}, flush=True)\n" for what, text in PROGRAMS.items()]
    output = mpirun(tmp_path, 2, PREAMBLE + "".join(parts), OMP_NUM_THREADS="1")
    assert "exit code 0" in output and all(output.count(what) == 2 for what in PROGRAMS), output
