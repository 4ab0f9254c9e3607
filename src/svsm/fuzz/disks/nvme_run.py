# SPDX-License-Identifier: MIT OR Apache-2.0
"""Programs against the NVMe driver: see `program`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from svsm.formats.errors import SvsmError
from svsm.formats.nvme import Completion, NvmeRegister
from svsm.fuzz.choices import Choices
from svsm.fuzz.disks.nvme_device import LyingController
from svsm.fuzz.disks.nvme_rules import NvmeRules, Size, judge_namespace, judge_pages
from svsm.fuzz.disks.program import DEADLINE, DiskRun, edge, shared_memory
from svsm.fuzz.disks.verdict import Debt
from svsm.fuzz.target import expect
from svsm.storage.drivers.dma import DmaMemory
from svsm.storage.drivers.nvme.disk import NvmeDisk, NvmePolicy, memory_bytes
from svsm.storage.drivers.nvme.queue import QueuePair
from svsm.testing.nvme_attacks import FlickerMemory
from svsm.testing.nvme_model import GPA

__all__ = ["NvmeRun"]

_POLICY: Final = NvmePolicy(
    depth=4, large_bytes=16384, large_slots=1, spins=2, deadline_seconds=DEADLINE, poll_seconds=DEADLINE / 25
)
_LIARS: Final = (int(NvmeRegister.CAP), int(NvmeRegister.CAP) + 4, int(NvmeRegister.CSTS), int(NvmeRegister.CSTS))
_FIELDS: Final = (
    *((1, 512, 1), (1, 513, 1), (1, 111, 1), (1, 516, 4), (1, 77, 1), (1, 514, 2), (1, 520, 2), (1, 525, 1)),
    *((0, 0, 8), (0, 25, 1), (0, 26, 1), (0, 29, 1), (0, 128, 2), (0, 130, 1), (0, 99, 1), (0, 7, 1)),
)
"""(CNS, offset, width) of what the driver reads of Identify pages."""
_EDGES: Final = (0, 1, 2, 3, 8, 14, 16, 0x66, 0x77, 0x55, 0xFF)


def _ones(_count: int, _honest: int) -> int:
    return 0xFFFF_FFFF


class _Known(NvmeDisk):
    """A driver that the lies know while it starts."""

    def __init__(self, run: NvmeRun) -> None:
        run.driver = self
        super().__init__(run.model, run.dma, policy=_POLICY, clock=run.clock, pause=run.clock.pause)


class NvmeRun(DiskRun):
    """One program against the NVMe driver.

    Args:
        data: The program. Its first byte says what the controller offers.
    """

    driver: NvmeDisk
    rules: NvmeRules

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        form = self.choices.unsigned(1)
        self.memory = shared_memory(memory_bytes(_POLICY))
        view = memoryview(self.memory)
        self._shift = (9, 12, 9, 14)[form & 3]
        self.rules = NvmeRules(window_bytes=LyingController.size_bytes)
        self.model = LyingController(
            view,
            self.content,
            self.clock,
            block_shift=self._shift,
            heard=self.rules.hear,
            pair_of=self._pair_of,
        )
        self.flickers = form >> 5 == 7
        if form & 0x1C == 0x04:
            self.model.pages[0][99] = b"\x01"  # read-only
        if form & 0x1C == 0x08:
            self.model.pages[1][520] = bytes(2)  # no optional command
        self.model.pages[0][132] = b"\0\0\x09\0" * 15  # formats that it does not have
        self.dma = (FlickerMemory if self.flickers else DmaMemory)(view, address=GPA)
        self._offer = {structure: dict(fields) for structure, fields in self.model.pages.items()}
        self._size: Size | None = None

    def _pair_of(self, queue: int) -> QueuePair:
        return self.driver._pair if queue else self.driver._controller._admin

    # ---- life and death ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """A driver."""
        self._up(self._make, self.choices)

    def _make(self) -> None:
        _Known(self)

    def restart(self) -> None:
        """A reset."""
        self._up(self.driver.reconnect, Choices(b""))

    def lie(self) -> None:
        """About a register, or in an Identify page."""
        choices = self.choices
        kind = choices.unsigned(1)
        if kind & 1:
            self.model.register_lies[_LIARS[kind >> 1 & 3]] = edge(choices)
            return
        if kind & 0xF0 == 0xF0:
            self.model.register_lies |= dict.fromkeys(_LIARS[:2], _ones)
            return
        structure, offset, width = _FIELDS[kind >> 1 & 15]
        value = choices.number() if kind & 0x80 else _EDGES[choices.unsigned(1) % len(_EDGES)]
        if offset in (512, 128):  # its neighbours stay as they are
            value, width = (value & 0xFF | 0x4400, 2) if offset == 512 else (value & 0xFFFF | self._shift << 16, 4)
        elif offset == 77:
            value %= 4
        self.model.pages[structure][offset] = (value % (1 << 8 * width)).to_bytes(width, "little")

    def be_honest(self) -> None:
        """Registers, pages, interrupts."""
        self.model.register_lies.clear()
        self.model.registers.clear()
        self.model.pages = {structure: dict(fields) for structure, fields in self._offer.items()}
        self.model.stalled = self.model.spurious = self.model.late = False

    def _up(self, start: Callable[[], None], lies: Choices) -> None:
        """Start or restart the driver, and compare with what registers, pages and completions said.

        Raises:
            SvsmError: The controller is refused, as it must be.
        """
        self.rules.code = ""
        self.clock.begin()
        self.model.new_life()
        debt = Debt()
        self.plan(debt, Choices(b"") if self.flickers else lies)
        self.tainted = False
        error: SvsmError | None = None
        try:
            start()
        except SvsmError as refused:
            error = refused
        self.rules.end()
        shown = self.model.shown
        self._size = judge_pages(shown[1], shown[0]) if len(shown) == 2 else None
        codes = debt.codes | ({self.rules.code} if self.rules.code else set())
        if len(shown) == 2 and self._size is None:
            codes |= {"nvme-identify"}
        self._judge(error, codes, debt)
        self.in_time()
        if error is not None:
            raise error
        self.tainted = debt.anything

    def _judge(self, error: SvsmError | None, codes: frozenset[str], debt: Debt) -> None:
        names = " or ".join(sorted(codes))
        if error is None:
            expect(not codes or debt.anything, f"started in spite of {names}")
            expect(self.driver.fault is None, "a new life begins without a fault")
            size, driver = self._size, self.driver
            expect(size is None or driver.block_size_bytes == size.block_bytes, "the block size is another")
            expect(size is None or driver.size_bytes == size.size_bytes, "the size is another")
        elif error.code != "dma-memory" or self._size is None or self._size.block_bytes <= _POLICY.large_bytes:
            expect(bool(codes) or debt.anything, "an honest controller is not started")
            expect(debt.anything or error.code in codes, f"not refused for {names}")

    # ---- calls ------------------------------------------------------------------------------------------------------

    def plan(self, debt: Debt, choices: Choices) -> None:
        """What the queues will do."""
        self.model.begin(debt, choices)

    def taken(self) -> int:
        """Commands that were fetched."""
        return len(self.model.commands)

    def flushes(self) -> int:
        """Of the controller."""
        return self.model.flushes

    def discards(self) -> bool:
        """Dataset Management."""
        return bool(self.model.shown[1][520] & 4)

    def settled(self, what: str) -> None:
        """Every slot is free again."""
        slots = self.driver._slots
        expect(not self.driver._pair.in_flight, f"{what}: something stays in flight")
        expect(len(slots._small) + len(slots._large) == len(slots.offsets), f"{what}: slots are lost, or found")

    def place(self, where: int, blocks: int) -> tuple[int, int] | None:
        """None where the controller lies about its block size and moves other bytes than it should: nobody can see."""
        honest = self.driver.block_size_bytes == 1 << self.model.block_shift
        return super().place(where, blocks) if honest else None

    def special(self, kind: int) -> None:
        """A poll, a reconnect, a completion of nothing."""
        if kind < 3:
            self._poll()
        elif kind == 3:
            self._reconnect()
        else:
            self._idle()

    def _poll(self) -> None:
        """Perhaps the namespace is another by now."""
        choice = self.choices.unsigned(1)
        if choice & 1:
            self.model.pages[0][0] = ((8, 64, 1, 1 << 50)[choice >> 1 & 3]).to_bytes(8, "little")
        if choice & 0x18 == 0x18:
            self.model.pages[0][130] = bytes([12 if self.model.block_shift == 9 else 9])
        debt, live, block = Debt(), self.driver.fault is None, self.driver.block_size_bytes
        page = judge_namespace(self.model.identify(0))
        if page is None or page.block_bytes != block:
            debt.die("nvme-identify")
        if self.call("poll", self.driver.poll, debt, lies=not debt.lies) and live and page is not None:
            expect(self.tainted or self.driver.size_bytes == page.size_bytes, "a change of the capacity is missed")

    def _reconnect(self) -> None:
        choice = self.choices.unsigned(1)
        self.be_honest()
        if choice & 3 == 3:
            self.lie()
        self.lost |= self.unflushed
        try:
            self._up(self.driver.reconnect, self.choices)
        except SvsmError as error:
            self.fault = self.fault or error
            expect(self.driver.fault is not None, "a controller that is refused is dead")
            return
        self.model.late = bool(choice & 0x80)

    def _idle(self) -> None:
        """Something is completed before it is asked for; then a read."""
        place = self.place(0, 1)
        if place is None or self.driver.fault is not None or self.flickers:
            return
        debt = Debt()
        queue, slots = self.model._queues[1], self.driver._slots
        honest = self.model.commands[-1][1]
        slot = (slots._small or slots._large)[-1] if self.choices.flag() else honest.command_id
        self.model.post(1, Completion(0, 0, queue.head, 1, slot, 0))
        debt.die("nvme-completion-unexpected")
        self.call("read", lambda: self.driver.read([place]), debt, lies=False)
