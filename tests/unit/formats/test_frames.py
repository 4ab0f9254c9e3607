# SPDX-License-Identifier: MIT OR Apache-2.0
"""The frame decoder: whole, byte by byte, truncated, oversized, endless."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svsm.formats.errors import FormatError
from svsm.formats.frames import FrameDecoder, encode_frame


def test_whole_and_byte_by_byte_give_the_same() -> None:
    bodies = [b"{}", b"", b"x" * 300]
    stream = b"".join(encode_frame(body) for body in bodies)
    assert FrameDecoder().feed(stream) == bodies
    decoder = FrameDecoder()
    found = []
    for value in stream:
        assert decoder.wanted_bytes >= 1
        found += decoder.feed(bytes([value]))
    assert found == bodies
    decoder.finish()


def test_every_truncation_is_noticed() -> None:
    stream = encode_frame(b"hello")
    for end in range(1, len(stream)):
        decoder = FrameDecoder()
        assert decoder.feed(stream[:end]) == []
        with pytest.raises(FormatError) as cut:
            decoder.finish()
        assert cut.value.code == "frame-truncated"


def test_wanted_bytes_leads_to_exactly_one_frame() -> None:
    stream = memoryview(encode_frame(b"abc") + encode_frame(b"next"))
    decoder = FrameDecoder()
    taken = 0
    while not (found := decoder.feed(stream[taken : taken + (step := decoder.wanted_bytes)])):
        taken += step
    assert found == [b"abc"]
    assert taken + step == 8 + 3


@pytest.mark.parametrize("length", [1025, 1 << 26, 1 << 62, 1 << 63, (1 << 64) - 1])
def test_a_long_announcement_is_refused_from_its_header(length: int) -> None:
    decoder = FrameDecoder(max_bytes=1024)
    with pytest.raises(FormatError) as refused:
        decoder.feed(length.to_bytes(8, "little"))
    assert refused.value.code == "frame-too-long"
    for more in (b"", b"x" * 4096):
        with pytest.raises(FormatError):
            decoder.feed(more)


def test_a_frame_at_the_cap_passes_and_one_above_is_not_sent() -> None:
    body = b"x" * 1024
    assert FrameDecoder(max_bytes=1024).feed(encode_frame(body, max_bytes=1024)) == [body]
    with pytest.raises(FormatError):
        encode_frame(body + b"x", max_bytes=1024)


@given(st.lists(st.binary(max_size=40), max_size=6), st.lists(st.integers(min_value=1, max_value=30), max_size=40))
def test_any_cutting_gives_the_same_frames(bodies: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(encode_frame(body) for body in bodies)
    decoder, found, place = FrameDecoder(), [], 0
    for cut in [*cuts, len(stream)]:
        found += decoder.feed(stream[place : place + cut])
        place += cut
    assert found == bodies
    assert decoder.pending_bytes == 0
