# SPDX-License-Identifier: MIT OR Apache-2.0
"""Control messages as real clients send them, and the data stream whole and byte by byte."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svsm.formats import tpm
from svsm.formats.errors import SvsmError
from svsm.formats.swtpm import (
    CAPABILITIES,
    MAX_CONTROL_BYTES,
    Control,
    ControlMessage,
    DataFrame,
    DataReader,
    capability_reply,
    established_reply,
)

COMMAND = tpm.get_random(32)
TPM_1_2 = bytes.fromhex("00c10000000c000000650000")


def _word(value: int) -> bytes:
    return value.to_bytes(4, "big")


def test_padding_after_a_message_is_ignored() -> None:
    bare = _word(Control.SET_LOCALITY) + b"\x03"
    assert ControlMessage.parse(bare) == ControlMessage(Control.SET_LOCALITY, 3)
    assert ControlMessage.parse(bare + bytes(3)) == ControlMessage(Control.SET_LOCALITY, 3)
    assert ControlMessage.parse(bare + _word(Control.SHUTDOWN)) == ControlMessage(Control.SET_LOCALITY, 3)


def test_hash_data_has_what_it_announces() -> None:
    message = _word(Control.HASH_DATA) + _word(3) + b"abc"
    assert ControlMessage.parse(message) == ControlMessage(Control.HASH_DATA, 3, b"abc")
    for damaged in (message[:-1], _word(Control.HASH_DATA) + _word(0xFFFFFFFF) + b"abc"):
        with pytest.raises(SvsmError):
            ControlMessage.parse(damaged)


@pytest.mark.parametrize(
    "message", [b"", b"\0\0\0", _word(0), _word(20), _word(Control.INIT), _word(Control.SET_LOCALITY)]
)
def test_short_and_unknown_messages_are_refused(message: bytes) -> None:
    with pytest.raises(SvsmError):
        ControlMessage.parse(message)


def test_capabilities_have_what_qemu_needs_and_no_state_blobs() -> None:
    for bit in (0, 1, 2, 3, 7, 10, 12, 13):
        assert CAPABILITIES >> bit & 1
    for bit in (6, 8, 9):  # STORE_VOLATILE, GET_STATEBLOB, SET_STATEBLOB
        assert not CAPABILITIES >> bit & 1
    assert len(capability_reply()) == 8
    assert established_reply(0, 1) == bytes((0, 0, 0, 0, 1, 0, 0, 0))


STREAMS = [
    (COMMAND, [DataFrame(COMMAND, None)], False),
    (COMMAND * 3, [DataFrame(COMMAND, None)] * 3, False),
    (_word(8) + b"\x02" + _word(len(COMMAND)) + COMMAND, [DataFrame(COMMAND, 2)], False),
    (_word(8) + b"\0" + _word(len(COMMAND)) + COMMAND + COMMAND + _word(20) + COMMAND,
     [DataFrame(COMMAND, 0), DataFrame(COMMAND, None)], True),
    # QEMU's tpm-tis and OVMF probe with a TPM 1.2 command; the TPM answers it, so it must get there.
    (TPM_1_2, [DataFrame(TPM_1_2, None)], False),
]  # fmt: skip


@pytest.mark.parametrize(("stream", "frames", "ended"), STREAMS)
def test_the_data_stream_is_cut_whole_and_byte_by_byte(stream: bytes, frames: list[DataFrame], ended: bool) -> None:
    reader = DataReader()
    assert reader.feed(stream) == frames
    assert reader.ended is ended
    slow = DataReader()
    assert [frame for value in stream for frame in slow.feed(bytes([value]))] == frames
    assert slow.ended is ended


def test_wrapped_responses() -> None:
    assert DataFrame(COMMAND, None).wrap(b"abc") == b"abc"
    assert DataFrame(COMMAND, 0).wrap(b"abc") == _word(3) + b"abc" + bytes(4)


def test_is_command_agrees_with_feed() -> None:
    reader = DataReader()
    assert reader.is_command(COMMAND)
    for other in (b"", COMMAND[:-1], COMMAND + b"\0", COMMAND * 2, _word(8) + b"\0" + COMMAND):
        assert not reader.is_command(other)
    reader.feed(COMMAND[:5])
    assert not reader.is_command(COMMAND)


@pytest.mark.parametrize(
    "stream",
    [
        b"\x80\x01" + _word(9) + bytes(10),
        b"\x80\x01" + _word(4097) + bytes(10),
        b"\x80\x01" + _word(0xFFFFFFFF),
        _word(8) + b"\0" + _word(9),
        _word(8) + b"\0" + _word(0xFFFFFFFF),
        _word(7),
        _word(0),
    ],
)
def test_impossible_sizes_end_the_stream_at_once(stream: bytes) -> None:
    with pytest.raises(SvsmError):
        DataReader().feed(stream)


@given(st.lists(st.binary(max_size=64), max_size=20))
def test_any_stream_is_frames_or_a_svsm_error(chunks: list[bytes]) -> None:
    reader = DataReader()
    try:
        for chunk in chunks:
            for frame in reader.feed(chunk):
                assert 10 <= len(frame.command) <= 4096
    except SvsmError:
        return


@given(st.binary(max_size=MAX_CONTROL_BYTES))
def test_any_control_message_is_a_value_or_a_svsm_error(message: bytes) -> None:
    try:
        parsed = ControlMessage.parse(message)
    except SvsmError:
        return
    assert len(parsed.data) <= 4096
