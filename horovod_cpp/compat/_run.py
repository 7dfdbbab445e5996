"""Runs a script or a module as Python itself would, after `install`."""

from __future__ import annotations

import builtins
import io
import os
import runpy
import sys
import zipfile
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from types import ModuleType

from horovod_cpp.compat._children import follow_into_children
from horovod_cpp.compat._finder import install

USAGE = """\
usage: python -m horovod_cpp.compat script.py [argument ...]
       python -m horovod_cpp.compat -m module [argument ...]

Runs a program that was written for horovod.torch on horovod_cpp. Under a launcher:
       mpirun -np 4 python -m horovod_cpp.compat train.py
"""


def main(arguments: Sequence[str]) -> None:
    """Run the program that the arguments name. What it raises comes out. Changes sys.argv, sys.path and `__main__`.

    Raises: SystemExit for a wrong command line and a file that cannot be opened (2), and after help (0).
    """
    first, *rest = arguments or [""]
    if first in ("-h", "--help"):
        print(USAGE, end="")
        sys.exit(0)
    module = first == "-m" and bool(rest)
    if not first or (first.startswith("-") and not module):
        print(USAGE, end="", file=sys.stderr)
        sys.exit(2)
    install()
    follow_into_children()
    if module:
        name, *rest = rest
        sys.argv = [name, *rest]  # run_module puts the file in its place, as `python -m` does
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        _run_file(first)


def _run_file(path: str) -> None:
    python_puts_a_folder_first = not getattr(sys.flags, "safe_path", sys.flags.isolated)
    if python_puts_a_folder_first:
        del sys.path[0]  # the working folder, which stands there because of `-m`
    if os.path.isdir(path) or zipfile.is_zipfile(path):
        # Runs its __main__.py, with it in front of sys.path. sys.argv[0] becomes absolute; Python leaves it as it is.
        runpy.run_path(os.path.abspath(path), run_name="__main__")
        return
    if python_puts_a_folder_first:
        sys.path.insert(0, os.path.dirname(os.path.realpath(path)))
    _run_source(os.path.join(os.getcwd(), path))  # Python does not normalise it either


def _run_source(path: str) -> None:
    """Not by `runpy.run_path`, which gives `sys.argv[0]` and `__file__` the same text, where Python does not.

    It would also take `__main__` away while threads and exit handlers of the program may still need it.
    """
    try:
        with io.open_code(path) as file:
            source = file.read()
    except OSError as error:
        print(f"{sys.executable}: can't open file '{path}': [Errno {error.errno}] {error.strerror}", file=sys.stderr)
        sys.exit(2)
    main_module = ModuleType("__main__")
    namespace = vars(main_module)
    namespace.update(
        __builtins__=builtins, __cached__=None, __file__=path, __loader__=SourceFileLoader("__main__", path)
    )
    sys.modules["__main__"] = main_module
    exec(compile(source, path, "exec", dont_inherit=True), namespace)
