# SPDX-License-Identifier: MIT OR Apache-2.0
"""Cases 26 to 31: time and order."""

from __future__ import annotations

from svsm.formats.virtio import DeviceStatus, Feature, MmioRegister
from svsm.host.devices.virtio_ring import Chain, DeviceRing, DeviceSplitRing
from svsm.testing.hostile.catalogue import (
    SURVIVED,
    attack,
    dead,
    nth,
    options_of,
)
from svsm.testing.hostile.device import HostileBlk
from svsm.testing.hostile.trial import Trial

__all__: list[str] = []


@attack(26, "the device asks for a reset and stops", dead("virtio-needs-reset"))
def _needs_reset(device: HostileBlk) -> None:
    nth(device, 2, lambda ring, chain, written: device.needs_reset())


@attack(26, "the device says FAILED and stops", dead("virtio-needs-reset"))
def _failed(device: HostileBlk) -> None:
    def act(ring: DeviceRing, chain: Chain, written: int) -> None:
        device.status |= DeviceStatus.FAILED
        device.deaf = True

    nth(device, 2, act)


@attack(26, "the device resets itself", dead("virtio-needs-reset"))
def _resets_itself(device: HostileBlk) -> None:
    def act(ring: DeviceRing, chain: Chain, written: int) -> None:
        device.status = 0

    nth(device, 2, act)


@attack(27, "the device never completes", dead("virtio-timeout"))
def _silent(device: HostileBlk) -> None:
    device.on_complete = lambda ring, chain, written: None


@attack(27, "the device never takes a request", dead("virtio-timeout"))
def _deaf(device: HostileBlk) -> None:
    device.deaf = True


def _complete_late(trial: Trial) -> None:
    """Kill by timeout, revive, then let the completions of the first life arrive."""
    device = trial.device
    late: list[tuple[DeviceRing, Chain, int]] = []
    device.on_complete = lambda ring, chain, written: late.append((ring, chain, written))
    trial.read(0, 4096, count=90)  # every small buffer is lent
    if trial.driver.fault is None or trial.driver.fault.code != "virtio-timeout":
        raise AssertionError("no deadline")
    trial.errors.clear()
    device.on_complete = None
    trial.driver.reconnect()
    trial.content[:] = trial.machine.content(0, len(trial.content))

    def afterwards(ring: DeviceRing, chain: Chain, written: int) -> None:
        while late:
            old_ring, old, length = late.pop()
            for part in old.parts:
                if part.device_writes:
                    device.window.put(part.address, b"\xdd" * part.length)
            old_ring.push(old, length)
        ring.push(chain, written)

    device.on_complete = afterwards
    trial.read(0, 4096, count=3)
    trial.read(0, 65536)
    trial.attempt(trial.driver.flush)
    trial.errors.clear()  # it may say that writes of the first life are lost


attack(28, "the device completes after its reset", SURVIVED, after=_complete_late)(lambda device: None)


def _never_wants_kicks(device: HostileBlk) -> None:
    """The device says that it wants no kick, and then waits for one."""

    def finished(ring: DeviceRing) -> None:
        ring.disable_kicks()
        if isinstance(ring, DeviceSplitRing):
            device.window.put(ring.addresses.device, b"\x01\x00")
            device.window.put(
                ring.addresses.device + 4 + 8 * ring.size, (ring.next_available + 0x4000).to_bytes(4, "little")[:2]
            )

    device.on_finished = finished


attack(29, "the device wants no kicks and needs them", SURVIVED)(_never_wants_kicks)
attack(29, "the same, without EVENT_IDX", SURVIVED, options=options_of(remove=int(Feature.EVENT_IDX)))(
    _never_wants_kicks
)


@attack(29, "the device's event fields are garbage", SURVIVED)
def _event_garbage(device: HostileBlk) -> None:
    def finished(ring: DeviceRing) -> None:
        if isinstance(ring, DeviceSplitRing):
            device.window.put(ring.addresses.device, b"\xfe\xff")
            device.window.put(ring.addresses.device + 4 + 8 * ring.size, b"\xa5\xa5")
        else:
            device.window.put(ring.addresses.device, b"\xff\xff\xff\xff")

    device.on_finished = finished


def _storm(trial: Trial) -> None:
    trial.machine.registers.spurious = True
    trial.read(0, 4096, count=3)
    if trial.driver.fault is not None:
        raise AssertionError("interrupts without a reason killed the device")
    trial.device.on_complete = lambda ring, chain, written: None
    trial.read(0, 512)


attack(30, "interrupts without end, and then no answer", dead("virtio-timeout"), after=_storm)(lambda device: None)
attack(30, "every bit of the interrupt status, always", SURVIVED)(
    lambda device: device.lie_at(MmioRegister.INTERRUPT_STATUS, 0xFFFF_FFFF)
)


def _all_bits_and_no_kicks(device: HostileBlk) -> None:
    _never_wants_kicks(device)
    device.lie_at(MmioRegister.INTERRUPT_STATUS, 0xFFFF_FFFF)


attack(30, "every bit of the interrupt status, always, and no kick wanted", SURVIVED)(_all_bits_and_no_kicks)


@attack(31, "completions in the opposite order", SURVIVED)
def _reversed(device: HostileBlk) -> None:
    held: list[tuple[DeviceRing, Chain, int]] = []
    device.on_complete = lambda ring, chain, written: held.append((ring, chain, written))

    def finished(ring: DeviceRing) -> None:
        while held:
            held_ring, chain, written = held.pop()
            held_ring.push(chain, written)

    device.on_finished = finished


@attack(31, "one request starves until the rest is done", SURVIVED)
def _starved(device: HostileBlk) -> None:
    held: list[tuple[Chain, int]] = []

    def act(ring: DeviceRing, chain: Chain, written: int) -> None:
        if not held:
            held.append((chain, written))
        else:
            ring.push(chain, written)

    def finished(ring: DeviceRing) -> None:
        while held:
            ring.push(*held.pop())

    device.on_complete = act
    device.on_finished = finished
