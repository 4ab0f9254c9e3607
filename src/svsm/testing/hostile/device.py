# SPDX-License-Identifier: MIT OR Apache-2.0
"""Our virtio-blk device model with a hook at everything that a device decides.

A case installs functions; what it does not replace stays honest, so that each attack is one lie in an otherwise
well-behaved device, the kind that gets furthest. `be_honest` removes all hooks, for the life after a reset.
"""

from __future__ import annotations

from collections.abc import Callable

from svsm.formats.virtio import MmioRegister, SplitDescriptor
from svsm.host.devices.virtio_blk import BlkBackend
from svsm.host.devices.virtio_mmio import MmioBlk
from svsm.host.devices.virtio_ring import Chain, DevicePackedRing, DeviceRing, DeviceSplitRing, Window

__all__ = ["HostileBlk"]

ReadHook = Callable[[int, int], int]
CompleteHook = Callable[[DeviceRing, Chain, int], None]


class HostileBlk(MmioBlk):
    """A block device that lies on request.

    Attributes:
        on_read: (offset, honest value) → what the driver gets to read.
        on_complete: Called instead of an honest completion.
        on_finished: Called instead of the interrupt after a batch.
        on_request: Sees each chain before it is performed.
        deaf: Ignore kicks.
        stuck: Ignore resets.
        batch: Room for a case to count in.
        reads: How often each register was read.
        resets: How often the driver has reset the device.
    """

    def __init__(self, backend: BlkBackend, window: Window) -> None:
        self._forget()
        self.reads: dict[int, int] = {}
        self.resets = 0
        super().__init__(backend, window)

    def be_honest(self) -> None:
        """Forget all hooks, and a capacity that was a lie."""
        self._forget()
        self.backend.measure()

    def _forget(self) -> None:
        self.on_read: ReadHook | None = None
        self.on_complete: CompleteHook | None = None
        self.on_finished: Callable[[DeviceRing], None] | None = None
        self.on_request: Callable[[Chain], None] | None = None
        self.deaf = False
        self.stuck = False
        self.batch = 0

    # ---- hooks ------------------------------------------------------------------------------------------------------

    def read32(self, offset: int) -> int:
        """The register, or the lie."""
        self.reads[offset] = self.reads.get(offset, 0) + 1
        value = super().read32(offset)
        return value if self.on_read is None else self.on_read(offset, value)

    def write32(self, offset: int, value: int) -> None:
        """Set a register, unless the device does not listen."""
        if offset == MmioRegister.QUEUE_NOTIFY and self.deaf:
            return
        if offset == MmioRegister.STATUS and not value:
            if self.stuck:
                return
            self.resets += 1
        super().write32(offset, value)

    def complete(self, ring: DeviceRing, chain: Chain, written: int) -> None:
        """Return a request, or do something else with it."""
        if self.on_complete is None:
            super().complete(ring, chain, written)
        else:
            self.on_complete(ring, chain, written)

    def finished(self, ring: DeviceRing) -> None:
        """The interrupt after a batch."""
        if self.on_finished is None:
            super().finished(ring)
        else:
            self.on_finished(ring)

    def _service(self, ring: DeviceRing) -> int:
        pop = ring.pop
        if self.on_request is None:
            return super()._service(ring)

        def watched() -> Chain | None:
            chain = pop()
            if chain is not None and self.on_request is not None:
                self.on_request(chain)
            return chain

        ring.pop = watched  # type: ignore[method-assign]
        try:
            return super()._service(ring)
        finally:
            ring.pop = pop  # type: ignore[method-assign]

    # ---- what attacks are made of -----------------------------------------------------------------------------------

    def ring(self, index: int = 0) -> DeviceRing | None:
        """A queue's ring, once it is set up."""
        return self.queues[index].ring if index < len(self.queues) else None

    def lie_at(self, offset: int, *values: int) -> None:
        """Answer a register with `values` one after the other; the last one stays."""
        answers = list(values)
        before = self.on_read

        def lie(at: int, honest: int) -> int:
            if at == offset:
                return answers.pop(0) if len(answers) > 1 else answers[0]
            return honest if before is None else before(at, honest)

        self.on_read = lie

    def lie_about_features(self, *, add: int = 0, remove: int = 0) -> None:
        """Change the offer, not what the device then accepts."""

        def lie(at: int, honest: int) -> int:
            if at != MmioRegister.DEVICE_FEATURES:
                return honest
            shift = 32 * self._feature_select[0]
            return (honest | add >> shift) & ~(remove >> shift) & 0xFFFF_FFFF

        self.on_read = lie

    def lie_about_config(self, offset: int, value: int, width: int) -> None:
        """Change a field of the configuration space; `offset` and `width` in bytes."""

        def lie(at: int, honest: int) -> int:
            start = at - MmioRegister.CONFIG
            if start < 0 or not start < offset + width or not offset < start + 4:
                return honest
            word = bytearray(honest.to_bytes(4, "little"))
            field = value.to_bytes(width, "little")
            for index in range(4):
                if offset <= start + index < offset + width:
                    word[index] = field[start + index - offset]
            return int.from_bytes(word, "little")

        self.on_read = lie

    def mark_used(self, ring: DeviceRing, identifier: int, length: int, entries: int) -> None:
        """A completion with any identifier and length, published."""
        if isinstance(ring, DeviceSplitRing):
            ring.put_used(identifier, length)
            ring.set_used_index(ring.next_used + 1)
        elif isinstance(ring, DevicePackedRing):
            ring.put_used(identifier, length, wrap=ring.used_wrap)
            ring.skip(entries)

    def scribble_descriptors(self, ring: DeviceRing, pattern: bytes) -> None:
        """Overwrite the whole descriptor table (packed: the ring)."""
        size = ring.size * SplitDescriptor.SIZE
        self.window.put(ring.addresses.descriptors, (pattern * (size // len(pattern) + 1))[:size])
