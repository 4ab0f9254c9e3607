# SPDX-License-Identifier: MIT OR Apache-2.0
"""The rows of the NVMe review: see `nvme_review`."""

from __future__ import annotations

from typing import Final

from svsm.testing.review import Row

__all__ = ["ROWS"]


def _row(
    part: str,
    field: str,
    threat: str,
    where: str,
    check: str,
    without: str,
    *attacks: str,
    reason: str = "",
    test: str = "",
) -> Row:
    return Row(part, field, threat, where, check, without, attacks, reason=reason, test=test)


_QUEUE_TESTS: Final = "tests/unit/storage/drivers/nvme/test_nvme_queue.py"
_DISK_TESTS: Final = "tests/unit/storage/drivers/nvme/test_nvme_disk.py"
_CQ, _DATA, _REG, _ID = "Completions", "Data", "Registers", "Identify and admin commands"
_LIFE = "svsm.storage.drivers.lifecycle"
_TIME, _PCI = "Time, interrupts, life and death", "PCI configuration space"

ROWS: Final[tuple[Row, ...]] = (
    _row(
        *(_CQ, "CID, range", "index outside the driver's tables", "queue"),
        *("            if slot >= slots:\n", "            if False:\n"),
        *("an identifier beyond the slots", "the first identifier that is none"),
    ),
    _row(
        *(_CQ, "CID of what is not in flight", "complete twice; complete what nobody asked", "queue"),
        *("            if not flying[slot]:\n", "            if False:\n"),
        *("completes twice", "completes another command"),
    ),
    _row(
        *(_CQ, "anything, with nothing in flight", "complete a command before it is given", "queue"),
        *("if not self.in_flight and self.pending():", "if False:"),
        "completes before it gets a command",
    ),
    _row(
        *(_CQ, "phase tag", "show a completion that is none; go round the ring", "queue"),
        *("            if word & _PHASE != phase:\n                break\n", ""),
        *("the old phase tag", "never completes"),
    ),
    _row(
        *(_CQ, "number of completions", "complete more than is in flight, without end", "queue"),
        *("        while len(done) < self.in_flight:\n", "        while True:\n"),
        reason="whatever comes beyond that number is not in flight, which is judged one by one (rows above)",
        test=f"{_QUEUE_TESTS}::test_no_more_is_collected_than_is_in_flight",
    ),
    _row(
        *(_CQ, "SQID", "answer for another queue", "queue"),
        *("            if word >> 16 & 0xFFFF != self.identifier:\n", "            if False:\n"),
        "names another queue",
    ),
    _row(
        *(_CQ, "SQHD", "claim to have read what was never submitted", "queue"),
        *("            self._check_head(word & 0xFFFF)\n", ""),
        *("a head beyond the queue", "a head beyond what was submitted"),
    ),
    _row(
        *(_CQ, "SQHD beyond the queue", "escape the comparison by its modulus", "queue"),
        *("fetched >= self.entries or ", ""),
        "a head beyond the queue",
    ),
    _row(
        *(_CQ, "dword 3 between two readings", "pass the check with one value, be used with another", "queue"),
        *("done.append((slot, word >> 49))", "done.append((memory[at + 1] >> 32 & 0xFFFF, memory[at + 1] >> 49))"),
        "everything changes once it was read",
    ),
    _row(
        *(_CQ, "status", "have what failed believed to be done", "disk"),
        *(
            "            if status & 0x7FF:\n                failure = status\n",
            "            if False:\n                pass\n",
        ),
        *("an error status", "a status of all ones"),
    ),
    _row(
        *(_CQ, "status of a flush, discard or write-zeroes", "have what failed believed to be done", "disk"),
        *("return status if status & 0x7FF else 0", "return 0"),
        "a flush fails",
    ),
    _row(
        *(_CQ, "anything after a violation", "go on with a queue that nobody can trust", "queue"),
        *(
            "        if self.broken is not None:\n            raise self.broken\n        if not 0 <= slot",
            "        if not 0 <= slot",
        ),
        reason="the disk above does not come back to a broken pair (next row)",
        test=f"{_QUEUE_TESTS}::test_broken_stays_broken",
    ),
    _row(
        *(_CQ, "anything after a violation, seen from above", "be believed again without a reset", _LIFE),
        *(
            "        if self.fault is not None:\n            raise self._dead(operation, self.fault)\n",
            "        pass\n",
        ),
        "fails once, and behaves",
    ),
    _row(
        *(_CQ, "dword 0", "smuggle a number in", "queue"),
        *("            self.results[slot] = memory[at] & 0xFFFF_FFFF\n", ""),
        reason="nothing to check: no result is used, not even the number of queues, of which one is all that is needed",
        test=f"{_QUEUE_TESTS}::test_phases_over_many_rounds",
    ),
    _row(
        *(_DATA, "a read's buffer before the read", "have old contents returned as new", "disk"),
        *("= zeros[:length] if reading else", "= shared[start : start + length] if reading else"),
        "success and nothing done",
    ),
    _row(
        *(_DATA, "a read's buffer after the read", "change what the caller has already judged", "disk"),
        *("shared[start : start + pieces[owner][1]].tobytes()", "shared[start : start + pieces[owner][1]]"),
        "everything changes once it was read",
    ),
    _row(
        *(_DATA, "the Identify page before it", "have other contents taken for an answer", "controller"),
        *("        self._memory.zero(self._page, IDENTIFY_BYTES)\n", ""),
        "Identify is done and nothing written",
    ),
    _row(
        *(_DATA, "the Identify page after it", "pass the check with one value, be used with another", "controller"),
        *("self._page + IDENTIFY_BYTES].tobytes()", "self._page + IDENTIFY_BYTES]"),
        test=f"{_DISK_TESTS}::test_the_transfer_limit_is_kept",
    ),
    _row(
        *(_REG, "any register", "be no 32-bit number (the way to the registers is hostile too)", "controller"),
        *("        if not 0 <= value <= _WORD:\n", "        if False:\n"),
        *("a register of more than 32 bits", "a register below zero"),
    ),
    _row(
        *(_REG, "CAP, all ones", "be no controller", "controller"),
        *("        if low == _WORD and high == _WORD:\n", "        if False:\n"),
        "all registers read as ones",
    ),
    _row(
        *(_REG, "CAP.CSS", "speak another command set", "controller"),
        *("not self.capabilities.nvm_command_set or ", ""),
        "no NVM command set",
    ),
    _row(
        *(_REG, "CAP.MPSMIN", "use larger pages, beyond every buffer", "controller"),
        *(" or self.capabilities.smallest_page_bytes != PAGE_BYTES", ""),
        "no pages of 4 KiB",
    ),
    _row(
        *(_REG, "CAP.MQES", "have queues that hold nothing", "controller"),
        *("        if self.capabilities.queue_entries < 2:\n", "        if False:\n"),
        "queues of one entry",
    ),
    _row(
        *(_REG, "CAP.MQES, small", "have more put in than it holds", "disk"),
        *(", controller.capabilities.queue_entries - 1)", ")"),
        reason="a longer queue than offered is refused by an honest controller, and overruns nothing of the driver's",
        test=f"{_DISK_TESTS}::test_the_queue_is_no_longer_than_the_controller_wants",
    ),
    _row(
        *(_REG, "CAP.DSTRD", "have doorbells written outside its registers", "controller"),
        *("        if highest + 4 > registers.size_bytes:\n", "        if False:\n"),
        "doorbells far apart",
    ),
    _row(
        *(_REG, "CSTS.RDY and CAP.TO", "have the driver wait for ever", "controller"),
        *("            if self._clock() >= deadline:\n                break\n", ""),
        *("never switches off", "never switches on"),
    ),
    _row(
        *(_REG, "CSTS.CFS while it starts", "have a failure taken for slowness", "controller"),
        *("            if status & ControllerStatus.CFS and wanted:\n", "            if False:\n"),
        "fails while it switches on",
    ),
    _row(
        *(_REG, "CSTS, all ones", "have an absent device taken for one that works", "controller"),
        *("        if status == _WORD:\n", "        if False:\n"),
        *("gone later", "gone while it switches off"),
    ),
    _row(
        *(_REG, "CSTS later", "fail, pause or stop unnoticed", "controller"),
        *("        if status & ~_RESET_NOTICE != ControllerStatus.RDY:\n", "        if False:\n"),
        *("fails later", "pauses later", "shuts itself down"),
    ),
    _row(
        *(_ID, "status of an admin command", "have what failed believed to be done", "controller"),
        *(
            "        if status & 0x7FF:\n            raise ProtocolError(",
            "        if False:\n            raise ProtocolError(",
        ),
        "refuses every admin command",
    ),
    _row(
        *(_ID, "SQES", "read commands of another size", "identify"),
        *("    if not _allows(host.submission_sizes, _SUBMISSION_SHIFT):\n", "    if False:\n"),
        "commands of another size",
    ),
    _row(
        *(_ID, "CQES", "write completions of another size", "identify"),
        *("    if not _allows(host.completion_sizes, _COMPLETION_SHIFT):\n", "    if False:\n"),
        "completions of another size",
    ),
    _row(
        *(_ID, "CNTRLTYPE", "be another kind of controller", "identify"),
        *("    if host.controller_type not in (0, 1):\n", "    if False:\n"),
        "no I/O controller",
    ),
    _row(
        *(_ID, "NN", "answer for a namespace that it does not have", "identify"),
        *("    if number > host.namespaces:\n", "    if False:\n"),
        "no namespaces",
    ),
    _row(
        *(_ID, "MDTS", "take less than a block", "identify"),
        *("    if not transfer:\n", "    if False:\n"),
        "transfers of less than a block",
    ),
    _row(
        *(_ID, "MDTS, huge", "shift a number out of all bounds", "identify"),
        *("PAGE_BYTES << min(host.transfer_shift, 30)",) * 2,
        reason="a shift by at most 255 is harmless in Python, and the driver's own limit is the smaller one anyway",
    ),
    _row(
        *(_ID, "MAXCMD", "want fewer commands than there are slots", "disk"),
        *("min(policy.depth, geometry.depth, ", "min(policy.depth, "),
        reason="a wish that costs only speed; exceeding it is for the controller to refuse with a status",
        test=f"{_DISK_TESTS}::test_the_queue_is_no_longer_than_the_controller_wants",
    ),
    _row(
        *(_ID, "FLBAS, NLBAF", "use a format that does not exist", "identify"),
        *("    if index > namespace.format_count:\n", "    if False:\n"),
        "a format that does not exist",
    ),
    _row(
        *(_ID, "LBADS", "have blocks of a size that no arithmetic bears", "identify"),
        *("    if not _SMALLEST_SHIFT <= shift <= _LARGEST_SHIFT:\n", "    if False:\n"),
        *("blocks of one byte", "blocks of 2^255 bytes"),
    ),
    _row(
        *(_ID, "MS", "transfer more than the buffer holds", "identify"),
        *("    if metadata:\n", "    if False:\n"),
        "metadata",
    ),
    _row(
        *(_ID, "DPS", "expect protection information that is not sent", "identify"),
        *("    if namespace.protection & 7:\n", "    if False:\n"),
        "end-to-end protection",
    ),
    _row(
        *(_ID, "NSZE, 0", "be no namespace", "identify"),
        *("not namespace.size_blocks or ", ""),
        "no blocks",
    ),
    _row(
        *(_ID, "NSZE", "be larger than offsets can be", "identify"),
        *(" or namespace.size_blocks << shift > _MOST_BYTES", ""),
        "2^64 - 1 blocks",
    ),
    _row(
        *(_ID, "LBADS later", "change the block size under a running file system", "disk"),
        *("        if block != self._shape.block_size_bytes:\n", "        if False:\n"),
        "the block size changes",
    ),
    _row(
        *(_ID, "NSATTR, ONCS, VWC", "lie about what it can do", "identify"),
        *("read_only=bool(disk.attributes & 1)", "read_only=False"),
        reason="a lie costs an error status or a refused write; a flush is sent whatever VWC says",
        test=f"{_DISK_TESTS}::test_a_write_protected_namespace_gets_no_write",
    ),
    _row(
        *(_TIME, "no completion", "have the driver wait for ever", "controller"),
        *("        if now >= deadline:\n", "        if False:\n"),
        *("never completes", "never completes an admin command"),
    ),
    _row(
        *(_TIME, "interrupts without end", "keep the driver from noticing that time passes", "controller"),
        *("        if self._fruitless >= _FRUITLESS_WAKE_UPS:\n", "        if False:\n"),
        "never completes, and interrupts without end",
    ),
    _row(
        *(
            _TIME,
            "state after a wake-up without news",
            "be dead and have the driver wait for its deadline",
            "controller",
        ),
        *("        self._fruitless += 1\n        self.check()\n", "        self._fruitless += 1\n"),
        *("fails later", "gone later"),
    ),
    _row(
        *(_TIME, "late DMA after a timeout", "write into the buffers of its next life", _LIFE),
        *("self._halves[self._generation % 2]", "self._halves[0]"),
    ),
    _row(
        *(_TIME, "writes lost in a reset", "have a flush after it promise what nobody knows", _LIFE),
        *(
            "        if self._lost_writes:\n            self._lost_writes = False\n",
            "        if False:\n            self._lost_writes = False\n",
        ),
    ),
    _row(
        *(_PCI, "any word", "be no 32-bit number", "pci"),
        *("        if not 0 <= value <= _WORD:\n", "        if False:\n"),
        "PCI: a word of more than 32 bits",
    ),
    _row(
        *(_PCI, "class and header type", "be another kind of device", "pci"),
        *("space.read32(where, _CLASS) >> 8 == NVME_CLASS and ", ""),
        "PCI: no controller",
    ),
    _row(
        *(_PCI, "BAR 0, type", "have its registers in ports, or nowhere", "pci"),
        *("    if kind & _BAR_IO or kind >> 1 & 3 not in (0, _BAR_TYPE_64):\n", "    if False:\n"),
        *("PCI: registers in ports", "PCI: a BAR of a type that does not exist"),
    ),
    _row(
        *(_PCI, "BAR 0, size", "cover other devices, or be smaller than its registers", "pci"),
        *("    if not mask or size & (size - 1) or not _SMALLEST_BAR <= size <= window_bytes:\n", "    if False:\n"),
        *("PCI: registers of no size", "PCI: registers of 4 KiB", "PCI: a size with holes"),
    ),
    _row(
        *(_PCI, "BAR 0 and command, read back", "be somewhere else, or not switched on", "pci"),
        *("        if got != value:\n", "        if False:\n"),
        *("PCI: the address does not stay", "PCI: no bus mastering"),
    ),
)
