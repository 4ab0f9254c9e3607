# SPDX-License-Identifier: MIT OR Apache-2.0
"""The kernel's ends of its two channels: to the hardware, which it trusts, and to the host, which it does not.

`InstructionPort` asks and waits: the hardware answers at once or is broken. `HostPort` never trusts: every wait has a
deadline, an answer that nobody waits for is dropped, devices are queued up to a limit and closed beyond it, and what
is no message at all is dropped as well, a bounded number of times: a host that keeps talking nonsense has ended the
conversation.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import select
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Final

from svsm.abi.errors import BackendError, ProtocolError, SvsmError
from svsm.abi.platform import Device, DeviceKind
from svsm.formats.snp import ghcb
from svsm.formats.snp.hardware_messages import (
    ANSWER,
    MAX_MESSAGE,
    Instruction,
    InstructionCode,
    Message,
)

__all__ = ["MAX_DEVICES", "MAX_NONSENSE", "HostPort", "InstructionPort"]

MAX_DEVICES: Final = 64
"""Devices waiting to be taken; more are closed at once."""
MAX_NONSENSE: Final = 256
"""Packets from the host that are no message before the channel counts as closed."""

_DEVICES: Final = {
    ghcb.DeviceKind.SERIAL: DeviceKind.SERIAL,
    ghcb.DeviceKind.DISK: DeviceKind.DISK,
    ghcb.DeviceKind.CLIENT: DeviceKind.CLIENT,
}
_NOTICES: Final = (ghcb.HostMessage.INTERRUPT, ghcb.HostMessage.SHUTDOWN, ghcb.HostMessage.DEVICE_INTERRUPT)
_MAX_DESCRIPTORS: Final = 253
_MAX_BATCH: Final = 64


def _receive(sock: socket.socket, *, flags: int = 0) -> tuple[bytes, list[int], bool]:
    """One packet: its bytes, its descriptors, and whether anything was cut off."""
    data, descriptors, received, _ = socket.recv_fds(
        sock, MAX_MESSAGE + 1, _MAX_DESCRIPTORS, flags | socket.MSG_CMSG_CLOEXEC
    )
    return data, list(descriptors), bool(received & (socket.MSG_TRUNC | socket.MSG_CTRUNC))


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)


class InstructionPort:
    """Instructions that the hardware executes for the kernel.

    Args:
        sock: SOCK_SEQPACKET, blocking.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._identifier = 0
        self._ended: collections.deque[int] = collections.deque()

    def fileno(self) -> int:
        """Readable when a service has ended."""
        return self._sock.fileno()

    def execute(self, kind: Instruction, *arguments: int) -> tuple[int, bool]:
        """PVALIDATE or RMPADJUST.

        Returns:
            The instruction's code and the carry flag.

        Raises:
            BackendError: ``platform-hardware`` when the hardware is gone.
        """
        answer, descriptors = self._ask(Message(kind, arguments))
        _close(descriptors)
        return answer.status, bool(answer.arguments[0])

    def spawn(self, service: str, archive: int, parameters: Mapping[str, str]) -> tuple[int, socket.socket]:
        """Start a service from a sealed memfd.

        Returns:
            Its number, and the kernel's end of its syscall socket.

        Raises:
            BackendError: ``platform-hardware``, ``platform-spawn``.
        """
        request = json.dumps({"service": service, "parameters": dict(parameters)}).encode()
        answer, descriptors = self._ask(Message(Instruction.SPAWN, (), request), [archive])
        if answer.status != InstructionCode.SUCCESS or len(descriptors) != 1:
            _close(descriptors)
            raise BackendError("the hardware did not start the service", code="platform-spawn", service=service)
        return answer.arguments[0], socket.socket(fileno=descriptors[0])

    def kill(self, number: int) -> None:
        """End a service's process; nothing when it has ended.

        Raises:
            BackendError: ``platform-hardware``.
        """
        self._send(Message(Instruction.KILL, (number,)), ())

    def ended_service(self) -> int | None:
        """The number of a service that has ended, or None."""
        while not self._ended and select.select([self._sock], [], [], 0)[0]:
            self._notice(self._next())
        return self._ended.popleft() if self._ended else None

    def close(self) -> None:
        """Hang up."""
        self._sock.close()

    def _ask(self, message: Message, sent: Sequence[int] = ()) -> tuple[Message, list[int]]:
        self._identifier += 1
        kind = message.kind
        self._send(Message(kind, message.arguments, message.payload, self._identifier), sent)
        while True:
            answer, descriptors = self._next()
            if answer.kind == kind | ANSWER and answer.identifier == self._identifier:
                return answer, descriptors
            self._notice((answer, descriptors))

    def _notice(self, received: tuple[Message, list[int]]) -> None:
        message, descriptors = received
        _close(descriptors)
        if message.kind != Instruction.SERVICE_ENDED:
            raise BackendError("the hardware answered what was not asked", code="platform-hardware")
        self._ended.append(message.arguments[0])

    def _next(self) -> tuple[Message, list[int]]:
        try:
            data, descriptors, _ = _receive(self._sock)
        except OSError as error:
            raise BackendError(f"the hardware is gone: {error.strerror}", code="platform-hardware") from None
        if not data:
            raise BackendError("the hardware is gone", code="platform-hardware")
        return Message.parse(data), descriptors

    def _send(self, message: Message, descriptors: Sequence[int]) -> None:
        try:
            socket.send_fds(self._sock, [message.pack()], list(descriptors))
        except OSError as error:
            raise BackendError(f"the hardware is gone: {error.strerror}", code="platform-hardware") from None


class HostPort:
    """GHCB exits and devices.

    Args:
        sock: SOCK_SEQPACKET; made non-blocking.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._identifier = 0
        self._waiting: dict[int, Message | None] = {}
        self._devices: collections.deque[Device] = collections.deque()
        self._nonsense = 0
        self._interrupt = False
        self._device_interrupt = False
        self._shutdown_seen = True
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._event_set = False
        self.shutdown_asked = False
        """The operator wants the machine to end."""
        self.closed = False

    def fileno(self) -> int:
        """Readable when the host has said something."""
        return self._sock.fileno()

    @property
    def event(self) -> int:
        """A descriptor that is readable while something that was taken in waits to be looked at.

        A wait for an answer takes in whatever comes before it; without this the rest would lie here unnoticed.
        """
        return self._event

    def start(self, exit_code: int, *arguments: int, deadline: float) -> int:
        """Send a GHCB exit (info 1, info 2, RAX, RBX); its number.

        Raises:
            BackendError: ``platform-host-gone``, ``platform-host-deadline``.
        """
        self._identifier += 1
        number = self._identifier
        data = Message(ghcb.HostMessage.EXIT, (exit_code, *arguments), identifier=number).pack()
        while True:
            try:
                self._sock.send(data)
                break
            except BlockingIOError:
                left = deadline - time.monotonic()
                if left <= 0 or not select.select([], [self._sock], [], left)[1]:
                    raise self._late() from None
            except OSError as error:
                self.closed = True
                raise self._gone(str(error.strerror)) from None
        self._waiting[number] = None
        return number

    def take_answer(self, number: int) -> Message | None:
        """The answer to an exit, once: None while there is none."""
        self.drain()
        answer = self._waiting.get(number)
        if answer is not None:
            del self._waiting[number]
            self._signal()
        elif self.closed:
            raise self._gone("hung up")
        return answer

    def exit(self, exit_code: int, *arguments: int, deadline: float) -> Message:
        """A GHCB exit whose answer is waited for.

        Raises:
            BackendError: ``platform-host-gone``, ``platform-host-deadline``: a late answer will be dropped.
        """
        number = self.start(exit_code, *arguments, deadline=deadline)
        while True:
            answer = self.take_answer(number)
            if answer is not None:
                return answer
            left = deadline - time.monotonic()
            if left <= 0:
                del self._waiting[number]
                raise self._late()
            select.select([self._sock], [], [], left)

    def next_device(self) -> Device | None:
        """The oldest device that waits, or None."""
        self.drain()
        device = self._devices.popleft() if self._devices else None
        self._signal()
        return device

    def take_interrupt(self) -> bool:
        """Whether the host has interrupted the guest since the last call; several count as one."""
        self.drain()
        interrupt, self._interrupt = self._interrupt, False
        self._signal()
        return interrupt

    def wait_device_interrupt(self, *, deadline: float) -> bool:
        """Wait for a device's interrupt that nobody has seen yet; False when the time is over.

        Raises:
            BackendError: ``platform-host-gone``.
        """
        while True:
            self.drain()
            if self._device_interrupt:
                self._device_interrupt = False
                return True
            if self.closed:
                raise self._gone("hung up")
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            select.select([self._sock], [], [], left)

    def look_for_shutdown(self) -> bool:
        """Whether the host has asked for the end."""
        self.drain()
        self._shutdown_seen = True
        self._signal()
        return self.shutdown_asked

    def close(self) -> None:
        """Hang up, and close devices that nobody has taken."""
        self.closed = True
        self._sock.close()
        os.close(self._event)
        _close([device.descriptor for device in self._devices])
        self._devices.clear()

    def drain(self) -> None:
        """Take in what has arrived, at most a batch; never blocks, never raises for what the host says."""
        self._take_batch()
        self._signal()

    def _signal(self) -> None:
        answered = any(answer is not None for answer in self._waiting.values())
        wanted = bool(self._devices) or self._interrupt or answered or not self._shutdown_seen
        if wanted and not self._event_set:
            os.eventfd_write(self._event, 1)
        elif not wanted and self._event_set:
            os.eventfd_read(self._event)
        self._event_set = wanted

    def _take_batch(self) -> None:
        for _ in range(_MAX_BATCH):
            if self.closed:
                return
            try:
                data, descriptors, cut = _receive(self._sock, flags=socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                self.closed = True
                return
            if not data and not descriptors:
                self.closed = True
                return
            try:
                self._take(data, descriptors, cut=cut)
            except SvsmError:
                _close(descriptors)
                self._nonsense += 1
                self.closed = self._nonsense > MAX_NONSENSE

    def _take(self, data: bytes, descriptors: list[int], *, cut: bool) -> None:
        message = Message.parse(data)
        if cut:
            raise ProtocolError("the host sent too much at once", code="platform-host-message")
        if message.kind == ghcb.HostMessage.EXIT | ANSWER and not descriptors:
            # An answer that nobody waits for is late or invented; either way it is nothing.
            if message.identifier in self._waiting:
                self._waiting[message.identifier] = message
            return
        if message.kind in _NOTICES and not descriptors:
            self._interrupt = self._interrupt or message.kind == ghcb.HostMessage.INTERRUPT
            self._device_interrupt = self._device_interrupt or message.kind == ghcb.HostMessage.DEVICE_INTERRUPT
            if message.kind == ghcb.HostMessage.SHUTDOWN and not self.shutdown_asked:
                self.shutdown_asked, self._shutdown_seen = True, False
            return
        kind, index, port, *_ = message.arguments
        known = message.kind == ghcb.HostMessage.DEVICE and kind in _DEVICES
        if not known or len(descriptors) != 1 or index >= 1 << 16 or port > 1:
            raise ProtocolError("the host sent no message", code="platform-host-message", got=message.kind)
        if len(self._devices) >= MAX_DEVICES:
            _close(descriptors)
            return
        self._devices.append(Device(_DEVICES[ghcb.DeviceKind(kind)], index, port, descriptors[0]))

    @staticmethod
    def _late() -> BackendError:
        return BackendError("the host did not answer in time", code="platform-host-deadline")

    @staticmethod
    def _gone(why: str) -> BackendError:
        return BackendError(f"the host is gone: {why}", code="platform-host-gone")
