# SPDX-License-Identifier: MIT OR Apache-2.0
"""One attestation, over every channel: it ends with the key or with an error that says why, before its deadline.

The kernel's client and a real broker's answers; the stream, and models of a 16550, a virtio console and a virtio
socket device. What the line does with the answers: nothing, one byte at a time, a byte lost or doubled anywhere, a
stall or a hang-up after any number of bytes, bytes without end. The same over real QEMU devices is in tests/interop.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from svsm.abi.errors import BackendError, SvsmError
from svsm.formats.runtime_messages import Formatted, FormattedAcknowledged
from svsm.kernel.attestation import attest
from svsm.kernel.channels.stream import FramedChannel
from svsm.kernel.runtime_channel import exchange
from svsm.testing.channel_harness import LINES, FarEnd, open_line
from tests.channel_support import Recording, attempt, double, drop, live
from tests.key_support import Desk

_SECONDS = 2.0
_REAL_SECONDS = 0.05
"""For attempts on the stream that cannot end otherwise: nothing else is running there."""
_PROMPT_SECONDS = 5.0

lines = pytest.mark.parametrize("line", LINES)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(tmp_path_factory.mktemp("desk"))


@pytest.fixture(scope="module")
def recording(desk: Desk) -> Recording:
    return Recording.make(desk)


def tried(
    line: str, recording: Recording, far: FarEnd, *, seconds: float | None = None
) -> tuple[SvsmError | None, float]:
    """One attempt: None for the right key, and how long it took; anything but the key or a refusal fails the test."""
    opened = open_line(line, far)
    if seconds is None:
        seconds = _REAL_SECONDS if line == "stream" else _SECONDS
    try:
        begun = opened.clock()
        outcome = attempt(opened.channel, recording, deadline=begun + seconds)
        took = opened.clock() - begun
    finally:
        opened.close()
    if isinstance(outcome, bytes):
        assert outcome == recording.volume_key
        return None, took
    assert outcome.code not in ("internal", "attestation-order")
    return outcome, took


@lines
@pytest.mark.parametrize("piece_bytes", [1 << 20, 1], ids=["whole", "one-byte-at-a-time"])
def test_the_key_comes(line: str, piece_bytes: int, tmp_path: Path) -> None:
    """`attest` against a live broker, then a message of the run-time channel, all over the same line."""
    desk = Desk(tmp_path)
    opened = open_line(line, FarEnd(live(desk), piece_bytes=piece_bytes))
    frames = FramedChannel(opened.channel)
    release = attest(
        frames,
        desk.chip(),
        settings=desk.settings,
        configuration_json=desk.configuration.to_json(),
        deadline=opened.clock() + _SECONDS,
    )
    assert len(release.volume_key) == 32
    assert release.runtime is not None
    message = Formatted(session=release.session, counter=(1).to_bytes(16, "big"), root=bytes(32))
    answer = exchange(frames, release.runtime, message, deadline=opened.clock() + _SECONDS)
    opened.close()
    assert isinstance(answer, FormattedAcknowledged)


def _sample(length: int, count: int) -> Iterable[int]:
    return {0, 7, 8, length - 1, *range(5, length, length // count)}


def _damaged(line: str, recording: Recording, positions: Iterable[int], *, hang_up: bool = False) -> set[str]:
    outcomes = set()
    for position in positions:
        for damage, change in ((drop, -1), (double, 1)):
            # A damaged first answer is the only one: the kernel does not ask again.
            last = recording.length + change if hang_up and position >= len(recording.answers[0]) else None
            far = FarEnd(recording.replayed(damage(position)), close_after=last)
            error, took = tried(line, recording, far, seconds=None if last is None else _SECONDS)
            assert took <= _SECONDS + _PROMPT_SECONDS
            outcomes.add("key" if error is None else error.code)
    return outcomes


@lines
def test_a_byte_lost_or_doubled(line: str, recording: Recording) -> None:
    outcomes = _damaged(line, recording, _sample(recording.length, 8))
    assert "channel-timeout" in outcomes
    assert len(outcomes) > 2


@pytest.mark.long
@pytest.mark.timeout(900)
@lines
def test_every_byte_lost_or_doubled(line: str, recording: Recording) -> None:
    """On the stream, where deadlines pass in real time, the peer hangs up after the last byte of its second answer."""
    assert len(_damaged(line, recording, range(recording.length), hang_up=line == "stream")) > 2


def _stalled(line: str, recording: Recording, offsets: Iterable[int]) -> None:
    """To the millisecond, which is how poll counts."""
    for offset in offsets:
        error, took = tried(line, recording, FarEnd(recording.replayed(), stop_after=offset))
        assert error is not None
        assert error.code == "channel-timeout"
        limit = _REAL_SECONDS if line == "stream" else _SECONDS
        assert limit - 0.001 <= took < limit + (_PROMPT_SECONDS if line == "stream" else 1)


@lines
def test_a_stall_costs_the_deadline(line: str, recording: Recording) -> None:
    _stalled(line, recording, _sample(recording.length, 3))


@pytest.mark.long
@pytest.mark.timeout(900)
@lines
def test_a_stall_anywhere_costs_the_deadline(line: str, recording: Recording) -> None:
    _stalled(line, recording, range(0, recording.length, 5 if line == "stream" else 1))


def _hung_up(line: str, recording: Recording, offsets: Iterable[int]) -> None:
    # A serial line has no end of stream; nor has a console with one port.
    endless = line in ("uart16550", "console-split", "console-packed")
    for offset in offsets:
        far = FarEnd(recording.replayed(), close_after=offset)
        error, took = tried(line, recording, far, seconds=None if endless else _SECONDS)
        assert error is not None
        assert error.code in ({"channel-timeout"} if endless else {"channel-closed", "frame-truncated"})
        assert endless or took < _PROMPT_SECONDS


@lines
def test_a_peer_that_hangs_up(line: str, recording: Recording) -> None:
    _hung_up(line, recording, _sample(recording.length, 4))


@pytest.mark.long
@pytest.mark.timeout(900)
@lines
def test_a_peer_that_hangs_up_anywhere(line: str, recording: Recording) -> None:
    _hung_up(line, recording, range(recording.length))


@lines
@pytest.mark.parametrize(
    "endless",
    [b"\0", b"\xff", (1 << 14).to_bytes(8, "little") + b"x" * 1000, b"\x02\0\0\0\0\0\0\0{}"],
    ids=["zeros", "ones", "a-long-frame", "frames"],
)
def test_input_without_end(line: str, endless: bytes, recording: Recording) -> None:
    error, took = tried(line, recording, FarEnd(lambda _body: b"", endless=endless), seconds=_SECONDS)
    assert error is not None
    assert took < _SECONDS + 1


@lines
def test_a_peer_that_sends_before_it_is_asked(line: str, recording: Recording) -> None:
    """Both answers at once: the second is not read before the kernel has sent its own part."""
    far = FarEnd(recording.replayed())
    far.write(b"\0" * 8)
    error, _ = tried(line, recording, far, seconds=_SECONDS)
    assert error is None or isinstance(error, BackendError)
