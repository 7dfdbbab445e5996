"""Lets programs that were written for ``horovod.torch`` run on this package as they are.

``python -m horovod_cpp.compat train.py [argument ...]`` runs a script, and ``python -m horovod_cpp.compat -m module
[argument ...]`` a module, in which ``import horovod.torch as hvd`` means ``horovod_cpp.torch``; so does every other
import of Horovod's packages, down to the same module objects, classes and exceptions. `install` does this part alone.

Nothing named ``horovod`` is put on the path, and other programs see no change. A real Horovod that is installed, but
not imported yet, is shadowed: its files are left alone, and the process does not load them. Processes that the program
starts through ``multiprocessing`` follow it; other programs that it starts do not.
"""

from horovod_cpp.compat._finder import HOROVOD_VERSION, install

__all__ = ["HOROVOD_VERSION", "install"]
