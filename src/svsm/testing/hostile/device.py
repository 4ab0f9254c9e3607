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
from svsm.testing.hostile.lies import RegisterLies

__all__ = ["HostileBlk"]

CompleteHook = Callable[[DeviceRing, Chain, int], None]


class HostileBlk(RegisterLies, MmioBlk):
    """A block device that lies on request.

    Attributes:
        on_complete: Called instead of an honest completion.
        on_finished: Called instead of the interrupt after a batch.
        on_request: Sees each chain before it is performed.
        batch: Room for a case to count in.
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
        self.forget_lies()
        self.on_complete: CompleteHook | None = None
        self.on_finished: Callable[[DeviceRing], None] | None = None
        self.on_request: Callable[[Chain], None] | None = None
        self.batch = 0

    # ---- hooks ------------------------------------------------------------------------------------------------------

    def read32(self, offset: int) -> int:
        """The register, or the lie."""
        return self.lied(offset, super().read32(offset))

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

        ring.pop = watched  # type: ignore[method-assign]  # looked at for the length of one call
        try:
            return super()._service(ring)
        finally:
            ring.pop = pop  # type: ignore[method-assign]  # as it was

    # ---- what attacks are made of -----------------------------------------------------------------------------------

    def ring(self, index: int = 0) -> DeviceRing | None:
        """A queue's ring, once it is set up."""
        return self.queues[index].ring if index < len(self.queues) else None

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
