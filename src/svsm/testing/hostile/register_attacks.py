# SPDX-License-Identifier: MIT OR Apache-2.0
"""Cases 14 to 25 and 32: registers and configuration."""

from __future__ import annotations

from collections.abc import Callable

from svsm.formats.virtio import BlkFeature, DeviceStatus, Feature, MmioRegister
from svsm.host.devices.virtio_ring import Chain, DeviceRing
from svsm.testing.hostile.catalogue import (
    IO_ERROR,
    SURVIVED,
    Install,
    attack,
    dead,
    options_of,
    refused,
)
from svsm.testing.hostile.device import HostileBlk
from svsm.testing.hostile.trial import Kind, Outcome, Trial

__all__: list[str] = []


@attack(14, "FEATURES_OK is not kept", refused("virtio-features-refused"))
def _features_not_ok(device: HostileBlk) -> None:
    device.on_read = lambda at, honest: honest & ~int(DeviceStatus.FEATURES_OK) if at == MmioRegister.STATUS else honest


attack(15, "VERSION_1 is not offered", refused("virtio-features-missing"))(
    lambda device: device.lie_about_features(remove=int(Feature.VERSION_1))
)
attack(15, "registers of version 1", refused("virtio-legacy"))(lambda device: device.lie_at(MmioRegister.VERSION, 1))
attack(15, "registers of version 3", refused("virtio-legacy"))(lambda device: device.lie_at(MmioRegister.VERSION, 3))
attack(16, "ACCESS_PLATFORM is not offered", refused("virtio-features-missing"))(
    lambda device: device.lie_about_features(remove=int(Feature.ACCESS_PLATFORM))
)
attack(16, "no feature at all", refused("virtio-features-missing"))(
    lambda device: device.lie_at(MmioRegister.DEVICE_FEATURES, 0)
)


def _no_writes(trial: Trial) -> None:
    if not trial.driver.read_only or {error.code for error in trial.errors} != {"block-read-only"}:
        raise AssertionError("a write to a read-only disk was not refused")
    if trial.machine.content(0, len(trial.content)) != trial.content:
        raise AssertionError("a read-only disk changed")


attack(
    17,
    "the disk is read-only",
    Outcome(Kind.ERROR, "block-read-only"),
    options=options_of(add=BlkFeature.RO),
    after=_no_writes,
)(lambda device: None)


def _no_flush(trial: Trial) -> None:
    if [error.details.get("operation") for error in trial.errors] != ["flush"]:
        raise AssertionError("a flush that cannot be was not an error")


@attack(
    17,
    "flushes are not offered, and answered with OK",
    IO_ERROR,
    options=options_of(remove=BlkFeature.FLUSH),
    after=_no_flush,
)
def _flush_is_a_lie(device: HostileBlk) -> None:
    def act(ring: DeviceRing, chain: Chain, written: int) -> None:
        last = chain.parts[-1]
        device.window.put(last.address + last.length - 1, b"\x00")
        ring.push(chain, written)

    device.on_complete = act


attack(17, "every feature bit is offered", refused("virtio-features-refused"))(
    lambda device: device.lie_about_features(add=(1 << 64) - 1)
)
attack(17, "features that nobody knows are offered", SURVIVED)(
    lambda device: device.lie_about_features(add=int(Feature.IN_ORDER | Feature.NOTIFICATION_DATA) | 1 << 50)
)
attack(17, "many queues are offered, and none exists", refused("virtio-blk-geometry"), queues=4)(
    lambda device: device.lie_about_config(34, 0, 2)
)
attack(17, "more queues are offered than exist", refused("virtio-queue-missing"), queues=4)(
    lambda device: device.lie_about_config(34, 9, 2)
)
attack(17, "discards of no sector", SURVIVED, options=options_of(discard_sectors=0))(lambda device: None)


def _read_once(*registers: int) -> Callable[[Trial], None]:
    def after(trial: Trial) -> None:
        for register in registers:
            if trial.device.reads.get(register, 0) > (2 if register == MmioRegister.DEVICE_FEATURES else 1):
                raise AssertionError(f"register {register:#x} was read again")

    return after


@attack(18, "feature words change between readings", SURVIVED, after=_read_once(MmioRegister.DEVICE_FEATURES))
def _feature_words_change(device: HostileBlk) -> None:
    seen: set[int] = set()

    def lie(at: int, honest: int) -> int:
        if at != MmioRegister.DEVICE_FEATURES:
            return honest
        select = device._feature_select[0]
        if select in seen:
            return honest ^ 0xFFFF_FFFF
        seen.add(select)
        return honest

    device.on_read = lie


@attack(19, "the configuration's generation never stands still", refused("virtio-config-unstable"))
def _generation(device: HostileBlk) -> None:
    device.lie_at(MmioRegister.CONFIG_GENERATION, *range(1000))


attack(19, "the generation stands still after three tries", SURVIVED)(
    lambda device: device.lie_at(MmioRegister.CONFIG_GENERATION, 1, 2, 3, 4, 5, 6, 7)
)


def _capacity(value: int, width: int = 8) -> Install:
    return lambda device: device.lie_about_config(0, value, width)


def _block_bytes(value: int) -> Install:
    return lambda device: device.lie_about_config(20, value, 4)


def _empty(trial: Trial) -> None:
    if trial.driver.size_bytes:
        raise AssertionError("an empty disk has a size")


attack(20, "no capacity", SURVIVED, after=_empty)(_capacity(0))
attack(20, "the largest capacity", refused("virtio-blk-geometry"))(_capacity((1 << 64) - 1))
attack(20, "a capacity that overflows in bytes", refused("virtio-blk-geometry"))(_capacity(1 << 55))


def _part_of_a_block(trial: Trial) -> None:
    if trial.driver.size_bytes != 2040 // 8 * 4096:
        raise AssertionError("a part of a block counts")


attack(
    20,
    "a capacity that is no whole number of blocks",
    SURVIVED,
    options=options_of(block_bytes=4096),
    after=_part_of_a_block,
)(_capacity(2047))


def _shrink(trial: Trial) -> None:
    trial.device.resize(8)
    if not trial.driver.poll() or trial.driver.size_bytes != 4096:
        raise AssertionError("the driver missed a resize")
    before = trial.requests
    trial.attempt(lambda: trial.driver.read([(4096, 512)]))
    if trial.errors.pop().code != "block-range" or trial.requests != before:
        raise AssertionError("a request went beyond the new end")


def _grow(trial: Trial) -> None:
    trial.device.resize(4096)
    if not trial.driver.poll() or trial.driver.size_bytes != 4096 * 512:
        raise AssertionError("the driver missed a resize")
    if trial.driver.read([(4096 * 512 - 512, 512)]) != [bytes(512)]:
        raise AssertionError("the new part is not there")


def _grow_impossibly(trial: Trial) -> None:
    trial.device.lie_about_config(0, (1 << 64) - 1, 8)
    trial.device.generation += 1
    trial.device.interrupt_status |= 2
    trial.attempt(trial.driver.poll)


attack(20, "the disk shrinks", SURVIVED, after=_shrink)(lambda device: None)
attack(20, "the disk grows", SURVIVED, after=_grow)(lambda device: None)
attack(20, "the disk grows beyond all bounds", dead("virtio-blk-geometry"), after=_grow_impossibly)(lambda device: None)


def _other_blocks(trial: Trial) -> None:
    """From 4096-byte blocks to 512, with a capacity that only fits the latter."""
    trial.device.lie_about_config(20, 512, 4)
    trial.device.resize(2047)
    trial.attempt(trial.driver.poll)
    if trial.driver.block_size_bytes != 4096 or trial.driver.size_bytes != 2040 // 8 * 4096:
        raise AssertionError("the size is no multiple of the block size")


attack(
    20, "the block size changes with the capacity", SURVIVED, options=options_of(block_bytes=4096), after=_other_blocks
)(lambda device: None)

attack(20, "the disk is larger than it is", IO_ERROR, after=lambda trial: trial.read(1 << 30, 512))(_capacity(1 << 30))

for _size in (0, 1, 256, 513, 3072, 1 << 21, 0x8000_0000, 0xFFFF_FFFF):
    attack(21, f"blocks of {_size} bytes", refused("virtio-blk-geometry"))(_block_bytes(_size))
attack(21, "topology of nonsense", SURVIVED)(lambda device: device.lie_about_config(24, (1 << 64) - 1, 8))

attack(22, "segments of one byte", refused("virtio-blk-geometry"))(lambda device: device.lie_about_config(8, 1, 4))
attack(22, "segments of any size", SURVIVED)(lambda device: device.lie_about_config(8, 0xFFFF_FFFF, 4))
attack(22, "segments of no size, which means no limit", SURVIVED)(lambda device: device.lie_about_config(8, 0, 4))
attack(22, "no segment", SURVIVED)(lambda device: device.lie_about_config(12, 0, 4))
attack(22, "segments without number", SURVIVED)(lambda device: device.lie_about_config(12, 0xFFFF_FFFF, 4))
attack(22, "discards in no segment", SURVIVED)(lambda device: device.lie_about_config(40, 0, 4))
attack(22, "discards in segments without number", SURVIVED)(
    lambda device: device.lie_about_config(36, (1 << 96) - 1, 12)
)


def _discards_happen(trial: Trial) -> None:
    if trial.driver.geometry.discard is None or any(trial.driver.read([(64 * 512, 16 * 512)])[0]):
        raise AssertionError("an alignment takes discards away")


attack(
    22,
    "discards whose alignment is larger than they can be",
    SURVIVED,
    options=options_of(discard_alignment=1 << 20),
    after=_discards_happen,
)(lambda device: None)

attack(23, "no queue", refused("virtio-queue-missing"))(lambda device: device.lie_at(MmioRegister.QUEUE_SIZE_MAX, 0))
attack(23, "a queue of more than 32768", refused("virtio-queue-size"))(
    lambda device: device.lie_at(MmioRegister.QUEUE_SIZE_MAX, 32769)
)
attack(23, "a queue of 2^32 - 1", refused("virtio-queue-size"))(
    lambda device: device.lie_at(MmioRegister.QUEUE_SIZE_MAX, 0xFFFF_FFFF)
)
attack(23, "the largest queue", SURVIVED)(lambda device: device.lie_at(MmioRegister.QUEUE_SIZE_MAX, 32768))
attack(23, "a queue of 31", SURVIVED)(lambda device: device.lie_at(MmioRegister.QUEUE_SIZE_MAX, 31))
attack(23, "a queue of 2", refused("virtio-queue-size"))(lambda device: device.lie_at(MmioRegister.QUEUE_SIZE_MAX, 2))
attack(23, "a queue whose size changes", SURVIVED, after=_read_once(MmioRegister.QUEUE_SIZE_MAX))(
    lambda device: device.lie_at(MmioRegister.QUEUE_SIZE_MAX, 32, 0xFFFF_FFFF)
)

attack(24, "the queue is ready before it is set up", refused("virtio-queue-busy"))(
    lambda device: device.lie_at(MmioRegister.QUEUE_READY, 1)
)
attack(24, "the queue never becomes ready", refused("virtio-queue-refused"))(
    lambda device: device.lie_at(MmioRegister.QUEUE_READY, 0)
)
attack(25, "a reset is never done", refused("virtio-reset-stuck"))(lambda device: device.lie_at(MmioRegister.STATUS, 8))


def _reset_stuck_later(trial: Trial) -> None:
    trial.device.deaf = trial.device.stuck = True
    trial.read(0, 512)
    before = len(trial.errors)
    trial.device.on_read = lambda at, honest: 0x4F if at == MmioRegister.STATUS else honest
    try:
        trial.driver.reconnect()
    except Exception as error:
        if getattr(error, "code", "") != "virtio-reset-stuck":
            raise
    else:
        raise AssertionError("a device that does not reset was used again")
    trial.read(0, 512)
    if len(trial.errors) != before + 1:
        raise AssertionError("a device that does not reset answers")


attack(25, "a later reset is never done", dead("virtio-reset-stuck"), after=_reset_stuck_later)(lambda device: None)


@attack(
    32,
    "magic, version and device change after the probe",
    SURVIVED,
    after=_read_once(MmioRegister.MAGIC, MmioRegister.VERSION, MmioRegister.DEVICE_ID),
)
def _identity_changes(device: HostileBlk) -> None:
    for register, honest in ((MmioRegister.MAGIC, 0x74726976), (MmioRegister.VERSION, 2), (MmioRegister.DEVICE_ID, 2)):
        device.lie_at(register, honest, 0)


attack(32, "no magic", refused("virtio-magic"))(lambda device: device.lie_at(MmioRegister.MAGIC, 0))
attack(32, "an empty slot", refused("virtio-no-device"))(lambda device: device.lie_at(MmioRegister.DEVICE_ID, 0))
attack(32, "a network card", refused("virtio-device-type"))(lambda device: device.lie_at(MmioRegister.DEVICE_ID, 1))
attack(32, "registers of more than 32 bits", refused("virtio-register"))(
    lambda device: device.lie_at(MmioRegister.MAGIC, 1 << 32 | 0x74726976)
)
attack(32, "registers below zero", refused("virtio-register"))(lambda device: device.lie_at(MmioRegister.MAGIC, -1))
