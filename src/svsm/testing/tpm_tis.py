# SPDX-License-Identifier: MIT OR Apache-2.0
"""A driver for a TPM behind its FIFO interface: what a guest does to reach QEMU's ``tpm-tis``.

Theory (TCG PC Client Platform TPM Profile 1.05 §6.5, "TIS"). The registers are one page for each of five localities,
from 0xFED40000 on. A locality asks for the TPM (requestUse), has it (activeLocality), gives it back by writing that
bit, and loses it without being asked to a higher one that seizes it (Seize, beenSeized). The one that has it moves
the TPM through

    idle ──commandReady──▶ ready ──bytes──▶ reception ──tpmGo──▶ execution ──▶ completion ──commandReady──▶ ready

While it receives, Expect says whether a byte is missing, by the size in the command's own header; in completion
dataAvail says whether one is left. burstCount is how many bytes may be moved before it is read again. commandReady in
reception or execution aborts. Every wait is bounded by one of the profile's timeouts or the caller's deadline.

`Tis` obeys these rules and refuses a TPM that does not. `registers` and `locality` are open: who wants to break the
rules writes the registers. Polled; interrupts are not used. Test equipment: svsm's own kernel has no such driver,
because its TPMs are its own services.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from typing import Final, Protocol

from svsm.formats.errors import BackendError, ProtocolError, StateError
from svsm.formats.tpm import ResponseHeader

__all__ = ["PAGE_BYTES", "Access", "ByteRegisters", "Register", "Status", "Tis"]

PAGE_BYTES: Final = 0x1000
"""Registers of one locality."""
_LOCALITIES: Final = 5
_BURST_SHIFT: Final = 8
_BURST_MASK: Final = 0xFFFF
_MOST_BYTES: Final = 4096
"""Of one response; more is refused before it is read."""
_TIMEOUT_A: Final = 0.75
_TIMEOUT_B: Final = 2.0
_TIMEOUT_C: Final = 0.2
_TIMEOUT_D: Final = 0.03
_PATIENCE: Final = 10.0
"""The profile's timeouts are a chip's. QEMU's TPM is threads and processes that wait for processors."""


class Register(enum.IntEnum):
    """Offsets in a locality's page (profile §6.5.2, table 18)."""

    ACCESS = 0x00  # 1 byte
    INT_ENABLE = 0x08
    INT_STATUS = 0x10
    INTF_CAPABILITY = 0x14
    STS = 0x18  # 4 bytes
    DATA_FIFO = 0x24  # bytes
    INTERFACE_ID = 0x30
    DID_VID = 0xF00


class Access(enum.IntFlag):
    """TPM_ACCESS_x (§6.5.2.4)."""

    ESTABLISHMENT = 1 << 0
    REQUEST_USE = 1 << 1
    PENDING_REQUEST = 1 << 2
    SEIZE = 1 << 3
    BEEN_SEIZED = 1 << 4
    ACTIVE_LOCALITY = 1 << 5
    VALID = 1 << 7


class Status(enum.IntFlag):
    """TPM_STS_x (§6.5.2.5), without burstCount in bits 8 to 23."""

    RESERVED_0 = 1 << 0  # set where nothing answers: for a locality that does not have the TPM, all bits are
    RESPONSE_RETRY = 1 << 1
    SELF_TEST_DONE = 1 << 2
    EXPECT = 1 << 3
    DATA_AVAIL = 1 << 4
    GO = 1 << 5
    COMMAND_READY = 1 << 6
    VALID = 1 << 7
    COMMAND_CANCEL = 1 << 24
    FAMILY_TPM2 = 1 << 26


class ByteRegisters(Protocol):
    """All localities' registers."""

    def read(self, offset: int, width_bytes: int) -> int:
        """1 or 4 bytes, little-endian."""

    def write(self, offset: int, width_bytes: int, value: int) -> None:
        """As `read`."""

    def read_bytes(self, offset: int, count: int) -> bytes:
        """The byte at `offset`, read so many times."""

    def write_bytes(self, offset: int, data: bytes) -> None:
        """Each byte, to the same offset."""


class Tis:
    """One locality of a TPM.

    Args:
        registers: Of all localities.
        locality: 0 to 3.
        clock: Monotonic seconds.

    Raises (all methods):
        BackendError: ``tis-timeout``, ``tis-seized``.
        ProtocolError: ``tis-protocol``.
    """

    def __init__(
        self, registers: ByteRegisters, *, locality: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if not 0 <= locality < _LOCALITIES - 1:
            raise StateError("localities 0 to 3 are software's", code="tis-locality", got=locality)
        self.registers = registers
        self.locality = locality
        self._page = locality * PAGE_BYTES
        self._clock = clock

    # ---- registers --------------------------------------------------------------------------------------------------

    def access(self) -> Access:
        """TPM_ACCESS."""
        return Access(self.registers.read(self._page + Register.ACCESS, 1))

    def write_access(self, value: Access) -> None:
        """One bit of TPM_ACCESS."""
        self.registers.write(self._page + Register.ACCESS, 1, value)

    def status(self) -> tuple[Status, int]:
        """TPM_STS and its burstCount."""
        value = self.registers.read(self._page + Register.STS, 4)
        return Status(value & ~(_BURST_MASK << _BURST_SHIFT)), value >> _BURST_SHIFT & _BURST_MASK

    def write_status(self, value: Status) -> None:
        """One bit of TPM_STS."""
        self.registers.write(self._page + Register.STS, 4, value)

    def put(self, data: bytes) -> None:
        """Bytes into the FIFO, whatever the TPM says."""
        self.registers.write_bytes(self._page + Register.DATA_FIFO, data)

    def get(self, count: int) -> bytes:
        """Bytes out of the FIFO, whatever the TPM says."""
        return self.registers.read_bytes(self._page + Register.DATA_FIFO, count)

    def read(self, register: Register) -> int:
        """A register of 4 bytes."""
        return self.registers.read(self._page + register, 4)

    # ---- waiting ----------------------------------------------------------------------------------------------------

    def _until(self, deadline: float, what: str, done: Callable[[], bool]) -> None:
        while not done():
            if self._clock() > deadline:
                raise BackendError("the TPM does not get ready in time", code="tis-timeout", waiting_for=what)

    def _soon(self, timeout_seconds: float) -> float:
        return self._clock() + timeout_seconds * _PATIENCE

    def _look(self, wanted: Status, what: str, deadline: float) -> Status:
        """TPM_STS once it has all of `wanted`."""
        seen = Status(0)

        def there() -> bool:
            nonlocal seen
            seen, _ = self.status()
            if seen & Status.RESERVED_0 or not self.access() & Access.ACTIVE_LOCALITY:
                raise BackendError("this locality does not have the TPM", code="tis-seized", waiting_for=what)
            return seen & wanted == wanted

        self._until(deadline, what, there)
        return seen

    def _burst(self, deadline: float, length: int) -> int:
        """How many of `length` bytes may be moved now; at least one."""
        burst = 0

        def there() -> bool:
            nonlocal burst
            burst = self.status()[1]
            return burst > 0

        self._until(deadline, "a burst count", there)
        return min(burst, length)

    # ---- the rules --------------------------------------------------------------------------------------------------

    def request(self) -> None:
        """Get the TPM for this locality (§6.5.2.4): asks, and waits for it."""
        deadline = self._soon(_TIMEOUT_A)
        self._until(deadline, "a valid access register", lambda: bool(self.access() & Access.VALID))
        self.write_access(Access.REQUEST_USE)
        self._until(deadline, "the locality", lambda: bool(self.access() & Access.ACTIVE_LOCALITY))

    def seize(self) -> None:
        """Take the TPM from a lower locality, which is told by beenSeized."""
        self.write_access(Access.SEIZE)
        self._until(self._soon(_TIMEOUT_A), "the locality", lambda: bool(self.access() & Access.ACTIVE_LOCALITY))

    def release(self) -> None:
        """Give the TPM back."""
        self.write_access(Access.ACTIVE_LOCALITY)

    def ready(self) -> None:
        """Idle, completion or anything else to ready: a command under way is aborted.

        The bit is not qualified by stsValid, which stays clear in this state.
        """
        self.write_status(Status.COMMAND_READY)
        self._look(Status.COMMAND_READY, "command ready", self._soon(_TIMEOUT_B))

    def send(self, command: bytes) -> None:
        """A command into a ready TPM; Expect must be set before its last byte and clear after."""
        deadline = self._soon(_TIMEOUT_A)
        at = 0
        while at < len(command) - 1:
            step = self._burst(deadline, len(command) - 1 - at)
            self.put(command[at : at + step])
            at += step
            if not self._look(Status.VALID, "Expect", deadline) & Status.EXPECT:
                raise ProtocolError("the TPM wants no more of the command", code="tis-protocol", got=at)
        self._burst(deadline, 1)
        self.put(command[-1:])
        if self._look(Status.VALID, "Expect", self._soon(_TIMEOUT_C)) & Status.EXPECT:
            raise ProtocolError("the TPM wants more than the command", code="tis-protocol", got=len(command))

    def receive(self, deadline: float) -> bytes:
        """The response of a TPM that executes; leaves it ready."""
        self._look(Status.VALID | Status.DATA_AVAIL, "data", deadline)
        response = self._take(ResponseHeader.SIZE)
        size = ResponseHeader.parse(response).size
        if not ResponseHeader.SIZE <= size <= _MOST_BYTES:
            raise ProtocolError("a TPM response has an impossible size", code="tis-protocol", got=size)
        response += self._take(size - len(response))
        if self._look(Status.VALID, "the end of data", self._soon(_TIMEOUT_C)) & Status.DATA_AVAIL:
            raise ProtocolError("the TPM has more than its response", code="tis-protocol", got=size)
        self.ready()
        return response

    def _take(self, length: int) -> bytes:
        taken = b""
        deadline = self._soon(_TIMEOUT_D + _TIMEOUT_A)
        while len(taken) < length:
            if not self._look(Status.VALID, "data", deadline) & Status.DATA_AVAIL:
                raise ProtocolError("the TPM's response is shorter than it says", code="tis-protocol", got=len(taken))
            taken += self.get(self._burst(deadline, length - len(taken)))
        return taken

    def ask(self, command: bytes, *, seconds: float = 30.0) -> bytes:
        """Ready, send, go, receive; the locality is this one's.

        Args:
            command: Whole, with its header.
            seconds: For the execution.

        Returns:
            The whole response.
        """
        self.ready()
        self.send(command)
        self.write_status(Status.GO)
        return self.receive(self._clock() + seconds)
