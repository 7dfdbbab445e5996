"""Each example, run as a user would, with little to do. What it prints at the end must be so."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.skipif(shutil.which("mpirun") is None, reason="there is no mpirun")


def run_example(name: str, *arguments: str | Path, ranks: int = 2) -> str:
    """What the ranks print. The progress bars go to the error output, which is shown if the example fails."""
    variables = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    command = ["mpirun", "--timeout", "80", "--oversubscribe", "--bind-to", "none", "-np", str(ranks), sys.executable]
    run = subprocess.run(
        [*command, str(ROOT / "examples" / f"{name}.py"), *map(str, arguments)],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("result: ") == 1, "rank 0 alone prints the result:\n" + run.stdout
    return run.stdout


def numbers(pattern: str, output: str) -> list[float]:
    """The numbers in the place of each # of the pattern, which is otherwise literal."""
    match = re.search(re.escape(pattern).replace(r"\#", r"(\d[\d,]*(?:\.\d+)?(?:e-?\d+)?)"), output)
    assert match, f"there is no {pattern!r} in:\n{output}"
    return [float(number.replace(",", "")) for number in match.groups()]


def bytes_sent(output: str) -> float:
    return numbers("rank 0 sent # bytes", output)[0]


IMAGENET = ("pytorch_imagenet_style", "--epochs", "2", "--steps", "20")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def two_epochs(checkpoints: Path) -> str:
    return run_example(*IMAGENET, "--checkpoints", checkpoints)


def test_imagenet_style_learns(two_epochs: str) -> None:
    first_loss, _ = numbers("after epoch 1: train loss #, test accuracy #%", two_epochs)
    second_loss, accuracy = numbers("after epoch 2: train loss #, test accuracy #%", two_epochs)
    assert second_loss < first_loss - 0.2, two_epochs
    assert accuracy > 35, two_epochs
    assert numbers("result: test accuracy #% after epoch 2", two_epochs) == [accuracy]


def test_imagenet_style_resumes_as_if_it_had_never_stopped(two_epochs: str, checkpoints: Path, tmp_path: Path) -> None:
    shutil.copy(checkpoints / "after-epoch-1.pt", tmp_path)
    resumed = run_example(*IMAGENET, "--checkpoints", tmp_path)
    assert f"resumes from {tmp_path / 'after-epoch-1.pt'}" in resumed
    assert "after epoch 1: train loss" not in resumed, "the first epoch was done again:\n" + resumed
    # Weights, momentum, learning rate and order of the images are those of the run that was not interrupted.
    for pattern in ("after epoch 2: train loss #, test accuracy #%", "result: test accuracy #%"):
        assert numbers(pattern, resumed) == numbers(pattern, two_epochs)
    assert (tmp_path / "after-epoch-2.pt").exists()


def test_imagenet_style_with_fp16_sends_half_the_bytes(two_epochs: str) -> None:
    output = run_example(*IMAGENET, "--fp16-allreduce")
    assert 0.45 < bytes_sent(output) / bytes_sent(two_epochs) < 0.6, output
    assert numbers("after epoch 2: train loss #", output)[0] == pytest.approx(
        numbers("after epoch 2: train loss #", two_epochs)[0], abs=0.1
    )


def test_char_language_model() -> None:
    output = run_example("pytorch_char_language_model", "--steps", "50", "--hidden", "96")
    before, after = numbers("result: # bits per character before, # after 50 steps", output)
    assert 6 < before < 7, "an untrained network takes each of about a hundred characters to be as likely"
    assert after < 4.5, output
    written = output[output.index("it writes: ") : output.index("rank 0 sent")]
    assert len(written) > 300 and len(set(written)) > 15, output
    # The gradients are 0.22 MB. More would mean that step() reduces again what synchronize() has reduced.
    assert 50 * 200_000 < bytes_sent(output) < 50 * 300_000, output


def test_gan(tmp_path: Path) -> None:
    output = run_example("pytorch_gan", "--steps", "40", "--output", tmp_path / "pictures.png")
    before, after = numbers("result: distance to unseen real pictures # before, # after 40 steps", output)
    assert after < 0.75 * before, output
    # The gradients of both networks are 1.09 MB, each of which travels once a step; the rest takes less than 8 MB.
    assert 40 * 1_090_000 < bytes_sent(output) < 40 * 1_100_000 + 8_000_000, output
    grid = matplotlib.image.imread(tmp_path / "pictures.png")
    assert grid.shape[:2] == (8 * 28, 8 * 28)
    pictures = grid[:, :, 0].reshape(8, 28, 8, 28).transpose(0, 2, 1, 3).reshape(64, 28 * 28)
    assert pictures.std(axis=1).min() > 0.05, "a picture is blank"
    assert len(np.unique(pictures, axis=0)) == 64, "pictures are the same"


def test_sparse_embeddings() -> None:
    output = run_example("pytorch_sparse_embeddings", "--steps", "150")
    before, after = numbers("result: test loss # before, # after 150 steps", output)
    assert after < before - 0.3, output
    assert numbers("the vectors of both ways differ by at most #", output)[0] < 1e-4
    sparse, dense = numbers("bytes that rank 0 sent a step: # sparse, # dense", output)
    words = numbers("# words", output)[0]
    assert dense >= 2 * words * 64 * 4, "less than two tables of 64 float32 a word"
    assert 0 < sparse < dense / 5, output


@pytest.mark.parametrize("ranks", [2, 4])
def test_process_sets(ranks: int) -> None:
    output = run_example("pytorch_process_sets", "--steps", "100", ranks=ranks)
    in_halves, together = numbers("result: test accuracy #% in halves, #% put together on rank 0", output)
    assert in_halves > 65, output
    # Each pair has tested a part of the images, rank 0 all with the network of its pair. The halves' logits are added
    # up in another order, which may change the last bit, and so, rarely, an answer.
    assert in_halves == pytest.approx(together, abs=0.05), output
