# SPDX-License-Identifier: MIT OR Apache-2.0
"""``python -m svsm.testing.hostile.qemu_front_end SOCKET [SECONDS]``: QEMU and SeaBIOS as a vhost-user front-end.

A PC boots from a ``vhost-user-blk-pci`` disk: QEMU speaks the messages, SeaBIOS's virtio driver the rings. The disk
that `svsm.testing.hostile.served` offers begins with `BOOT_SECTOR`, which reads a little more and ends the machine, so
a boot that works is seen. Prints one line and exits with 0 when the machine booted, 3 when QEMU refused the back-end, 4
when the guest did not boot and QEMU still answers its monitor, 5 when QEMU does not answer; when a signal ended QEMU,
with that signal.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import Final

__all__ = ["BOOT_SECTOR", "main"]

_EXIT_PORT: Final = 0xF4
_EXIT_VALUE: Final = 0x31
_BOOTED: Final = _EXIT_VALUE << 1 | 1
BOOT_SECTOR: Final = (
    bytes.fromhex("31c0 8ec0 be0800")  # es = 0, eight times:
    + bytes.fromhex("b80102 bb0080 b90200 b600 56 52 cd13 5a 5e 7207 4e 75ea")  # read the second sector, by the BIOS
    + bytes([0xB0, _EXIT_VALUE, 0xE6, _EXIT_PORT, 0xF4, 0xEB, 0xFD])  # end; where a read fails, halt
).ljust(510, b"\0") + b"\x55\xaa"
"""Real-mode code that reads a sector eight times and then writes to QEMU's isa-debug-exit."""
_SECONDS: Final = 15.0
_MONITOR_SECONDS: Final = 10.0
_MEMORY: Final = "64M"


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


def main(words: list[str]) -> int:
    """The command line."""
    if not words:
        print(__doc__, file=sys.stderr)
        return 2
    seconds = float(words[1]) if len(words) > 1 else _SECONDS
    near, far = socket.socketpair()
    with near:
        with far:
            command = _words(words[0], far.fileno())
            process = subprocess.Popen(
                command,
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


def _judge(process: subprocess.Popen[bytes], monitor: socket.socket) -> int:
    if process.returncode is None:
        lives = _answers(monitor)
        said = "the guest does not boot, QEMU answers" if lives else "QEMU hangs"
    elif process.returncode < 0:
        said = f"QEMU ended by {signal.Signals(-process.returncode).name}"
    else:
        said = "booted" if process.returncode == _BOOTED else f"QEMU ended with {process.returncode}"
    process.kill()
    _, errors = process.communicate()
    last = errors.decode("utf-8", "replace").strip().rpartition("\n")[2]
    print(json.dumps({"result": said, "said": last[:160]}))
    if process.returncode < 0 and said.startswith("QEMU ended"):
        sys.stdout.flush()
        os.kill(os.getpid(), -process.returncode)
        time.sleep(1)
    return {"booted": 0, "the guest does not boot, QEMU answers": 4, "QEMU hangs": 5}.get(said, 3)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
