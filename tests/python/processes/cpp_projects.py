"""C++ projects of users, configured and built as they would."""

from __future__ import annotations

import faulthandler
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = ROOT / "examples"


def run(*command: str | Path, fails: bool = False, alone: bool = False, limit_s: int = 300, **variables: str) -> str:
    """What it prints. `alone`: nothing leads to the source tree."""
    left_out = ("CPATH", "PYTHONPATH", "LD_LIBRARY_PATH") if alone else ("CPATH",)
    done = subprocess.run(
        [str(word) for word in command],
        cwd="/" if alone else None,
        env={name: value for name, value in os.environ.items() if name not in left_out} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=limit_s,
    )
    assert (done.returncode != 0) == fails, done.stdout
    return done.stdout


def copied(example: str, folder: Path) -> Path:
    return Path(shutil.copytree(EXAMPLES / example, folder / example))


def configure(project: Path, *options: str, fails: bool = False, alone: bool = False, **variables: str) -> str:
    """What CMake says, without its line breaks."""
    output = run("cmake", "-S", project, "-B", project / "build", *options, fails=fails, alone=alone, **variables)
    return " ".join(output.split())


def build(project: Path, *targets: str) -> Path:
    # Compiling LibTorch programs may take longer than a test otherwise may; `run` has a limit of its own.
    faulthandler.cancel_dump_traceback_later()
    chosen = ["--target", *targets] if targets else []
    run("cmake", "--build", project / "build", "-j", "2", *chosen, limit_s=1500)
    return project / "build"


HVDRUN = (sys.executable, "-m", "horovod_cpp.run", "-np", "2")
Command = tuple[str | Path, ...]


def check_mean(program: Path, launcher: Command = HVDRUN, alone: bool = False) -> None:
    output = run(*launcher, program, alone=alone)
    assert output.count("of 2: mean 0.5") == 2, output


def check_fashion_mnist(program: Path, launcher: Command = HVDRUN, alone: bool = False, **variables: str) -> None:
    output = run(*launcher, program, "1", "6400", alone=alone, **variables)
    accuracy = re.findall(r"test accuracy (\d+\.\d) %", output)
    assert len(accuracy) == 1 and float(accuracy[0]) > 60, output
