"""Stands for ``horovod.common.basics``: the functions of our module of that name, and Horovod's object with them."""

from __future__ import annotations

from typing import Any

from horovod_cpp import _core
from horovod_cpp.common import basics, process_sets


class HorovodBasics:
    """Has as attributes the functions about the job and its process sets, and the reduce operations.

    Horovod makes one for each framework, around the library of that framework; here all are alike.
    """

    Average = _core.AVERAGE
    Sum = _core.SUM
    Adasum = _core.ADASUM
    Min = _core.MIN
    Max = _core.MAX
    Product = _core.PRODUCT

    def __init__(self, pkg_path: str | None = None, *args: str) -> None:
        """Args: as Horovod's, which find its library. Not needed; ignored."""

    def __getattr__(self, name: str) -> Any:
        """A function of `horovod_cpp.common.basics`. AttributeError if it has none of that name."""
        return getattr(basics, name)

    def _get_process_set_ids_and_ranks(self) -> dict[int, list[int]]:
        return process_sets.get_process_set_ids_and_ranks()


def __getattr__(name: str) -> Any:
    """What `horovod_cpp.common.basics` has, the same object. AttributeError if it has nothing of that name."""
    return getattr(basics, name)
