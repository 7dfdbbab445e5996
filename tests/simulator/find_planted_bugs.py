#!/usr/bin/env python3
"""Shows that the simulator finds bugs: each patch in planted/ breaks the product in one way, and a run must report it.

Works in a copy of the tree under build/planted. The patches up to 22 come from people who had not read the simulator.
Arguments, if any, choose patches by the beginning of their names.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "planted"
TREE, BUILD = WORK / "tree", WORK / "build"
RUNS = (
    ["--ranks", "2..8", "--seeds", "0..9999"],
    ["--ranks", "64", "--control-only", "--seeds", "0..199"],
)


def run(*command: str | Path, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)


def copy_tree() -> None:
    files = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT, check=True).stdout.split(
        "\n"
    )
    shutil.rmtree(WORK, ignore_errors=True)  # the build too: it may hold a bug of a run that was broken off
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (TREE / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, TREE / name)


def build() -> None:
    launcher = ["-DCMAKE_CXX_COMPILER_LAUNCHER=ccache"] if shutil.which("ccache") else []
    for command in (
        ["cmake", "--preset", "release", "-B", str(BUILD), *launcher],
        ["ninja", "-C", str(BUILD), "simulator"],
    ):
        done = run(*command, cwd=TREE)
        if done.returncode != 0:
            sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


def find() -> str | None:
    """The report of the first invariant that broke; None when all runs passed."""
    for arguments in RUNS:
        done = run(BUILD / "tests" / "simulator" / "simulator", *arguments, timeout=1200)
        if done.returncode != 0:
            return done.stdout + done.stderr
    return None


def main() -> None:
    chosen = tuple(sys.argv[1:]) or ("",)
    patches = [
        path for path in sorted((ROOT / "tests/simulator/planted").glob("*.patch")) if path.name.startswith(chosen)
    ]
    assert patches, "there are no such patches"
    copy_tree()
    build()
    if (report := find()) is not None:
        sys.exit(f"the simulator fails without a planted bug:\n{report}")
    missed = []
    for patch in patches:
        applied = run("patch", "-p1", "-F0", "--no-backup-if-mismatch", "-i", patch, cwd=TREE)
        if applied.returncode != 0:
            sys.exit(f"{patch.name} does not apply any more:\n{applied.stdout}{applied.stderr}")
        build()
        report = find()
        invariant = re.search(r"invariant[: ]+'?([a-z-]+)", report or "")
        if invariant is None:
            missed.append(patch.name)
        seed = re.search(r"seed[: ]+(\d+)", report or "")
        found = f"{invariant[1]}, seed {seed[1] if seed else '?'}" if invariant else "NOT FOUND"
        print(f"{patch.stem:<44} {found}", flush=True)
        run("patch", "-p1", "-R", "--no-backup-if-mismatch", "-i", patch, cwd=TREE, check=True)
    if missed:
        sys.exit(f"{len(missed)} of {len(patches)} planted bugs were not found")
    print(f"all {len(patches)} planted bugs were found")


if __name__ == "__main__":
    main()
