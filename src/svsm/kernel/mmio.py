# SPDX-License-Identifier: MIT OR Apache-2.0
"""A device's registers as the kernel reaches them: each access is a GHCB exit that the host answers (AMD 56421).

    read   MMIO_READ(address, 4), scratch = a word in shared memory ─▶ host ─▶ device; the answer is in the word
    write  the word, MMIO_WRITE(address, 4) ─▶ host; it is on its way to the device when the exit is answered

Whatever comes out is the host's word. A window is accepted only where registers may lie, so no address that the host
names is ever memory; an offset is the driver's, and stays in the window. Each access and each wait has a deadline.
"""

from __future__ import annotations

import math
import time
from typing import Final

from svsm.abi.errors import BackendError, ProtocolError, StateError
from svsm.abi.platform import Gpa
from svsm.formats.snp import ghcb
from svsm.kernel.machine_port import HostPort
from svsm.kernel.physical_memory import PhysicalWindow

__all__ = ["MmioRegisters"]

_WORD: Final = 0xFFFF_FFFF
_ALIGNMENT: Final = 0x200
"""virtio-mmio's windows are this large and QEMU's lie side by side; everybody else's are whole pages."""


class MmioRegisters:
    """`svsm.abi.platform.DeviceRegisters` by MMIO exits.

    Args:
        host: The channel.
        window: Holds the scratch word.
        gpa: Of the register window, as the host says.
        size_bytes: Of it.
        scratch_gpa: A shared word for this alone.
        seconds: How long one access may take.

    Raises:
        ProtocolError: ``platform-mmio`` for an address where no registers may lie.
    """

    def __init__(
        self,
        host: HostPort,
        window: PhysicalWindow,
        gpa: Gpa,
        size_bytes: int,
        *,
        scratch_gpa: int,
        seconds: float,
    ) -> None:
        misplaced = gpa % _ALIGNMENT or not ghcb.MMIO_GPA <= gpa <= ghcb.MMIO_GPA + ghcb.MMIO_BYTES - size_bytes
        if misplaced or size_bytes < ghcb.MMIO_WIDTH_BYTES:
            raise ProtocolError(
                "the host names registers where none may be", code="platform-mmio", gpa=gpa, length=size_bytes
            )
        self.size_bytes = size_bytes
        self.expires = math.inf
        self._host = host
        self._window = window
        self._gpa = gpa
        self._scratch = scratch_gpa
        self._seconds = seconds

    def read32(self, offset: int) -> int:
        """The register at a byte offset.

        Raises:
            BackendError: ``platform-host-refused``, ``platform-host-deadline``, ``platform-host-gone``.
            StateError: ``platform-register``.
        """
        self._window.write(self._scratch, bytes(ghcb.MMIO_WIDTH_BYTES))
        self._exit(ghcb.ExitCode.MMIO_READ, offset)
        return int.from_bytes(self._window.read(self._scratch, ghcb.MMIO_WIDTH_BYTES), "little")

    def write32(self, offset: int, value: int) -> None:
        """Set a register.

        Raises:
            BackendError, StateError: As `read32`.
        """
        self._window.write(self._scratch, (value & _WORD).to_bytes(ghcb.MMIO_WIDTH_BYTES, "little"))
        self._exit(ghcb.ExitCode.MMIO_WRITE, offset)

    def wait_interrupt(self, seconds: float) -> bool:
        """An interrupt that has come already, or the next one.

        Raises:
            BackendError: ``platform-host-gone``.
        """
        return self._host.wait_device_interrupt(deadline=time.monotonic() + seconds)

    def close(self) -> None:
        """Nothing: the channel is the platform's."""

    def _exit(self, code: ghcb.ExitCode, offset: int) -> None:
        if offset % ghcb.MMIO_WIDTH_BYTES or not 0 <= offset <= self.size_bytes - ghcb.MMIO_WIDTH_BYTES:
            raise StateError("the window has no such register", code="platform-register", offset=offset)
        deadline = min(time.monotonic() + self._seconds, self.expires)
        where = (self._gpa + offset, ghcb.MMIO_WIDTH_BYTES)
        answer = self._host.exit(code, *where, 0, 0, self._scratch, deadline=deadline)
        if answer.arguments[ghcb.ANSWER_INFO_2]:
            raise BackendError("the host reaches no such register", code="platform-host-refused", gpa=where[0])
