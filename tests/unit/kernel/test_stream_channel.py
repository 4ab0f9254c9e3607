# SPDX-License-Identifier: MIT OR Apache-2.0
"""The stream driver, frames on it, and the blocking drivers over real sockets."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from svsm.formats.errors import BackendError, FormatError
from svsm.formats.frames import encode_frame
from svsm.formats.runtime_messages import Formatted, FormattedAcknowledged
from svsm.kernel.attestation import attest
from svsm.kernel.channels.stream import FramedChannel, StreamChannel
from svsm.kernel.runtime_channel import exchange
from tests.key_support import Desk


def pair() -> tuple[FramedChannel, socket.socket]:
    ours, theirs = socket.socketpair()
    return FramedChannel(StreamChannel(ours), max_bytes=1 << 16), theirs


def soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


def test_a_frame_byte_by_byte_and_two_at_once() -> None:
    line, peer = pair()
    for value in encode_frame(b"hello"):
        peer.send(bytes([value]))
    assert line.receive(deadline=soon()) == b"hello"
    peer.send(encode_frame(b"one") + encode_frame(b"two"))
    assert line.receive(deadline=soon()) == b"one"
    assert line.receive(deadline=soon()) == b"two"
    line.close()
    peer.close()


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (b"", "channel-closed"),
        (b"\x05", "frame-truncated"),
        (encode_frame(b"hello")[:-1], "frame-truncated"),
    ],
)
def test_the_line_ends(sent: bytes, code: str) -> None:
    line, peer = pair()
    peer.send(sent)
    peer.close()
    with pytest.raises((BackendError, FormatError)) as caught:
        line.receive(deadline=soon())
    assert caught.value.code == code
    line.close()


def test_an_oversized_announcement_is_refused_without_waiting() -> None:
    line, peer = pair()
    peer.send((1 << 40).to_bytes(8, "little"))
    started = time.monotonic()
    with pytest.raises(FormatError) as caught:
        line.receive(deadline=soon())
    assert caught.value.code == "frame-too-long"
    assert time.monotonic() - started < 2
    line.close()
    peer.close()


def test_silence_and_drips_end_at_the_deadline() -> None:
    line, peer = pair()
    stop = threading.Event()

    def drip() -> None:
        peer.send((60000).to_bytes(8, "little"))
        while not stop.wait(0.01):
            peer.send(b"x")

    for action in (None, drip):
        thread = threading.Thread(target=action) if action else None
        if thread:
            thread.start()
        with pytest.raises(BackendError) as caught:
            line.receive(deadline=soon(0.15))
        stop.set()
        if thread:
            thread.join()
        assert caught.value.code == "channel-timeout"
    line.close()
    peer.close()


def test_a_reader_that_does_not_read() -> None:
    ours, theirs = socket.socketpair()
    channel = StreamChannel(ours)
    with pytest.raises(BackendError) as caught:
        channel.send(bytes(64 << 20), deadline=soon(0.1))
    assert caught.value.code == "channel-timeout"
    theirs.close()
    with pytest.raises(BackendError) as gone:
        channel.send(b"x", deadline=soon())
    assert gone.value.code == "channel-closed"
    channel.close()
    with pytest.raises(BackendError):
        channel.receive(1, deadline=soon())


def test_a_host_that_makes_the_socket_block_gains_nothing() -> None:
    ours, theirs = socket.socketpair()
    copy = ours.dup()
    channel = StreamChannel(ours)
    copy.setblocking(True)  # the flag belongs to both copies
    started = time.monotonic()
    with pytest.raises(BackendError) as caught:
        channel.send(bytes(8 << 20), deadline=soon(0.1))
    assert caught.value.code == "channel-timeout"
    assert time.monotonic() - started < 5
    for end in (channel, copy, theirs):
        end.close()


def test_a_whole_attestation_over_a_socket(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "broker")
    line, peer = pair()
    relay = desk.relay()
    thread = threading.Thread(target=answer_each, args=(peer, [relay.negotiate, relay.attest, relay.channel]))
    thread.start()
    release = attest(
        line,
        desk.chip(),
        settings=desk.settings,
        configuration_json=desk.configuration.to_json(),
        deadline=soon(),
    )
    assert release.runtime is not None
    message = Formatted(session=release.session, counter=b"c" * 16, root=b"r" * 32)
    answer = exchange(line, release.runtime, message, deadline=soon())
    assert isinstance(answer, FormattedAcknowledged)
    thread.join()
    line.close()


def test_a_withheld_acknowledgement_ends_at_the_deadline(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "broker")
    line, peer = pair()
    release, _ = desk.attest()
    assert release.runtime is not None
    message = Formatted(session=release.session, counter=b"c" * 16, root=b"r" * 32)
    with pytest.raises(BackendError) as caught:
        exchange(line, release.runtime, message, deadline=soon(0.1))
    assert caught.value.code == "channel-timeout"
    line.close()
    peer.close()


def test_late_answers_to_earlier_requests_do_not_count(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "broker")
    line, peer = pair()
    release, relay = desk.attest()
    assert release.runtime is not None
    message = Formatted(session=release.session, counter=b"c" * 16, root=b"r" * 32)
    _, earlier = release.runtime.request(message)
    kept = relay.channel(earlier)

    def kept_first(body: bytes) -> bytes:
        peer.sendall(encode_frame(kept))
        return relay.channel(body)

    thread = threading.Thread(target=answer_each, args=(peer, [kept_first]))
    thread.start()
    answer = exchange(line, release.runtime, message, deadline=soon())
    thread.join()
    assert answer.reply_to == 1
    line.close()


def answer_each(peer: socket.socket, handlers: list[Callable[[bytes], bytes]]) -> None:
    with peer, peer.makefile("rb") as stream:
        for handle in handlers:
            length = int.from_bytes(stream.read(8), "little")
            peer.sendall(encode_frame(handle(stream.read(length))))
