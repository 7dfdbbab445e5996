"""Starts the ranks of a job on this machine: ``hvdrun -np 2 python train.py`` or ``python -m horovod_cpp.run``."""

from horovod_cpp.run.command import main

__all__ = ["main"]
