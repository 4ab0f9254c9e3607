# SPDX-License-Identifier: MIT OR Apache-2.0
"""The device role as QEMU: a process that becomes qemu-system-x86_64 with the machine's shared memory as its RAM.

    QEMU's RAM    the first GiB of the shared memory file, at the same guest-physical addresses; private and VMPL2
                  memory are other files, of which it has no descriptor
    its disk      the image, opened and locked here: QEMU opens no file of its own but its libraries
    its COM3      connected to the proxy here
    its qtest     the host, which passes the kernel's register and port exits on to it

The process is confined before it becomes QEMU: own uid, Landlock, a list of system calls (`Role.QEMU`), death with the
supervisor. All of this stays with a program that is executed. What does not is being non-dumpable, which matters
little: it holds no more than the host does. QEMU does not end when the host hangs up; the supervisor ends it. It is
in a session of its own: QEMU takes up SIGINT again, which the other roles ignore, so Ctrl-C at the terminal would end
the disk before the TPMs are shut down.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Final

from svsm.cli.supervisor.disk import Disk, DiskKind, open_exclusive
from svsm.cli.supervisor.roles import Emit
from svsm.cli.supervisor.sockets import connect_serial
from svsm.confine import PathRule, enter
from svsm.confine.identity import role_uid
from svsm.confine.lists import Role
from svsm.formats.errors import BackendError
from svsm.host.qemu_command import Descriptors, DiskOptions, MachineKind, command_words, halting_firmware

__all__ = ["KINDS", "qemu_body"]

KINDS: Final = {DiskKind.QEMU_VIRTIO: MachineKind.MICROVM, DiskKind.QEMU_NVME: MachineKind.Q35}
"""Which of QEMU's machines has which disk."""

_MEMORY_BYTES: Final = 1 << 30
"""Reaches beyond everything that kernel and host share, and ends below the hole for devices."""
_COM3: Final = 2
_DISK: Final = Path("/dev/fdset/1")
_STDERR: Final = 2
_LIBRARIES: Final = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache", "/etc/localtime")
_LOADER: Final = "/lib64/ld-linux-x86-64.so.2"
_QUESTIONS: Final = ("/dev/urandom", "/proc/self", "/proc/filesystems", "/sys/devices/system", "/sys/bus/nd")
"""What its libraries look at while they are loaded."""


def qemu_body(
    disk: Disk,
    *,
    program: str,
    qtest: socket.socket,
    shared: int,
    serial: Path,
    messages: int,
    landlock_cap: int | None,
) -> Callable[[Emit, int], None]:
    """The process that becomes QEMU.

    Args:
        disk: Its image.
        program: QEMU's path.
        qtest: Its end of the host's channel.
        shared: The shared memory.
        serial: Where the proxy listens.
        messages: A file for what it prints.
        landlock_cap: Use no newer Landlock.
    """

    def body(emit: Emit, supervisor: int) -> None:
        image = open_exclusive(disk)
        firmware = os.memfd_create("svsm-firmware")
        os.write(firmware, halting_firmware())
        held = Descriptors(shared, firmware, qtest.fileno(), {_COM3: connect_serial(serial)}, image)
        kind = KINDS[disk.kind]
        words = command_words(kind, held, memory_bytes=_MEMORY_BYTES, disk=DiskOptions(_DISK))
        os.setsid()
        os.dup2(messages, _STDERR)
        for descriptor in held.all():
            os.set_inheritable(descriptor, True)
        isolation = enter(
            Role.QEMU,
            uid=role_uid(Role.QEMU),
            landlock_rules=_paths(program),
            parent=supervisor,
            landlock_cap=landlock_cap,
        )
        emit("device", isolation=isolation.as_json())
        try:
            os.execve(program, [program, *words], {})
        except OSError as error:
            raise BackendError(f"QEMU cannot be started: {error.strerror}", code="qemu-start", path=program) from None

    return body


def _paths(program: str) -> list[PathRule]:
    """The files that QEMU needs of its own."""
    real = Path(program).resolve()
    prefix = real.parent.parent
    read = [
        *_LIBRARIES,
        *_QUESTIONS,
        str(prefix / "lib"),
        str(prefix / "share" / "qemu"),
        str(prefix / "share/seabios"),
    ]
    rules = [PathRule(path) for path in read]
    return [*rules, PathRule("/dev/null", write=True), *(PathRule(path, execute=True) for path in (str(real), _LOADER))]
