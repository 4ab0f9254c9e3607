# SPDX-License-Identifier: MIT OR Apache-2.0
"""Disks that take each of their decisions from the input: virtio over registers and over vhost-user, and NVMe.

The devices, their lies and what is watched are in `svsm.fuzz.disks`. The NVMe
controller is `svsm.testing.nvme_model`, which fails when the driver hands out an address that is not shared memory.
"""

from __future__ import annotations

from svsm.formats import vhost_user_messages
from svsm.formats.vhost_user import Request
from svsm.formats.virtio import BlkConfig
from svsm.fuzz.choices import Choices
from svsm.fuzz.disks.nvme_run import NvmeRun
from svsm.fuzz.disks.pci_run import pci_run
from svsm.fuzz.disks.vhost_run import VhostRun
from svsm.fuzz.disks.virtio_run import MmioRun
from svsm.fuzz.target import Target, expect, judge
from svsm.storage.drivers.virtio.blk_config import parse_geometry

__all__ = ["ROWS"]


def _mmio_split(data: bytes) -> None:
    MmioRun(data, packed=False).run()


def _mmio_packed(data: bytes) -> None:
    MmioRun(data, packed=True).run()


def _configuration(data: bytes) -> None:
    choices = Choices(data)
    features = choices.unsigned(8)
    geometry = parse_geometry(choices.edited(_CONFIG) if choices.flag() else choices.rest(), features)
    block = geometry.block_size_bytes
    expect(block >= 512 and block & (block - 1) == 0, "a block size is a power of two")
    # What is not a whole block at its end, the driver cuts off: that is for the targets with a driver in them.
    expect(0 <= geometry.size_bytes <= 1 << 56, "a capacity can be addressed")
    transfer = geometry.transfer_bytes
    expect(transfer >= block and transfer % block == 0, "a request moves whole blocks, one at least")
    expect(0 < geometry.queues <= 65535, "there is a queue")


_CONFIG = BlkConfig(
    capacity=2048, seg_max=126, blk_size=512, num_queues=4, max_discard_sectors=64, max_discard_seg=1
).pack()


def _vhost_user_replies(data: bytes) -> None:
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


def _vhost_user(data: bytes) -> None:
    VhostRun(data).run()


def _nvme(data: bytes) -> None:
    NvmeRun(data).run()


_RING_SEEDS = [
    bytes([0, 0, 0, *(10, 0, 0), *(9, 0, 0), *(0, 0), *(1, 1, 0), *(2, 0), *(3, 1), *(4, 0), 5, 6]),
    bytes([0, 0, 0, *(10, 4, 64, 4, 0), *(9, 0, 0)]),  # something undone
    bytes([1, 0, 4, *(0, 3, 0)]),  # a register that lies
]
_NVME_SEEDS = [
    bytes([0, 0, 0, *(10, 0, 0), *(9, 0, 0), *(6, 0), *(7, 1, 0), *(0, 0, 0), *(3, 0), 5]),
    bytes([0, 0, 0, *(10, 4, 64, 5, 0), *(9, 0, 0)]),
    bytes([0, 4, 1, 0, 0]),
]

ROWS = (
    Target(
        "nvme",
        "an NVMe controller that lies: completions, Identify pages, registers",
        _nvme,
        lambda: _NVME_SEEDS,
        max_bytes=128,
    ),
    Target(
        "nvme-pci",
        "a PCI bus that lies about an NVMe controller",
        pci_run,
        lambda: [bytes(3), bytes([1, 2, 1, 4, 0, 3]), bytes([0, 3, 2, 1, 1, 2, 3, 0, 5])],
        max_bytes=64,
    ),
    Target(
        "virtio-mmio-split",
        "a virtio disk that lies: registers and split rings",
        _mmio_split,
        lambda: _RING_SEEDS,
        max_bytes=128,
    ),
    Target(
        "virtio-mmio-packed",
        "a virtio disk that lies: registers and packed rings",
        _mmio_packed,
        lambda: _RING_SEEDS,
        max_bytes=128,
    ),
    Target(
        "vhost-user",
        "a vhost-user back-end that lies: messages and both rings",
        _vhost_user,
        lambda: [
            *_RING_SEEDS,
            bytes([0xC4, 0, 3, 3, 3, 1, 0, 0, 0, 0]),
            bytes([0x40, 0, 0, *(3, 3, 0, 3, 2, 0, 0, 0)]),
        ],
        max_bytes=128,
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
        _vhost_user_replies,
        lambda: [bytes(21), bytes([14]) + (15).to_bytes(4, "little") + (5).to_bytes(4, "little") + bytes(12)],
        max_bytes=128,
    ),
)
