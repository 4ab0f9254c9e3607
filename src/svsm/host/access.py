# SPDX-License-Identifier: MIT OR Apache-2.0
"""One access of the kernel to a register or an I/O port: a GHCB exit taken apart, and its answer (AMD 56421 §4.1).

    MMIO_READ, MMIO_WRITE   4 bytes at an address; the value is at the scratch address
    IOIO                    1, 2 or 4 bytes at a port; the value is in RAX, or so many are at the scratch address

Scratch addresses lie in shared memory: where they do not, the exit fails.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Final, Self

from svsm.formats.errors import FormatError
from svsm.formats.snp import ghcb
from svsm.formats.snp.hardware_messages import Message

__all__ = ["Access", "done", "failed"]

_FAILED: Final = 1 << 32
"""SW_EXITINFO2 of an exit that did nothing: its high dword is not zero."""


def done(exit_: Message) -> Message:
    """The answer to an exit that did what it should, and has no value."""
    return exit_.answer(0, 0)


def failed(exit_: Message) -> Message:
    """The answer to an exit that reaches nothing."""
    return exit_.answer(0, _FAILED)


@dataclasses.dataclass(slots=True)
class Access:
    """A decoded exit, and for a read the values that have come so far."""

    exit_: Message
    place: int
    """Guest-physical address, or port."""
    width_bytes: int
    is_port: bool
    reading: bool
    count: int
    """How many values; more than one for ports only."""
    scratch: int | None
    """Where the values lie; None: in RAX."""
    rax: int
    values: list[int] = dataclasses.field(default_factory=list)

    @classmethod
    def parse(cls, exit_: Message) -> Self:
        """Take an exit apart.

        Raises:
            FormatError: ``ghcb-io`` for widths and counts that do not exist.
        """
        code, info_1, info_2, rax, _, scratch = exit_.arguments
        if code == ghcb.ExitCode.IOIO:
            access = ghcb.IoAccess.parse(info_1)
            count = info_2 if access.string else 1
            where = scratch if access.string else None
            found = cls(exit_, access.port, access.width_bytes, True, access.reading, count, where, rax)
        else:
            found = cls(exit_, info_1, info_2, False, code == ghcb.ExitCode.MMIO_READ, 1, scratch, rax)
        narrow = not found.is_port and found.width_bytes != ghcb.MMIO_WIDTH_BYTES
        if narrow or not 0 < found.count <= ghcb.MAX_IO_COUNT:
            raise FormatError("there is no such access", code="ghcb-io", got=info_2)
        return found

    def is_in(self, places: range) -> bool:
        """Whether every byte of it lies in a window or among ports."""
        return self.place in places and self.place + self.width_bytes - 1 in places

    def written(self, shared_fd: int) -> list[int]:
        """The values of a write. Raises OSError or OverflowError where the scratch address is nowhere."""
        if self.scratch is None:
            return [self.rax & self._mask]
        width = self.width_bytes
        data = os.pread(shared_fd, width * self.count, self.scratch)
        return [int.from_bytes(data[at : at + width], "little") for at in range(0, width * self.count, width)]

    def take(self, value: int, shared_fd: int) -> Message | None:
        """Keep a value of a read; the exit's answer once it has all of them."""
        self.values.append(value & self._mask)
        if len(self.values) < self.count:
            return None
        if self.scratch is None:
            return self.exit_.answer(0, 0, 0, self.values[0])
        data = b"".join(value.to_bytes(self.width_bytes, "little") for value in self.values)
        try:
            os.pwrite(shared_fd, data, self.scratch)
        except (OSError, OverflowError):
            return failed(self.exit_)
        return done(self.exit_)

    @property
    def _mask(self) -> int:
        return (1 << 8 * self.width_bytes) - 1
