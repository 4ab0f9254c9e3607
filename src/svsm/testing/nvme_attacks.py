# SPDX-License-Identifier: MIT OR Apache-2.0
"""What a hostile NVMe controller can do, as named cases, and what must come of each.

A case changes the model (before the driver starts, or after), the driver then does a small fixed workload, and
`Attack.run` says in a few words what came of it:

    served                 everything worked and every byte was right
    refused CODE           the driver did not start, with this code
    died CODE              a call ended with block-io, and the device is dead for this reason
    failed                 a call ended with block-io, and the device lives
    wrong data             a call succeeded with bytes that are not the disk's
    zeros                  a call succeeded with zeros where the disk has something else
    …, too late            it took longer than a few deadlines

Time is the bench's: a driver that never gave up would be stopped by its clock. Any exception that is no `SvsmError`
escapes: whoever runs the case sees it.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

from svsm.formats.errors import BackendError, SvsmError
from svsm.formats.nvme import Completion, NvmeRegister, NvmOpcode, Submission
from svsm.storage.drivers.dma import DmaMemory
from svsm.storage.drivers.nvme.pci import ConfigurationSpace, enable_memory_bar, find_nvme
from svsm.testing.block_conformance import initial_content
from svsm.testing.nvme_model import NvmeBench, NvmeModel, nvme_bench

__all__ = ["ATTACKS", "Attack"]

_DISK_BYTES: Final = 64 << 10
_LATE_SECONDS: Final = 15
_FAR: Final = 0xFFFF_FFFF
_Posted = Sequence[tuple[int, Completion]]


@dataclasses.dataclass(frozen=True, slots=True)
class Attack:
    """One case.

    Attributes:
        name: What the controller does.
        expected: What must come of it.
        before: Changes the model before the driver starts.
        after: Changes it when the driver runs.
        flicker: Shared memory turns to garbage behind each reading.
        block_shift: The disk's block size as a power of two.
        act: Instead of the workload with the model.
    """

    name: str
    expected: str
    before: Callable[[NvmeModel], None] | None = None
    after: Callable[[NvmeModel], None] | None = None
    flicker: bool = False
    block_shift: int = 9
    act: Callable[[], str] | None = None

    def run(self) -> str:
        """What came of it."""
        return self.act() if self.act is not None else _work(self)


def _work(attack: Attack) -> str:
    content = bytearray(initial_content(_DISK_BYTES))
    memory_type: type[DmaMemory] = FlickerMemory if attack.flicker else DmaMemory
    bench = nvme_bench(content, block_shift=attack.block_shift, memory_type=memory_type)
    begun = bench.clock.now
    outcome = _outcome(attack, bench, content)
    return outcome if bench.clock.now - begun < _LATE_SECONDS else f"{outcome}, too late"


def _outcome(attack: Attack, bench: NvmeBench, content: bytearray) -> str:
    model, block = bench.model, 1 << attack.block_shift
    if attack.before is not None:
        attack.before(model)
    try:
        disk = bench.start()
    except SvsmError as error:
        return f"refused {error.code}"
    expected = bytes(content)
    if attack.after is not None:
        attack.after(model)
    try:
        count = _DISK_BYTES // block
        ranges = [(at * block, block) for at in range(count)] + [(0, 4 * block), (_DISK_BYTES // 2, _DISK_BYTES // 2)]
        got = disk.read(ranges)
        disk.write([(0, b"\x5a" * block)])
        disk.flush()
        again = disk.read([(0, block)])[0]
        disk.poll()
    except BackendError as error:
        return f"died {error.details['violation']!s}" if "violation" in error.details else "failed"
    right = [*(expected[offset : offset + length] for offset, length in ranges), b"\x5a" * block]
    wrong = [is_ for is_, should in zip([*got, again], right, strict=True) if bytes(is_) != should]
    if any(any(part) for part in wrong):
        return "wrong data"
    return "zeros" if wrong else "served"


# ---- memory that changes behind the reader ---------------------------------------------------------------------------


class _Flicker:
    """A view whose items turn to garbage as soon as the driver has taken a completion from them, or data."""

    def __init__(self, view: memoryview, *, words: bool) -> None:
        self._view = view
        self._words = words
        self.nbytes = view.nbytes

    def __getitem__(self, key: Any) -> Any:
        caller = sys._getframe(1)
        if isinstance(key, slice):
            return _Slice(self._view, key) if caller.f_code.co_name in ("_take", "_identify") else self._view[key]
        value = self._view[key]
        if self._words and caller.f_code.co_name == "collect":
            pair = caller.f_locals["self"]
            at = caller.f_locals["at"]
            # The phase stays: it is what the driver waits for in the next round.
            if key == at + 1 and value & 1 << 48 == pair._phase:
                self._view[key] = value & 1 << 48 | 0xFFFE_0000_FFFF
        return value

    def __setitem__(self, key: Any, value: Any) -> None:
        self._view[key] = value


class _Slice:
    """Data that is garbage once it has been copied."""

    def __init__(self, view: memoryview, key: slice) -> None:
        self._part = view[key]

    def tobytes(self) -> bytes:
        """The contents, once."""
        copied = self._part.tobytes()
        self._part[:] = b"\xee" * len(copied)
        return copied


class FlickerMemory(DmaMemory):
    """`DmaMemory` of that kind."""

    def __init__(self, memory: memoryview, *, address: int) -> None:
        super().__init__(memory, address=address)
        self._whole = self.bytes
        self.u64: Any = _Flicker(self.u64, words=True)
        self.bytes: Any = _Flicker(self.bytes, words=False)

    def part(self, offset: int, length: int) -> DmaMemory:
        """As the base's, over the plain bytes."""
        return type(self)(self._whole[offset : offset + length], address=self.address + offset)


# ---- hooks ----------------------------------------------------------------------------------------------------------


def _register(offset: int, value: int) -> Callable[[NvmeModel], None]:
    return lambda model: model.registers.__setitem__(offset, lambda: value)


def _all_ones(model: NvmeModel) -> None:
    model.registers.update({0: lambda: _FAR, 4: lambda: _FAR})


def _subsystem_reset(model: NvmeModel) -> None:
    model.registers[NvmeRegister.CSTS] = lambda: model.status() | 1 << 4


def _no_format(model: NvmeModel) -> None:
    """It would pass but for its number."""
    model.pages[0] |= {26: b"\x01", 132: b"\0\0\x09\0"}


def _capability(shift: int, width: int, value: int) -> Callable[[NvmeModel], None]:
    def change(model: NvmeModel) -> None:
        model.capabilities = model.capabilities & ~(((1 << width) - 1) << shift) | value << shift

    return change


def _page(structure: int, offset: int, data: bytes) -> Callable[[NvmeModel], None]:
    return lambda model: model.pages[structure].__setitem__(offset, data)


def _status_bits(bits: int) -> Callable[[NvmeModel], None]:
    def change(model: NvmeModel) -> None:
        model.stalled = True
        model.registers[NvmeRegister.CSTS] = lambda: model.status() | bits

    return change


def _answers(change: Callable[[NvmeModel, Completion], _Posted], *, admin: bool = False) -> Callable[[NvmeModel], None]:
    """Change completions of the I/O queue, or of the admin queue."""

    def install(model: NvmeModel) -> None:
        def answer(where: NvmeModel, queue: int, completion: Completion) -> _Posted:
            return change(where, completion) if (queue == 0) is admin else [(queue, completion)]

        model.answer = answer

    return install


def _field(*, admin: bool = False, **changes: int) -> Callable[[NvmeModel], None]:
    queue = 0 if admin else 1
    return _answers(lambda _model, completion: [(queue, completion.replace(**changes))], admin=admin)


def _twice(model: NvmeModel) -> None:
    """The first one only: more would not fit the ring."""
    calls = [0]

    def change(_model: NvmeModel, completion: Completion) -> _Posted:
        calls[0] += 1
        return [(1, completion)] * (2 if calls[0] == 1 else 1)

    _answers(change)(model)


def _another(model: NvmeModel, completion: Completion) -> _Posted:
    flying = {completion.command_id}
    return [(1, completion.replace(command_id=next(number for number in range(8) if number not in flying)))]


def _early(model: NvmeModel) -> None:
    """For the slot that the driver uses first; the honest completion of that is left out."""
    slot = 2
    calls = [0]

    def change(_model: NvmeModel, completion: Completion) -> _Posted:
        calls[0] += completion.command_id == slot
        return [] if completion.command_id == slot and calls[0] == 1 else [(1, completion)]

    _answers(change)(model)
    model.post(1, Completion(0, 0, 0, 1, slot, 0))


def _stormy(model: NvmeModel) -> None:
    model.stalled = model.spurious = True


def _stalled(model: NvmeModel) -> None:
    model.stalled = True


def _nothing_done(model: NvmeModel) -> None:
    """Honest at first, so that the buffers hold something."""
    honest = model.run
    calls = [0]

    def run(command: Submission) -> int:
        calls[0] += 1
        return honest(command) if calls[0] < 40 else 0

    model.run = run  # type: ignore[method-assign]  # the attack


def _transfers_fail(model: NvmeModel) -> None:
    def change(where: NvmeModel, completion: Completion) -> _Posted:
        flush = where.commands[-1][1].opcode == NvmOpcode.FLUSH
        return [(1, completion if flush else completion.replace(status=0x281 << 1))]

    _answers(change)(model)


def _flush_fails(model: NvmeModel) -> None:
    def change(where: NvmeModel, completion: Completion) -> _Posted:
        flush = where.commands[-1][1].opcode == NvmOpcode.FLUSH
        return [(1, completion.replace(status=0x006 << 1) if flush else completion)]

    _answers(change)(model)


def _recovers() -> str:
    """After a violation nothing is believed, however good it looks."""
    bench = nvme_bench(bytearray(_DISK_BYTES))
    disk = bench.start()
    _stalled(bench.model)
    for turn in range(2):
        try:
            disk.read([(0, 512)])
        except BackendError as error:
            if error.details.get("violation") != "nvme-timeout":
                return f"died {error.details.get('violation')!s}"
        else:
            return f"believed in turn {turn}"
        bench.model.stalled = False
    return "served"


def _grown_blocks(model: NvmeModel) -> None:
    model.pages[0][128] = bytes([0, 0, 12, 0])


def _old_phase(model: NvmeModel) -> None:
    def answer(where: NvmeModel, queue: int, completion: Completion) -> _Posted:
        where.post(queue, completion, flip=False)
        return []

    model.answer = answer


def _not_done(model: NvmeModel) -> None:
    """Identify says success and writes nothing: the page keeps what was there, which would pass for a namespace."""
    model.pages[1] |= {0: bytes([128, 0, 0, 0, 0, 0, 0, 0]), 128: b"\0\0\x09\0"}
    real = model.identify

    def identify(structure: int) -> bytes:
        return real(structure) if structure else _page_before(model)

    model.identify = identify  # type: ignore[method-assign]  # the attack


def _page_before(model: NvmeModel) -> bytes:
    address = model.commands[-1][1].prp1
    return bytes(model.memory(address, 4096))


# ---- PCI ------------------------------------------------------------------------------------------------------------


class _Function:
    """One PCI function at device 4, behind ports 0xCF8 and 0xCFC."""

    def __init__(self, **changes: int) -> None:
        self.changes = changes
        self.selected = 0
        self.words = {
            0x00: 0x0010_1B36,
            0x04: 0,
            0x08: changes.get("kind", 0x0108_0202),
            0x0C: 0,
            0x10: changes.get("bar", 4),
        }

    def in32(self, port: int) -> int:
        """0xCFC."""
        if self.selected >> 11 & 0x1F != 4 or self.selected >> 8 & 7:
            return self.changes.get("nobody", _FAR)
        offset = self.selected & 0xFC
        if offset == 0x04:
            return self.words[4] & self.changes.get("command_mask", 0xFFFF)
        return self.words.get(offset, 0)

    def out32(self, port: int, value: int) -> None:
        """Both."""
        if port == 0xCF8:
            self.selected = value
            return
        offset = self.selected & 0xFC
        if offset == 0x10:
            value = value & self.changes.get("mask", 0xFFFF_C000) | self.words[0x10] & 0xF
            value ^= self.changes.get("flip", 0) if value >> 16 != 0xFFFF else 0
        self.words[offset] = value


def _pci(**changes: int) -> Callable[[], str]:
    def act() -> str:
        space = ConfigurationSpace(_Function(**changes))
        try:
            where = find_nvme(space)
            base, size = enable_memory_bar(space, where, window_gpa=0xE000_0000, window_bytes=1 << 20)
        except SvsmError as error:
            return f"refused {error.code}"
        return "served" if (base, size) == (0xE000_0000, 0x4000) else "wrong data"

    return act


def _attack(name: str, expected: str, before: Callable[[NvmeModel], None] | None = None, **rest: Any) -> Attack:
    return Attack(name, expected, before, **rest)


_CSTS = NvmeRegister.CSTS

ATTACKS: Final[tuple[Attack, ...]] = (
    _attack("nothing at all", "served"),
    # Registers
    _attack("all registers read as ones", "refused nvme-gone", _all_ones),
    _attack("a register of more than 32 bits", "refused nvme-register", _register(_CSTS, 1 << 40)),
    _attack("a register below zero", "refused nvme-register", _register(0, -1)),
    _attack("no NVM command set", "refused nvme-unsupported", _capability(37, 1, 0)),
    _attack("no pages of 4 KiB", "refused nvme-unsupported", _capability(48, 4, 1)),
    _attack("queues of one entry", "refused nvme-unsupported", _capability(0, 16, 0)),
    _attack("queues of two entries", "served", _capability(0, 16, 1)),
    _attack("doorbells far apart", "refused nvme-doorbell", _capability(32, 4, 15)),
    _attack("never switches off", "refused nvme-stuck", _register(_CSTS, 1)),
    _attack("never switches on", "refused nvme-stuck", _register(_CSTS, 0)),
    _attack("fails while it switches on", "refused nvme-failed", _register(_CSTS, 2)),
    _attack("gone while it switches off", "refused nvme-gone", _register(_CSTS, _FAR)),
    _attack("fails later", "died nvme-failed", after=_status_bits(2)),
    _attack("pauses later", "died nvme-failed", after=_status_bits(1 << 5)),
    _attack("shuts itself down", "died nvme-failed", after=_status_bits(1 << 3)),
    _attack("gone later", "died nvme-gone", after=_status_bits(_FAR)),
    _attack("says that its subsystem was reset", "served", _subsystem_reset),
    # Time
    _attack("never completes", "died nvme-timeout", after=_stalled),
    _attack("never completes, and interrupts without end", "died nvme-timeout", after=_stormy),
    _attack("never completes an admin command", "refused nvme-timeout", _stalled),
    # Identify
    _attack("commands of another size", "refused nvme-identify", _page(1, 512, b"\x77\x44")),
    _attack("completions of another size", "refused nvme-identify", _page(1, 512, b"\x66\x55")),
    _attack("no I/O controller", "refused nvme-identify", _page(1, 111, b"\x02")),
    _attack("no namespaces", "refused nvme-identify", _page(1, 516, bytes(4))),
    _attack("transfers of less than a block", "refused nvme-identify", _page(1, 77, b"\x01"), block_shift=14),
    _attack("transfers of any size", "served", _page(1, 77, b"\xff")),
    _attack("one command at a time", "served", _page(1, 514, b"\x01\0")),
    _attack("a format that does not exist", "refused nvme-identify", _no_format),
    _attack("blocks of one byte", "refused nvme-identify", _page(0, 128, bytes(4))),
    _attack("blocks of 2^255 bytes", "refused nvme-identify", _page(0, 128, b"\0\0\xff\0")),
    _attack("metadata", "refused nvme-identify", _page(0, 128, b"\x08\0\x09\0")),
    _attack("end-to-end protection", "refused nvme-identify", _page(0, 29, b"\x01")),
    _attack("no blocks", "refused nvme-identify", _page(0, 0, bytes(8))),
    _attack("2^64 - 1 blocks", "refused nvme-identify", _page(0, 0, b"\xff" * 8)),
    _attack("more blocks than there are", "served", _page(0, 0, b"\0\0\x01\0\0\0\0\0")),
    _attack("write protection without a word about it before", "failed", after=_field(status=0x20 << 1)),
    _attack("the block size changes", "died nvme-identify", after=_grown_blocks),
    _attack("Identify is done and nothing written", "refused nvme-identify", _not_done),
    # Admin
    _attack("refuses every admin command", "refused nvme-admin-refused", _field(admin=True, status=1 << 1)),
    _attack("claims 2^32 queues", "served", _field(admin=True, result=_FAR)),
    # Completions
    _attack("an identifier beyond the slots", "died nvme-completion-id", after=_field(command_id=0xFFFF)),
    _attack("the first identifier that is none", "died nvme-completion-id", after=_field(command_id=8)),
    _attack("completes twice", "died nvme-completion-unexpected", after=_twice),
    _attack("completes before it gets a command", "died nvme-completion-unexpected", after=_early),
    _attack("completes another command", "died nvme-completion-unexpected", after=_answers(_another)),
    _attack("names another queue", "died nvme-completion-queue", after=_field(sq_id=0)),
    _attack("a head beyond the queue", "died nvme-completion-head", after=_field(sq_head=0xFFFF)),
    _attack("a head beyond what was submitted", "died nvme-completion-head", after=_field(sq_head=8)),
    _attack("the old phase tag", "died nvme-timeout", after=_old_phase),
    _attack("an error status", "failed", after=_transfers_fail),
    _attack("a flush fails", "failed", after=_flush_fails),
    _attack("fails once, and behaves", "served", act=_recovers),
    _attack("a status of all ones", "failed", after=_field(status=0xFFFF)),
    _attack("success and nothing done", "zeros", after=_nothing_done),
    _attack("everything changes once it was read", "served", flicker=True),
    # PCI
    _attack("PCI: nothing at all", "served", act=_pci()),
    _attack("PCI: no controller", "refused nvme-pci-none", act=_pci(kind=0x0200_0000)),
    _attack("PCI: a word of more than 32 bits", "refused nvme-register", act=_pci(nobody=1 << 40)),
    _attack("PCI: registers in ports", "refused nvme-pci-bar", act=_pci(bar=1)),
    _attack("PCI: a BAR of a type that does not exist", "refused nvme-pci-bar", act=_pci(bar=2)),
    _attack("PCI: registers of no size", "refused nvme-pci-bar", act=_pci(mask=0)),
    _attack("PCI: registers of 4 KiB", "refused nvme-pci-bar", act=_pci(mask=0xFFFF_F000)),
    _attack("PCI: registers of 2 GiB", "refused nvme-pci-bar", act=_pci(mask=0x8000_0000)),
    _attack("PCI: a size with holes", "refused nvme-pci-bar", act=_pci(mask=0xFFF5_C000)),
    _attack("PCI: the address does not stay", "refused nvme-pci-refused", act=_pci(flip=0x10_0000)),
    _attack("PCI: no bus mastering", "refused nvme-pci-refused", act=_pci(command_mask=0xFFFB)),
)
