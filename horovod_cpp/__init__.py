"""Collective communication for training on many processes; the successor of Horovod.

``import horovod_cpp.torch as hvd`` is the drop-in for ``horovod.torch``; ``hvdrun`` starts the ranks.
"""

__version__ = "0.1.0"
