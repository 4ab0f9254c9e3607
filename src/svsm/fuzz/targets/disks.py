# SPDX-License-Identifier: MIT OR Apache-2.0
"""Disks that take each of their decisions from the input, virtio and NVMe, and what a vhost-user back-end answers.

The virtio device, its lies and the promises that are watched (no exception but `SvsmError`, no byte of private memory
in shared memory, bounded time, dead stays dead, an honest device works again) are `svsm.testing.hostile`'s. The NVMe
controller is `svsm.testing.nvme_model`, which fails when the driver hands out an address that is not shared memory.
"""

from __future__ import annotations

import functools

from svsm.formats import vhost_user_messages
from svsm.formats.errors import SvsmError
from svsm.formats.nvme import Completion, NvmeRegister
from svsm.formats.vhost_user import Request
from svsm.formats.virtio import BlkConfig
from svsm.fuzz.choices import Choices
from svsm.fuzz.target import Target, expect, judge
from svsm.storage.drivers.nvme.disk import NvmeDisk
from svsm.storage.drivers.virtio.blk_config import parse_geometry
from svsm.testing.hostile.mixture import mixture
from svsm.testing.hostile.trial import RINGS, run
from svsm.testing.nvme_model import NvmeModel, nvme_bench

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


def _nvme(data: bytes) -> None:
    choices = Choices(data)
    bench = nvme_bench(bytearray(_NVME_BYTES), block_shift=choices.pick((9, 12)))
    model, begun = bench.model, bench.clock.now
    for _ in range(choices.below(4)):  # lies that are there from the start
        kind = choices.below(4)
        if kind == 0:
            model.pages[choices.below(2)][choices.unsigned(2) % 4032] = choices.blob(64)
        elif kind == 1:
            model.capabilities = (model.capabilities ^ 1 << choices.below(64)) if choices.flag() else choices.number()
        elif kind == 2:
            value = choices.number() & 0xFFFF_FFFF
            model.registers[choices.pick((NvmeRegister.CSTS, NvmeRegister.VS, NvmeRegister.CC))] = functools.partial(
                int, value
            )
        else:
            model.spurious = True
    left = choices.below(16)
    held: list[tuple[int, Completion]] = []

    def answer(model: NvmeModel, queue: int, honest: Completion) -> list[tuple[int, Completion]]:
        nonlocal left
        left -= 1
        if left >= 0 or not choices.more:
            return [(queue, honest)]
        posted = _completions(choices, queue, honest, held)
        # What was held may be for a queue that a reset has taken away; there is no memory to post it to.
        return [(number, completion) for number, completion in posted if number in model._queues]

    model.answer = answer
    disk = bench.start()
    expect(disk.size_bytes % disk.block_size_bytes == 0, "a capacity is whole blocks")
    for _ in range(8):
        if disk.size_bytes < 8 * disk.block_size_bytes:
            break
        try:
            _nvme_call(choices, disk)
        except SvsmError:
            continue
    expect(bench.clock.now - begun < _NVME_SECONDS, "time is bounded")


_NVME_BYTES = 64 << 10
_NVME_SECONDS = 300.0


def _completions(
    choices: Choices, queue: int, honest: Completion, held: list[tuple[int, Completion]]
) -> list[tuple[int, Completion]]:
    kind = choices.below(6)
    if kind == 0:
        return [(queue, honest)]
    if kind == 1:
        return [
            (queue, Completion.parse(choices.edited(honest.pack())[: Completion.SIZE].ljust(Completion.SIZE, b"\0")))
        ]
    if kind == 2:
        return [(queue, honest), (queue, honest)]
    if kind == 3:
        held.append((queue, honest))
        return []
    if kind == 4:
        released = [*held, (queue, honest)]
        held.clear()
        return released
    return [(queue, honest.replace(status=choices.unsigned(2), command_id=choices.unsigned(2)))]


def _nvme_call(choices: Choices, disk: NvmeDisk) -> None:
    block, operation = disk.block_size_bytes, choices.below(5)
    start, count = block * choices.below(4), 1 + choices.below(4)
    if operation == 0:
        (got,) = disk.read([(start, count * block)])
        expect(len(got) == count * block, "a read gives what was asked for")
    elif operation == 1:
        disk.write([(start, b"w" * block)] * count)
    elif operation == 2:
        disk.flush()
    elif operation == 3:
        disk.poll()
    else:
        disk.reconnect()


ROWS = (
    Target(
        "nvme",
        "an NVMe controller that lies: completions, Identify pages, registers",
        _nvme,
        lambda: [
            bytes(8),
            bytes([0, 0, 9, *([5, 0, 0, 0, 0] * 6)]),
            bytes([1, 1, 0, 0, 80, 0, 4, 255, 255, 255, 255, 9]),
        ],
        max_bytes=256,
        cpu_seconds=10.0,
    ),
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
