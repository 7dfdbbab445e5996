"""The example in C++ that is built with the tests; test_cpp_package.py and test_wheel.py build the others."""

from __future__ import annotations

import math
import re
import shutil
import sys
from pathlib import Path

import pytest
from cpp_projects import ROOT, run

PROGRAM = ROOT / "build" / "release" / "tests" / "torch" / "char_language_model"
RATE = 0.004

pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason="built without LibTorch")


def mpirun(ranks: int) -> list[str]:
    if shutil.which("mpirun") is None:
        pytest.skip("there is no mpirun")
    return ["mpirun", "--timeout", "80", "--oversubscribe", "--bind-to", "none", "-np", str(ranks)]


def hvdrun(ranks: int) -> list[str]:
    return [sys.executable, "-m", "horovod_cpp.run", "-np", str(ranks)]


def train(launcher: list[str], steps: int, *options: str | Path) -> str:
    return run(*launcher, PROGRAM, "--hidden", "64", "--steps", str(steps), *options)


def result(output: str, steps: int) -> list[float]:
    found = re.findall(rf"result: (\d\.\d+) bits per character before, (\d\.\d+) after {steps} steps", output)
    assert len(found) == 1, "rank 0 alone prints the result:\n" + output
    return [float(bits) for bits in found[0]]


def test_two_ranks_learn_what_one_learns_from_a_batch_of_both() -> None:
    two = train(mpirun(2), 40)
    before, after = result(two, 40)
    assert 6 < before < 7, "an untrained network takes each of about a hundred characters to be as likely"
    assert after < 4.3, two
    written = two[two.index("it writes: ") : two.index("result: ")]
    assert len(written) > 300 and len(set(written)) > 15, two
    assert "40/40 steps" in two, "there is no progress bar"

    one = train(mpirun(1), 40, "--batch-size", "32", "--learning-rate", str(RATE * math.sqrt(2)))
    assert result(one, 40) == pytest.approx([before, after], abs=0.005)
    # The example's result depends on the batch and the rate, so the ones above are not the same whatever they read.
    assert result(train(mpirun(1), 40), 40)[1] != pytest.approx(after, abs=0.02)


def test_a_run_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    checkpoint = ("--checkpoint", tmp_path / "writer.pt")
    first = train(hvdrun(2), 10, *checkpoint)
    assert "resumes" not in first
    resumed = train(hvdrun(2), 20, *checkpoint)
    assert f"resumes after step 10 of {tmp_path / 'writer.pt'}" in resumed
    assert " 11/20 steps" in resumed and " 10/20 steps" not in resumed, "it began anew:\n" + resumed
    # Weights, Adam's averages and the places that are read are those of a run that was not interrupted.
    assert result(resumed, 20) == result(train(hvdrun(2), 20), 20)
    assert result(resumed, 20)[1] < result(first, 10)[1]


def test_a_checkpoint_of_another_text_is_refused(tmp_path: Path) -> None:
    checkpoint = ("--checkpoint", tmp_path / "writer.pt")
    train(hvdrun(2), 1, *checkpoint)
    (tmp_path / "text").write_text("What is written here has fewer characters.\n" * 100)
    for options in (("--text", tmp_path / "text"), ("--hidden", "32")):
        output = run(*hvdrun(2), PROGRAM, "--hidden", "64", "--steps", "2", *checkpoint, *options, fails=True)
        assert "the checkpoint is of a text with other characters, or of another --hidden" in output, output


def test_what_is_not_known_is_refused() -> None:
    output = run(PROGRAM, "--step", "3", fails=True)
    assert "--step does not go" in output and "--steps" in output, output
