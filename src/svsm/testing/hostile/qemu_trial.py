# SPDX-License-Identifier: MIT OR Apache-2.0
"""Attacks on the way between QEMU's virtio-mmio disk and the driver, over qtest: a real device, and lies about it.

The device behind is QEMU's: its registers, its rings, its timing. `Interposer` stands between. Cases about registers
are the catalogue's own (`CASES`); cases about rings are in `qemu_attacks`, because here a completion is changed and not
made. What has no place is in `IMPOSSIBLE`, by name, with the reason.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, cast

from svsm.formats.errors import SvsmError
from svsm.host.devices.virtio_mmio import MmioBlk
from svsm.host.qemu import DiskOptions, MachineKind, MachineOptions
from svsm.host.qemu import Machine as QemuMachine
from svsm.storage.drivers.dma import DmaMemory
from svsm.storage.drivers.virtio.blk import VirtioBlk, memory_bytes
from svsm.storage.drivers.virtio.mmio import MmioTransport
from svsm.testing.hostile import register_attacks
from svsm.testing.hostile.attacks import ATTACKS
from svsm.testing.hostile.catalogue import (
    SURVIVED,
    Attack,
)
from svsm.testing.hostile.device import HostileBlk
from svsm.testing.hostile.flicker import FlickerMemory
from svsm.testing.hostile.interposer import Interposer
from svsm.testing.hostile.qemu_attacks import InterposedAttack
from svsm.testing.hostile.trial import Kind, Outcome, Trial, TrialError, carry_out
from svsm.testing.virtio_harness import Clock, InlineRegisters, Machine

__all__ = [
    "CASES",
    "DIFFERENT",
    "IMPOSSIBLE",
    "QemuTrial",
    "expected",
    "run",
]

_DISK_BYTES: Final = 1 << 20
_DMA_GPA: Final = 16 << 20
_DEADLINE_SECONDS: Final = 10.0
_SHORT_SECONDS: Final = 0.4
_LONGEST_SECONDS: Final = 60.0

_OURS = "needs a device that offers something else than QEMU's"
_RESIZE = "the capacity is QEMU's to change; its own resize is in tests/interop"
IMPOSSIBLE: Final = {
    "the disk is read-only": _OURS,
    "flushes are not offered, and answered with OK": _OURS,
    "discards of no sector": _OURS,
    "a capacity that is no whole number of blocks": _OURS,
    "the block size changes with the capacity": _OURS,
    "discards whose alignment is larger than they can be": _OURS,
    "the disk shrinks": _RESIZE,
    "the disk grows": _RESIZE,
    "the disk grows beyond all bounds": _RESIZE,
}

DIFFERENT: Final = {
    # QEMU 7.2 keeps FEATURES_OK whatever the driver accepts, so what shows is what the bits mean.
    "every feature bit is offered": Outcome(Kind.ERROR, "block-read-only"),
    # The fields that lie belong to features that QEMU does not offer here, so nobody looks at them.
    "many queues are offered, and none exists": SURVIVED,
    "more queues are offered than exist": SURVIVED,
    "segments of one byte": SURVIVED,
}
"""Other outcomes than in the catalogue, by name."""

CASES: Final = [
    attack
    for attack in ATTACKS
    if attack.name not in IMPOSSIBLE
    and (
        attack.install.__module__ == register_attacks.__name__
        or attack.memory_type is FlickerMemory
        or attack.name == "every bit of the interrupt status, always"
    )
]


def expected(attack: Attack, ring: str) -> Outcome:
    """What must come of a case on this transport."""
    return DIFFERENT.get(attack.name, attack.expected[ring])


class QemuTrial(Trial):
    """A `Trial` whose device is QEMU's.

    Attributes:
        program: QEMU, or None for the one in PATH.
        shared: What the device can reach.
    """

    program: Path | None = None
    deadline_seconds = _DEADLINE_SECONDS

    def start(self) -> None:
        """Start QEMU and make the driver. Raises what the driver raises."""
        self._began = time.monotonic()
        self._folder = tempfile.TemporaryDirectory(prefix="svsm-hostile-")
        path = Path(self._folder.name) / "disk.raw"
        path.write_bytes(self.content)
        policy = dataclasses.replace(self._policy, deadline_seconds=self.deadline_seconds, rekick_seconds=0.05)
        disk = DiskOptions(path, packed=policy.packed)
        self._qemu = QemuMachine(MachineOptions(MachineKind.MICROVM, disk=disk, program=self.program))
        try:
            interposer = Interposer(self._qemu.virtio_registers())
            self._devices.append(cast(HostileBlk, interposer))
            view = self._qemu.memory[_DMA_GPA : _DMA_GPA + memory_bytes(policy)]
            if self._memory_type is DmaMemory:
                memory = interposer.watch(view, address=_DMA_GPA)
            else:
                memory = self._memory_type(view, address=_DMA_GPA)
            self.shared = view
            self._install(self._devices[-1])
            driver = VirtioBlk(MmioTransport(interposer), memory, policy=policy)
        except SvsmError:
            self._end()
            raise
        descriptor = os.open(path, os.O_RDONLY)
        registers = cast(InlineRegisters, interposer)
        self._machine = Machine(driver, cast(MmioBlk, interposer), memory, Clock(), registers, descriptor)

    def look_for_canaries(self) -> None:
        """Only in what is shared with the device, which is not all of the guest's memory."""
        if bytes(self.shared).find(b"PRIVATE") >= 0:
            raise TrialError("a private byte is in shared memory")

    def after_discard(self, offset: int, length: int) -> bytes:
        """Whatever QEMU made of it."""
        return self.machine.content(offset, length)

    def _bounded(self) -> None:
        if time.monotonic() > self._began + _LONGEST_SECONDS:
            raise TrialError("it took too long")

    def _end(self) -> None:
        self._qemu.close()
        self._folder.cleanup()

    def close(self) -> None:
        """End the driver and QEMU."""
        super().close()
        if self._machine is not None:
            self._end()


def run(attack: Attack | InterposedAttack, ring: str, *, program: Path | None = None) -> Outcome:
    """One trial of a case of `CASES` or `INTERPOSED`.

    Raises:
        TrialError: A promise was broken.
    """
    if isinstance(attack, InterposedAttack):
        trial = QemuTrial(cast(Callable[[HostileBlk], None], attack.install), ring)
        outcome = attack.expected
    else:
        trial = QemuTrial(attack.install, ring, queues=attack.queues, memory_type=attack.memory_type)
        outcome = expected(attack, ring)
    trial.program = program
    if outcome.code in ("virtio-timeout", "virtio-reset-stuck"):
        trial.deadline_seconds = _SHORT_SECONDS
    return carry_out(trial, attack.after)
