# SPDX-License-Identifier: MIT OR Apache-2.0
"""A hostile disk: whatever it answers, the driver gives what was asked for or an SvsmError, soon."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest

from svsm.formats.errors import BackendError, ProtocolError, SvsmError
from svsm.storage.cocoonfs import Volume
from svsm.storage.drivers.remote import INFO, MAGIC, READ, BlockMessage, RemoteDevice
from svsm.testing.diskprocess import DiskProcess

Answer = Callable[[BlockMessage], bytes | None]


def _serve(answer: Answer) -> socket.socket:
    """A disk that answers INFO decently, everything else as told; None closes."""
    ours, theirs = socket.socketpair()

    def run() -> None:
        with theirs, contextlib.suppress(OSError):
            while True:
                raw = theirs.recv(BlockMessage.SIZE, socket.MSG_WAITALL)
                reply = answer(BlockMessage.parse(raw)) if len(raw) == BlockMessage.SIZE else None
                if reply is None:
                    return
                theirs.sendall(reply)

    threading.Thread(target=run, daemon=True).start()
    return ours


def _info(request: BlockMessage, *, size: int = 65536, block: int = 512) -> bytes:
    return request.replace(offset=block, length=size).pack()


def _decent(request: BlockMessage) -> bytes:
    if request.operation == INFO:
        return _info(request)
    data = bytes(request.length) if request.operation == READ else b""
    return request.replace(length=len(data)).pack() + data


def _after_info(answer: Answer) -> Answer:
    return lambda request: _info(request) if request.operation == INFO else answer(request)


def test_decent() -> None:
    device = RemoteDevice(_serve(_decent))
    assert device.read([(512, 1024)]) == [bytes(1024)]
    device.close()


@pytest.mark.parametrize(
    ("size", "block"),
    [(65536, 100), (65536, 0), (65537, 512), (1 << 60, 512), (65536, 1 << 40), (65536, (1 << 64) - 1)],
)
def test_senseless_description(size: int, block: int) -> None:
    with pytest.raises(ProtocolError) as caught:
        RemoteDevice(_serve(lambda request: _info(request, size=size, block=block)))
    assert caught.value.code == "block-protocol"


CHANGES: dict[str, Callable[[BlockMessage], BlockMessage]] = {
    "magic": lambda reply: reply.replace(magic=MAGIC ^ 1),
    "operation": lambda reply: reply.replace(operation=9),
    "sequence": lambda reply: reply.replace(sequence=reply.sequence - 1),
    "status": lambda reply: reply.replace(status=77),
    "reserved": lambda reply: reply.replace(reserved_6=1),
    "longer": lambda reply: reply.replace(length=reply.length + 512),
    "shorter": lambda reply: reply.replace(length=0),
    "huge": lambda reply: reply.replace(length=(1 << 64) - 1),
    "error with data": lambda reply: reply.replace(status=1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_wrong_answer_ends_the_device(change: str) -> None:
    device = RemoteDevice(_serve(_after_info(lambda request: CHANGES[change](request).pack() + bytes(512))))
    with pytest.raises(ProtocolError) as caught:
        device.read([(0, 512)])
    assert caught.value.code == "block-protocol"
    with pytest.raises(BackendError) as dead:
        device.read([(0, 512)])
    assert dead.value.code == "block-io"
    device.close()


def test_io_error_is_reported_and_survived() -> None:
    replies = iter([1, 0])

    def answer(request: BlockMessage) -> bytes:
        status = next(replies)
        return request.replace(status=status, length=0).pack()

    device = RemoteDevice(_serve(_after_info(answer)))
    with pytest.raises(BackendError) as caught:
        device.flush()
    assert caught.value.code == "block-io"
    device.flush()
    device.close()


def test_a_peer_that_makes_the_socket_block_gains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    copy = ours.dup()
    theirs.sendall(_info(BlockMessage(MAGIC, INFO, 0, 0, 1, 0, 0)))
    device = RemoteDevice(ours, deadline_seconds=0.2)
    wait = device._wait

    def wait_and_block(deadline: float) -> None:
        wait(deadline)
        os.set_blocking(copy.fileno(), True)  # the flag belongs to both copies

    monkeypatch.setattr(device, "_wait", wait_and_block)
    with pytest.raises(BackendError):
        device.write([(0, bytes(device.size_bytes))] * 64)
    for end in (device, copy, theirs):
        end.close()


def test_silence_and_trickle() -> None:
    for answer in (lambda request: b"", lambda request: b"S"):
        device = RemoteDevice(_serve(_after_info(answer)), deadline_seconds=0.2)
        start = time.monotonic()
        with pytest.raises(BackendError):
            device.read([(0, 512)])
        assert time.monotonic() - start < 2
        device.close()


def test_closes() -> None:
    with pytest.raises(BackendError):
        RemoteDevice(_serve(lambda request: None))
    device = RemoteDevice(_serve(_after_info(lambda request: None)))
    with pytest.raises(BackendError):
        device.write([(0, bytes(512))])
    device.close()


@pytest.mark.parametrize("seed", range(40))
def test_random_answers(seed: int) -> None:
    rng = random.Random(seed)

    def answer(request: BlockMessage) -> bytes | None:
        raw = bytearray(_decent(request))
        for _ in range(rng.choice([0, 1, 1, 3])):
            raw[rng.randrange(min(32, len(raw)))] ^= 1 << rng.randrange(8)
        return None if rng.random() < 0.05 else bytes(raw[: rng.choice([len(raw)] * 9 + [len(raw) // 2])])

    try:
        device = RemoteDevice(_serve(answer), deadline_seconds=0.1)
    except SvsmError:
        return
    for _ in range(5):
        try:
            assert [len(data) for data in device.read([(0, 1024)])] == [1024]
            device.write([(0, bytes(512))])
            device.flush()
        except SvsmError:
            break
    device.close()


def test_large_transfers(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(8 << 20))
    disk = DiskProcess(path)
    device = disk.connect()
    data = random.Random(1).randbytes(5 << 20)
    device.write([(1024, data)])
    device.write([((7 << 20) + 512 * n, bytes([n % 256]) * 512) for n in range(400)])
    assert device.read([(1024, len(data))]) == [data]
    assert device.read([((7 << 20) + 512 * 300, 512)]) == [bytes([300 % 256]) * 512]
    device.close()
    disk.kill()


@pytest.mark.parametrize("loss", ["drop", "tear"])
def test_killed_disk(tmp_path: Path, loss: Literal["drop", "tear"]) -> None:
    """Commits over a disk process that is killed in the middle: what was acknowledged is there afterwards."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(64 << 10))
    disk = DiskProcess(path, spill=tmp_path / "spill")
    device = disk.connect()
    volume = Volume.create(device, b"key", salt=b"")
    acknowledged = b""
    with volume.transaction() as transaction:
        transaction.write(16, acknowledged)
    rng = random.Random(loss)
    for turn in range(8):
        stop = threading.Timer(rng.random() * 0.02, disk.kill, kwargs={"loss": loss, "seed": turn})
        stop.start()
        attempted, code = acknowledged, "none"
        try:
            for number in range(200):
                attempted = b"%d %d " % (turn, number) * (1 + number % 300)
                with volume.transaction() as transaction:
                    transaction.write(16, attempted)
                acknowledged = attempted
        except SvsmError as error:
            code = error.code
        assert code in ("none", "block-io")
        stop.join()
        device.close()
        device = disk.connect()
        volume = Volume.open(device, b"key")
        assert volume.read(16) in (acknowledged, attempted)
        acknowledged = volume.read(16)
    device.close()
    disk.kill()
