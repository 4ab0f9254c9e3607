# SPDX-License-Identifier: MIT OR Apache-2.0
"""``python -m svsm.testing.hostile front-end qemu SOCKET``: QEMU and SeaBIOS as a vhost-user front-end.

A PC boots from a ``vhost-user-blk-pci`` disk: QEMU speaks the messages, SeaBIOS's virtio driver the rings. The disk
that `svsm.testing.hostile.served` offers begins with `BOOT_SECTOR`, which reads a little more and ends the machine, so
a boot that works is seen. The codes: 0 when the machine booted, 3 when QEMU refused the back-end, 4 when the guest did
not boot and QEMU still answers its monitor, 5 when QEMU does not answer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import signal
import socket
import subprocess
from typing import Final

__all__ = ["BOOT_SECTOR", "SECONDS", "Boot", "boot"]

_EXIT_PORT: Final = 0xF4
_EXIT_VALUE: Final = 0x31
_BOOTED: Final = _EXIT_VALUE << 1 | 1
BOOT_SECTOR: Final = (
    bytes.fromhex("31c0 8ec0 be0800")  # es = 0, eight times:
    + bytes.fromhex("b80102 bb0080 b90200 b600 56 52 cd13 5a 5e 7207 4e 75ea")  # read the second sector, by the BIOS
    + bytes([0xB0, _EXIT_VALUE, 0xE6, _EXIT_PORT, 0xF4, 0xEB, 0xFD])  # end; where a read fails, halt
).ljust(510, b"\0") + b"\x55\xaa"
"""Real-mode code that reads a sector eight times and then writes to QEMU's isa-debug-exit."""
SECONDS: Final = 15.0
_MONITOR_SECONDS: Final = 10.0
_MEMORY: Final = "64M"


@dataclasses.dataclass(frozen=True, slots=True)
class Boot:
    """What came of it.

    Attributes:
        code: As above; of a QEMU that a signal ended, minus the signal.
        result: The same in words.
        said: The last line that QEMU printed.
    """

    code: int
    result: str
    said: str


def _words(path: str, monitor: int) -> list[str]:
    guard = shutil.which("setpriv")
    return [
        *([guard, "--pdeathsig", "KILL"] if guard else []),
        *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg"),
        *("-machine", "q35", "-m", _MEMORY, "-no-reboot"),
        *("-object", f"memory-backend-memfd,id=ram,size={_MEMORY},share=on", "-numa", "node,memdev=ram"),
        *("-chardev", f"socket,id=vhost,path={path}", "-device", "vhost-user-blk-pci,chardev=vhost,bootindex=1"),
        *("-device", f"isa-debug-exit,iobase={_EXIT_PORT:#x},iosize=1"),
        *("-chardev", f"socket,id=monitor,fd={monitor}", "-mon", "chardev=monitor,mode=control"),
    ]


def _answers(monitor: socket.socket) -> bool:
    """Whether QEMU's main loop runs."""
    monitor.settimeout(_MONITOR_SECONDS)
    received = b""
    try:
        monitor.sendall(b'{"execute": "qmp_capabilities"}\n{"execute": "query-status", "id": "here"}\n')
        while b'"here"' not in received:
            part = monitor.recv(4096)
            if not part:
                return False
            received += part
    except OSError:
        return False
    return True


def boot(path: str, seconds: float = SECONDS) -> Boot:
    """Start QEMU with the disk at a socket, and see what comes of it.

    Args:
        path: Of the back-end.
        seconds: How long it has to boot.

    Raises:
        OSError: There is no QEMU.
    """
    near, far = socket.socketpair()
    with near:
        with far:
            process = subprocess.Popen(
                _words(path, far.fileno()),
                pass_fds=[far.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
            return _judge(process, near)
        finally:
            process.kill()
            process.wait()


def _judge(process: subprocess.Popen[bytes], monitor: socket.socket) -> Boot:
    ended = process.returncode
    if ended is None:
        answers = _answers(monitor)
        code, result = (4, "the guest does not boot, QEMU answers") if answers else (5, "QEMU hangs")
    elif ended < 0:
        code, result = ended, f"QEMU ended by {signal.Signals(-ended).name}"
    else:
        code, result = (0, "booted") if ended == _BOOTED else (3, f"QEMU ended with {ended}")
    process.kill()
    _, errors = process.communicate()
    last = errors.decode("utf-8", "replace").strip().rpartition("\n")[2]
    return Boot(code, result, last[:160])
