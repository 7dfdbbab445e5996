"""Where the user called: file and line for messages."""

from __future__ import annotations

import os
import sys

CallSite = tuple[str | None, int]

_OWN_FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_skipped: tuple[str, ...] = (_OWN_FOLDER,)


def skip_folder(folder: str) -> None:
    """Pass over the frames of a framework, too, through which calls come back to this package."""
    global _skipped
    _skipped = (*_skipped, folder + os.sep)


def call_site() -> CallSite:
    """File and line of the first caller outside this package and the skipped folders; (None, 0) if there is none."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename.startswith(_skipped):
        if frame.f_back is None:
            return None, 0
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno
