# SPDX-License-Identifier: MIT OR Apache-2.0
"""A virtio disk that takes each of its decisions from the input, and what a vhost-user back-end answers.

The device, its lies and the promises that are watched (no exception but `SvsmError`, no byte of private memory in
shared memory, bounded time, dead stays dead, an honest device works again) are `svsm.testing.hostile`'s.
"""

from __future__ import annotations

from svsm.formats.vhost_user import Request
from svsm.formats.virtio import BlkConfig
from svsm.fuzz.choices import Choices
from svsm.fuzz.target import Target, expect, judge
from svsm.storage.drivers.virtio import vhost_user_messages
from svsm.storage.drivers.virtio.blk_config import parse_geometry
from svsm.testing.hostile.mixture import mixture
from svsm.testing.hostile.trial import RINGS, run

__all__ = ["ROWS"]


def _rings(data: bytes) -> None:
    """Two bytes: which ring, and how many decisions are honest before the first lie."""
    if len(data) > 2:
        run(mixture(data[2:], rounds=data[1]), RINGS[data[0] % len(RINGS)])


def _ring_seeds() -> list[bytes]:
    return [
        bytes([ring, rounds]) + bytes([255, operation, 0, 1])
        for ring in range(4)
        for rounds, operation in ((40, 1), (44, 7))
    ]


def _configuration(data: bytes) -> None:
    choices = Choices(data)
    features = choices.unsigned(8)
    geometry = parse_geometry(choices.edited(_CONFIG) if choices.flag() else choices.rest(), features)
    block = geometry.block_size_bytes
    expect(block >= 512 and block & (block - 1) == 0, "a block size is a power of two")
    expect(geometry.size_bytes % block == 0, "a capacity is whole blocks")
    expect(geometry.transfer_bytes >= block, "a request moves a block at least")
    expect(0 < geometry.queues <= 65535, "there is a queue")


_CONFIG = BlkConfig(
    capacity=2048, seg_max=126, blk_size=512, num_queues=4, max_discard_sectors=64, max_discard_seg=1
).pack()


def _vhost_user(data: bytes) -> None:
    choices = Choices(data)
    request = choices.pick(tuple(Request))
    body = choices.rest()
    judge(lambda: vhost_user_messages.judge_acknowledgement(request, body))
    judge(lambda: vhost_user_messages.judge_vring(body, 0))
    judge(lambda: expect(0 <= vhost_user_messages.judge_queues(body) <= 256, "queues can be addressed"))
    judge(
        lambda: expect(len(vhost_user_messages.judge_config(body, 0, 60)) == 60, "all of the part that was asked for")
    )
    length = vhost_user_messages.judge_header(body[:12], request, 8)
    expect(length in (0, 8), "an answer has the length that was asked for")


ROWS = (
    Target(
        "virtio-rings", "a virtio disk that lies, on each ring", _rings, _ring_seeds, max_bytes=256, cpu_seconds=10.0
    ),
    Target(
        "virtio-blk-config",
        "the configuration space of a virtio disk",
        _configuration,
        lambda: [bytes(8) + b"\1", b"\xff" * 8 + b"\1", bytes(8) + b"\0" + _CONFIG],
        max_bytes=128,
    ),
    Target(
        "vhost-user-replies",
        "replies of a vhost-user back-end",
        _vhost_user,
        lambda: [bytes(21), bytes([14]) + (15).to_bytes(4, "little") + (5).to_bytes(4, "little") + bytes(12)],
        max_bytes=128,
    ),
)
