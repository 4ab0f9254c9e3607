# SPDX-License-Identifier: MIT OR Apache-2.0
"""What block sizes cost: the measurement that `profiles.TUNED` was chosen by.

    python -m tests.bench.volume_profiles [FOLDER]

For each configuration, in a volume of 128 MiB in FOLDER (/dev/shm by default), in-process: making it, 4 KiB written and
replaced, 64 MiB written and read; what the structures take of the volume, what a thousand files of 4 KiB take, and
what a replaced file of 4 KiB writes to the disk.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from svsm.storage.cocoonfs.presets import layout_of
from tests.bench.volume_sides import MIB, OurVolume, best_of_turns

__all__ = ["main"]

_SMALL, _HUGE = 4096, 64 * MIB
_SIZE_MIB = 128
_SIZES = (
    (128, 512, 512, 1024),
    (128, 512, 4096, 1024),
    (128, 4096, 4096, 4096),
    (512, 512, 4096, 1024),
    (512, 4096, 4096, 4096),
    (512, 4096, 8192, 4096),
    (512, 4096, 16384, 4096),
    (512, 4096, 32768, 4096),
)
"""Allocation block, IO block, data block, tree node, in bytes; the first is the reference program's default."""


def _figures(folder: Path, sizes: tuple[int, int, int, int]) -> dict[str, float]:
    allocation, io, data, node = sizes
    layout = layout_of(
        allocation_block_bytes=allocation, io_block_bytes=io, data_block_bytes=data, tree_node_bytes=node
    )
    side = OurVolume(folder / "image", _SIZE_MIB * MIB, (_SMALL, _HUGE), layout)
    found = best_of_turns({"mkfs ms": side.mkfs}, 3)
    free = side.volume.free_bytes
    found["structures %"] = 100 * (1 - free / (_SIZE_MIB * MIB))
    numbers = iter(range(100, 1000))
    found |= best_of_turns({"new 4 KiB ms": lambda: side.write(next(numbers), _SMALL)}, 50)
    found |= best_of_turns({"replaced 4 KiB ms": lambda: side.write(50, _SMALL)}, 50)
    before = side.written
    side.write(50, _SMALL)
    found["replaced 4 KiB writes KiB"] = (side.written - before) / 1024
    found |= best_of_turns(
        {"write 64 MiB ms": lambda: side.write(60, _HUGE)}, 3, {"write 64 MiB ms": lambda: side.remove(60)}
    )
    found |= best_of_turns({"read 64 MiB ms": lambda: side.read(60)}, 3)
    side.remove(60)
    free = side.volume.free_bytes
    side.write_many(range(5000, 6000), _SMALL)
    found["1,000 of 4 KiB take KiB"] = (free - side.volume.free_bytes) / 1024
    side.close()
    return found


def main(words: list[str]) -> int:
    """Measure and print."""
    with tempfile.TemporaryDirectory(dir=words[0] if words else "/dev/shm") as folder:
        for number, sizes in enumerate(_SIZES):
            found = _figures(Path(folder), sizes)
            if not number:
                print(f"{'allocation, IO, data block, node':<34}" + "".join(f"{name:>27}" for name in found))
            print(
                f"{', '.join(map(str, sizes)):<34}" + "".join(f"{value:27.2f}" for value in found.values()), flush=True
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
