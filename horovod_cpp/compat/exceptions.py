"""Stands for ``horovod.common.exceptions``: the exceptions of this package, and those that only Horovod needs."""

from __future__ import annotations

from horovod_cpp.common.exceptions import HorovodInternalError, HostsUpdatedInterrupt

__all__ = [
    "HorovodInternalError",
    "HorovodVersionMismatchError",
    "HostsUpdatedInterrupt",
    "get_version_mismatch_message",
]


def get_version_mismatch_message(name: str, version: str, installed_version: str) -> str:
    """The text of `HorovodVersionMismatchError`, of the same arguments."""
    return (
        f"Horovod was built for {name} {installed_version}, and {name} {version} is in use. Build it again for the "
        "version in use."
    )


class HorovodVersionMismatchError(ImportError):
    """The framework is of another version than the one that Horovod was built for.

    Never raised by this package, which is built without the framework; here for programs that name it.
    """

    def __init__(self, name: str, version: str, installed_version: str) -> None:
        """Args: name: of the framework; version: in use; installed_version: that Horovod was built for."""
        super().__init__(get_version_mismatch_message(name, version, installed_version))
        self.name = name
        self.version = version
        self.installed_version = installed_version
