# SPDX-License-Identifier: MIT OR Apache-2.0
"""Cases 1 to 13 and 35: completions, data, status, descriptors."""

from __future__ import annotations

from collections.abc import Callable

from svsm.formats.virtio import BlkType
from svsm.host.devices.virtio_ring import Chain, DevicePackedRing, DeviceRing, DeviceSplitRing
from svsm.testing.hostile.catalogue import (
    IO_ERROR,
    PACKED,
    SPLIT,
    SURVIVED,
    Install,
    attack,
    dead,
    nth,
)
from svsm.testing.hostile.device import HostileBlk
from svsm.testing.hostile.flicker import FlickerMemory
from svsm.testing.hostile.trial import Trial

__all__: list[str] = []


def _index_jump(step: int) -> Install:
    def install(device: HostileBlk) -> None:
        def act(ring: DeviceRing, chain: Chain, written: int) -> None:
            ring.push(chain, written)
            if isinstance(ring, DeviceSplitRing):
                ring.set_used_index(ring.next_used + step)

        nth(device, 1, act)

    return install


for _step, _name in ((1, "by one too many"), (7, "by more than are in flight"), (-2, "back"), (0x8000, "half around")):
    attack(1, f"the used index jumps {_name}", dead("virtio-used-index"), rings=SPLIT)(_index_jump(_step))


def _move_idle(trial: Trial) -> None:
    ring = trial.device.ring()
    if isinstance(ring, DeviceSplitRing):
        ring.set_used_index(ring.next_used + 1)
    elif isinstance(ring, DevicePackedRing):
        ring.put_used(0, 1, wrap=ring.used_wrap)
    trial.read(0, 512)


attack(
    1, "the used index moves while nothing is in flight", dead("virtio-used-unexpected"), rings=SPLIT, after=_move_idle
)(lambda device: None)
attack(
    35,
    "a descriptor is marked used while nothing is in flight",
    dead("virtio-used-unexpected"),
    rings=PACKED,
    after=_move_idle,
)(lambda device: None)


def _identifier(value: int) -> Install:
    def install(device: HostileBlk) -> None:
        nth(device, 2, lambda ring, chain, written: device.mark_used(ring, value, written, chain.entries))

    return install


attack(2, "an identifier beyond the ring", dead("virtio-used-id"))(_identifier(0x7FFF))
attack(2, "an identifier just beyond the ring", dead("virtio-used-id"))(_identifier(32))
attack(2, "the largest identifier", dead("virtio-used-id"))(_identifier(0xFFFF))
attack(3, "an identifier whose upper half is set", dead("virtio-used-id"), rings=SPLIT)(_identifier(0x1_0000))
attack(3, "an identifier of 32 bits", dead("virtio-used-id"), rings=SPLIT)(_identifier(0xFFFF_FFFF))


@attack(3, "the right identifier with upper bits", dead("virtio-used-id"), rings=SPLIT)
def _right_with_upper_bits(device: HostileBlk) -> None:
    nth(device, 2, lambda ring, chain, written: device.mark_used(ring, chain.identifier | 0x8000_0000, written, 1))


@attack(
    4,
    "the middle of a chain is returned",
    dead("virtio-used-unexpected"),
    split_direct=dead("virtio-used-id"),
)
def _middle(device: HostileBlk) -> None:
    nth(device, 2, lambda ring, chain, written: device.mark_used(ring, chain.identifier ^ 1, written, chain.entries))


@attack(4, "a request that is not in flight is returned", dead("virtio-used-unexpected"))
def _unsolicited(device: HostileBlk) -> None:
    # Slot 0 has a large buffer and is not used by the first small request.
    nth(device, 0, lambda ring, chain, written: device.mark_used(ring, 0, written, chain.entries))


@attack(
    5,
    "a request is returned twice at once",
    dead("virtio-used-unexpected"),
    split=dead("virtio-used-index"),
    split_direct=dead("virtio-used-index"),
)
def _twice(device: HostileBlk) -> None:
    def act(ring: DeviceRing, chain: Chain, written: int) -> None:
        ring.push(chain, written)
        device.mark_used(ring, chain.identifier, written, chain.entries)

    nth(device, 0, act)


@attack(5, "a request is returned in the place of another", dead("virtio-used-unexpected"))
def _twice_in_a_batch(device: HostileBlk) -> None:
    last: list[Chain] = []

    def act(ring: DeviceRing, chain: Chain, written: int) -> None:
        if last and device.batch > 1:
            device.mark_used(ring, last[-1].identifier, 1, chain.entries)
        else:
            ring.push(chain, written)
        last.append(chain)
        device.batch += 1

    def finished(ring: DeviceRing) -> None:
        device.batch = 0
        last.clear()

    device.on_complete = act
    device.on_finished = finished


def _length(value: int | None, add: int = 0) -> Install:
    def install(device: HostileBlk) -> None:
        nth(
            device,
            1,
            lambda ring, chain, written: device.mark_used(
                ring, chain.identifier, written + add if value is None else value, chain.entries
            ),
        )

    return install


attack(6, "one byte more than the buffer holds", dead("virtio-used-length"))(_length(None, 1))
attack(6, "the largest length", dead("virtio-used-length"))(_length(0xFFFF_FFFF))
attack(6, "a length with the sign bit", dead("virtio-used-length"))(_length(0x8000_0000))


attack(7, "nothing written, says the length, with status OK", IO_ERROR)(_length(0))
attack(7, "only the status written, says the length", IO_ERROR)(_length(1))
attack(7, "all but a byte written, says the length", IO_ERROR)(_length(None, -1))

attack(8, "identifier, length and status change once they are read", SURVIVED, memory_type=FlickerMemory)(
    lambda device: None
)


def _status(value: int) -> Install:
    def install(device: HostileBlk) -> None:
        def act(ring: DeviceRing, chain: Chain, written: int) -> None:
            last = chain.parts[-1]
            device.window.put(last.address + last.length - 1, bytes([value]))
            ring.push(chain, written)

        nth(device, 1, act)

    return install


for _value in (3, 0x7F, 0xFF):
    attack(9, f"status {_value:#x}", dead("virtio-blk-status"))(_status(_value))


@attack(9, "a flush is completed and nothing is done", dead("virtio-blk-status"))
def _flush_not_done(device: HostileBlk) -> None:
    def act(ring: DeviceRing, chain: Chain, written: int) -> None:
        if device.window.take(chain.parts[0].address, 4) == int(BlkType.FLUSH).to_bytes(4, "little"):
            device.window.put(chain.parts[-1].address, b"\xff")
        ring.push(chain, written)

    device.on_complete = act


@attack(7, "a flush fails", IO_ERROR)
def _flush_fails(device: HostileBlk) -> None:
    def act(ring: DeviceRing, chain: Chain, written: int) -> None:
        if device.window.take(chain.parts[0].address, 4) == int(BlkType.FLUSH).to_bytes(4, "little"):
            device.window.put(chain.parts[-1].address, b"\x01")
        ring.push(chain, written)

    device.on_complete = act


@attack(7, "a flush is completed with status OK, and nothing written, says the length", IO_ERROR)
def _flush_wrote_nothing(device: HostileBlk) -> None:
    def act(ring: DeviceRing, chain: Chain, written: int) -> None:
        flush = device.window.take(chain.parts[0].address, 4) == int(BlkType.FLUSH).to_bytes(4, "little")
        device.mark_used(ring, chain.identifier, 0 if flush else written, chain.entries)

    device.on_complete = act


@attack(9, "a request is completed and nothing is done", dead("virtio-blk-status"))
def _nothing_done(device: HostileBlk) -> None:
    undone: dict[int, bytes] = {}

    def request(chain: Chain) -> None:
        for part in chain.parts:
            if part.device_writes:
                undone[part.address] = device.window.take(part.address, part.length)

    def act(ring: DeviceRing, chain: Chain, written: int) -> None:
        for address, data in undone.items():
            device.window.put(address, data)
        ring.push(chain, written)

    device.on_request = request
    nth(device, 4, act)


attack(9, "an I/O error", IO_ERROR)(_status(1))
attack(9, "an unsupported request", IO_ERROR)(_status(2))


def _scribble_everything(trial: Trial) -> None:
    results = trial.driver.read([(0, 4096), (8192, 8192)])
    before = [bytes(part) for part in results]
    shared = trial.device.window.bytes
    saved = bytes(shared)
    shared[:] = b"\xee" * len(shared)
    if results != before:
        raise AssertionError("a result is a view of shared memory")
    shared[:] = saved


attack(10, "data changes after the driver has returned it", SURVIVED, after=_scribble_everything)(lambda device: None)


@attack(11, "descriptors and available ring are overwritten with garbage", dead("virtio-needs-reset"))
def _garbage_descriptors(device: HostileBlk) -> None:
    def act(ring: DeviceRing, chain: Chain, written: int) -> None:
        if isinstance(ring, DeviceSplitRing):
            device.scribble_descriptors(ring, b"\xff" * 16)
            available = device.window.offset(ring.addresses.driver + 4, 2 * ring.size)
            device.window.bytes[available : available + 2 * ring.size] = b"\xff" * (2 * ring.size)
        ring.push(chain, written)

    def act_packed(ring: DeviceRing, chain: Chain, written: int) -> None:
        ring.push(chain, written)
        if isinstance(ring, DevicePackedRing):
            # All but the two bytes of flags of every entry, which are the ring's clock.
            for position in range(ring.size):
                device.window.put(ring.addresses.descriptors + 16 * position, b"\xff" * 8)

    device.on_complete = lambda ring, chain, written: (act if isinstance(ring, DeviceSplitRing) else act_packed)(
        ring, chain, written
    )


@attack(12, "indirect tables are overwritten with garbage", dead("virtio-needs-reset"), rings=("split", "packed"))
def _garbage_tables(device: HostileBlk) -> None:
    def act(ring: DeviceRing, chain: Chain, written: int) -> None:
        ring.push(chain, written)
        start = chain.parts[0].address
        # Tables lie right behind the ring, before the headers.
        first = ring.addresses.device
        for at in range(first + 4 * ring.size * 2 + 64, start - 64, 64):
            if device.window.take(at, 8) != bytes(8):
                device.window.put(at, b"\xff" * 48)

    device.on_complete = act


@attack(13, "a chain is made a loop", dead("virtio-needs-reset"), rings=SPLIT)
def _loop(device: HostileBlk) -> None:
    def act(ring: DeviceRing, chain: Chain, written: int) -> None:
        ring.push(chain, written)
        if isinstance(ring, DeviceSplitRing):
            for position in range(ring.size):
                at = ring.addresses.descriptors + 16 * position
                address = device.window.take(at, 8)
                tail = 16 | 1 << 32 | position << 48
                device.window.put(at, address + tail.to_bytes(8, "little"))

    device.on_complete = act


def _packed(act: Callable[[HostileBlk, DevicePackedRing, Chain, int], None], number: int = 2) -> Install:
    def install(device: HostileBlk) -> None:
        def complete(ring: DeviceRing, chain: Chain, written: int) -> None:
            if isinstance(ring, DevicePackedRing):
                act(device, ring, chain, written)

        nth(device, number, complete)

    return install


def _flags_only(flags: int) -> Install:
    def act(device: HostileBlk, ring: DevicePackedRing, chain: Chain, written: int) -> None:
        ring.put_used(chain.identifier, written, wrap=ring.used_wrap)
        ring._flags[8 * ring.next_used + 7] = flags
        ring.skip(chain.entries)

    return _packed(act)


attack(35, "the wrap counter is wrong", dead("virtio-timeout"), rings=PACKED)(_flags_only(0))
attack(35, "only AVAIL is set", dead("virtio-timeout"), rings=PACKED)(_flags_only(0x80))
attack(35, "only USED is set", dead("virtio-timeout"), rings=PACKED)(_flags_only(0x8000))
attack(35, "every other flag is set too", SURVIVED, rings=PACKED)(_flags_only(0xFFFF))


def _skip_position(device: HostileBlk, ring: DevicePackedRing, chain: Chain, written: int) -> None:
    ring.skip(1)
    ring.push(chain, written)


attack(35, "a position is skipped", dead("virtio-timeout"), rings=PACKED)(_packed(_skip_position))


@attack(35, "the whole ring is marked used", dead("virtio-used-unexpected"), rings=PACKED)
def _all_used(device: HostileBlk) -> None:
    def act(ring: DeviceRing, chain: Chain, written: int) -> None:
        if isinstance(ring, DevicePackedRing):
            for position in range(ring.size):
                at = ring.addresses.descriptors + 16 * position + 8
                tail = written | chain.identifier << 32 | 0x8080 << 48
                device.window.put(at, tail.to_bytes(8, "little"))

    nth(device, 0, act)


@attack(35, "an identifier is returned twice, in two positions", dead("virtio-used-unexpected"), rings=PACKED)
def _packed_twice(device: HostileBlk) -> None:
    def act(ring: DeviceRing, chain: Chain, written: int) -> None:
        ring.push(chain, written)
        ring.push(chain, written)

    nth(device, 3, act)
