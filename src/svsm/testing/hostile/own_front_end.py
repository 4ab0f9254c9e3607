# SPDX-License-Identifier: MIT OR Apache-2.0
"""``python -m svsm.testing.hostile front-end ours SOCKET``: this project's driver, with a little work.

Writes, reads back, flushes, discards, reads much at once. Exit 0 when every byte was right, 3 with the error's code
when the driver refused the back-end or gave it up, 1 when a wrong byte was called good.
"""

from __future__ import annotations

from typing import Final

from svsm.formats.errors import SvsmError
from svsm.storage.drivers.virtio.blk import BlkPolicy
from svsm.storage.drivers.virtio.vhost_user import VhostUserBlk, open_vhost_user

__all__ = ["drive"]

_POLICY: Final = BlkPolicy(queue_size=64, large_bytes=65536, large_slots=2, deadline_seconds=1.0, rekick_seconds=0.05)
_START: Final = 1 << 20


def _work(disk: VhostUserBlk) -> bool:
    block = disk.block_size_bytes
    data = bytes(range(256)) * (16 * block // 256)
    good = True
    for turn in range(4):
        offset = _START + turn * len(data)
        disk.write([(offset, data)])
        good = good and disk.read([(offset, len(data))]) == [data]
    disk.flush()
    disk.discard([(_START, len(data))])
    return good and disk.read([(_START + len(data), block)] * 40) == [data[:block]] * 40


def drive(path: str) -> tuple[int, str]:
    """Work on the disk at a socket.

    Returns:
        0, 1 or 3, as above, and a word on it.
    """
    try:
        disk = open_vhost_user(path, policy=_POLICY, answer_seconds=1.0)
        try:
            good = _work(disk)
        finally:
            disk.close()
    except SvsmError as error:
        return 3, " ".join([error.code, *[str(error.details[key]) for key in ("violation",) if key in error.details]])
    return (0, "right") if good else (1, "wrong contents were returned as good")
