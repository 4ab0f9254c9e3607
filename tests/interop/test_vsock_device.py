# SPDX-License-Identifier: MIT OR Apache-2.0
"""The key over rust-vmm's socket device (vhost-device-vsock 0.3.0), and what that device does to a connection.

The program is a vhost-user back-end: connections of the guest to port P of the host become connections to the Unix
socket ``NAME_P``, where the proxy listens. It offers split rings with EVENT_IDX, and no ACCESS_PLATFORM, because it
reaches only the memory that it is given. (A kernel's vhost-vsock needs /dev/vhost-vsock, which few test machines have.)
"""

from __future__ import annotations

import contextlib
import random
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from svsm.abi.errors import BackendError, SvsmError
from svsm.formats.virtio import DeviceType, Feature
from svsm.kernel.attestation import attest
from svsm.kernel.channels.stream import FramedChannel
from svsm.kernel.channels.virtio_line import line_memory_bytes
from svsm.kernel.channels.vsock import VsockChannel, VsockPolicy
from svsm.storage.drivers.virtio.vhost_user import VhostUserTransport
from svsm.storage.drivers.virtio.vhost_user_socket import SharedMemory, connect
from svsm.testing.channel_harness import FarEnd, FarEndThread
from tests.channel_support import Recording, attempt, double, drop, live
from tests.key_support import Desk
from tests.support import peer

pytestmark = pytest.mark.interop

_CID = 3
_PORT = 9999
_SOON = 20.0


class Device:
    """The running back-end, and the socket that port 9999 of its host is."""

    def __init__(self, folder: Path) -> None:
        program = peer("vhost-device-vsock")
        self.control = folder / "vu"
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(folder / f"vm_{_PORT}"))
        self.listener.listen()
        self.listener.settimeout(_SOON)
        command = [str(program), f"--guest-cid={_CID}"]
        command += [f"--socket={self.control}", f"--uds-path={folder / 'vm'}"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def channel(self, policy: VsockPolicy | None = None) -> VsockChannel:
        """The kernel's channel. The listener's socket is there before it listens, so connecting is tried again."""
        policy = policy or VsockPolicy()
        deadline = time.monotonic() + _SOON
        while True:
            memory = SharedMemory(line_memory_bytes(policy.line))
            try:
                connected = connect(str(self.control))
                break
            except BackendError:
                assert time.monotonic() < deadline
                assert self.process.poll() is None
                time.sleep(0.02)
        transport = VhostUserTransport(connected, memory, device_type=DeviceType.VSOCK)
        return VsockChannel(transport, memory.dma, policy=policy)

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        self.listener.close()


@pytest.fixture
def device() -> Iterator[Device]:
    # Sockets have short names only, so not in pytest's own folder.
    with tempfile.TemporaryDirectory(prefix="vs") as folder:
        made = Device(Path(folder))
        try:
            yield made
        finally:
            made.close()


@contextlib.contextmanager
def opened(device: Device, far: FarEnd) -> Iterator[VsockChannel]:
    """The kernel's channel, `far` at the other end."""
    channel = device.channel()
    connected, _ = device.listener.accept()
    thread = FarEndThread(connected, far)
    thread.start()
    try:
        yield channel
    finally:
        channel.close()
        thread.end()


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return Recording.make(Desk(tmp_path_factory.mktemp("desk")))


@pytest.mark.parametrize("piece_bytes", [1 << 20, 1], ids=["whole", "one-byte-at-a-time"])
def test_the_key_comes(device: Device, piece_bytes: int, tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    with opened(device, FarEnd(live(desk), piece_bytes=piece_bytes)) as channel:
        assert channel.cid == _CID
        assert channel.features == Feature.VERSION_1 | Feature.EVENT_IDX
        release = attest(
            FramedChannel(channel),
            desk.chip(),
            settings=desk.settings,
            configuration_json=desk.configuration.to_json(),
            deadline=time.monotonic() + 30,
        )
    assert len(release.volume_key) == 32


def _tried(device: Device, recording: Recording, far: FarEnd, seconds: float) -> SvsmError | None:
    with opened(device, far) as channel:
        begun = time.monotonic()
        outcome = attempt(channel, recording, deadline=begun + seconds)
        assert time.monotonic() - begun < seconds + 5
    if isinstance(outcome, bytes):
        assert outcome == recording.volume_key
        return None
    return outcome


@pytest.mark.parametrize("position", [3, 300, *(pytest.param(at, marks=pytest.mark.long) for at in range(0, 1960, 49))])
def test_a_byte_lost_or_doubled(device: Device, position: int, recording: Recording) -> None:
    """One device after the other connection: each `opened` is a new vhost-user client of the same program."""
    for damage in (drop, double):
        _tried(device, recording, FarEnd(recording.replayed(damage(position))), 0.5)


@pytest.mark.parametrize("offset", [200, *(pytest.param(at, marks=pytest.mark.long) for at in range(0, 1960, 98))])
def test_a_stall_and_a_hang_up(device: Device, offset: int, recording: Recording) -> None:
    error = _tried(device, recording, FarEnd(recording.replayed(), stop_after=offset), 0.5)
    assert error is not None
    assert error.code == "channel-timeout"
    error = _tried(device, recording, FarEnd(recording.replayed(), close_after=offset), 10)
    assert error is not None
    assert error.code in ("channel-closed", "frame-truncated")


@pytest.mark.parametrize("endless", [b"\0", b"\xff", (1 << 14).to_bytes(8, "little") + b"x" * 1000])
def test_input_without_end(device: Device, endless: bytes, recording: Recording) -> None:
    assert _tried(device, recording, FarEnd(lambda _body: b"", endless=endless), 10) is not None


def test_a_megabyte_each_way(device: Device) -> None:
    """Credit runs out and comes back many times, in both directions."""
    with opened(device, FarEnd(lambda body: len(body).to_bytes(8, "little") + body[::-1])) as channel:
        frames = FramedChannel(channel)
        data = random.Random(5).randbytes(1 << 20)
        frames.send(data, deadline=time.monotonic() + _SOON)
        assert frames.receive(deadline=time.monotonic() + _SOON) == data[::-1]


def test_nobody_listens(device: Device) -> None:
    """VIRTIO 1.2 §5.10.6.6 wants RST. This version of the program sends nothing, so it costs the deadline."""
    begun = time.monotonic()
    with pytest.raises(BackendError) as caught:
        device.channel(VsockPolicy(port=1234, connect_seconds=0.5))
    assert caught.value.code == "channel-timeout", "a version that answers is a reason to change docs/UPSTREAM.md"
    assert time.monotonic() - begun < 6


def test_a_far_end_that_does_not_read_costs_the_deadline(device: Device) -> None:
    channel = device.channel()
    connected, _ = device.listener.accept()
    begun = time.monotonic()
    with pytest.raises(BackendError) as caught:
        channel.send(bytes(4 << 20), deadline=begun + 1)
    assert caught.value.code == "channel-timeout"
    assert time.monotonic() - begun < 6
    connected.close()
    channel.close()


def test_a_device_that_dies(device: Device) -> None:
    channel = device.channel()
    device.process.kill()
    device.process.wait()
    for _ in range(2):
        with pytest.raises(SvsmError) as caught:
            channel.receive(1, deadline=time.monotonic() + _SOON)
        assert caught.value.code == "vhost-user-gone"
    channel.close()
