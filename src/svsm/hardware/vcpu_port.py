# SPDX-License-Identifier: MIT OR Apache-2.0
"""The chip's end of the channel to its vCPU process (`svsm.formats.snp.vcpu_messages`).

The vCPU process runs guest code in an emulator, so it is treated as something that may have been taken over: it gets
registers, never a VMSA page; what it gives back goes into general registers only; and it has `ACK_SECONDS` to
acknowledge that it has given a page up. One that does not is a broken processor, and the VM ends.
"""

from __future__ import annotations

import collections
import dataclasses
import select
import socket
import time
from typing import Final

from svsm.formats.errors import BackendError, SvsmError
from svsm.formats.snp.vcpu_messages import (
    MAX_MESSAGE_BYTES,
    Access,
    ExitMessage,
    Kind,
    MapMessage,
    Memory,
    PlainMessage,
    Registers,
    RunMessage,
    UnmapMessage,
    parse_message,
    stop,
)
from svsm.formats.snp.vmsa import VmsaView

__all__ = ["ACK_SECONDS", "EFER_SVME", "GuestStop", "VcpuPort", "load_registers", "store_exit"]

ACK_SECONDS: Final = 5.0
EFER_SVME: Final = 1 << 12

_GENERAL: Final = tuple(
    (field.name, {"fs_base": "fs.base", "gs_base": "gs.base"}.get(field.name, field.name))
    for field in dataclasses.fields(Registers)
    if field.name != "ghcb_msr"
)


@dataclasses.dataclass(frozen=True, slots=True)
class GuestStop:
    """A vCPU has stopped."""

    vmsa_gpa: int
    exit_code: int
    exit_info_1: int
    exit_info_2: int
    registers: Registers


class VcpuPort:
    """The chip's end.

    Args:
        sock: SOCK_SEQPACKET, blocking.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._sequence = 0
        self._run: tuple[int, int] | None = None
        self._stops: collections.deque[GuestStop] = collections.deque()

    def fileno(self) -> int:
        """The descriptor to wait on; look at `take_stop` first."""
        return self._sock.fileno()

    @property
    def running(self) -> int | None:
        """The VMSA whose guest runs now, or None."""
        return self._run[0] if self._run else None

    def map(self, gpa: int, length: int, memory: Memory, access: Access) -> None:
        """Make a range visible to the guest; returns when it is.

        Raises:
            BackendError: ``machine-vcpu``.
        """
        sequence = self._next()
        self._send(MapMessage(Kind.MAP, 0, sequence, gpa, length, memory, access).pack())
        self._await(sequence)

    def unmap(self, gpa: int, length: int) -> None:
        """Make a range invisible; when it returns, no guest instruction can reach it any more.

        Raises:
            BackendError: ``machine-vcpu``.
        """
        sequence = self._next()
        self._send(UnmapMessage(Kind.UNMAP, 0, sequence, gpa, length).pack())
        self._await(sequence)

    def run(self, vmsa_gpa: int, registers: Registers, sev_features: int) -> None:
        """Start the guest. The caller has seen to it that none runs."""
        sequence = self._next()
        self._run = (vmsa_gpa, sequence)
        self._send(RunMessage(Kind.RUN, 0, sequence, sev_features, 0, registers).pack())

    def stop(self) -> None:
        """Ask a running guest to exit with INTR."""
        if self._run:
            self._send(stop(self._next()))

    def take_stop(self) -> GuestStop | None:
        """The oldest exit not taken yet, if there is one."""
        return self._stops.popleft() if self._stops else None

    def receive(self) -> None:
        """Read one message that has arrived; an EXIT is queued for `take_stop`.

        Raises:
            BackendError: ``machine-vcpu`` when the process is gone or says something impossible.
        """
        acknowledged = self._receive()
        if acknowledged is not None:
            raise _broken("acknowledges what nobody asked for")

    def close(self) -> None:
        """End the process: it leaves when its socket is closed."""
        self._sock.close()

    def _next(self) -> int:
        self._sequence += 1
        return self._sequence

    def _send(self, data: bytes) -> None:
        try:
            self._sock.send(data)
        except OSError as error:
            raise _broken(f"cannot be reached: {error.strerror}") from None

    def _await(self, sequence: int) -> None:
        deadline = time.monotonic() + ACK_SECONDS
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not self._poll.poll(left * 1000):
                raise _broken("did not acknowledge in time")
            acknowledged = self._receive()
            if acknowledged == sequence:
                return
            if acknowledged is not None:
                raise _broken("acknowledges something else")

    def _receive(self) -> int | None:
        """Read one message: the number of an ACK, or None for an EXIT (which is queued)."""
        try:
            data = self._sock.recv(MAX_MESSAGE_BYTES)
            message = parse_message(data) if data else None
        except OSError as error:
            raise _broken(f"is gone: {error.strerror}") from None
        except SvsmError as error:
            raise _broken(error.message) from None
        if isinstance(message, PlainMessage) and message.kind == Kind.ACK:
            return message.sequence
        if isinstance(message, ExitMessage) and self._run and message.sequence == self._run[1]:
            stopped = GuestStop(
                self._run[0], message.exit_code, message.exit_info_1, message.exit_info_2, message.registers
            )
            self._run = None
            self._stops.append(stopped)
            return None
        raise _broken("is gone" if message is None else "says what it may not say now")


def _broken(what: str) -> BackendError:
    return BackendError(f"the vCPU process {what}", code="machine-vcpu")


def load_registers(page: bytes, *, ghcb_msr: int) -> Registers:
    """The registers of a VMSA page, for RUN."""
    view = VmsaView(bytearray(page))
    return Registers(**{name: view.get(field) for name, field in _GENERAL}, ghcb_msr=ghcb_msr)


def store_exit(page: bytes, stopped: GuestStop) -> bytes:
    """The VMSA page after an exit: general registers and exit fields changed, everything else as it was.

    EFER.SVME stays set whatever the vCPU process says: that a VMSA can run is VMPL0's to decide.
    """
    changed = bytearray(page)
    view = VmsaView(changed)
    for name, field in _GENERAL:
        value = getattr(stopped.registers, name)
        view.set(field, value | EFER_SVME if name == "efer" else value)
    view.set("guest_exit_code", stopped.exit_code)
    view.set("guest_exit_info_1", stopped.exit_info_1)
    view.set("guest_exit_info_2", stopped.exit_info_2)
    return bytes(changed)
