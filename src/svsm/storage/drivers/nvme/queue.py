# SPDX-License-Identifier: MIT OR Apache-2.0
"""A submission queue and its completion queue, driver side.

Theory. A command identifier is a slot's number: one command that can be in flight, with buffers of its own. There are
fewer slots than ring entries, so neither ring can run over: what the controller has not fetched or not completed is
always in flight, and that is less than a ring. The submission ring is write-only for the driver. Of a completion the
driver loads the second 8 bytes once, as one machine load that holds phase tag, identifier, queue, head and status
together, judges that copy, and looks everything else up in private memory.

The first thing that cannot be true breaks the pair, and the same `ProtocolError` is raised from then on. Only a
controller reset ends that. Nothing here waits and nothing writes to registers: the caller rings the doorbells.
"""

from __future__ import annotations

from svsm.formats.errors import ProtocolError, StateError
from svsm.formats.nvme import COMPLETION_BYTES, PAGE_BYTES, SUBMISSION_BYTES
from svsm.storage.drivers.dma import DmaMemory

__all__ = ["QueuePair", "queue_bytes"]

_PHASE = 1 << 48
_MOST_ENTRIES = 1 << 16


def queue_bytes(entries: int) -> int:
    """Shared memory of one pair."""
    return entries * (SUBMISSION_BYTES + COMPLETION_BYTES) + 2 * PAGE_BYTES


class QueuePair:
    """One pair. Not for several threads.

    Args:
        memory: Where the rings go, zeroed.
        identifier: The queues' number; 0 is the admin pair.
        entries: Of each ring; at least 2.

    Raises:
        StateError: ``nvme-queue-shape``, ``dma-memory``.

    Attributes:
        slots: Commands that can be in flight.
        in_flight: Commands that are.
        submissions, completions: Device addresses.
        tail, head: For the doorbells: where the next command goes, and where the next completion is expected.
        broken: The violation that ended this pair.
        results: By slot: dword 0 of its last completion.
    """

    def __init__(self, memory: DmaMemory, *, identifier: int, entries: int) -> None:
        if not 2 <= entries <= _MOST_ENTRIES or not 0 <= identifier < 1 << 16:
            raise StateError("a queue has 2 to 65536 entries", code="nvme-queue-shape", got=entries)
        self.identifier = identifier
        self.entries = entries
        self.slots = entries - 1
        self.in_flight = 0
        self.tail = self.head = 0
        self.broken: ProtocolError | None = None
        self.results = [0] * self.slots
        submissions = memory.allocate(entries * SUBMISSION_BYTES, align=PAGE_BYTES)
        completions = memory.allocate(entries * COMPLETION_BYTES, align=PAGE_BYTES)
        self.submissions = memory.device_address(submissions)
        self.completions = memory.device_address(completions)
        self._words = memory.u64
        self._first_submission = submissions >> 3
        self._first_completion = completions >> 3
        self._flying = bytearray(self.slots)
        self._phase = _PHASE
        self._fetched = 0

    def submit(self, slot: int, words: tuple[int, int, int, int, int, int]) -> None:
        """Put a command into the ring; the caller rings the doorbell with `tail`.

        Args:
            slot: Not in flight.
            words: opcode, flags and namespace (the identifier is put in here), PRP 1, PRP 2, then command dwords 10
                and 11, 12 and 13, 14 and 15, each pair as 64 bits.

        Raises:
            StateError: ``nvme-slot``.
            ProtocolError: The pair is broken, or a completion is there although nothing is in flight.
        """
        if self.broken is not None:
            raise self.broken
        if not 0 <= slot < self.slots or self._flying[slot]:
            raise StateError("the slot is in flight or does not exist", code="nvme-slot", got=slot)
        if not self.in_flight and self.pending():
            raise self._violation("completes a command before it gets one", code="nvme-completion-unexpected")
        at = self._first_submission + 8 * self.tail
        memory = self._words
        memory[at] = words[0] | slot << 16
        memory[at + 1] = 0
        memory[at + 2] = 0
        memory[at + 3] = words[1]
        memory[at + 4] = words[2]
        memory[at + 5] = words[3]
        memory[at + 6] = words[4]
        memory[at + 7] = words[5]
        self._flying[slot] = 1
        self.in_flight += 1
        self.tail = (self.tail + 1) % self.entries

    def pending(self) -> bool:
        """Whether `collect` would find something (or a violation)."""
        return self._words[self._first_completion + 2 * self.head + 1] & _PHASE == self._phase

    def collect(self) -> list[tuple[int, int]]:
        """(slot, status of 15 bits) of what the controller has finished; the slots are the driver's again.

        Never waits, and ends after as many completions as there are commands in flight.

        Raises:
            ProtocolError: ``nvme-completion-id``, ``nvme-completion-unexpected``, ``nvme-completion-queue``,
                ``nvme-completion-head``: the pair is broken.
        """
        if self.broken is not None:
            raise self.broken
        done: list[tuple[int, int]] = []
        memory, flying, slots, entries = self._words, self._flying, self.slots, self.entries
        head, phase = self.head, self._phase
        while len(done) < self.in_flight:
            at = self._first_completion + 2 * head
            word = memory[at + 1]  # read once
            if word & _PHASE != phase:
                break
            slot = word >> 32 & 0xFFFF
            if slot >= slots:
                raise self._violation("completes a command that cannot exist", code="nvme-completion-id", got=slot)
            if not flying[slot]:
                raise self._violation("completes what it was not given", code="nvme-completion-unexpected", got=slot)
            if word >> 16 & 0xFFFF != self.identifier:
                raise self._violation(
                    "completes in the wrong queue", code="nvme-completion-queue", got=word >> 16 & 0xFFFF
                )
            self._check_head(word & 0xFFFF)
            flying[slot] = 0
            self.results[slot] = memory[at] & 0xFFFF_FFFF
            done.append((slot, word >> 49))
            head += 1
            if head == entries:
                head = 0
                phase ^= _PHASE
        self.in_flight -= len(done)
        self.head, self._phase = head, phase
        return done

    def _check_head(self, fetched: int) -> None:
        """The controller's place in the submission ring only moves on, and not beyond what was submitted."""
        known = self._fetched
        if fetched >= self.entries or (fetched - known) % self.entries > (self.tail - known) % self.entries:
            raise self._violation(
                "says that it has read commands which were never submitted",
                code="nvme-completion-head",
                expected=self.tail,
                got=fetched,
            )
        self._fetched = fetched

    def _violation(self, what: str, *, code: str, **details: int) -> ProtocolError:
        self.broken = ProtocolError(
            f"the controller {what}",
            code=code,
            hint="the controller or its host is broken or hostile; reset it",
            queue=self.identifier,
            **details,
        )
        return self.broken
