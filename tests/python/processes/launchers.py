"""Runs a program under a launcher, as users do, and returns what it said."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def mpirun(folder: Path, ranks: int, program: str, *options: str, package: Path = ROOT, **environment: str) -> str:
    """mpirun's output, both streams, and its exit code."""
    launcher = ["mpirun", "--timeout", "100", "--oversubscribe", *options]
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return _run(launcher, folder, ranks, program, {"PYTHONPATH": str(package)} | root | environment)


def hvdrun(folder: Path, ranks: int, program: str, **environment: str) -> str:
    """hvdrun's output, both streams, and its exit code."""
    launcher = [sys.executable, "-m", "horovod_cpp.run"]
    return _run(launcher, folder, ranks, program, {"PYTHONPATH": str(ROOT)} | environment)


def _run(launcher: list[str], folder: Path, ranks: int, program: str, environment: dict[str, str]) -> str:
    path = folder / "program.py"
    path.write_text(textwrap.dedent(program))
    run = subprocess.run(
        [*launcher, "-np", str(ranks), sys.executable, str(path)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=110,
    )
    return f"{run.stdout}\nexit code {run.returncode}"
