# SPDX-License-Identifier: MIT OR Apache-2.0
"""The virtio disk driver on an honest device: what conformance does not ask."""

from __future__ import annotations

import dataclasses
import mmap
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from svsm.formats.errors import BackendError, ProtocolError, StateError
from svsm.formats.virtio import BlkConfig, BlkFeature, DeviceStatus, Interrupt, MmioRegister
from svsm.host.devices.virtio_blk import ALL_FEATURES, BlkOptions
from svsm.storage.drivers.dma import DmaMemory
from svsm.storage.drivers.virtio.blk import BlkPolicy, VirtioBlk, memory_bytes
from svsm.storage.drivers.virtio.blk_config import Geometry, parse_geometry
from svsm.storage.drivers.virtio.mmio import MmioTransport
from svsm.testing.virtio_harness import (
    GPA,
    SMALL_POLICY,
    Clock,
    InlineRegisters,
    Machine,
    disk_file,
    threaded_disk,
    virtio_disk,
)

_SIZE = 1 << 20


def _machine(policy: BlkPolicy = SMALL_POLICY, **options: Any) -> Machine:
    return virtio_disk(
        disk_file(_SIZE, os.urandom(_SIZE)),
        options=BlkOptions(**options),
        policy=policy,
    )


def test_identity_and_geometry() -> None:
    machine = _machine()
    assert machine.driver.get_id() == b"svsm-disk"
    geometry = machine.driver.geometry
    assert geometry.flush
    assert geometry.discard is not None
    assert geometry.write_zeroes is not None
    machine.close()


@pytest.mark.parametrize("serial", [b"", b"twenty bytes, exactly", b"\x00x"])
def test_names_of_any_length(serial: bytes) -> None:
    machine = virtio_disk(disk_file(4096), options=BlkOptions(serial=serial))
    assert machine.driver.get_id() == serial[:20].split(b"\0")[0]
    machine.close()


def test_many_requests_are_in_flight_together() -> None:
    """A call costs kicks by the batch of 16, not by the request."""
    machine = _machine(dataclasses.replace(SMALL_POLICY, queue_size=256))
    before = machine.registers.accesses
    machine.driver.read([(at * 512, 512) for at in range(1000)])
    assert machine.registers.accesses - before < 1000 / 16 + 5
    machine.close()


@pytest.mark.parametrize("ranges", [1, 3])
@pytest.mark.parametrize("operation", ["read", "write", "flush", "write_zeroes"])
def test_completed_and_never_done(operation: str, ranges: int) -> None:
    """Every slot has been used before, so its status byte says OK from the last time."""
    machine = _machine()
    machine.driver.write([(at * 512, bytes(512)) for at in range(64)])
    written = 513 if operation == "read" else 1
    machine.device.backend.handle = lambda window, chain: written  # type: ignore[method-assign]
    each = [(at * 512, 512) for at in range(ranges)]
    calls: dict[str, Callable[[], object]] = {
        "read": lambda: machine.driver.read(each),
        "write": lambda: machine.driver.write([(offset, bytes(length)) for offset, length in each]),
        "flush": machine.driver.flush,
        "write_zeroes": lambda: machine.driver.write_zeroes(each),
    }
    with pytest.raises(BackendError) as caught:
        calls[operation]()
    assert caught.value.details["violation"] == "virtio-blk-status"
    machine.close()


def _judged(config: BlkConfig) -> Geometry:
    return parse_geometry(config.pack(), BlkFeature.DISCARD | BlkFeature.WRITE_ZEROES)


@pytest.mark.parametrize(("offered", "used"), [(0, 1), (1, 1), (64, 64), (65, 64), ((1 << 32) - 1, 64)])
def test_segments_of_a_request_are_within_bounds(offered: int, used: int) -> None:
    discard = BlkConfig(max_discard_sectors=8, max_discard_seg=offered)
    write_zeroes = BlkConfig(max_write_zeroes_sectors=8, max_write_zeroes_seg=offered)
    found = [_judged(discard).discard, _judged(write_zeroes).write_zeroes]
    assert [limits and limits.segments for limits in found] == [used, used]


@pytest.mark.parametrize("value", [0, 1, 2, 255])
def test_only_one_is_leave_to_unmap(value: int) -> None:
    geometry = _judged(BlkConfig(max_write_zeroes_sectors=8, write_zeroes_may_unmap=value))
    assert geometry.write_zeroes is not None
    assert geometry.write_zeroes.unmap is (value == 1)


def test_interrupt_bits_without_a_meaning_are_not_acknowledged() -> None:
    machine = _machine()
    registers = machine.registers
    read32, write32 = registers.read32, registers.write32
    acknowledged: list[int] = []

    def noted(offset: int, value: int) -> None:
        if offset == MmioRegister.INTERRUPT_ACK:
            acknowledged.append(value)
        write32(offset, value)

    registers.write32 = noted  # type: ignore[method-assign]
    registers.read32 = lambda offset: (  # type: ignore[method-assign]
        0xFFFF_FFFE if offset == MmioRegister.INTERRUPT_STATUS else read32(offset)
    )
    events = MmioTransport(registers).take_events()
    assert (events.used, events.configuration) == (False, True)
    assert acknowledged == [Interrupt.CONFIGURATION]
    machine.close()


@pytest.mark.parametrize("early", [False, True])
def test_early_kicks_are_two_more_and_only_for_a_lone_request(early: bool) -> None:
    machine = _machine(dataclasses.replace(SMALL_POLICY, early_kick=early))
    kicks: list[int] = []
    write32 = machine.registers.write32

    def noted(offset: int, value: int) -> None:
        if offset == MmioRegister.QUEUE_NOTIFY:
            kicks.append(value)
        write32(offset, value)

    machine.registers.write32 = noted  # type: ignore[method-assign]
    machine.driver.write([(0, b"a" * 512)])
    assert machine.driver.read([(0, 512)]) == [b"a" * 512]
    assert len(kicks) == (6 if early else 2)
    machine.driver.read([(0, 512), (512, 512)])
    assert len(kicks) == (7 if early else 3)
    machine.close()


def test_flush_reaches_the_device_and_only_then_counts() -> None:
    machine = _machine()
    machine.driver.write([(0, bytes(512))])
    assert machine.device.backend.flushes == 0
    machine.driver.flush()
    assert machine.device.backend.flushes == 1
    machine.close()


@pytest.mark.parametrize(("segments", "most"), [(1, 8), (3, 8), (64, 1), (1, 1000)])
def test_discard_and_zeroes_keep_the_devices_limits(segments: int, most: int) -> None:
    """Ranges are cut and bundled; the device refuses what is beyond its limits, so nothing may be."""
    machine = _machine(discard_sectors=most, discard_segments=segments, zeroes_sectors=most, zeroes_segments=segments)
    ranges = [(512 * 3, 512 * 50), (512 * 100, 512), (512 * 200, 512 * 9)]
    machine.driver.discard(ranges)
    for offset, length in ranges:
        assert machine.content(offset, length) == bytes(length)
    assert machine.content(0, 512 * 3) != bytes(512 * 3)
    machine.driver.write([(0, b"\xff" * 65536)])
    machine.driver.write_zeroes([(512, 65536 - 1024)])
    assert machine.content(0, 65536) == b"\xff" * 512 + bytes(65536 - 1024) + b"\xff" * 512
    machine.close()


def test_zeroes_without_the_feature_are_written() -> None:
    machine = _machine(features=ALL_FEATURES & ~int(BlkFeature.WRITE_ZEROES))
    machine.driver.write_zeroes([(512, 100 * 512)])
    assert machine.content(512, 100 * 512) == bytes(100 * 512)
    machine.close()


def test_discard_without_the_feature_does_nothing() -> None:
    machine = _machine(features=ALL_FEATURES & ~int(BlkFeature.DISCARD))
    before = machine.content(0, 4096)
    machine.driver.discard([(0, 4096)])
    assert machine.content(0, 4096) == before
    machine.close()


def test_resize_is_noticed_while_it_happens() -> None:
    machine = _machine()
    assert not machine.driver.poll()
    machine.device.resize(16)
    assert machine.driver.poll()
    assert not machine.driver.poll()
    assert machine.driver.size_bytes == 8192
    assert machine.driver.resizes == 1
    with pytest.raises(StateError) as caught:
        machine.driver.read([(8192, 512)])
    assert caught.value.code == "block-range"
    machine.close()


def _kill(machine: Machine) -> BackendError:
    machine.device.needs_reset()
    with pytest.raises(BackendError) as caught:
        machine.driver.read([(0, 512)])
    return caught.value


def test_a_dead_device_says_so_until_it_is_reconnected() -> None:
    machine = _machine()
    error = _kill(machine)
    assert error.code == "block-io"
    assert error.details["violation"] == "virtio-needs-reset"
    for call in (
        machine.driver.flush,
        machine.driver.get_id,
        machine.driver.poll,
        lambda: machine.driver.write([(0, bytes(512))]),
        lambda: machine.driver.discard([(0, 512)]),
    ):
        with pytest.raises(BackendError):
            call()
    machine.driver.reconnect()
    assert machine.driver.read([(0, 512)]) == [machine.content(0, 512)]
    assert machine.driver.fault is None
    machine.close()


def test_a_flush_after_a_reset_does_not_hide_lost_writes() -> None:
    machine = _machine()
    machine.driver.write([(0, bytes(512))])
    _kill(machine)
    machine.driver.reconnect()
    machine.driver.write([(512, bytes(512))])
    with pytest.raises(BackendError):
        machine.driver.flush()
    machine.driver.flush()
    _kill(machine)
    machine.driver.reconnect()
    machine.driver.flush()  # nothing was written since the last flush
    machine.close()


def test_a_failed_write_counts_as_one_that_may_be_lost() -> None:
    machine = _machine()
    machine.device.needs_reset()
    with pytest.raises(BackendError):
        machine.driver.write([(0, bytes(512))])
    machine.driver.reconnect()
    with pytest.raises(BackendError):
        machine.driver.flush()
    machine.close()


def test_reconnecting_to_a_device_that_is_no_disk_any_more() -> None:
    machine = _machine()
    _kill(machine)
    machine.device.backend.options = dataclasses.replace(machine.device.backend.options, features=0)
    with pytest.raises(ProtocolError) as caught:
        machine.driver.reconnect()
    assert caught.value.code == "virtio-features-missing"
    with pytest.raises(BackendError) as dead:
        machine.driver.read([(0, 512)])
    assert dead.value.details["violation"] == "virtio-features-missing"
    machine.close()


def test_a_new_transport_to_the_same_disk() -> None:
    machine = _machine()
    _kill(machine)
    fresh = MmioTransport(
        InlineRegisters(machine.device, machine.clock), clock=machine.clock, pause=machine.clock.pause
    )
    machine.driver.reconnect(fresh)
    assert machine.driver.read([(0, 512)]) == [machine.content(0, 512)]
    machine.close()


def test_deadlines_grow_with_what_is_asked_for() -> None:
    machine = _machine()
    machine.device.queues[0].ring = None  # takes nothing any more
    start = machine.clock.now
    with pytest.raises(BackendError):
        machine.driver.read([(0, 512)])
    short = machine.clock.now - start
    assert SMALL_POLICY.deadline_seconds <= short < SMALL_POLICY.deadline_seconds + 1.5
    machine.close()


def test_closing_resets_the_device() -> None:
    machine = _machine()
    assert machine.device.status & DeviceStatus.DRIVER_OK
    machine.driver.close()
    assert not machine.device.status & DeviceStatus.DRIVER_OK
    with pytest.raises(StateError):
        machine.driver.reconnect()


@pytest.mark.parametrize(
    "policy",
    [
        BlkPolicy(small_bytes=100),
        BlkPolicy(small_bytes=8192, large_bytes=4096),
        BlkPolicy(queues=0),
        BlkPolicy(queues=17),
        BlkPolicy(large_slots=0),
        BlkPolicy(deadline_seconds=0.0),
        BlkPolicy(spins=0),
    ],
)
def test_policies_that_make_no_sense(policy: BlkPolicy) -> None:
    with pytest.raises(StateError) as caught:
        policy.check()
    assert caught.value.code == "virtio-policy"


@pytest.mark.parametrize("pages", [1, 2, 20])
def test_too_little_memory(pages: int) -> None:
    machine = _machine()
    memory = DmaMemory(memoryview(mmap.mmap(-1, 4096 * pages)), address=GPA)
    clock = Clock()
    with pytest.raises(StateError) as caught:
        VirtioBlk(
            MmioTransport(InlineRegisters(machine.device, clock), clock=clock, pause=clock.pause),
            memory,
            policy=SMALL_POLICY,
            clock=clock,
        )
    assert caught.value.code == "dma-memory"
    machine.close()


@pytest.mark.parametrize("queues", [1, 4])
@pytest.mark.parametrize("queue_size", [4, 256, 1024])
@pytest.mark.parametrize("indirect", [True, False])
def test_memory_bytes_is_enough(queues: int, queue_size: int, indirect: bool) -> None:
    policy = BlkPolicy(queues=queues, queue_size=queue_size, large_bytes=65536, indirect=indirect)
    machine = virtio_disk(disk_file(_SIZE), options=BlkOptions(queues=queues, queue_size=queue_size), policy=policy)
    assert machine.memory.size_bytes == memory_bytes(policy)
    machine.close()


@pytest.mark.parametrize("packed", [True, False])
def test_beside_a_device_in_another_thread(packed: bool) -> None:
    """Real time, real sleeping: nothing is lost between the two."""
    content = os.urandom(_SIZE)
    policy = BlkPolicy(packed=packed, spins=1, queue_size=16, large_bytes=65536, large_slots=2)
    machine, thread = threaded_disk(disk_file(_SIZE, content), policy=policy)
    for turn in range(20):
        ranges = [((turn + index) * 4096 % _SIZE, 4096) for index in range(turn * 3 + 1)]
        assert machine.driver.read(ranges) == [content[offset : offset + length] for offset, length in ranges]
        machine.driver.write([(0, content[:4096])])
    resized = threading.Thread(target=lambda: machine.device.resize(8))
    resized.start()
    resized.join()
    assert machine.driver.poll()
    machine.driver.flush()
    machine.close()
    thread.stop()


def test_registers_are_read_as_the_specification_orders() -> None:
    """Status goes 0, ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK; queues are set up before the last."""
    written: list[tuple[int, int]] = []

    class Recorder(InlineRegisters):
        def write32(self, offset: int, value: int) -> None:
            written.append((offset, value))
            super().write32(offset, value)

    machine = _machine()
    machine.driver.close()
    written.clear()
    clock = Clock()
    memory = DmaMemory(memoryview(mmap.mmap(-1, memory_bytes(SMALL_POLICY))), address=GPA)
    transport = MmioTransport(Recorder(machine.device, clock), clock=clock, pause=clock.pause)
    machine.device.window.address = GPA + (1 << 40)  # any other address: the queue is refused before DRIVER_OK
    with pytest.raises(ProtocolError) as caught:
        VirtioBlk(transport, memory, policy=SMALL_POLICY, clock=clock)
    assert caught.value.code == "virtio-queue-refused"
    statuses = [value for offset, value in written if offset == MmioRegister.STATUS]
    assert statuses == [0, 1, 3, 11]
    os.close(machine.descriptor)
