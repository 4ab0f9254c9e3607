# SPDX-License-Identifier: MIT OR Apache-2.0
"""The drivers on QEMU's own device models: virtio-mmio on microvm, NVMe on q35. The raw file is the judge."""

from __future__ import annotations

import contextlib
import hashlib
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from svsm.formats.errors import BackendError, StateError, SvsmError
from svsm.formats.virtio import Feature
from svsm.host.qemu import PCI_WINDOW, DiskOptions, Machine, MachineKind, MachineOptions
from svsm.storage.drivers.dma import DmaMemory
from svsm.storage.drivers.nvme.disk import NvmeDisk, NvmePolicy, memory_bytes
from svsm.storage.drivers.nvme.pci import ConfigurationSpace, enable_memory_bar, find_nvme
from svsm.storage.drivers.virtio.blk import BlkPolicy, VirtioBlk
from svsm.testing.block_conformance import CHECKS, Check, Subject, initial_content
from svsm.testing.qemu_harness import nvme_disk, virtio_disk
from tests.qmp_support import Monitor
from tests.support import peer

pytestmark = pytest.mark.interop

_MIB = 1 << 20
Disk = VirtioBlk | NvmeDisk
KINDS = ("virtio-split", "virtio-packed", "nvme")


class Bench:
    """Machines of one kind over one image."""

    def __init__(self, kind: str, image: Path, *, block: int = 512, deadline_seconds: float = 30.0) -> None:
        self.kind = kind
        self.image = image
        self.block = block
        self.deadline_seconds = deadline_seconds
        self.machines: list[Machine] = []
        self._monitor: Monitor | None = None

    def start(self, *, read_only: bool = False) -> Disk:
        """A fresh machine; the one before is ended."""
        self.close()
        disk = DiskOptions(
            path=self.image, packed=self.kind == "virtio-packed", read_only=read_only, logical_block_bytes=self.block
        )
        machine_kind = MachineKind.Q35 if self.kind == "nvme" else MachineKind.MICROVM
        program = peer("qemu-system-x86_64")
        self.machines.append(Machine(MachineOptions(machine_kind, disk=disk, monitor=True, program=program)))
        if self.kind == "nvme":
            return nvme_disk(self.machines[0], NvmePolicy(deadline_seconds=self.deadline_seconds, read_only=read_only))
        made = virtio_disk(self.machines[0], BlkPolicy(deadline_seconds=self.deadline_seconds))
        assert bool(made.features & Feature.RING_PACKED) == (self.kind == "virtio-packed")
        return made

    def fresh(self, *, read_only: bool = False) -> Disk:
        """A machine over an image with `initial_content`."""
        self.close()
        self.image.write_bytes(initial_content())
        return self.start(read_only=read_only)

    def resize(self, size_bytes: int) -> None:
        """Make the disk of the running machine larger or smaller."""
        if self._monitor is None:
            connection = self.machines[0].monitor
            assert connection is not None
            self._monitor = Monitor(connection)
        self._monitor.resize("disk", size_bytes)

    def close(self) -> None:
        """End the machine."""
        for machine in self.machines:
            machine.close()
        self.machines.clear()
        self._monitor = None


@contextlib.contextmanager
def bench(kind: str, image: Path, **options: float) -> Iterator[Bench]:
    made = Bench(kind, image, **options)  # type: ignore[arg-type]
    try:
        yield made
    finally:
        made.close()


def _quick(kind: str, check: Check) -> bool:
    names = ("writes_are_read_back", "flushed_is_durable", "read_only_refuses") if kind == "nvme" else ("discards",)
    return check.__name__ in names


@pytest.mark.parametrize(
    ("kind", "check"),
    [
        pytest.param(kind, check, marks=() if _quick(kind, check) else pytest.mark.long, id=f"{kind}-{check.__name__}")
        for kind in KINDS
        for check in CHECKS
    ],
)
def test_conformance(kind: str, check: Check, tmp_path: Path) -> None:
    with bench(kind, tmp_path / "disk.raw") as made:
        check(
            Subject(
                create=made.fresh,
                reopen=made.start,
                create_read_only=lambda: made.fresh(read_only=True),
                # QEMU's NVMe does not let its image be resized.
                grow=None if kind == "nvme" else lambda more: made.resize(_MIB + more),
            )
        )


@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_resize_is_noticed(kind: str, tmp_path: Path) -> None:
    """`block_resize` of a running machine's disk: the new end can be used, the lost one is refused here."""
    with bench(kind, tmp_path / "disk.raw") as made:
        disk = made.fresh()
        assert not disk.poll()
        made.resize(3 * _MIB)
        with pytest.raises(StateError) as caught:
            disk.write([(2 * _MIB, bytes(512))])  # not before it was told
        assert caught.value.code == "block-range"
        assert disk.poll()
        assert (disk.size_bytes, disk.resizes) == (3 * _MIB, 1)
        disk.write([(3 * _MIB - 4096, b"\x5a" * 4096)])
        disk.flush()
        assert made.image.read_bytes() == initial_content() + bytes(2 * _MIB - 4096) + b"\x5a" * 4096
        made.resize(_MIB)
        assert disk.poll()
        assert not disk.poll()
        assert (disk.size_bytes, disk.resizes) == (_MIB, 2)
        with pytest.raises(StateError) as caught:
            disk.read([(_MIB, 512)])
        assert caught.value.code == "block-range"
        assert disk.read([(0, _MIB)]) == [initial_content()]
        assert made.image.stat().st_size == _MIB
        disk.close()


def test_blocks_of_4096_bytes_over_nvme(tmp_path: Path) -> None:
    with bench("nvme", tmp_path / "disk.raw", block=4096) as made:
        disk = made.fresh()
        assert disk.block_size_bytes == 4096
        disk.write([(4096, b"\x11" * 8192)])
        disk.flush()
        expected = initial_content()[:4096] + b"\x11" * 8192 + initial_content()[12288:]
        assert disk.read([(0, _MIB)])[0] == expected
        assert made.image.read_bytes() == expected


def _storm(disk: Disk, model: bytearray, source: random.Random, total_bytes: int) -> int:
    """Random reads, writes, zeroed and discarded ranges against a model; returns the bytes moved."""
    moved, blocks = 0, len(model) // 512
    while moved < total_bytes:
        extents = []
        for slot in source.sample(range(16), source.randrange(1, 9)):
            part = blocks // 16
            first = source.randrange(part)
            count = min(part - first, 1 << source.randrange(12))
            extents.append(((slot * part + first) * 512, count * 512))
        moved += sum(length for _, length in extents)
        choice = source.random()
        if choice < 0.45:
            for (offset, length), data in zip(extents, disk.read(extents), strict=True):
                assert data == model[offset : offset + length]
        elif choice < 0.9:
            written = [(offset, source.randbytes(length)) for offset, length in extents]
            disk.write(written)
            for offset, content in written:
                model[offset : offset + len(content)] = content
        elif choice < 0.95:
            disk.write_zeroes(extents)
            for offset, length in extents:
                model[offset : offset + length] = bytes(length)
        else:
            disk.discard(extents)
            # Undefined until written again: so write it, with what the model has.
            disk.write([(offset, bytes(model[offset : offset + length])) for offset, length in extents])
        if source.random() < 0.05:
            disk.flush()
    disk.flush()
    return moved


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("total", [8 * _MIB, pytest.param(1024 * _MIB, marks=pytest.mark.long)], ids=["8MiB", "1GiB"])
def test_random_requests_leave_the_file_as_the_model(kind: str, total: int, tmp_path: Path) -> None:
    source = random.Random(kind)
    model = bytearray(source.randbytes(16 * _MIB))
    image = tmp_path / "disk.raw"
    image.write_bytes(model)
    with bench(kind, image) as made:
        disk = made.start()
        assert _storm(disk, model, source, total) >= total
        disk.close()
    assert hashlib.sha256(image.read_bytes()).digest() == hashlib.sha256(model).digest()
    if total > 8 * _MIB:
        other = tmp_path / "model.raw"
        other.write_bytes(model)
        subprocess.run([str(peer("qemu-img")), "compare", "-f", "raw", str(image), str(other)], check=True)


def _work_until_it_ends(disk: Disk) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        disk.write([(_MIB // 2, bytes(_MIB // 2))])
        disk.read([(0, 4096)])


@pytest.mark.parametrize("kind", KINDS)
def test_killed_in_flight(kind: str, tmp_path: Path) -> None:
    """kill -9 while writes are running: an honest error soon, dead from then on, flushed data there for the next."""
    image = tmp_path / "disk.raw"
    with bench(kind, image, deadline_seconds=10) as made:
        disk = made.fresh()
        kept = b"\x77" * 4096
        disk.write([(0, kept)])
        disk.flush()
        killer = threading.Timer(0.15, made.machines[0].kill)
        killer.start()
        begun = time.monotonic()
        with pytest.raises(BackendError) as caught:
            _work_until_it_ends(disk)
        killer.join()
        assert caught.value.code == "block-io"
        assert caught.value.details["violation"] == "qemu-gone"
        assert time.monotonic() - begun < 5
        for call in (lambda: disk.read([(0, 512)]), disk.flush):
            with pytest.raises(BackendError, match="QEMU is gone"):
                call()
        disk.close()
        again = made.start()
        assert again.read([(0, 4096)]) == [kept]


_BLOCKS = 1024


def _generation(number: int) -> list[tuple[int, bytes]]:
    """Contents of every block that no other generation has, sector by sector."""
    return [
        (
            block * 4096,
            b"".join(hashlib.shake_128(b"%d %d %d" % (number, block, part)).digest(512) for part in range(8)),
        )
        for block in range(_BLOCKS)
    ]


def _write_generation(disk: Disk, number: int) -> None:
    extents = _generation(number)[: _BLOCKS // 2]
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        disk.write(extents)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_killed_in_flight_again_and_again(kind: str, tmp_path: Path) -> None:
    """What was flushed is there after each death; what was in flight is old or new, each sector for itself."""
    image, source = tmp_path / "disk.raw", random.Random(kind)
    image.write_bytes(bytes(_BLOCKS * 4096))
    with bench(kind, image, deadline_seconds=10) as made:
        disk = made.start()
        for number in range(0, 24, 2):
            old, new = _generation(number), _generation(number + 1)
            disk.write(old)
            disk.flush()
            killer = threading.Timer(source.uniform(0.002, 0.1), made.machines[0].kill)
            killer.start()
            with pytest.raises(BackendError) as caught:
                _write_generation(disk, number + 1)
            killer.join()
            assert caught.value.details["violation"] == "qemu-gone"
            disk.close()
            disk = made.start()
            found = disk.read([(offset, 4096) for offset, _ in old])
            for block, data in enumerate(found):
                for at in range(0, 4096, 512):
                    allowed = {old[block][1][at : at + 512]}
                    if block < _BLOCKS // 2:
                        allowed.add(new[block][1][at : at + 512])
                    assert data[at : at + 512] in allowed
        disk.close()


@pytest.mark.parametrize("kind", ["virtio-split", "nvme"])
def test_reset_and_second_life(kind: str, tmp_path: Path) -> None:
    with bench(kind, tmp_path / "disk.raw") as made:
        disk = made.fresh()
        disk.write([(512, b"\x12" * 512)])
        disk.reconnect()
        with pytest.raises(BackendError, match="may be lost"):
            disk.flush()
        disk.flush()
        assert disk.read([(512, 512)]) == [b"\x12" * 512]


def test_an_unreachable_queue_is_an_honest_error(tmp_path: Path) -> None:
    """The driver's memory is said to be where the machine has none: QEMU's controller fails, the driver says so."""
    with bench("nvme", tmp_path / "disk.raw") as made:
        made.fresh()
        machine, policy = made.machines[0], NvmePolicy(deadline_seconds=2)
        space = ConfigurationSpace(machine.ports())
        base, size = enable_memory_bar(space, find_nvme(space), window_gpa=PCI_WINDOW[0], window_bytes=PCI_WINDOW[1])
        memory = DmaMemory(machine.memory[16 * _MIB : 16 * _MIB + memory_bytes(policy)], address=1 << 40)
        with pytest.raises(SvsmError) as caught:
            NvmeDisk(machine.nvme_registers(base, size), memory, policy=policy)
        assert caught.value.code in ("nvme-failed", "nvme-timeout", "nvme-stuck")


def test_a_machine_that_cannot_start_says_why(tmp_path: Path) -> None:
    options = MachineOptions(
        MachineKind.Q35, disk=DiskOptions(path=tmp_path / "missing.raw"), program=peer("qemu-system-x86_64")
    )
    with pytest.raises(BackendError) as caught:
        Machine(options)
    assert caught.value.code == "qemu-start"
    assert "missing.raw" in str(caught.value.hint)


def test_nothing_is_left_running(tmp_path: Path) -> None:
    with bench("nvme", tmp_path / "disk.raw") as made:
        made.fresh()
        pid = made.machines[0].pid
        assert Path(f"/proc/{pid}").exists()
    assert not Path(f"/proc/{pid}").exists()
