# SPDX-License-Identifier: MIT OR Apache-2.0
"""Our vhost-user front-end with qemu-storage-daemon: conformance, integrity against the raw file, sudden death."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import random
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from svsm.abi.block import BlockDevice
from svsm.formats.errors import BackendError, SvsmError
from svsm.formats.virtio import BlkFeature, Feature
from svsm.storage.drivers.virtio.blk import BlkPolicy
from svsm.storage.drivers.virtio.vhost_user import VhostUserBlk, open_vhost_user
from svsm.testing.block_conformance import CHECKS, SIZE_BYTES, Subject, initial_content
from svsm.testing.storage_daemon import StorageDaemon
from tests.support import peer

pytestmark = pytest.mark.interop

_MIB = 1 << 20
_SECTOR = 512


@pytest.fixture
def folder() -> Iterator[Path]:
    # Sockets have short names only, so not in pytest's own folder.
    with tempfile.TemporaryDirectory(prefix="vu") as made:
        yield Path(made)


def _daemon(folder: Path, image: Path, **options: bool | int) -> StorageDaemon:
    return StorageDaemon(peer("qemu-storage-daemon"), image, folder, **options)  # type: ignore[arg-type]


def _image(folder: Path, size_bytes: int) -> Path:
    path = folder / "disk.raw"
    with path.open("wb") as file:
        file.truncate(size_bytes)
    return path


# ---- conformance ----------------------------------------------------------------------------------------------------

_POLICIES = {
    "plain": BlkPolicy(),
    "direct-sleeping": BlkPolicy(indirect=False, event_idx=False, spins=1),
    "four-queues-of-16": BlkPolicy(queues=4, queue_size=16, small_bytes=512, large_bytes=65536),
}


@pytest.mark.parametrize(
    "policy", [pytest.param(name, marks=[pytest.mark.long] if name == "direct-sleeping" else []) for name in _POLICIES]
)
def test_conformance(folder: Path, policy: str) -> None:
    """All checks, with a fresh daemon for each fresh disk."""
    image = folder / "disk.raw"
    with contextlib.ExitStack() as stack:
        daemons: list[StorageDaemon] = []

        def create(read_only: bool = False) -> BlockDevice:
            for daemon in daemons:
                daemon.stop()
            image.write_bytes(initial_content())
            daemons[:] = [stack.enter_context(_daemon(folder, image, queues=4, read_only=read_only))]
            return reopen()

        def reopen() -> VhostUserBlk:
            driver = open_vhost_user(str(daemons[-1].socket), policy=_POLICIES[policy])
            stack.callback(driver.close)
            return driver

        for check in CHECKS:
            check(Subject(create=create, reopen=reopen, create_read_only=lambda: create(read_only=True)))
        assert image.stat().st_size == SIZE_BYTES


def test_what_the_daemon_offers(folder: Path) -> None:
    with _daemon(folder, _image(folder, _MIB), queues=2) as daemon:
        driver = open_vhost_user(str(daemon.socket), policy=BlkPolicy(queues=2))
        for feature in (Feature.VERSION_1, Feature.EVENT_IDX, Feature.INDIRECT_DESC, BlkFeature.FLUSH, BlkFeature.MQ):
            assert driver.features & feature
        assert not driver.features & Feature.RING_PACKED
        assert driver.get_id() == b"vhost_user_blk"
        assert (driver.geometry.queues, driver.geometry.discard is not None) == (2, True)
        driver.close()


# ---- integrity ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Model:
    """What must be in the file."""

    driver: VhostUserBlk
    content: bytearray
    random: random.Random
    moved_bytes: int = 0

    def _range(self, most_bytes: int) -> tuple[int, int]:
        length = self.random.choice((_SECTOR, 4096, self.random.randrange(1, most_bytes // _SECTOR + 1) * _SECTOR))
        return self.random.randrange((len(self.content) - length) // _SECTOR + 1) * _SECTOR, length

    def write(self) -> None:
        """Several extents at once, which do not overlap: nothing orders those that do."""
        extents: list[tuple[int, bytes]] = []
        for _ in range(self.random.choice((1, 1, 8, 40))):
            offset, length = self._range(_MIB if self.random.random() < 0.2 else 16384)
            if all(offset + length <= at or at + len(data) <= offset for at, data in extents):
                extents.append((offset, self.random.randbytes(length)))
        self.driver.write(extents)
        for offset, data in extents:
            self.content[offset : offset + len(data)] = data
            self.moved_bytes += len(data)

    def read(self) -> None:
        ranges = [self._range(_MIB if self.random.random() < 0.2 else 16384) for _ in range(self.random.choice((1, 8)))]
        for (offset, length), data in zip(ranges, self.driver.read(ranges), strict=True):
            assert data == self.content[offset : offset + length]
            self.moved_bytes += length

    def write_zeroes(self) -> None:
        offset, length = self._range(2 * _MIB)
        self.driver.write_zeroes([(offset, length)])
        self.content[offset : offset + length] = bytes(length)
        self.moved_bytes += length

    def discard(self) -> None:
        """Contents are undefined after it; the model takes over what is there, once, and demands that it stays."""
        offset, length = self._range(2 * _MIB)
        self.driver.discard([(offset, length)])
        there = self.driver.read([(offset, length)])[0]
        for at in range(0, length, _SECTOR):
            assert there[at : at + _SECTOR] in (self.content[offset + at : offset + at + _SECTOR], bytes(_SECTOR))
        self.content[offset : offset + length] = there
        self.moved_bytes += length

    def step(self) -> None:
        self.random.choice((self.write, self.write, self.read, self.read, self.write_zeroes, self.discard))()
        if self.random.random() < 0.05:
            self.driver.flush()


def _integrity(folder: Path, size_bytes: int, to_move_bytes: int, policy: BlkPolicy) -> None:
    qemu_img = peer("qemu-img")
    image = _image(folder, size_bytes)
    with _daemon(folder, image, nbd=True, queues=2) as daemon:
        driver = open_vhost_user(str(daemon.socket), policy=policy)
        model = _Model(driver, bytearray(size_bytes), random.Random(size_bytes))
        while model.moved_bytes < to_move_bytes:
            model.step()
        driver.flush()
        expected = hashlib.sha256(model.content).digest()
        # What lies on the medium, read by somebody else.
        copied = subprocess.run(
            ["dd", f"if={image}", "bs=1M", "status=none"], capture_output=True, check=True, timeout=120
        ).stdout
        assert hashlib.sha256(copied).digest() == expected
        model_file = folder / "model.raw"
        model_file.write_bytes(model.content)
        # What the daemon itself shows to another client.
        address = f"nbd+unix:///disk?socket={daemon.nbd_socket}"
        done = subprocess.run(
            [str(qemu_img), "compare", "-U", "-f", "raw", "-F", "raw", str(model_file), address],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert (done.returncode, "identical" in done.stdout) == (0, True), done.stdout + done.stderr
        assert driver.read([(0, size_bytes)])[0] == copied
        driver.close()


def test_integrity(folder: Path) -> None:
    _integrity(folder, 16 * _MIB, 96 * _MIB, BlkPolicy(queues=2, large_bytes=256 << 10))


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("indirect", [True, False])
def test_integrity_of_more_than_a_gibibyte(folder: Path, indirect: bool) -> None:
    _integrity(folder, 256 * _MIB, 1200 * _MIB, BlkPolicy(indirect=indirect, packed=False))


# ---- death ----------------------------------------------------------------------------------------------------------


def _block(generation: int, number: int) -> bytes:
    return hashlib.shake_128(b"%d %d" % (generation, number)).digest(4096)


def _write_until_error(driver: VhostUserBlk, generation: int, blocks: int) -> None:
    extents = [(number * 4096, _block(generation, number)) for number in range(blocks)]
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        driver.write(extents)


def _killed_in_flight(folder: Path, rounds: int, blocks: int) -> None:
    """Generations of all blocks, each flushed; the daemon dies in the middle of one. What was flushed is there."""
    image = _image(folder, blocks * 4096)
    source = random.Random(3)
    with _daemon(folder, image) as daemon:
        driver = open_vhost_user(str(daemon.socket))
        generation = 0
        for _ in range(rounds):
            generation += 1
            driver.write([(number * 4096, _block(generation, number)) for number in range(blocks)])
            driver.flush()
            killer = threading.Timer(source.uniform(0.002, 0.05), daemon.kill)
            killer.start()
            began = time.monotonic()
            with pytest.raises(BackendError) as caught:
                _write_until_error(driver, generation + 1, blocks // 2)
            killer.join()
            assert caught.value.code == "block-io"
            assert caught.value.details["violation"] == "vhost-user-gone"
            assert time.monotonic() - began < 5
            for call in (driver.flush, lambda: driver.read([(0, 4096)])):
                with pytest.raises(BackendError):  # it stays dead
                    call()
            with pytest.raises(BackendError) as absent:
                driver.reconnect()
            assert absent.value.code == "vhost-user-connect"
            daemon.start()
            driver.reconnect()
            found = driver.read([(number * 4096, 4096) for number in range(blocks)])
            for number, data in enumerate(found):
                allowed = {_block(generation, number)}
                if number < blocks // 2:  # in flight when it died: old or new, each sector for itself
                    allowed.add(_block(generation + 1, number))
                    sectors = zip(*(_sectors(one) for one in allowed), strict=True)
                    assert all(got in pair for got, pair in zip(_sectors(data), sectors, strict=True))
                else:
                    assert data in allowed
            with pytest.raises(BackendError):  # said once: unflushed writes may be lost
                driver.flush()
            generation += 1
        driver.close()


def _sectors(data: bytes) -> list[bytes]:
    return [data[at : at + _SECTOR] for at in range(0, len(data), _SECTOR)]


def test_killed_in_flight(folder: Path) -> None:
    _killed_in_flight(folder, 3, 512)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_killed_in_flight_again_and_again(folder: Path) -> None:
    _killed_in_flight(folder, 40, 4096)


def test_a_frozen_daemon_is_given_up_and_comes_back(folder: Path) -> None:
    with _daemon(folder, _image(folder, _MIB)) as daemon:
        driver = open_vhost_user(str(daemon.socket), policy=BlkPolicy(deadline_seconds=0.3), answer_seconds=0.5)
        driver.write([(0, b"k" * 4096)])
        driver.flush()
        daemon.freeze()
        with pytest.raises(BackendError) as caught:
            driver.read([(0, 4096)])
        assert caught.value.details["violation"] == "virtio-timeout"
        with pytest.raises(SvsmError) as still:
            driver.reconnect()
        assert still.value.code == "vhost-user-timeout"
        daemon.thaw()
        driver.reconnect()
        assert driver.read([(0, 4096)]) == [b"k" * 4096]
        driver.close()


def test_a_second_client_is_told_to_wait(folder: Path) -> None:
    with _daemon(folder, _image(folder, _MIB)) as daemon:
        first = open_vhost_user(str(daemon.socket))
        with pytest.raises(SvsmError) as caught:
            open_vhost_user(str(daemon.socket), policy=BlkPolicy(deadline_seconds=0.3), answer_seconds=0.3)
        assert caught.value.code == "vhost-user-timeout"
        assert first.read([(0, 512)]) == [bytes(512)]
        first.close()
        second = open_vhost_user(str(daemon.socket))
        second.close()


@pytest.mark.parametrize("what", ["head", "address"])
def test_a_daemon_that_gives_up_on_a_broken_ring(folder: Path, what: str) -> None:
    """libvhost-user closes the socket when a ring makes no sense: honest errors here, and a new life after it."""
    with _daemon(folder, _image(folder, _MIB)) as daemon:
        driver = open_vhost_user(str(daemon.socket), policy=BlkPolicy(indirect=False, packed=False))
        queue = driver._lanes[0].queue
        if what == "head":
            queue._heads[:] = [60000] * len(queue._heads)  # type: ignore[attr-defined]
        else:
            for at in range(0, 2 * queue.shape.size, 2):
                driver._memory.u64[queue._ring_base // 8 + at] = 1 << 50  # type: ignore[attr-defined]
        with pytest.raises(BackendError) as caught:
            driver.read([(0, 4096)])
        assert caught.value.details["violation"] == "vhost-user-gone"
        driver.reconnect()
        assert driver.read([(0, 4096)]) == [bytes(4096)]
        driver.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="opening what another process has mapped needs root")
def test_the_daemon_cannot_reach_the_size_of_the_memory(folder: Path) -> None:
    """The seals are on the very file that the daemon has mapped."""
    with _daemon(folder, _image(folder, _MIB)) as daemon:
        driver = open_vhost_user(str(daemon.socket))
        found = 0
        for name in os.listdir(f"/proc/{daemon.pid}/map_files"):
            path = Path(f"/proc/{daemon.pid}/map_files/{name}")
            if "svsm-vhost-user" not in os.readlink(path):
                continue
            found += 1
            with path.open("r+b") as file, pytest.raises(PermissionError):
                file.truncate(4096)
        assert found
        driver.close()
