"""Stands for ``horovod.torch.mpi_ops``: everything public of ``horovod_cpp.torch``, and what Horovod has only here."""

from horovod_cpp.compat.basics import HorovodBasics
from horovod_cpp.compat.util import get_average_backwards_compatibility_fun, num_rank_is_power_2
from horovod_cpp.torch import *  # noqa: F403 (the same objects, whatever they are)
from horovod_cpp.torch import __all__ as _public

_basics = HorovodBasics()

handle_average_backwards_compatibility = get_average_backwards_compatibility_fun(_basics)

__all__ = [*_public, "handle_average_backwards_compatibility", "num_rank_is_power_2"]
