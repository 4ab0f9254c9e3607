# SPDX-License-Identifier: MIT OR Apache-2.0
"""`svsm.testing.nvme_model` for fuzzers: it tells what it says, looks at what it gets, and asks what to lie about.

`Controller.answer` is where completions are decided; each lie there books what it costs in the `Debt` of the call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from svsm.formats.nvme import PAGE_BYTES, AdminOpcode, Completion, NvmeRegister, NvmOpcode, Submission
from svsm.fuzz.choices import Choices
from svsm.fuzz.disks.verdict import Clock, Debt
from svsm.fuzz.target import expect
from svsm.storage.drivers.nvme.queue import QueuePair
from svsm.testing.nvme_model import NvmeModel

__all__ = ["LyingController"]

_CSTS: Final = int(NvmeRegister.CSTS)
_ZERO_PAGE: Final = bytes(PAGE_BYTES)
_OTHER_ENDS: Final = ("nvme-completion-unexpected", "nvme-completion-head", "nvme-timeout", "nvme-completion-id")
_Posted = Sequence[tuple[int, Completion]]


class LyingController(NvmeModel):
    """A controller that lies.

    Args:
        view: The shared memory.
        content: Of the disk.
        clock: Moved when the driver waits.
        block_shift: Block size as a power of two.
        heard: Told every access to registers.
        pair_of: The driver's pair behind a queue number.

    Attributes:
        debt: Of the call that runs.
        register_lies: By offset, as in `virtio_device`.
        shown: The Identify pages as they were given last, by CNS.
        owed: Memory of commands that were never completed, for whoever completes them after a reset.
        late: Such memory is written with the next completion.
    """

    def __init__(
        self,
        view: memoryview,
        content: bytearray,
        clock: Clock,
        *,
        block_shift: int,
        heard: Callable[[bool, int, int], None],
        pair_of: Callable[[int], QueuePair],
    ) -> None:
        super().__init__(view, content, clock, block_shift=block_shift)  # type: ignore[arg-type]  # this clock has what the model asks of its own
        self.debt = Debt()
        self.register_lies: dict[int, Callable[[int, int], int]] = {}
        self.shown: dict[int, bytes] = {}
        self.owed: list[memoryview] = []
        self.late = False
        self.answer = lambda _model, queue, honest: self._answer(queue, honest)
        self._heard = heard
        self._pair_of = pair_of
        self._reads: dict[int, int] = {}
        self._plan: list[tuple[int, int, Choices]] = []
        self._count = 0
        self._stride = 4
        self._heads = [0, 0]
        self._old: list[memoryview] = []
        self._delayed: list[tuple[int, Completion]] = []
        self._acts: tuple[Callable[[int, Completion, Choices], _Posted], ...] = (
            self._identifier,
            self._queue,
            self._head,
            self._status,
            self._twice,
            self._hold,
            self._delay,
            self._phase,
            self._stop,
            self._result,
            self._identifier,
            self._head,
        )

    # ---- registers --------------------------------------------------------------------------------------------------

    def read32(self, offset: int) -> int:
        """A trapped load."""
        value = super().read32(offset)
        lie = self.register_lies.get(offset)
        if lie is not None:
            count = self._reads.get(offset, 0)
            self._reads[offset] = count + 1
            value = lie(count, value)
        if offset == NvmeRegister.CAP + 4:
            self._stride = 4 << (value & 0xF)  # whatever it says, it keeps
        self._heard(False, offset, value)
        return value

    def write32(self, offset: int, value: int) -> None:
        """A trapped store."""
        self._heard(True, offset, value)
        expect(0 <= offset <= self.size_bytes - 4, "a register outside the window is written")
        if offset >= NvmeRegister.DOORBELLS:
            offset = NvmeRegister.DOORBELLS + (offset - NvmeRegister.DOORBELLS) // self._stride * 4
        super().write32(offset, value)

    def new_life(self) -> None:
        """A reset: what is owed now is of the life before."""
        self._old, self.owed = self.owed, []
        self._delayed.clear()
        self._heads = [0, 0]
        self.stalled = self.spurious = False
        self.registers.clear()

    def begin(self, debt: Debt, choices: Choices) -> None:
        """A call begins: decide what will be done to which of its commands. A byte says how many lies there are."""
        self.debt = debt
        self._count = 0
        self._plan.clear()
        kind = choices.unsigned(1)
        for _ in range((0, 1, 1, 2)[kind >> 6]):
            place = choices.unsigned(1)
            self._plan.append((place >> 4 & 7, place & 15, choices))

    # ---- commands ---------------------------------------------------------------------------------------------------

    def _admin(self, command: Submission) -> tuple[int, int]:
        if command.opcode == AdminOpcode.IDENTIFY and command.cdw10 in (0, 1):
            expect(
                bytes(self.memory(command.prp1, PAGE_BYTES)) == _ZERO_PAGE, "a page is not zeroed before it is asked"
            )
            self.shown[command.cdw10] = self.identify(command.cdw10)
        return super()._admin(command)

    def run(self, command: Submission) -> int:
        """One I/O command; what a read exposes is clean."""
        if command.opcode == NvmOpcode.READ:
            length = ((command.cdw12 & 0xFFFF) + 1) << self.block_shift
            for part in self._pages(command, length):
                expect(part == _ZERO_PAGE[: len(part)], "a buffer is not zeroed before a read")
        return super().run(command)

    def _doorbell(self, number: int, value: int) -> None:
        super()._doorbell(number, value)
        while self._delayed:
            queue, completion = self._delayed.pop()
            self.post(queue, completion.replace(sq_head=self._queues[queue].head))

    # ---- completions ------------------------------------------------------------------------------------------------

    def _answer(self, queue: int, honest: Completion) -> _Posted:
        if self.late:
            self.late = False
            for part in self._old:
                part[:] = b"\xdd" * len(part)
        number, self._count = self._count, self._count + 1
        for at, kind, choices in self._plan:
            if at == number:
                posted = self._acts[kind % len(self._acts)](queue, honest, choices)
                self._heads[queue] = honest.sq_head
                return posted
        self._heads[queue] = honest.sq_head
        return [(queue, honest)]

    def _identifier(self, queue: int, honest: Completion, choices: Choices) -> _Posted:
        pair, own = self._pair_of(queue), honest.command_id
        edges = (pair.slots, 0xFFFF, own ^ 1, own + 1, own | 0x100, 0x8000)
        choice = choices.unsigned(1)
        value = edges[choice % 8] if choice % 8 < len(edges) else choices.unsigned(2)
        if value == own:
            self.debt.lies += 1
        elif value >= pair.slots:
            self.debt.die("nvme-completion-id")
        elif pair._flying[value]:
            self.debt.die(*_OTHER_ENDS)
        else:
            self.debt.die("nvme-completion-unexpected")
        return [(queue, honest.replace(command_id=value))]

    def _queue(self, queue: int, honest: Completion, choices: Choices) -> _Posted:
        value = (1 - queue, 2, 0xFFFF, queue | 0x100)[choices.unsigned(1) & 3]
        self.debt.die("nvme-completion-queue")
        return [(queue, honest.replace(sq_id=value))]

    def _head(self, queue: int, honest: Completion, choices: Choices) -> _Posted:
        pair, known = self._pair_of(queue), self._heads[queue]
        entries = pair.entries
        # Whole rings above a head that is right: only a comparison with the ring's size tells them apart.
        again = honest.sq_head + entries * (1 + choices.unsigned(1) % 32)
        edges = (again, 0xFFFF, entries, (pair.tail + 1) % entries, honest.sq_head, (known - 1) % entries)
        value = edges[choices.unsigned(1) % len(edges)]
        moved = (value - known) % entries
        if value >= entries or moved > (pair.tail - known) % entries:
            self.debt.die("nvme-completion-head")
        elif value == honest.sq_head:
            self.debt.lies += 1
        else:
            self.debt.whatever()
        return [(queue, honest.replace(sq_head=value))]

    def _status(self, queue: int, honest: Completion, choices: Choices) -> _Posted:
        value = (0x281, 1, 0x7FF, 0x4000, 0x7FFF, 0x800)[choices.unsigned(1) % 6]
        if not value & 0x7FF:
            self.debt.lies += 1
        elif queue:
            self.debt.fail()
        else:
            self.debt.die("nvme-admin-refused")
        return [(queue, honest.replace(status=value << 1))]

    def _twice(self, queue: int, honest: Completion, choices: Choices) -> _Posted:
        if honest.sq_head == self._pair_of(queue).tail:  # seen only with the next command
            self.debt.whatever()
        else:
            self.debt.die("nvme-completion-unexpected")
        return [(queue, honest), (queue, honest)]

    def _hold(self, queue: int, honest: Completion, choices: Choices) -> _Posted:
        """Never completed, perhaps with interrupts without end."""
        command = self.commands[-1][1]
        if queue and command.opcode == NvmOpcode.READ:
            self.owed += self._pages(command, ((command.cdw12 & 0xFFFF) + 1) << self.block_shift)
        self.debt.die("nvme-timeout")
        self.spurious |= choices.flag()
        return []

    def _delay(self, queue: int, honest: Completion, choices: Choices) -> _Posted:
        self._delayed.append((queue, honest))
        self.debt.lies += 1
        return []

    def _phase(self, queue: int, honest: Completion, choices: Choices) -> _Posted:
        self.post(queue, honest, flip=False)
        self.debt.die("nvme-timeout")
        return []

    def _stop(self, queue: int, honest: Completion, choices: Choices) -> _Posted:
        """The controller fails, pauses, shuts down or is gone, and completes nothing."""
        bits = (2, 1 << 5, 1 << 3, 0xFFFF_FFFF)[choices.unsigned(1) & 3]
        self.registers[_CSTS] = lambda: self.status() | bits
        self.debt.die("nvme-gone" if bits == 0xFFFF_FFFF else "nvme-failed")
        if _CSTS in self.register_lies:  # which may say that all is well
            self.debt.whatever()
        return []

    def _result(self, queue: int, honest: Completion, choices: Choices) -> _Posted:
        self.debt.lies += 1
        return [(queue, honest.replace(result=0xFFFF_FFFF))]
