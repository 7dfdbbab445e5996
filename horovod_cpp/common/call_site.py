"""Where the user called: file and line for messages."""

from __future__ import annotations

import os

from horovod_cpp import _core

CallSite = tuple[str | None, int]

call_site = _core.call_site
"""File and line of the first caller outside this package and the skipped folders; (None, 0) if there is none."""


def skip_folder(folder: str) -> None:
    """Pass over the frames of a framework, too, through which calls come back to this package."""
    _core.skip_folder(folder + os.sep)


skip_folder(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
