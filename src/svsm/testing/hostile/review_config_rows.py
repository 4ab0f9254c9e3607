# SPDX-License-Identifier: MIT OR Apache-2.0
"""The rows of the virtio review about the configuration space: see `review_rows`."""

from __future__ import annotations

from typing import Final

from svsm.testing.review import Row

__all__ = ["CONFIGURATION_ROWS"]

_CONFIG: Final = "Configuration space"
_TESTS: Final = "tests/unit/storage/drivers/virtio/test_blk.py"

CONFIGURATION_ROWS: Final[tuple[Row, ...]] = (
    Row(
        _CONFIG,
        "capacity, impossible",
        "overflow offsets",
        "blk_config",
        "    if config.capacity > _MAX_SECTORS:",
        "    if False:",
        ("the largest capacity", "a capacity that overflows in bytes"),
    ),
    Row(
        _CONFIG,
        "capacity, not whole blocks",
        "have the last block end behind the disk",
        "svsm.storage.drivers.checks",
        "size = size_bytes // self._block_size * self._block_size",
        "size = size_bytes",
        ("a capacity that is no whole number of blocks",),
    ),
    Row(
        _CONFIG,
        "capacity, smaller than what is asked for",
        "get requests beyond its end",
        "svsm.storage.drivers.checks",
        "        check_ranges(ranges, size_bytes=self._size, block_size_bytes=self._block_size)\n",
        "",
        ("the disk shrinks",),
    ),
    Row(
        _CONFIG,
        "capacity, smaller than what is written",
        "get requests beyond its end",
        "svsm.storage.drivers.checks",
        "        check_extents(extents, size_bytes=self._size, block_size_bytes=self._block_size)\n",
        "",
        ("the disk shrinks",),
    ),
    Row(
        _CONFIG,
        "capacity, changing",
        "shrink or grow while it is used",
        "svsm.storage.drivers.checks",
        "        if size != self._size:",
        "        if False:",
        ("the disk shrinks", "the disk grows"),
    ),
    Row(
        _CONFIG,
        "capacity and blk_size, changing together",
        "have a size that is no multiple of the block size in use",
        "svsm.storage.drivers.checks",
        "size = size_bytes // self._block_size * self._block_size",
        "size = size_bytes",
        ("the block size changes with the capacity",),
    ),
    Row(
        _CONFIG,
        "blk_size",
        "divide by zero, break alignment, take all memory",
        "blk_config",
        "    if not SECTOR_BYTES <= size <= _LARGEST_BLOCK or size & (size - 1):",
        "    if False:",
        ("blocks of 0 bytes", "blocks of 513 bytes", "blocks of 2147483648 bytes"),
    ),
    Row(
        _CONFIG,
        "size_max",
        "make transfers of nothing",
        "blk_config",
        "    if transfer and transfer < block:",
        "    if False:",
        ("segments of one byte",),
    ),
    Row(
        _CONFIG,
        "num_queues",
        "have no queue",
        "blk_config",
        "    if not queues:",
        "    if False:",
        ("many queues are offered, and none exists",),
    ),
    Row(
        _CONFIG,
        "max_discard_sectors, max_write_zeroes_sectors",
        "divide by zero, make requests without end",
        "blk_config",
        "    if not sectors:\n        return None\n",
        "",
        ("discards of no sector",),
    ),
    Row(
        _CONFIG,
        "discard_sector_alignment",
        "make every request empty",
        "blk_config",
        "    if align > step and align <= sectors and not align % step:",
        "    if align:",
        ("discards whose alignment is larger than they can be",),
    ),
    Row(
        _CONFIG,
        "max_discard_seg, max_write_zeroes_seg",
        "make requests larger than their buffer",
        "blk_config",
        "max(1, min(segments, _MOST_SEGMENTS))",
        "segments",
        reason="the buffer's size bounds it a second time",
        test=f"{_TESTS}::test_segments_of_a_request_are_within_bounds",
    ),
    Row(
        _CONFIG,
        "write_zeroes_may_unmap",
        "be no truth value",
        "blk_config",
        "unmap=config.write_zeroes_may_unmap == 1",
        "unmap=config.write_zeroes_may_unmap",
        reason="only decides one flag of a request",
        test=f"{_TESTS}::test_only_one_is_leave_to_unmap",
    ),
    Row(
        _CONFIG,
        "RO",
        "get writes that it will not do",
        "svsm.storage.drivers.checks",
        "        if self._read_only:\n            raise read_only_error()\n",
        "        pass\n",
        ("the disk is read-only",),
    ),
    Row(
        _CONFIG,
        "FLUSH not offered",
        "have the owner believe that data is durable",
        "blk",
        "        if not self._shape.flush:",
        "        if False:",
        ("flushes are not offered, and answered with OK",),
    ),
)
