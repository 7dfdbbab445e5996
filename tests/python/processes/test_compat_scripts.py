"""Programs written for Horovod, started as they are by `mpirun ... python -m horovod_cpp.compat`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.skipif(shutil.which("mpirun") is None, reason="there is no mpirun")


def mpirun(folder: Path, ranks: int, *arguments: str) -> tuple[int, str]:
    """Exit code and output of `python -m horovod_cpp.compat` with these arguments on each rank."""
    variables = {"PYTHONPATH": str(ROOT), "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    launcher = ["mpirun", "--timeout", "90", "--oversubscribe", "--bind-to", "none", "--tag-output", "-np", str(ranks)]
    run = subprocess.run(
        [*launcher, sys.executable, "-m", "horovod_cpp.compat", *arguments],
        cwd=folder,
        env=os.environ | variables | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    return run.returncode, run.stdout


TRAIN = """
    import argparse

    import torch
    import torch.nn.functional as F
    import torch.utils.data.distributed

    import horovod
    import horovod.torch as hvd

    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--use-adasum", action="store_true", default=False)
    args = parser.parse_args()

    hvd.init()
    torch.manual_seed(42 + hvd.rank())  # not alike: the broadcast has to do it
    torch.set_num_threads(1)

    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(256, 8, generator=generator)
    targets = (inputs @ torch.randn(8, 1, generator=generator) > 0).float()
    dataset = torch.utils.data.TensorDataset(inputs, targets)
    sampler = torch.utils.data.distributed.DistributedSampler(dataset, num_replicas=hvd.size(), rank=hvd.rank())
    loader = torch.utils.data.DataLoader(dataset, batch_size=16, sampler=sampler)

    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
    lr_scaler = hvd.size() if not args.use_adasum else 1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05 * lr_scaler, momentum=0.9)
    if hvd.rank() == 0:  # as after a checkpoint: only the root has state
        F.binary_cross_entropy_with_logits(model(inputs[:16]), targets[:16]).backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.125
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    optimizer = hvd.DistributedOptimizer(
        optimizer,
        named_parameters=model.named_parameters(),
        compression=hvd.Compression.none,
        op=hvd.Adasum if args.use_adasum else hvd.Average,
        gradient_predivide_factor=1.0,
    )

    def metric_average(val, name):
        tensor = torch.tensor(val)
        avg_tensor = hvd.allreduce(tensor, name=name)
        return avg_tensor.item()

    def test():
        model.eval()
        with torch.no_grad():
            output = model(inputs)
            loss = F.binary_cross_entropy_with_logits(output, targets).item()
            accuracy = ((output > 0) == (targets > 0)).float().mean().item()
        return metric_average(loss, "avg_loss"), metric_average(accuracy, "avg_accuracy")

    first_loss, _ = test()
    for epoch in range(args.epochs):
        model.train()
        sampler.set_epoch(epoch)
        for data, target in loader:
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(model(data), target).backward()
            optimizer.step()
    loss, accuracy = test()

    parameters = torch.cat([p.detach().flatten() for p in model.parameters()])
    gathered = hvd.allgather(parameters.unsqueeze(0), name="parameters")
    alike = bool((gathered == gathered[0]).all())
    learning_rates = hvd.allgather_object(optimizer.param_groups[0]["lr"])
    print(f"rank {hvd.rank()} of {hvd.size()}: learned={loss < first_loss / 2 and accuracy > 0.9} alike={alike} "
          f"learning rates={learning_rates} version={horovod.__version__}")
"""


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_training_script(tmp_path: Path, ranks: int) -> None:
    (tmp_path / "train.py").write_text(textwrap.dedent(TRAIN))
    # As many steps with any number of ranks.
    status, output = mpirun(tmp_path, ranks, "train.py", "--epochs", str(2 * ranks))
    assert status == 0, output
    for rank in range(ranks):
        place, rates = f"rank {rank} of {ranks}", [0.125] * ranks
        said = f"{place}: learned=True alike=True learning rates={rates} version=0.28.1+horovod_cpp."
        assert said in output, output


TESTS = """
    import os
    import unittest

    import pytest
    import torch

    import horovod.torch as hvd
    from horovod.common.exceptions import HorovodInternalError
    from horovod.common.util import env, split_list
    from horovod.runner.common.util.env import get_env_rank_and_size


    class TorchTests(unittest.TestCase):
        @classmethod
        def setUpClass(cls):
            hvd.init()

        def test_rank_and_size(self):
            self.assertEqual(get_env_rank_and_size(), (hvd.rank(), hvd.size()))
            self.assertEqual(hvd.size(), int(os.environ["EXPECTED_SIZE"]))

        def test_allreduce_async_fused(self):
            handles = [hvd.allreduce_async(torch.ones(17) * i, op=hvd.Sum) for i in range(20)]
            for i, handle in enumerate(handles):
                assert (hvd.synchronize(handle) == hvd.size() * i).all()

        def test_error(self):
            if hvd.size() == 1:
                self.skipTest("Only one worker available")
            try:
                hvd.allreduce(torch.ones(17 + hvd.rank()))
                assert False, "hvd.allreduce did not throw error"
            except (HorovodInternalError, RuntimeError):
                pass

        def test_gradient(self):
            tensor = torch.ones(5, requires_grad=True)
            hvd.allreduce(tensor, op=hvd.Sum).backward(torch.ones(5))
            assert tensor.grad.tolist() == [hvd.size()] * 5


    @pytest.mark.parametrize("name", ["a", "b"])
    def test_parametrized(name, tmp_path):
        hvd.init()
        with env(HOROVOD_SOMETHING=name):
            gathered = hvd.mpi_ops.allgather(torch.tensor([[float(hvd.rank())]]), name=name)
        assert split_list(gathered.flatten().tolist(), hvd.size()) == [[float(rank)] for rank in range(hvd.size())]
"""


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_file_of_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    (tmp_path / "test_torch.py").write_text(textwrap.dedent(TESTS))
    monkeypatch.setenv("EXPECTED_SIZE", str(ranks))
    pytest_arguments = ("-q", "--color=no", "-p", "no:cacheprovider")
    status, output = mpirun(tmp_path, ranks, "-m", "pytest", *pytest_arguments, "test_torch.py")
    assert status == 0, output
    assert output.count("5 passed, 1 skipped" if ranks == 1 else "6 passed") == ranks, output


def test_a_test_that_fails_fails_the_job(tmp_path: Path) -> None:
    (tmp_path / "test_torch.py").write_text(
        textwrap.dedent("""
        import horovod.torch as hvd

        def test_wrong():
            hvd.init()
            assert hvd.size() == 17
        """)
    )
    status, output = mpirun(tmp_path, 2, "-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider", "test_torch.py")
    assert status == 1, output
    assert "1 failed" in output and "assert 2 == 17" in output, output
