"""C++ and Python ranks train one model, in one job or in two; their other half is in tests/torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = ROOT / "build" / "release" / "tests" / "torch" / "torch_test"

pytestmark = [
    pytest.mark.skipif(shutil.which("mpirun") is None, reason="there is no mpirun"),
    pytest.mark.skipif(not PROGRAM.exists(), reason="built without LibTorch"),
]

# The same optimizers and steps as on the C++ ranks.
PREAMBLE = """
import copy
import sys
import torch
from torch import nn, optim
import horovod_cpp.torch as hvd

torch.set_num_threads(1)
hvd.init(process_sets="dynamic")


def make_model():
    torch.manual_seed(100 + hvd.rank())
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def train(model, optimizer, inputs, targets):
    for _ in range(12):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()


def train_shard(model, inner, inputs, targets):
    optimizer = hvd.DistributedOptimizer(inner, named_parameters=model.named_parameters())
    train(model, optimizer, inputs.chunk(hvd.size())[hvd.rank()], targets.chunk(hvd.size())[hvd.rank()])


optimizers = (
    lambda parameters: optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=0.01),
    lambda parameters: optim.Adam(parameters, 0.05),
    lambda parameters: optim.AdamW(parameters, 0.05),
    lambda parameters: optim.RMSprop(parameters, 0.01, momentum=0.5),
    lambda parameters: optim.Adagrad(parameters, 0.1),
)
"""

# A seed gives the same numbers in C++.
ONE_MODEL = """
torch.manual_seed(17)
inputs = torch.randn(24, 6, dtype=torch.float64)
targets = torch.randn(24, 3, dtype=torch.float64)
for make in optimizers:
    model = make_model()
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    alone = copy.deepcopy(model)
    train(alone, make(alone.parameters()), inputs, targets)
    train_shard(model, make(model.parameters()), inputs, targets)
    for here, there in zip(alone.parameters(), model.parameters(), strict=True):
        assert (here - there).abs().max() < 1e-9
hvd.barrier()
"""

ONE_BATCH = """
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

CUT_ALIKE = """
shapes = [(5,), (1000, 1000), (4, 3, 2, 2), (1100, 1000), (0, 3), (300, 2), (700, 300), ()]
parameters = [torch.ones(shape, dtype=torch.float32 if shape == (300, 2) else torch.float64) for shape in shapes]
parameters[2] = parameters[2].contiguous(memory_format=torch.channels_last)
named = [(f"p{index}", nn.Parameter(parameter)) for index, parameter in enumerate(parameters)]
optimizer = hvd.DistributedOptimizer(
    optim.SGD([parameter for _, parameter in named], 0.1), named, op=hvd.Sum, gradient_as_bucket_view=True
)
for _ in range(2):
    optimizer.zero_grad()
    hvd.barrier()
    (sum(parameter.sum().double() for _, parameter in named) * (hvd.rank() + 1)).backward()
    optimizer.synchronize()
    wanted = hvd.size() * (hvd.size() + 1) / 2
    assert all(torch.equal(parameter.grad, torch.full_like(parameter, wanted)) for _, parameter in named)
hvd.barrier()
"""

FROZEN = """
def make_parameters():
    return [nn.Parameter(torch.ones(3, dtype=torch.float64), requires_grad=index > 1) for index in range(6)]


def train_frozen(parameters, optimizer, factor):
    for step in range(5):
        parameters[1].requires_grad_(step >= 2)
        parameters[0].requires_grad_(step >= 3)
        parameters[2].requires_grad_(step < 1 or step > 2)
        still = parameters[2].detach().clone()
        optimizer.zero_grad()
        sum(parameter.sum() * (index + 1.0) * factor for index, parameter in enumerate(parameters)).backward()
        optimizer.step()
        assert torch.equal(parameters[2], still) == (step in (1, 2))


def moving(parameters):
    return optim.SGD(parameters, 0.125, momentum=0.5, weight_decay=0.25)


alone = make_parameters()
train_frozen(alone, moving(alone), hvd.size() * (hvd.size() + 1) / 2)
views = {"gradient_as_bucket_view": True}
for options in ({}, {"groups": 2}, views, {"groups": 2} | views, {"op": hvd.Adasum}):
    parameters = make_parameters()
    named = [(f"p{index}", parameter) for index, parameter in enumerate(parameters)]
    train_frozen(
        parameters, hvd.DistributedOptimizer(moving(parameters), named, **{"op": hvd.Sum} | options), hvd.rank() + 1
    )
    if "op" in options:
        alone = [hvd.broadcast(parameter.detach(), 0) for parameter in parameters]
    assert all(map(torch.allclose, parameters, alone)), (options, parameters, alone)

total = hvd.size() * (hvd.size() + 1) / 2
for options in ({}, {"groups": 2}, views, {"groups": 2} | views, {"op": hvd.Adasum}):
    adasum = "op" in options
    parameters = [nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2)]
    named = [(f"p{index}", parameter) for index, parameter in enumerate(parameters)]
    optimizer = hvd.DistributedOptimizer(moving(parameters), named, **{"op": hvd.Sum} | options)
    alone = hvd.rank() == (0 if adasum else hvd.size() - 1)  # it freezes before the others
    for step in range(6 if adasum else 8):
        parameters[1].requires_grad_(step < (1 if alone else 3) or step > (4 if adasum else 5))
        before = parameters[1].detach().clone()
        optimizer.zero_grad()
        (sum(parameter.sum() for parameter in parameters) * (hvd.rank() + 1.0)).backward()
        optimizer.step()
        if adasum:
            assert torch.equal(parameters[1], before) == (step in (3, 4))
            for parameter in parameters:
                assert torch.equal(hvd.broadcast(parameter.detach(), 0), parameter)
        elif step in (3, 4, 5):
            assert parameters[1].grad is None and torch.equal(parameters[1], before)
        else:
            expected = total - hvd.size() if step in (1, 2) else total
            assert torch.equal(parameters[1].grad, torch.full_like(parameters[1], expected)), step
hvd.barrier()
"""

SPARSE = """
import re

rank, ranks = hvd.rank(), hvd.size()


def entry(index, shape, dtype):
    return torch.sparse_coo_tensor([[index]], torch.ones((1, *shape[1:]), dtype=dtype), shape, check_invariants=True)


total = torch.tensor([[(ranks + 1) // 2], [ranks // 2], [0]]).expand(3, 2)
for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.complex128):
    got = hvd.sparse_allreduce_async(entry(rank % 2, (3, 2), dtype), "sum", hvd.Sum)()
    assert got.dtype == dtype and torch.equal(got.to_dense(), total.to(dtype)), got
mean = hvd.sparse_allreduce_async(entry(rank % 2, (3, 2), torch.float64), "mean", hvd.Average)()
assert torch.allclose(mean.to_dense(), total.double() / ranks), mean
embedder = nn.ModuleDict({"words": nn.Embedding(30, 4, sparse=True), "rare": nn.Embedding(10, 4, sparse=True)}).double()
named = [(f"embedder.{name}", embedding.weight) for name, embedding in embedder.items()]
optimizer = hvd.DistributedOptimizer(optim.SGD([weight for _, weight in named], 0.1), named, op=hvd.Sum)
for all_use_rare in (True, False):
    optimizer.zero_grad()
    used = embedder.values() if all_use_rare or rank > 0 else [embedder["words"]]
    sum(embedding(torch.arange(4)).sum() for embedding in used).backward()
    optimizer.synchronize()
    for embedding, count in ((embedder["words"], ranks), (embedder["rare"], ranks if all_use_rare else ranks - 1)):
        grad = embedding.weight.grad
        assert grad.is_sparse and torch.equal(grad.to_dense()[:4], torch.full((4, 4), float(count)).double()), grad
mine = (entry(0, (3,), torch.float16), hvd.Sum) if rank == 0 else (entry(0, (4, 2), torch.bool), hvd.Average)
try:
    hvd.sparse_allreduce_async(mine[0], "parted", mine[1])()
    text = ""
except hvd.HorovodInternalError as error:
    text = str(error)
site = r"\\([^()]+:\\d+(, [^()]+:\\d+)?\\)"
assert re.fullmatch(
    "sparse allreduce 'parted': "
    rf"mismatched data type: float16: rank 0 {site}; bool: ranks? [1-3-]+ {site}; "
    rf"mismatched shape: \\[3\\]: rank 0 {site}; \\[4, 2\\]: ranks? [1-3-]+ {site}; "
    rf"mismatched reduction: Sum: rank 0 {site}; Average: ranks? [1-3-]+ {site}",
    text,
), text
hvd.barrier()
"""

WEIGHTS_OF_A_FILE = """
start = torch.load("start.pt")
inputs, targets = start.pop("inputs"), start.pop("targets")
results = []
for make in optimizers:
    model = make_model()
    model.load_state_dict(start)
    train_shard(model, make(model.parameters()), inputs, targets)
    results += [parameter.detach() for parameter in model.parameters()]
torch.save(results, f"end.{hvd.rank()}.pt")
hvd.barrier()
"""


def run_job(folder: Path, order: str, test: str, script: str) -> None:
    """One rank for each letter: c runs the C++ test, p the Python script, in that folder."""
    (folder / "rank.py").write_text(PREAMBLE + script)
    cpp = [str(PROGRAM), f"--gtest_filter=WithPython.DISABLED_{test}", "--gtest_also_run_disabled_tests"]
    commands = {"c": [*cpp, "--gtest_color=no"], "p": [sys.executable, str(folder / "rank.py")]}
    ranks: list[str] = []
    for letter in order:
        ranks += [":", "-np", "1", *commands[letter]] if ranks else ["-np", "1", *commands[letter]]
    variables = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HOROVOD_START_TIMEOUT": "60",  # loading torch four times may take long on a busy machine
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "TEST_TMPDIR": str(folder),  # GoogleTest's
    }
    run = subprocess.run(
        ["mpirun", "--timeout", "100", "--oversubscribe", "--bind-to", "none", *ranks],
        cwd=folder,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=110,
    )
    assert run.returncode == 0, run.stdout
    assert run.stdout.count("[  PASSED  ] 1 test") == order.count("c"), run.stdout


@pytest.mark.parametrize("order", ["cp", "pc", "ccpp"])
def test_cpp_and_python_ranks_train_one_model(tmp_path: Path, order: str) -> None:
    run_job(tmp_path, order, "OneModelIsTrained", ONE_MODEL)


@pytest.mark.parametrize("order", ["cp", "pc"])
def test_cpp_and_python_ranks_normalise_one_batch(tmp_path: Path, order: str) -> None:
    run_job(tmp_path, order, "OneBatchIsNormalised", ONE_BATCH)


@pytest.mark.parametrize("order", ["cp", "pc"])
def test_cpp_and_python_ranks_cut_gradients_into_the_same_buckets(tmp_path: Path, order: str) -> None:
    run_job(tmp_path, order, "BucketsAreCutAlike", CUT_ALIKE)


@pytest.mark.parametrize("order", ["cp", "pc"])
def test_cpp_and_python_ranks_freeze_and_unfreeze_parameters(tmp_path: Path, order: str) -> None:
    run_job(tmp_path, order, "ParametersAreFrozenAndUnfrozen", FROZEN)


@pytest.mark.parametrize("order", ["cp", "pc", "ccpp"])
def test_cpp_and_python_ranks_add_up_sparse_tensors(tmp_path: Path, order: str) -> None:
    run_job(tmp_path, order, "SparseTensorsAreAddedUp", SPARSE)


Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def beginning() -> Tensors:
    """Weights, which no seed of the ranks gives, and data."""
    torch.manual_seed(5)
    weights = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double().state_dict()
    data = {"inputs": torch.randn(24, 6, dtype=torch.float64), "targets": torch.randn(24, 3, dtype=torch.float64)}
    return dict(weights) | data


def trained(beginning: Tensors, folder: Path, order: str) -> list[list[torch.Tensor]]:
    """The weights that each rank of the job ends with, of one optimizer after the other."""
    folder.mkdir()
    torch.save(beginning, folder / "start.pt")
    run_job(folder, order, "TheWeightsOfAFileAreTrained", WEIGHTS_OF_A_FILE)
    # C++ writes a list as a type of its own, which is not among those that torch.load reads unasked.
    return [torch.load(folder / f"end.{rank}.pt", weights_only=False) for rank in range(len(order))]


def distance(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    return max(float((here - there).abs().max()) for here, there in zip(some, others, strict=True))


def test_cpp_and_python_jobs_end_with_the_same_weights(beginning: Tensors, tmp_path: Path) -> None:
    python, other_python = trained(beginning, tmp_path / "python", "pp")
    began = [weights for name, weights in beginning.items() if name not in ("inputs", "targets")]
    assert all((end - begin).abs().max() > 1e-3 for end, begin in zip(python, 5 * began, strict=True))
    cpp, other_cpp = trained(beginning, tmp_path / "cpp", "cc")
    assert distance(python, other_python) == distance(cpp, other_cpp) == 0, "the ranks of a job have parted"
    assert distance(python, cpp) < 1e-9
    # Here the ranks, too, differ by what torch's optimizers in C++ and in Python round differently.
    for end in trained(beginning, tmp_path / "mixed", "cp"):
        assert distance(python, end) < 1e-9
