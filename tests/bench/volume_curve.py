# SPDX-License-Identifier: MIT OR Apache-2.0
"""What a small commit costs by the size of its volume, and how much memory a volume takes.

    python -m tests.bench.volume_curve MIB      one size, in this process; figures as JSON

Flushes do nothing here: this is about the program, and flushes cost the same whatever the size. Bytes and requests are
counted beside the times, because counts are the same on a loaded machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from svsm.storage.cocoonfs import Volume
from tests.bench.report import ROOT, Row
from tests.bench.volume_sides import KEY, MIB, SALT, CountingFile

__all__ = ["curve_rows"]

_SIZES_MIB = (8, 32, 128, 512, 1024)
_MEMORY_TARGET_MIB = 150
_TIMES = 100


class _Unflushed(CountingFile):
    """A file whose flushes do nothing."""

    def flush(self) -> None:
        """Nothing."""


def _best_ms(run: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(_TIMES):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best * 1000


def _peak_mib() -> float:
    """The most memory that this process had since the last call; the whole process."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return int(peak.split()[1]) / 1024


def _measure(size_mib: int, path: str) -> dict[str, float]:
    os.truncate(path, size_mib * MIB)
    device = _Unflushed(os.open(path, os.O_RDWR))
    Volume.create(device, KEY, salt=SALT)
    found = {"memory of mkfs": _peak_mib()}
    volume = Volume.open(device, KEY)
    small, numbers = os.urandom(4096), iter(range(1000, 2000))

    def write(inode: int) -> None:
        with volume.transaction() as transaction:
            transaction.write(inode, small)

    write(16)
    found["levels"] = volume.image.tree.geometry.levels
    found["new 4 KiB file"] = _best_ms(lambda: write(next(numbers)))
    device.written = 0
    found["replaced 4 KiB file"] = _best_ms(lambda: write(16))
    found["written by it"] = device.written / _TIMES / 1024
    found["read 4 KiB"] = _best_ms(lambda: volume.read(16))
    found["memory in use"] = _peak_mib()
    start = time.process_time()
    Volume.open(device, KEY)
    found["open"] = (time.process_time() - start) * 1000
    return found


def _in_a_process(size_mib: int) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.bench.volume_curve", str(size_mib)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"a volume of {size_mib} MiB: {done.stderr.strip()[-500:]}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


_UNITS = {"levels": "", "written by it": "KiB", "memory of mkfs": "MiB", "memory in use": "MiB"}


def curve_rows() -> list[Row]:
    """A small commit in volumes of 8 MiB to 1 GiB: what the first costs, and a replacement's bytes, are the targets.

    A commit rewrites one node for each level of the tree, so that and nothing else may be more in a larger volume.
    """
    rows: list[Row] = []
    first: dict[str, float] = {}
    for size in _SIZES_MIB:
        found = _in_a_process(size)
        first = first or found
        grown = found["levels"] / first["levels"]
        targets: dict[str, float] = {"memory of mkfs": _MEMORY_TARGET_MIB, "memory in use": _MEMORY_TARGET_MIB}
        for name in ("new 4 KiB file", "replaced 4 KiB file", "written by it"):
            targets[name] = first[name] * grown
        rows += [Row(f"{size} MiB: {name}", found[name], _UNITS.get(name, "ms"), targets.get(name)) for name in found]
    return rows


if __name__ == "__main__":
    with tempfile.NamedTemporaryFile(dir=ROOT) as image:
        print(json.dumps(_measure(int(sys.argv[1]), image.name)))
