# SPDX-License-Identifier: MIT OR Apache-2.0
"""I/O ports as the kernel reaches them: each access is an IOIO exit that the host answers (AMD 56421 §4.1.2).

    one value     IN: the answer's RAX;   OUT: the exit's RAX
    many bytes    INS, OUTS: so many bytes at the scratch address, in shared memory, all from or to one port

Whatever comes out is the host's word, cut to the width that was asked for. A port is never memory, so no port can be a
wrong one to touch; which ports are which device's is for who drives it. Each access and each wait has a deadline.
"""

from __future__ import annotations

import math
import time
from typing import Final

from svsm.abi.errors import BackendError
from svsm.formats.snp import ghcb
from svsm.formats.snp.hardware_messages import Message
from svsm.kernel.machine_port import HostPort
from svsm.kernel.physical_memory import PhysicalWindow

__all__ = ["IoPorts"]

_BYTE: Final = 1


class IoPorts:
    """`svsm.abi.platform.DevicePorts` by IOIO exits.

    Args:
        host: The channel.
        window: Holds the scratch area.
        scratch_gpa: `ghcb.MAX_IO_COUNT` bytes of shared memory for this alone.
        seconds: How long one access may take.
    """

    def __init__(self, host: HostPort, window: PhysicalWindow, *, scratch_gpa: int, seconds: float) -> None:
        self._host = host
        self._window = window
        self._scratch = scratch_gpa
        self._seconds = seconds
        self.expires = math.inf

    def in8(self, port: int, count: int = 1) -> bytes:
        """Read a port's byte, so many times.

        Raises:
            BackendError: ``platform-host-refused``, ``platform-host-deadline``, ``platform-host-gone``.
            FormatError: ``ghcb-io``.
        """
        if count == 1:
            return bytes([self._in(port, _BYTE)])
        taken = b""
        while len(taken) < count:
            piece = min(count - len(taken), ghcb.MAX_IO_COUNT)
            self._window.write(self._scratch, bytes(piece))
            self._exit(ghcb.IoAccess(port, _BYTE, reading=True, string=True), count=piece)
            taken += self._window.read(self._scratch, piece)
        return taken

    def out8(self, port: int, data: bytes) -> None:
        """Write each byte to a port.

        Raises:
            BackendError, FormatError: As `in8`.
        """
        if len(data) == 1:
            self._out(port, _BYTE, data[0])
            return
        for start in range(0, len(data), ghcb.MAX_IO_COUNT):
            piece = data[start : start + ghcb.MAX_IO_COUNT]
            self._window.write(self._scratch, piece)
            self._exit(ghcb.IoAccess(port, _BYTE, reading=False, string=True), count=len(piece))

    def in32(self, port: int) -> int:
        """Read 32 bits. Raises as `in8`."""
        return self._in(port, 4)

    def out32(self, port: int, value: int) -> None:
        """Write 32 bits. Raises as `in8`."""
        self._out(port, 4, value)

    def wait_interrupt(self, line: int, seconds: float) -> bool:
        """A device's interrupt that has come already, or the next one; it may be another line's.

        Raises:
            BackendError: ``platform-host-gone``.
        """
        return self._host.wait_device_interrupt(deadline=time.monotonic() + seconds)

    def fileno(self) -> int:
        """Readable when the host has said something."""
        return self._host.fileno()

    def _in(self, port: int, width_bytes: int) -> int:
        answer = self._exit(ghcb.IoAccess(port, width_bytes, reading=True, string=False))
        return answer.arguments[ghcb.ANSWER_RAX] & _mask(width_bytes)

    def _out(self, port: int, width_bytes: int, value: int) -> None:
        self._exit(ghcb.IoAccess(port, width_bytes, reading=False, string=False), value=value & _mask(width_bytes))

    def _exit(self, access: ghcb.IoAccess, *, count: int = 0, value: int = 0) -> Message:
        deadline = min(time.monotonic() + self._seconds, self.expires)
        scratch = self._scratch if access.string else 0
        answer = self._host.exit(ghcb.ExitCode.IOIO, access.pack(), count, value, 0, scratch, deadline=deadline)
        if answer.arguments[ghcb.ANSWER_INFO_2]:
            raise BackendError("the host has no such I/O port", code="platform-host-refused", port=access.port)
        return answer


def _mask(width_bytes: int) -> int:
    return (1 << 8 * width_bytes) - 1
