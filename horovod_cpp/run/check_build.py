"""What this build has, and what it finds on this machine: ``hvdrun --check-build``, ``python -m horovod_cpp``.

The titles, and the lines up to a colon, are those of ``horovodrun --check-build`` where both have them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import horovod_cpp


class CheckBuild(argparse.Action):
    """An option that prints the table and ends the program with 0."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(table())
        parser.exit()


def table() -> str:
    """Opens what a job would open: takes some seconds, mostly for torch."""
    torch = _row("PyTorch", _torch)  # first, so that NCCL is the one that torch has loaded, as in a job

    from horovod_cpp import _core

    mpi = _row("MPI", lambda: _first_words(_core.mpi_text()))
    return "\n".join([
        f"horovod_cpp v{horovod_cpp.__version__}:",
        "",
        "Available Frameworks:",
        torch,
        "",
        "Available Controllers:",
        mpi,
        _row("hvdrun, torchrun"),
        "",
        "Available Tensor Operations:",
        _row("shm"),
        _row("tcp"),
        mpi.partition(":")[0],
        _row("CUDA", lambda: f"{_core.cuda_text()}, devices: {_core.cuda_devices()}"),
        _row("NCCL", lambda: _nccl(_core.cuda_built(), _core.nccl_text())),
    ])  # fmt: skip


def _torch() -> str:
    import torch

    return torch.__version__


def _nccl(with_cuda: bool, text: str) -> str:
    if not with_cuda:
        raise LookupError(f"{text}: of no use without the CUDA module")
    return text


def _row(name: str, question: Callable[[], str] | None = None) -> str:
    """`question` answers what is there, or raises why it is not."""
    if question is None:
        return f"    [X] {name}"
    try:
        return f"    [X] {name}: {question()}"
    except Exception as error:  # a broken torch raises anything
        return f"    [ ] {name}: {' '.join(str(error).split())}"


def _first_words(text: str) -> str:
    """Name and version of an MPI, which says more in more lines."""
    return text.partition("\n")[0].partition(",")[0].strip()
