"""The main job, which scripts/demo runs: trained for a little while under both launchers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
LAUNCHERS = {
    "mpirun": ["mpirun", "--timeout", "100", "--oversubscribe", "--bind-to", "none"],
    "hvdrun": [sys.executable, "-m", "horovod_cpp.run", "--no-tag"],
}
SHORT = ("--epochs", "1", "--steps", "60", "--rounds", "1")
PARAMETERS = 1 * 16 * 9 + 16 + 16 * 32 * 9 + 32 + 32 * 7 * 7 * 128 + 128 + 128 * 10 + 10


@pytest.fixture(params=LAUNCHERS)
def launcher(request: pytest.FixtureRequest) -> list[str]:
    if shutil.which("mpirun") is None and request.param == "mpirun":
        pytest.skip("there is no mpirun")
    return LAUNCHERS[request.param]


def train(launcher: list[str], *options: str) -> tuple[int, str]:
    """The exit code, and what the ranks print on standard output; the progress bars go to the error output."""
    variables = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    program = [sys.executable, str(ROOT / "examples" / "pytorch_fashion_mnist.py")]
    run = subprocess.run(
        [*launcher, "-np", "2", *program, *options],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=110,
    )
    print(run.stdout, run.stderr)  # shown if the test fails
    return run.returncode, run.stdout


def table(output: str) -> dict[str, float]:
    """The rows that the job prints in the end: what is in front, and the number behind it, without its unit."""
    rows = re.findall(r"^(\S.*?) {2,}([\d,.]+)(?:%| s| ms)?$", output, re.MULTILINE)
    assert len(dict(rows)) == len(rows), "one rank alone prints the table, once"
    return {label: float(value.replace(",", "")) for label, value in rows}


def test_the_network_learns_and_the_table_is_complete(launcher: list[str]) -> None:
    code, output = train(launcher, *SHORT, "--expect", "70")
    assert code == 0
    rows = table(output)
    accuracy = rows.pop("test accuracy")
    assert accuracy > 70
    assert re.findall(r"^epoch 1: test accuracy ([\d.]+)%$", output, re.MULTILINE) == [f"{accuracy:.2f}"]
    # The gradients are float32, and a step reduces each once.
    assert rows.pop("bytes reduced a step") == 4 * PARAMETERS
    # 60 steps; in the measurement 11 to warm up, one that counts bytes, and a round of 11; 8 bytes for the accuracy.
    assert rows.pop("bytes reduced by this job") == (60 + 11 + 1 + 11) * 4 * PARAMETERS + 8
    assert rows.keys() == {
        "training",
        "images/s, 1 rank alone",
        "images/s, 2 ranks",
        "images/s, 2 ranks, only a barrier a step",
        "library / only a barrier (median of the rounds)",
        "waiting for communication a step (median)",
    }
    assert min(rows.values()) > 0, rows


def test_it_fails_where_the_accuracy_stays_below_what_is_expected() -> None:
    code, output = train(LAUNCHERS["hvdrun"], "--epochs", "1", "--steps", "5", "--rounds", "0", "--expect", "88")
    assert code == 1
    assert "the test accuracy is below 88 %" in output
