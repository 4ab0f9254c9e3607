# SPDX-License-Identifier: MIT OR Apache-2.0
"""An NVMe controller's registers and its admin queue: reset, start, Identify, one I/O queue pair, time.

The registers are behind `Registers`: device memory in a real VM, QEMU's qtest socket. Each answer comes from the host.
CAP is read once; waiting for RDY is bounded by the clock and by a count; a status of all ones is a device that is gone,
and CFS or anything else unexpected in CSTS ends the controller. The doorbells' stride is the controller's choice: the
highest doorbell must lie in the window that was mapped.

Waiting for a completion: look a few times, wait for an interrupt, look again; after a wake-up without news look at
CSTS. Interrupts that bring nothing, again and again, are answered with pauses. A doorbell is never rung twice: NVMe
has no notification that a controller could decline, so a lost one is a dead controller.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Protocol

from svsm.formats.errors import ProtocolError, SvsmError
from svsm.formats.nvme import (
    IDENTIFY_BYTES,
    PAGE_BYTES,
    AdminOpcode,
    Capabilities,
    ControllerStatus,
    NvmeRegister,
    configuration_word,
    doorbell,
    status_name,
)
from svsm.storage.drivers.dma import DmaMemory
from svsm.storage.drivers.nvme.queue import QueuePair

__all__ = ["ADMIN_ENTRIES", "Controller", "Registers"]

ADMIN_ENTRIES = 8
_WORD = 0xFFFF_FFFF
_READY_TRIES = 100_000
_RESET_NOTICE = 1 << 4
"""CSTS.NSSRO: an earlier reset of the subsystem, which harms nobody. Any other bit but RDY does."""
_READY_PAUSE_SECONDS = 0.001
_FRUITLESS_WAKE_UPS = 64
_STORM_PAUSE_SECONDS = 0.001
_CNS_NAMESPACE, _CNS_CONTROLLER = 0, 1
_FEATURE_QUEUES = 7
_QUEUE_CONTIGUOUS, _QUEUE_INTERRUPTS = 1, 2


class Registers(Protocol):
    """The controller's register window, BAR 0."""

    @property
    def size_bytes(self) -> int:
        """Of the window."""

    def read32(self, offset: int) -> int:
        """The register at a byte offset; hostile."""

    def write32(self, offset: int, value: int) -> None:
        """Set a register."""

    def wait_interrupt(self, seconds: float) -> bool:
        """Until an interrupt arrives, at most so long; whether one did. It may be spurious."""

    def close(self) -> None:
        """Let go."""


class Controller:
    """Registers and admin queue.

    Args:
        registers: Owned.
        clock: What deadlines are measured with.
        pause: Sleeps for seconds.
        spins: How often to look before waiting.
        poll_seconds: Look at CSTS after so long without an interrupt.

    Raises:
        ProtocolError: ``nvme-register``, ``nvme-gone``, ``nvme-unsupported``.
        BackendError: What `registers` raises.
    """

    def __init__(
        self,
        registers: Registers,
        *,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
        spins: int = 100,
        poll_seconds: float = 0.05,
    ) -> None:
        self._registers = registers
        self._clock = clock
        self._pause = pause
        self._spins = spins
        self._poll_seconds = poll_seconds
        self._fruitless = 0
        low, high = self._read(NvmeRegister.CAP), self._read(NvmeRegister.CAP + 4)
        if low == _WORD and high == _WORD:
            raise ProtocolError("there is no NVMe controller at these registers", code="nvme-gone")
        self.capabilities = Capabilities.parse(low | high << 32)
        if not self.capabilities.nvm_command_set or self.capabilities.smallest_page_bytes != PAGE_BYTES:
            raise ProtocolError(
                "the controller has no NVM commands, or no pages of 4 KiB",
                code="nvme-unsupported",
                got=low | high << 32,
            )
        if self.capabilities.queue_entries < 2:
            raise ProtocolError("the controller's queues hold nothing", code="nvme-unsupported", field="MQES", got=0)
        highest = doorbell(1, self.capabilities.doorbell_stride_bytes, completion=True)
        if highest + 4 > registers.size_bytes:
            raise ProtocolError(
                "the doorbells are outside the registers",
                code="nvme-doorbell",
                expected=registers.size_bytes,
                got=highest,
            )

    # ---- registers --------------------------------------------------------------------------------------------------

    def _read(self, offset: int) -> int:
        value = self._registers.read32(offset)
        if not 0 <= value <= _WORD:
            raise ProtocolError("a register has an impossible value", code="nvme-register", offset=offset)
        return value

    def _write64(self, offset: int, value: int) -> None:
        self._registers.write32(offset, value & _WORD)
        self._registers.write32(offset + 4, value >> 32)

    def _status(self) -> int:
        status = self._read(NvmeRegister.CSTS)
        if status == _WORD:
            raise ProtocolError("the controller is gone", code="nvme-gone")
        return status

    def _await_status(self, mask: int, wanted: int, deadline: float, what: str) -> int:
        for _ in range(_READY_TRIES):
            status = self._status()
            if status & mask == wanted:
                return status
            if status & ControllerStatus.CFS and wanted:
                raise ProtocolError("the controller has failed", code="nvme-failed", got=status)
            if self._clock() >= deadline:
                break
            self._pause(_READY_PAUSE_SECONDS)
        raise ProtocolError(
            f"the controller does not {what} in time", code="nvme-stuck", hint="only its host can help: restart it"
        )

    def reset(self, *, deadline: float) -> None:
        """Switch it off and wait until it is: from then on it touches no memory.

        Raises:
            ProtocolError: ``nvme-stuck``, ``nvme-gone``, ``nvme-register``.
        """
        self._registers.write32(NvmeRegister.CC, configuration_word(enable=False))
        self._await_status(ControllerStatus.RDY, 0, deadline, "switch off")

    def start(self, memory: DmaMemory, *, deadline: float) -> None:
        """Give it an admin queue and switch it on.

        Args:
            memory: What all queues and buffers of this life come from.
            deadline: The controller's own CAP.TO counts where it is sooner.

        Raises:
            ProtocolError: ``nvme-failed``, ``nvme-stuck``, ``nvme-gone``, ``nvme-register``.
            StateError: ``dma-memory``.
        """
        entries = min(ADMIN_ENTRIES, self.capabilities.queue_entries)
        self._admin = QueuePair(memory, identifier=0, entries=entries)
        self._page = memory.allocate(IDENTIFY_BYTES, align=PAGE_BYTES)
        self._memory = memory
        self._registers.write32(NvmeRegister.AQA, (entries - 1) << 16 | entries - 1)
        self._write64(NvmeRegister.ASQ, self._admin.submissions)
        self._write64(NvmeRegister.ACQ, self._admin.completions)
        self._registers.write32(NvmeRegister.CC, configuration_word(enable=True))
        limit = self._clock() + max(self.capabilities.ready_seconds, _READY_PAUSE_SECONDS)
        self._await_status(ControllerStatus.RDY, ControllerStatus.RDY, min(deadline, limit), "switch on")
        self.check()

    def check(self) -> None:
        """Ready, and nothing else: no failure, no shutdown, no pause.

        Raises:
            ProtocolError: ``nvme-failed``, ``nvme-gone``, ``nvme-register``.
        """
        status = self._status()
        if status & ~_RESET_NOTICE != ControllerStatus.RDY:
            raise ProtocolError(
                "the controller has failed, or stopped by itself",
                code="nvme-failed",
                expected=int(ControllerStatus.RDY),
                got=status,
            )

    def ring(self, pair: QueuePair) -> None:
        """Tell it about new commands."""
        offset = doorbell(pair.identifier, self.capabilities.doorbell_stride_bytes, completion=False)
        self._registers.write32(offset, pair.tail)

    def acknowledge(self, pair: QueuePair) -> None:
        """Tell it which completions have been taken."""
        offset = doorbell(pair.identifier, self.capabilities.doorbell_stride_bytes, completion=True)
        self._registers.write32(offset, pair.head)

    # ---- time -------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A new call begins: earlier fruitless wake-ups are forgotten."""
        self._fruitless = 0

    def wait(self, pair: QueuePair, deadline: float) -> None:
        """Wait for a completion, a while at most; the caller looks and comes back.

        Raises:
            ProtocolError: ``nvme-timeout`` when `deadline` has passed; what `check` raises.
        """
        for _ in range(self._spins):
            if pair.pending():
                return
        now = self._clock()
        if now >= deadline:
            raise ProtocolError("the controller does not answer in time", code="nvme-timeout", queue=pair.identifier)
        seconds = min(deadline - now, self._poll_seconds)
        if self._fruitless >= _FRUITLESS_WAKE_UPS:
            self._pause(min(_STORM_PAUSE_SECONDS, seconds))
        else:
            self._registers.wait_interrupt(seconds)
        if pair.pending():
            self._fruitless = 0
            return
        self._fruitless += 1
        self.check()

    # ---- admin commands ---------------------------------------------------------------------------------------------

    def _command(
        self, opcode: int, *, deadline: float, namespace: int = 0, prp: int = 0, cdw10: int, cdw11: int
    ) -> int:
        """One admin command; its result."""
        admin = self._admin
        self.begin()
        admin.submit(0, (opcode | namespace << 32, prp, 0, cdw10 | cdw11 << 32, 0, 0))
        self.ring(admin)
        while not (done := admin.collect()):
            self.wait(admin, deadline)
        self.acknowledge(admin)
        status = done[0][1]
        if status & 0x7FF:
            raise ProtocolError(
                f"the controller refuses an admin command: {status_name(status)}",
                code="nvme-admin-refused",
                opcode=opcode,
                got=status,
            )
        return admin.results[0]

    def _identify(self, structure: int, namespace: int, deadline: float) -> bytes:
        self._memory.zero(self._page, IDENTIFY_BYTES)
        address = self._memory.device_address(self._page)
        self._command(
            AdminOpcode.IDENTIFY, deadline=deadline, namespace=namespace, prp=address, cdw10=structure, cdw11=0
        )
        return self._memory.bytes[self._page : self._page + IDENTIFY_BYTES].tobytes()

    def identify_controller(self, *, deadline: float) -> bytes:
        """Identify, CNS 01h: a private copy of 4096 bytes.

        Raises:
            ProtocolError: ``nvme-admin-refused``, the queue's and the clock's.
        """
        return self._identify(_CNS_CONTROLLER, 0, deadline)

    def identify_namespace(self, number: int, *, deadline: float) -> bytes:
        """Identify, CNS 00h: a private copy of 4096 bytes.

        Raises:
            ProtocolError: ``nvme-admin-refused``, the queue's and the clock's.
        """
        return self._identify(_CNS_NAMESPACE, number, deadline)

    def create_queue(self, memory: DmaMemory, *, entries: int, deadline: float) -> QueuePair:
        """Ask for one I/O queue pair, number 1.

        Raises:
            ProtocolError: ``nvme-admin-refused``, the queue's and the clock's.
            StateError: ``dma-memory``, ``nvme-queue-shape``.
        """
        # The answer says how many there may be: at least one, and one is all that is used, so it is not needed.
        self._command(AdminOpcode.SET_FEATURES, deadline=deadline, cdw10=_FEATURE_QUEUES, cdw11=0)
        pair = QueuePair(memory, identifier=1, entries=entries)
        size = pair.identifier | (entries - 1) << 16
        flags = _QUEUE_CONTIGUOUS | _QUEUE_INTERRUPTS
        self._command(AdminOpcode.CREATE_CQ, deadline=deadline, prp=pair.completions, cdw10=size, cdw11=flags)
        flags = _QUEUE_CONTIGUOUS | pair.identifier << 16
        self._command(AdminOpcode.CREATE_SQ, deadline=deadline, prp=pair.submissions, cdw10=size, cdw11=flags)
        return pair

    # ---- end --------------------------------------------------------------------------------------------------------

    def shut_down(self, *, deadline: float) -> None:
        """Let it finish in order, where it can, and switch it off.

        Raises:
            ProtocolError: As `reset`.
        """
        mask = ControllerStatus.SHUTDOWN_OCCURRING | ControllerStatus.SHUTDOWN_COMPLETE
        self._registers.write32(NvmeRegister.CC, configuration_word(enable=True, shutdown=True))
        with contextlib.suppress(SvsmError):  # it is switched off either way
            self._await_status(mask, ControllerStatus.SHUTDOWN_COMPLETE, deadline, "shut down")
        self.reset(deadline=deadline)

    def close(self) -> None:
        """Close the registers."""
        self._registers.close()
