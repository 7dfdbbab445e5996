"""However a job ends, no file, socket or process of it stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
UNSHARE = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
if os.geteuid() != 0:
    UNSHARE += ["--user", "--map-root-user"]


@pytest.fixture(scope="module", autouse=True)
def namespaces() -> None:
    """A /tmp that others write to, too, would say nothing."""
    for place in (ROOT, Path(sys.prefix)):
        if place.is_relative_to("/tmp"):
            pytest.skip(f"{place} cannot be reached in a job that has a /tmp of its own")
    tried = subprocess.run([*UNSHARE, "mount", "-t", "tmpfs", "tmpfs", "/tmp"], capture_output=True, text=True)
    if tried.returncode != 0:
        pytest.skip(f"a job cannot have a /tmp and a network of its own here: {tried.stderr.strip()}")


def run(text: str, number: int = 0, **environment: str) -> dict[str, Any]:
    """What alone.py prints of a job whose ranks run `text`."""
    done = subprocess.run(
        [*UNSHARE, sys.executable, str(Path(__file__).with_name("alone.py")), textwrap.dedent(text), str(number)],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


# With numpy, as torch is three times as long to import. In the end rank 0 waits for an operation that rank 1 never
# asks for, if the job is to be ended by a signal.
AT_WORK = """
import os, sys
import numpy as np
import horovod_cpp.arrays as hvd
hvd.init()
for n in (1, 100_000, 2_000_000):
    assert hvd.allreduce(np.ones(n, np.float32), name=f"of {{n}}", op=hvd.Sum)[-1] == 2
print("ready", flush=True)
if {waits} and hvd.rank() == 0:
    hvd.allreduce(np.ones(4), name="waited")
sys.stdin.read()
{end}
"""


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize(
    ("end", "number", "code"),
    [
        ("", 0, 0),
        ("raise RuntimeError('an error of the program')", 0, 1),
        ("os._exit(3)", 0, 3),
        ("", signal.SIGTERM, -signal.SIGTERM),
        ("", signal.SIGKILL, -signal.SIGKILL),
    ],
    ids=["exit", "exception", "exit without shutdown", "SIGTERM", "SIGKILL"],
)
def test_nothing_is_left_behind(transport: str, end: str, number: int, code: int) -> None:
    seen = run(AT_WORK.format(waits=bool(number), end=end), number, HOROVOD_TRANSPORT=transport)
    assert seen["codes"] == [code, code]
    assert len(seen["during"]["processes"]) == 2
    assert seen["during"]["files"] == [], "also a file that is removed in the end would stay where a rank is killed"
    assert seen["after"] == seen["before"]


def test_what_is_left_behind_is_seen() -> None:
    """Or the test above would say nothing."""
    seen = run("""
        import os, socket, subprocess, sys
        rank = os.environ["RANK"]
        for folder in ("/dev/shm", "/tmp"):
            open(f"{folder}/of rank {rank}", "w").close()
        listener = socket.socket(socket.AF_UNIX)
        listener.bind("\\0of rank " + rank)
        listener.listen()
        silent = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.Popen(["sleep", "100"], pass_fds=[listener.fileno()], start_new_session=True, **silent)
        print("ready", flush=True)
        """)  # fmt: skip
    assert seen["after"]["files"] == [f"{folder}/of rank {rank}" for folder in ("/dev/shm", "/tmp") for rank in "01"]
    assert sorted(line.split()[-1] for line in seen["after"]["sockets"]) == ["0", "1"]
    assert len(seen["after"]["processes"]) == 2
