"""C++ and Python ranks of one job train one model; their other half is in tests/torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = ROOT / "build" / "release" / "tests" / "torch" / "torch_test"

pytestmark = [
    pytest.mark.skipif(shutil.which("mpirun") is None, reason="there is no mpirun"),
    pytest.mark.skipif(not PROGRAM.exists(), reason="built without LibTorch"),
]

# The same steps as on the C++ ranks; a seed gives the same numbers there.
PYTHON_RANK = """
import copy
import torch
from torch import nn, optim
import horovod_cpp.torch as hvd

torch.set_num_threads(1)
hvd.init(process_sets="dynamic")
torch.manual_seed(17)
inputs = torch.randn(24, 6, dtype=torch.float64)
targets = torch.randn(24, 3, dtype=torch.float64)


def train(model, optimizer, inputs, targets):
    for _ in range(12):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()


for make in (
    lambda parameters: optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=0.01),
    lambda parameters: optim.Adam(parameters, 0.05),
    lambda parameters: optim.AdamW(parameters, 0.05),
    lambda parameters: optim.RMSprop(parameters, 0.01, momentum=0.5),
    lambda parameters: optim.Adagrad(parameters, 0.1),
):
    torch.manual_seed(100 + hvd.rank())
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    alone = copy.deepcopy(model)
    train(alone, make(alone.parameters()), inputs, targets)
    optimizer = hvd.DistributedOptimizer(make(model.parameters()), named_parameters=model.named_parameters())
    mine = (inputs.chunk(hvd.size())[hvd.rank()], targets.chunk(hvd.size())[hvd.rank()])
    train(model, optimizer, *mine)
    for here, there in zip(alone.parameters(), model.parameters(), strict=True):
        assert (here - there).abs().max() < 1e-9
hvd.barrier()

torch.manual_seed(23)
batch = torch.randn(24, 6, dtype=torch.float64, requires_grad=True)
own = batch.detach().chunk(hvd.size())[hvd.rank()].clone().requires_grad_()
whole, layer = nn.BatchNorm1d(6).double(), hvd.SyncBatchNorm(6).double()
expected, got = whole(batch), layer(own)
assert (got - expected.chunk(hvd.size())[hvd.rank()]).abs().max() < 1e-9
expected.pow(3).sum().backward()
got.pow(3).sum().backward()
assert (own.grad - batch.grad.chunk(hvd.size())[hvd.rank()]).abs().max() < 1e-9
assert (layer.running_var - whole.running_var).abs().max() < 1e-9
hvd.barrier()
"""


@pytest.mark.parametrize("order", ["cp", "pc", "ccpp"])
def test_cpp_and_python_ranks_train_one_model(tmp_path: Path, order: str) -> None:
    script = tmp_path / "rank.py"
    script.write_text(PYTHON_RANK)
    cpp = [str(PROGRAM), "--gtest_filter=WithPython.*", "--gtest_also_run_disabled_tests", "--gtest_color=no"]
    commands = {"c": cpp, "p": [sys.executable, str(script)]}
    ranks: list[str] = []
    for letter in order:
        ranks += [":", "-np", "1", *commands[letter]] if ranks else ["-np", "1", *commands[letter]]
    variables = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    run = subprocess.run(
        ["mpirun", "--timeout", "80", "--oversubscribe", "--bind-to", "none", *ranks],
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=90,
    )
    assert run.returncode == 0, run.stdout
    assert run.stdout.count("[  PASSED  ] 2 tests") == order.count("c"), run.stdout
