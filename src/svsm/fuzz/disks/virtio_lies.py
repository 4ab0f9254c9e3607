# SPDX-License-Identifier: MIT OR Apache-2.0
"""What a device can do with a request instead of returning it, and what it then owes: one function for each lie.

A lie looks at the driver's queue (its shape, what is in flight) only to know what it has done: an identifier that
happens to be in flight is another lie than one that is not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from svsm.formats.virtio import BlkType, DescriptorFlag
from svsm.fuzz.choices import Choices
from svsm.fuzz.disks.verdict import Debt
from svsm.fuzz.disks.virtio_device import Disk, Request
from svsm.host.devices.virtio_ring import Chain, DevicePackedRing, DeviceRing, DeviceSplitRing
from svsm.storage.drivers.virtio.queue import VirtQueue

__all__ = ["RingLies"]

_MARKS: Final = 0x8080
_OTHER_ENDS: Final = (
    *("virtio-used-unexpected", "virtio-blk-status", "virtio-used-length", "virtio-timeout", "virtio-used-index"),
    *("virtio-used-id", "virtio-needs-reset"),
)
_READS: Final = (int(BlkType.IN), int(BlkType.GET_ID))


class RingLies:
    """Decides about each completion of a call.

    Args:
        queue_of: The driver's queue behind a ring.

    Attributes:
        disk: Set by whoever makes it.
        debt: Of the call that runs.
        late: What the life before this one never got back comes with the next completion.
        events: Instead of asking for kicks after a batch, say this.
        storm: Called when waiting shall take no time any more.
        halt: Called when the device stops, in one of three ways; says what that must be called.
    """

    def __init__(self, queue_of: Callable[[DeviceRing], VirtQueue]) -> None:
        self.disk: Disk
        self.debt = Debt()
        self.late = False
        self.events: int | None = None
        self.storm: Callable[[], None] = lambda: None
        self.halt: Callable[[int], str] = lambda _kind: ""
        self._queue_of = queue_of
        self._held: list[tuple[DeviceRing, Chain, int]] = []
        self._old: list[tuple[DeviceRing, Chain, int]] = []
        self._plan: list[tuple[int, int, Choices]] = []
        self._delayed: list[tuple[DeviceRing, Request]] = []
        self._count = 0
        self._acts: tuple[Callable[[DeviceRing, Request, Choices], None], ...] = (
            self._identifier,
            self._length,
            self._status,
            self._undone,
            self._twice,
            self._index,
            self._hold,
            self._delay,
            self._halt,
            self._flags,
            self._events,
            self._scribble,
            self._identifier,
            self._length,
            self._hold,
            self._undone,
        )

    def new_life(self) -> None:
        """A reset: what is held now is of the life before."""
        self._old, self._held = self._held, []
        self._delayed.clear()
        self.events = None

    def begin(self, debt: Debt, choices: Choices) -> None:
        """A call begins: decide what will be done to which of its requests. A byte says how many lies there are."""
        self.debt = debt
        self._count = 0
        self._plan.clear()
        kind = choices.unsigned(1)
        for _ in range((0, 1, 1, 2)[kind >> 6]):
            place = choices.unsigned(1)
            self._plan.append((place >> 4 & 3, place & 15, choices))

    # ---- the device's side ------------------------------------------------------------------------------------------

    def complete(self, ring: DeviceRing, request: Request) -> None:
        """Return a request, or lie."""
        if self.late:
            self.late = False
            for old, chain, written in self._old:
                for part in chain.parts:
                    if part.device_writes:
                        self.disk.window.put(part.address, b"\xdd" * part.length)
                old.push(chain, written)
            self._old.clear()
        number, self._count = self._count, self._count + 1
        for at, kind, choices in self._plan:
            if at == number:
                self._acts[kind](ring, request, choices)
                return
        ring.push(request.chain, request.written)

    def finished(self, ring: DeviceRing) -> None:
        """A batch is done: what was delayed comes now, the last first."""
        while self._delayed:
            old, request = self._delayed.pop()
            old.push(request.chain, request.written)
        if self.events is not None:
            self.disk.window.put(ring.addresses.device, (self.events & 0xFFFF_FFFF).to_bytes(4, "little")[:2])
            if isinstance(ring, DeviceSplitRing):
                at = ring.addresses.device + 4 + 8 * ring.size
                self.disk.window.put(at, (self.events >> 16 & 0xFFFF).to_bytes(2, "little"))
            else:
                self.disk.window.put(ring.addresses.device + 2, (self.events >> 16 & 0xFFFF).to_bytes(2, "little"))

    def idle(self, ring: DeviceRing) -> None:
        """Something is completed while nothing is in flight."""
        if isinstance(ring, DeviceSplitRing):
            ring.set_used_index(ring.next_used + 1)
        elif isinstance(ring, DevicePackedRing):
            ring.put_used(0, 1, wrap=ring.used_wrap)
        self.disk.spoiled = True
        self.debt.die("virtio-used-unexpected")

    def _used(self, ring: DeviceRing, request: Request, identifier: int, length: int) -> None:
        """A completion with any identifier and length."""
        if isinstance(ring, DeviceSplitRing):
            ring.put_used(identifier & 0xFFFF_FFFF, length)
            ring.set_used_index(ring.next_used + 1)
        elif isinstance(ring, DevicePackedRing):
            ring.put_used(identifier, length, wrap=ring.used_wrap)
            ring.skip(request.chain.entries)

    # ---- lies -------------------------------------------------------------------------------------------------------

    def _identifier(self, ring: DeviceRing, request: Request, choices: Choices) -> None:
        honest, queue = request.chain.identifier, self._queue_of(ring)
        stride = 1 if queue.shape.indirect or isinstance(ring, DevicePackedRing) else queue.shape.chain
        edges = (ring.size, honest + 1, honest + stride, 0xFFFF, honest | 0x1_0000, honest | 0x8000_0000, 0xFFFF_FFFF)
        choice = choices.unsigned(1)
        value = edges[choice % 8] if choice % 8 < len(edges) else choices.unsigned(2)
        self._used(ring, request, value, request.written)
        if isinstance(ring, DevicePackedRing):
            value &= 0xFFFF
        if value == honest:
            self.debt.lies += 1
        elif value % stride or value // stride >= queue.shape.slots:
            self.debt.die("virtio-used-id")
        elif queue._flying[value // stride]:
            self.debt.die(*_OTHER_ENDS)
        else:
            self.debt.die("virtio-used-unexpected")

    def _length(self, ring: DeviceRing, request: Request, choices: Choices) -> None:
        edges = (0, 1, request.full + 1, request.written - 1, 0x8000_0000, 0xFFFF_FFFF, request.written, request.full)
        value = edges[choices.unsigned(1) % len(edges)]
        self._used(ring, request, request.chain.identifier, value)
        short = value != request.written if request.kind in (BlkType.IN, BlkType.OUT) else not value
        if value > request.full:
            self.debt.die("virtio-used-length")
        elif short:
            self.debt.fail()
        else:
            self.debt.lies += 1

    def _status(self, ring: DeviceRing, request: Request, choices: Choices) -> None:
        value = (1, 2, 3, 0xFF, 0x7F, 0x80)[choices.unsigned(1) % 6]
        self.disk.window.put(request.status_at, bytes([value]))
        ring.push(request.chain, request.written)
        if value in (1, 2):
            self.debt.fail()
        else:
            self.debt.die("virtio-blk-status")

    def _undone(self, ring: DeviceRing, request: Request, choices: Choices) -> None:
        """Completed, and nothing is done."""
        for address, data in request.before:
            self.disk.window.put(address, data)
        ring.push(request.chain, request.written)
        self.debt.die("virtio-blk-status")

    def _twice(self, ring: DeviceRing, request: Request, choices: Choices) -> None:
        self.disk.spoiled = True
        ring.push(request.chain, request.written)
        ring.push(request.chain, request.written)
        wraps = isinstance(ring, DevicePackedRing)  # the second may lie where the first was
        self.debt.die("virtio-used-unexpected", "virtio-timeout" if wraps else "virtio-used-index")

    def _index(self, ring: DeviceRing, request: Request, choices: Choices) -> None:
        """The used index jumps, or a place in a packed ring is skipped."""
        step = (1, 7, 0x7FFF, 0xFFFE)[choices.unsigned(1) & 3]
        self.disk.spoiled = True
        ring.push(request.chain, request.written)
        if isinstance(ring, DeviceSplitRing):
            ring.set_used_index(ring.next_used + step)
            self.debt.die(*(("virtio-used-index",) if step < 0x8000 else _OTHER_ENDS))
        elif isinstance(ring, DevicePackedRing):
            ring.skip(step % ring.size)
            self.debt.whatever()

    def _hold(self, ring: DeviceRing, request: Request, choices: Choices) -> None:
        """Never completed, perhaps with interrupts without end."""
        self._held.append((ring, request.chain, request.written))
        self.debt.die("virtio-timeout")
        if choices.flag():
            self.storm()

    def _delay(self, ring: DeviceRing, request: Request, choices: Choices) -> None:
        self._delayed.append((ring, request))
        self.debt.lies += 1

    def _halt(self, ring: DeviceRing, request: Request, choices: Choices) -> None:
        """The device asks for a reset, has failed, or has been reset, and does nothing more."""
        self.debt.die(self.halt(choices.unsigned(1) % 3))

    def _flags(self, ring: DeviceRing, request: Request, choices: Choices) -> None:
        """A packed descriptor whose marks are not those of a used one."""
        if not isinstance(ring, DevicePackedRing):
            self._hold(ring, request, choices)
            return
        flags = (0, 0x80, 0x8000, 0xFFFF, 0x7F7F)[choices.unsigned(1) % 5]
        ring.put_used(request.chain.identifier, request.written, wrap=ring.used_wrap)
        ring._flags[8 * ring.next_used + 7] = flags
        good = flags & _MARKS == (_MARKS if ring.used_wrap else 0)
        available = int(DescriptorFlag.USED if ring.used_wrap else DescriptorFlag.AVAIL)  # of the next round
        ring.skip(request.chain.entries)
        if good:
            self.debt.lies += 1
        elif flags & _MARKS == available:  # the device itself takes it for a chain when it comes round
            self.disk.spoiled = True
            self.debt.die("virtio-timeout", "virtio-needs-reset", "vhost-user-gone")
        else:
            self.debt.die("virtio-timeout")

    def _events(self, ring: DeviceRing, request: Request, choices: Choices) -> None:
        """From now on the device says that it wants no kicks, or nonsense, and waits for them."""
        ring.push(request.chain, request.written)
        away = (ring.next_available + 0x4000 if isinstance(ring, DeviceSplitRing) else 1) << 16
        self.events = (away | 1, 0, 0xFFFF_FFFF, 0xA5A5_A5A5)[choices.unsigned(1) & 3]
        self.debt.lies += 1

    def _scribble(self, ring: DeviceRing, request: Request, choices: Choices) -> None:
        """Descriptors are garbage from now on: whatever the driver reads there is not its own."""
        self.disk.spoiled = True
        ring.push(request.chain, request.written)
        pattern = bytes([choices.unsigned(1) | 1])
        for position in range(ring.size):
            width = 16 if isinstance(ring, DeviceSplitRing) else 8
            self.disk.window.put(ring.addresses.descriptors + 16 * position, pattern * width)
        self.debt.whatever()
