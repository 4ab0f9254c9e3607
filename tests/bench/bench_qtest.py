# SPDX-License-Identifier: MIT OR Apache-2.0
"""The drivers on QEMU's device models over qtest: 4 KiB random reads and writes, and large reads,
with every check on.

    python -m tests.bench qtest

The image is on tmpfs where there is one (Linux AIO, O_DIRECT), so that it is the path that is measured and not a disk.
A round trip over the qtest socket costs a wake-up on each side; queues of 32 and 128 share it.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from svsm.formats.errors import SvsmError
from svsm.host.qemu import DiskOptions, Machine, MachineKind, MachineOptions
from svsm.storage.drivers.nvme.disk import NvmeDisk, NvmePolicy
from svsm.storage.drivers.virtio.blk import BlkPolicy, VirtioBlk
from svsm.testing.qemu_harness import nvme_disk, virtio_disk
from tests.bench.report import Result, Row, output

__all__ = ["bench"]

_MIB = 1 << 20
_IMAGE_BYTES = 256 * _MIB
_SECONDS = 0.5
_ROUNDS = 3
_TARGET_IOPS = 100_000
_LARGE_BYTES = 512 << 10
_CALL = 16
"""Queue depths' worth of requests in one call."""

Disk = VirtioBlk | NvmeDisk


def _disk(kind: str, machine: Machine, depth: int) -> Disk:
    if kind == "nvme":
        return nvme_disk(machine, NvmePolicy(depth=depth, spins=2000))
    return virtio_disk(machine, BlkPolicy(queue_size=max(depth, 4), spins=2000))


def _rate(work: Callable[[], int]) -> float:
    """Units per second, the best of a few rounds."""
    best = 0.0
    for _ in range(_ROUNDS):
        done, begun = 0, time.perf_counter()
        while (passed := time.perf_counter() - begun) < _SECONDS:
            done += work()
        best = max(best, done / passed)
    return best


def _figures(kind: str, image: Path, native: bool) -> list[Row]:
    rows = []
    for depth in (1, 32, 128):
        options = DiskOptions(path=image, native=native, packed=kind == "virtio packed")
        machine = Machine(MachineOptions(MachineKind.Q35 if kind == "nvme" else MachineKind.MICROVM, disk=options))
        try:
            disk = _disk(kind, machine, depth)
            rows += _measure(kind, disk, depth)
            disk.close()
        finally:
            machine.close()
    return rows


def _measure(kind: str, disk: Disk, depth: int) -> list[Row]:
    source = random.Random(1)
    ranges = [(source.randrange(_IMAGE_BYTES // 4096) * 4096, 4096) for _ in range(depth * _CALL if depth > 1 else 1)]
    extents = [(offset, bytes(4096)) for offset, _ in ranges]

    def write() -> int:
        disk.write(extents)
        return len(extents)

    target = _TARGET_IOPS if depth == 32 else None
    reads = _rate(lambda: len(disk.read(ranges)))
    rows = [
        Row(f"{kind}, 4 KiB reads, QD{depth}", reads, "1/s", target, more_is_better=True),
        Row(f"{kind}, 4 KiB writes, QD{depth}", _rate(write), "1/s", target, more_is_better=True),
    ]
    if depth == 128:
        # Eight at a time; larger results are dominated by the page faults of their own fresh memory.
        large = [(at * _LARGE_BYTES, _LARGE_BYTES) for at in range(8)]
        rate = _rate(lambda: sum(len(part) for part in disk.read(large))) / 1e9
        rows.append(Row(f"{kind}, reads of 512 KiB", rate, "GB/s", more_is_better=True))
    return rows


def bench() -> Result:
    """All figures.

    Raises:
        RuntimeError: QEMU is missing or does not start.
    """
    if shutil.which("qemu-system-x86_64") is None:
        raise RuntimeError("qemu-system-x86_64 is not installed")
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        image = Path(folder) / "disk.raw"
        image.write_bytes(random.Random(2).randbytes(_MIB) * (_IMAGE_BYTES // _MIB))
        native = True
        try:
            _figures_probe(image)
        except SvsmError:
            native = False
        rows: list[Row] = []
        for kind in ("virtio", "virtio packed", "nvme"):
            rows += _figures(kind, image, native)
    version = output("qemu-system-x86_64", "--version").split("\n")[0]
    return Result(rows, peers={"QEMU": version}, details={"aio": "native" if native else "threads"})


def _figures_probe(image: Path) -> None:
    """Whether this file system takes O_DIRECT."""
    machine = Machine(MachineOptions(MachineKind.Q35, disk=DiskOptions(path=image, native=True)))
    machine.close()
