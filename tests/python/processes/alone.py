"""Runs two ranks where nobody else makes anything, and prints what there is before, while and after they run, as JSON.

    unshare --mount --net --pid --fork --kill-child --mount-proc python alone.py TEXT SIGNAL

The processes, sockets and network are those of this job alone, and /dev/shm and /tmp are empty. Each rank runs the
Python program TEXT. Once both have said "ready" their input ends, and they get SIGNAL if it is not 0.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

RANKS = 2
FOLDERS = ("/dev/shm", "/tmp")
SIOCSIFFLAGS = 0x8914
IFF_UP = 1


def what_is_there() -> dict[str, list[str]]:
    return {
        "files": sorted(str(path) for folder in FOLDERS for path in Path(folder).rglob("*")),
        # Without the head, and the number in memory of each.
        "sockets": [line.split(maxsplit=1)[1] for line in Path("/proc/net/unix").read_text().splitlines()[1:]],
        "processes": [name for name in sorted(os.listdir("/proc")) if name.isdecimal() and int(name) != os.getpid()],
    }


def loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", IFF_UP))


def start(text: str, rank: int) -> subprocess.Popen[str]:
    variables = {
        "RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",  # nobody else is on this network
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", text]
    return subprocess.Popen(
        command, env=os.environ | variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def reap_orphans() -> None:
    """What a rank has started and then left becomes a child of this process, the first of its namespace."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass


def what_is_left(before: dict[str, list[str]]) -> dict[str, list[str]]:
    """What there is, once it is no more than before, or after 5 s: an orphan may need a moment to end."""
    deadline = time.monotonic() + 5
    while True:
        reap_orphans()
        after = what_is_there()
        if after == before or time.monotonic() > deadline:
            return after
        time.sleep(0.05)


def main(text: str, number: int) -> None:
    for folder in FOLDERS:
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=True)
    loopback_up()
    before = what_is_there()
    ranks = [start(text, rank) for rank in range(RANKS)]
    for rank in ranks:
        assert rank.stdout is not None and rank.stdout.readline() == "ready\n"
    during = what_is_there()
    for rank in ranks:
        if number:
            rank.send_signal(number)
        assert rank.stdin is not None
        rank.stdin.close()
    codes = [rank.wait(30) for rank in ranks]
    print(json.dumps({"codes": codes, "before": before, "during": during, "after": what_is_left(before)}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
