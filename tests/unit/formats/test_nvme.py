# SPDX-License-Identifier: MIT OR Apache-2.0
"""NVMe records and words, against figures of the specification, and CAP as QEMU 7.2 gives it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svsm.formats.nvme import (
    Capabilities,
    Completion,
    DsmRange,
    IdentifyController,
    IdentifyNamespace,
    Submission,
    configuration_word,
    doorbell,
    status_name,
)
from svsm.formats.record import Record

# What QEMU 7.2's `-device nvme` answers for CAP.
_QEMU_CAP = 0x0040_1820_0F01_07FF


@pytest.mark.parametrize("kind", [Submission, Completion, DsmRange, IdentifyController, IdentifyNamespace])
@given(data=st.data())
def test_every_bit_is_kept(kind: type[Record], data: st.DataObject) -> None:
    raw = data.draw(st.binary(min_size=kind.SIZE, max_size=kind.SIZE)) if kind.SIZE < 100 else bytes(range(256)) * 16
    assert kind.parse(raw).pack() == raw


def test_fields_of_identify_are_where_the_specification_has_them() -> None:
    page = bytearray(4096)
    for offset, value in ((77, 1), (111, 2), (512, 3), (513, 4), (514, 5), (516, 6), (520, 7), (525, 8)):
        page[offset] = value
    host = IdentifyController.parse(page)
    assert (host.transfer_shift, host.controller_type, host.submission_sizes, host.completion_sizes) == (1, 2, 3, 4)
    assert (host.most_commands, host.namespaces, host.optional_commands, host.volatile_cache) == (5, 6, 7, 8)
    page = bytearray(4096)
    for offset, value in ((0, 1), (8, 2), (16, 3), (25, 4), (26, 5), (29, 6), (99, 7), (132, 8), (134, 9)):
        page[offset] = value
    disk = IdentifyNamespace.parse(page)
    assert (disk.size_blocks, disk.capacity_blocks, disk.used_blocks) == (1, 2, 3)
    assert (disk.format_count, disk.format, disk.protection, disk.attributes) == (4, 5, 6, 7)
    assert disk.format_at(1) == (9, 8)


def test_capabilities() -> None:
    made = Capabilities.parse(_QEMU_CAP)
    assert made.queue_entries == 2048
    assert made.ready_seconds == 7.5
    assert made.doorbell_stride_bytes == 4
    assert made.nvm_command_set
    assert made.smallest_page_bytes == 4096
    assert Capabilities.parse(made.pack()) == made


@given(st.integers(0, (1 << 64) - 1))
def test_any_capabilities(value: int) -> None:
    made = Capabilities.parse(value)
    assert 1 <= made.queue_entries <= 65536
    assert 4 <= made.doorbell_stride_bytes <= 128 << 10
    assert Capabilities.parse(made.pack()) == made


def test_words() -> None:
    assert configuration_word(enable=True) == 0x0046_0001
    assert configuration_word(enable=True, shutdown=True) == 0x0046_4001
    assert [doorbell(1, 4, completion=False), doorbell(1, 8, completion=True)] == [0x1008, 0x1018]
    assert status_name(0x4281) == "unrecovered read error"
    assert status_name(0x7FF) == "status type 7, code 0xff"
