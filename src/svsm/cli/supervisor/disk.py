# SPDX-License-Identifier: MIT OR Apache-2.0
"""The machine's disk: where it is, and the device role that serves a file as a virtio disk.

A file is opened, locked and served by the device role, a process of its own on the host's side: it holds the file, the
shared memory and the channel on which the host relays the kernel's register accesses. The other two kinds are
descriptors that the host opens and hands to the kernel.
"""

from __future__ import annotations

import dataclasses
import enum
import fcntl
import mmap
import os
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path

from svsm.cli.supervisor.roles import Emit
from svsm.confine import enter
from svsm.confine.identity import role_uid
from svsm.confine.lists import Role
from svsm.formats.errors import BackendError, StateError

__all__ = ["Disk", "DiskKind", "connect", "device_body"]

_LOCK_SECONDS = 2.0
"""The device of an instance that was killed a moment ago may still be ending."""
_LOCK_PAUSE_SECONDS = 0.01


class DiskKind(enum.StrEnum):
    """How the kernel reaches a disk."""

    FILE = "file"
    """A file or block device behind the device role: virtio-blk over virtio-mmio."""
    DIRECT = "direct"
    """A file or block device whose descriptor the kernel gets."""
    PROCESS = "process"
    """A disk process that listens on a Unix socket; the kernel gets the connection."""


@dataclasses.dataclass(frozen=True, slots=True)
class Disk:
    """Where the disk is."""

    path: Path
    kind: DiskKind
    create_bytes: int | None = None
    """Size of a file to make where there is none; None: it must exist."""

    def open(self) -> int:
        """A descriptor of it.

        Raises:
            BackendError: ``disk-open``.
        """
        try:
            if self.kind is DiskKind.PROCESS:
                return connect(self.path)
            flags = os.O_RDWR | os.O_CLOEXEC
            if self.create_bytes is None:
                return os.open(self.path, flags)
            descriptor = os.open(self.path, flags | os.O_CREAT, 0o600)
            if os.fstat(descriptor).st_size == 0:
                os.ftruncate(descriptor, self.create_bytes)
            return descriptor
        except OSError as failed:
            raise BackendError(
                f"the disk {self.path} cannot be opened: {failed.strerror}",
                code="disk-open",
                hint="check the path, its permissions and that a disk process listens there if one should",
            ) from failed


def connect(path: Path) -> int:
    """A connection to a Unix stream socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(str(path))
        return connection.detach()


def device_body(
    disk: Disk, registers: socket.socket, shared: int, *, landlock_cap: int | None
) -> Callable[[Emit, int], None]:
    """The process that plays the disk. `shared` is closed once it is mapped."""

    def body(emit: Emit, supervisor: int) -> None:
        from svsm.formats.snp.ghcb import DEVICE_MEMORY_BYTES, DEVICE_MEMORY_GPA
        from svsm.host.devices.virtio_process import serve

        descriptor = disk.open()
        _make_exclusive(descriptor, disk.path)
        memory = mmap.mmap(shared, DEVICE_MEMORY_BYTES, offset=DEVICE_MEMORY_GPA)
        os.close(shared)
        isolation = enter(Role.DEVICE, uid=role_uid(Role.DEVICE), parent=supervisor, landlock_cap=landlock_cap)
        emit("device", isolation=isolation.as_json())
        serve(registers, memory, address=DEVICE_MEMORY_GPA, disk=descriptor)

    return body


def _make_exclusive(descriptor: int, path: Path) -> None:
    mode = os.fstat(descriptor).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise BackendError(f"{path} is neither a file nor a block device", code="disk-kind")
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise StateError(
                    "the disk is in use", code="block-in-use", hint="stop the other machine that uses it first"
                ) from None
        except OSError as failed:
            raise BackendError(f"{path} cannot be locked: {failed.strerror}", code="disk-open") from failed
        time.sleep(_LOCK_PAUSE_SECONDS)
