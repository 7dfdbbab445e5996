"""The exceptions of the package, and how failures of the library become one of them."""

from __future__ import annotations

from horovod_cpp import _core

NOT_INITIALIZED = "Horovod has not been initialized; use hvd.init()."


class HorovodInternalError(RuntimeError):
    """An operation failed: ranks disagree, a rank is lost or has shut down, or nothing was initialised."""


class HorovodInitializationError(HorovodInternalError, ValueError):
    """The ranks of the job did not meet; also a `ValueError`, which Horovod raises here."""


class HostsUpdatedInterrupt(RuntimeError):  # noqa: N818 (Horovod's name)
    """Hosts came or went: `hvd.elastic.run` forms the job again and keeps the state as it is.

    `skip_sync`: the ranks have the same state already, so that it need not be broadcast afterwards.
    """

    def __init__(self, skip_sync: bool = False) -> None:
        super().__init__("the hosts of the job were updated")
        self.skip_sync = skip_sync


def operation_error(error: _core.Error) -> Exception:
    """The exception for a call that failed at once: `ValueError` for the caller's mistake."""
    if error.code == _core.INVALID_ARGUMENT:
        return ValueError(str(error))
    if error.code == _core.UNAVAILABLE:
        return RuntimeError(str(error))
    if error.code == _core.PRECONDITION and not isinstance(error, _core.ForkError) and not _core.is_initialized():
        text = str(error)
        return HorovodInternalError(text if text.startswith(NOT_INITIALIZED) else f"{NOT_INITIALIZED} ({text})")
    return HorovodInternalError(str(error))


def initialization_error(error: _core.Error) -> Exception:
    """The exception for an `init` that failed."""
    if error.code == _core.INVALID_ARGUMENT:
        return ValueError(str(error))
    if error.code == _core.UNAVAILABLE:
        return RuntimeError(str(error))
    return HorovodInitializationError(f"Horovod initialization failed. {error}")


def query_error(error: _core.Error) -> Exception:
    """The exception for a question about rank, size or process sets."""
    if isinstance(error, _core.ForkError):
        return HorovodInternalError(str(error))
    if error.code == _core.PRECONDITION:
        return ValueError(NOT_INITIALIZED)
    return ValueError(str(error))
