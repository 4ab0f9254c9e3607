# SPDX-License-Identifier: MIT OR Apache-2.0
"""The layouts of VIRTIO 1.2: against the Linux headers where they are, and against themselves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svsm.formats.virtio import (
    BlkConfig,
    BlkFeature,
    BlkHeader,
    BlkSegment,
    BlkStatus,
    BlkType,
    DescriptorFlag,
    DeviceStatus,
    DeviceType,
    Feature,
    MmioRegister,
    PackedDescriptor,
    PackedEvent,
    PackedLayout,
    RegisterMessage,
    SplitDescriptor,
    SplitLayout,
    UsedElement,
)

_HEADERS = Path("/usr/include/linux")


def _defines(name: str) -> dict[str, int]:
    path = _HEADERS / name
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    found = re.findall(r"^#define\s+(\w+)\s+\(?(0x[0-9a-fA-F]+|\d+)\)?\s*(?:/\*|$)", path.read_text(), re.M)
    return {key: int(value, 0) for key, value in found}


def test_feature_bits_are_linux_ones() -> None:
    ring, config, blk = _defines("virtio_ring.h"), _defines("virtio_config.h"), _defines("virtio_blk.h")
    for name, value in (
        ("INDIRECT_DESC", ring["VIRTIO_RING_F_INDIRECT_DESC"]),
        ("EVENT_IDX", ring["VIRTIO_RING_F_EVENT_IDX"]),
        ("VERSION_1", config["VIRTIO_F_VERSION_1"]),
        ("ACCESS_PLATFORM", config["VIRTIO_F_ACCESS_PLATFORM"]),
        ("RING_PACKED", config["VIRTIO_F_RING_PACKED"]),
        ("ORDER_PLATFORM", config["VIRTIO_F_ORDER_PLATFORM"]),
    ):
        assert Feature[name] == 1 << value
    for feature in BlkFeature:
        name = f"VIRTIO_BLK_F_{feature.name}"
        if name in blk:
            assert feature == 1 << blk[name], name


def test_numbers_are_linux_ones() -> None:
    blk, mmio, config = _defines("virtio_blk.h"), _defines("virtio_mmio.h"), _defines("virtio_config.h")
    assert _defines("virtio_ids.h")["VIRTIO_ID_BLOCK"] == DeviceType.BLOCK
    for kind in BlkType:
        assert kind == blk[f"VIRTIO_BLK_T_{kind.name}"]
    assert [int(status) for status in BlkStatus] == [blk[f"VIRTIO_BLK_S_{name}"] for name in ("OK", "IOERR", "UNSUPP")]
    for register, name in (
        (MmioRegister.MAGIC, "MAGIC_VALUE"),
        (MmioRegister.DEVICE_FEATURES, "DEVICE_FEATURES"),
        (MmioRegister.DEVICE_FEATURES_SELECT, "DEVICE_FEATURES_SEL"),
        (MmioRegister.DRIVER_FEATURES, "DRIVER_FEATURES"),
        (MmioRegister.DRIVER_FEATURES_SELECT, "DRIVER_FEATURES_SEL"),
        (MmioRegister.QUEUE_SELECT, "QUEUE_SEL"),
        (MmioRegister.QUEUE_SIZE_MAX, "QUEUE_NUM_MAX"),
        (MmioRegister.QUEUE_SIZE, "QUEUE_NUM"),
        (MmioRegister.QUEUE_READY, "QUEUE_READY"),
        (MmioRegister.QUEUE_NOTIFY, "QUEUE_NOTIFY"),
        (MmioRegister.INTERRUPT_STATUS, "INTERRUPT_STATUS"),
        (MmioRegister.INTERRUPT_ACK, "INTERRUPT_ACK"),
        (MmioRegister.STATUS, "STATUS"),
        (MmioRegister.QUEUE_DESCRIPTORS_LOW, "QUEUE_DESC_LOW"),
        (MmioRegister.QUEUE_DRIVER_LOW, "QUEUE_AVAIL_LOW"),
        (MmioRegister.QUEUE_DEVICE_LOW, "QUEUE_USED_LOW"),
        (MmioRegister.QUEUE_DEVICE_HIGH, "QUEUE_USED_HIGH"),
        (MmioRegister.CONFIG_GENERATION, "CONFIG_GENERATION"),
        (MmioRegister.CONFIG, "CONFIG"),
    ):
        assert register == mmio[f"VIRTIO_MMIO_{name}"], name
    for status in DeviceStatus:
        assert status == config[f"VIRTIO_CONFIG_S_{'DRIVER_OK' if status == 4 else status.name}"]


@pytest.mark.parametrize(
    ("field", "offset"),
    [
        ("capacity", 0),
        ("size_max", 8),
        ("seg_max", 12),
        ("blk_size", 20),
        ("physical_block_exp", 24),
        ("writeback", 32),
        ("num_queues", 34),
        ("max_discard_sectors", 36),
        ("max_discard_seg", 40),
        ("discard_sector_alignment", 44),
        ("max_write_zeroes_sectors", 48),
        ("max_write_zeroes_seg", 52),
        ("write_zeroes_may_unmap", 56),
        ("max_secure_erase_sectors", 60),
    ],
)
def test_configuration_fields_are_where_the_specification_puts_them(field: str, offset: int) -> None:
    changed = BlkConfig().replace(**{field: 1}).pack()
    assert changed.index(1) == offset
    assert sum(changed) == 1


_U16, _U32, _U64 = st.integers(0, (1 << 16) - 1), st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)


@given(_U64, _U32, _U16, _U16)
def test_a_tail_is_the_second_word(address: int, length: int, first: int, second: int) -> None:
    for descriptor in (
        SplitDescriptor(address, length, first, second),
        PackedDescriptor(address, length, first, second),
    ):
        assert descriptor.tail.to_bytes(8, "little") == descriptor.pack()[8:]


@pytest.mark.parametrize(
    "kind",
    [SplitDescriptor, UsedElement, PackedDescriptor, PackedEvent, BlkHeader, BlkSegment, BlkConfig, RegisterMessage],
)
def test_round_trip(kind: type[BlkHeader]) -> None:
    raw = bytes(range(1, kind.SIZE + 1))
    assert kind.parse(raw).pack() == raw


def test_flags() -> None:
    assert DescriptorFlag.AVAIL | DescriptorFlag.USED == 0x8080
    assert (DescriptorFlag.NEXT, DescriptorFlag.WRITE, DescriptorFlag.INDIRECT) == (1, 2, 4)


@pytest.mark.parametrize("size", [1, 2, 4, 128, 256, 32768])
def test_split_parts_do_not_overlap(size: int) -> None:
    layout = SplitLayout(size)
    assert layout.available >= 16 * size
    assert layout.used >= layout.used_event + 2
    assert layout.used % 4 == 0
    assert layout.used_ring % 8 == 0  # an element is one aligned word
    assert layout.total_bytes >= layout.available_event + 2


@pytest.mark.parametrize("size", [1, 3, 100, 256, 32768])
def test_packed_parts_do_not_overlap(size: int) -> None:
    layout = PackedLayout(size)
    assert 16 * size <= layout.driver_event < layout.device_event < layout.total_bytes
    assert layout.driver_event % 4 == layout.device_event % 4 == 0
