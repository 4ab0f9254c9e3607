# SPDX-License-Identifier: MIT OR Apache-2.0
"""The machine's disk: where it is, and the device role that has it.

    file          the role opens, locks and serves a file as a virtio disk
    vhost-user    the role plays a virtio disk's registers; a daemon at a socket serves its queues
    qemu-…        the role becomes QEMU (`svsm.cli.supervisor.qemu_disk`)
    direct, process   no role: descriptors that the host opens and hands to the kernel

The role is a process of its own on the host's side: it holds the disk, the shared memory and the channel on which the
host relays the kernel's register accesses.
"""

from __future__ import annotations

import dataclasses
import enum
import fcntl
import functools
import mmap
import os
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from svsm.cli.supervisor.roles import Emit
from svsm.cli.supervisor.sockets import connect, connect_serial
from svsm.confine import enter
from svsm.confine.identity import role_uid
from svsm.confine.lists import Role
from svsm.formats.errors import BackendError, StateError
from svsm.host.devices.key_channel import KeyChannel

__all__ = ["Disk", "DiskKind", "device_body", "front_body", "open_exclusive"]

_LOCK_SECONDS = 2.0
"""The device of an instance that was killed a moment ago may still be ending."""
_LOCK_PAUSE_SECONDS = 0.01


class DiskKind(enum.StrEnum):
    """How the kernel reaches a disk."""

    FILE = "file"
    """A file or block device behind the device role: virtio-blk over virtio-mmio."""
    VHOST_USER = "vhost-user"
    """A vhost-user daemon's socket behind the device role: virtio-blk over virtio-mmio."""
    QEMU_VIRTIO = "qemu-virtio"
    """A file or block device behind QEMU's microvm: virtio-blk over virtio-mmio, the key over COM3."""
    QEMU_NVME = "qemu-nvme"
    """A file or block device behind QEMU's q35: NVMe on PCI, the key over COM3."""
    DIRECT = "direct"
    """A file or block device whose descriptor the kernel gets."""
    PROCESS = "process"
    """A disk process that listens on a Unix socket; the kernel gets the connection."""

    @property
    def serves_the_states_own(self) -> bool:
        """Whether it can have the file in the state directory."""
        return self in (DiskKind.FILE, DiskKind.QEMU_VIRTIO, DiskKind.QEMU_NVME)


_OPEN_HINTS: Final = {
    DiskKind.VHOST_USER: "start the vhost-user daemon first; it must listen on that socket, and let this user connect",
    DiskKind.PROCESS: "start the disk process first; it must listen on that socket, and let this user connect",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Disk:
    """Where the disk is."""

    path: Path
    kind: DiskKind
    create_bytes: int | None = None
    """Size of a file to make where there is none; None: it must exist."""

    @property
    def has_role(self) -> bool:
        """Whether there is a device role, and registers."""
        return self.kind not in (DiskKind.DIRECT, DiskKind.PROCESS)

    def open(self) -> int:
        """A descriptor of it.

        Raises:
            BackendError: ``disk-open``.
        """
        try:
            if self.kind in (DiskKind.PROCESS, DiskKind.VHOST_USER):
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
                hint=_OPEN_HINTS.get(
                    self.kind, "check the path and its permissions; a file must exist: truncate -s 8M FILE"
                ),
            ) from failed


def device_body(
    disk: Disk, registers: socket.socket, shared: int, *, key: tuple[KeyChannel, Path], landlock_cap: int | None
) -> Callable[[Emit, int], None]:
    """The process that plays the disk, and the key's device. `shared` is closed once it is mapped.

    Args:
        key: What the key comes over, and the proxy's socket, which is connected to before confinement.
    """

    def body(emit: Emit, supervisor: int) -> None:
        from svsm.formats.snp.ghcb import DEVICE_MEMORY_GPA
        from svsm.host.devices.key_channel import KeyDevice
        from svsm.host.devices.virtio_process import serve

        descriptor = open_exclusive(disk)
        kind, path = key
        make = None
        if kind is not KeyChannel.STREAM:
            make = functools.partial(KeyDevice, kind, socket.socket(fileno=connect_serial(path)))
        memory = _device_memory(shared)
        os.close(shared)
        isolation = enter(Role.DEVICE, uid=role_uid(Role.DEVICE), parent=supervisor, landlock_cap=landlock_cap)
        emit("device", isolation=isolation.as_json())
        serve(registers, memory, address=DEVICE_MEMORY_GPA, disk=descriptor, key=make)

    return body


def front_body(
    disk: Disk, registers: socket.socket, shared: int, *, landlock_cap: int | None
) -> Callable[[Emit, int], None]:
    """The process that plays the registers of a disk that a vhost-user daemon serves."""

    def body(emit: Emit, supervisor: int) -> None:
        from svsm.formats.snp.ghcb import DEVICE_MEMORY_BYTES, DEVICE_MEMORY_GPA
        from svsm.host.devices.vhost_user_front import FrontBackend, serve_front
        from svsm.host.devices.vhost_user_link import BackendLink
        from svsm.host.devices.virtio_ring import Window

        link = BackendLink(socket.socket(fileno=disk.open()))
        window = Window(memoryview(_device_memory(shared)), address=DEVICE_MEMORY_GPA)
        isolation = enter(Role.DEVICE, uid=role_uid(Role.DEVICE), parent=supervisor, landlock_cap=landlock_cap)
        emit("device", isolation=isolation.as_json())
        backend = FrontBackend(link, shared, address=DEVICE_MEMORY_GPA, size_bytes=DEVICE_MEMORY_BYTES)

        def died() -> None:
            # The kernel sees a disk that asks for a reset, and takes none; people want to know whose fault it is.
            message = f"the vhost-user daemon at {disk.path} is gone"
            emit("failed", code="vhost-user-gone", message=message, hint="see its log; start it and boot again")

        serve_front(registers, backend, window, died=died)

    return body


def _device_memory(shared: int) -> mmap.mmap:
    from svsm.formats.snp.ghcb import DEVICE_MEMORY_BYTES, DEVICE_MEMORY_GPA

    return mmap.mmap(shared, DEVICE_MEMORY_BYTES, offset=DEVICE_MEMORY_GPA)


def open_exclusive(disk: Disk) -> int:
    """A descriptor of a file or block device that no other machine uses; the lock goes with it.

    Raises:
        BackendError: ``disk-open``, ``disk-kind``.
        StateError: ``block-in-use``.
    """
    descriptor = disk.open()
    _make_exclusive(descriptor, disk.path)
    return descriptor


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
