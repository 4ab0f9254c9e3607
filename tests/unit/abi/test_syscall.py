# SPDX-License-Identifier: MIT OR Apache-2.0
"""The syscall wire: every frame round-trips, every damage is refused, nothing is allocated on a peer's word."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svsm.abi import syscall
from svsm.abi.syscall import (
    Call,
    Endpoint,
    Event,
    EventKind,
    FrameHeader,
    FrameReader,
    Reply,
    Request,
    Status,
    Transport,
)
from svsm.formats.errors import SvsmError

EVENTS = [
    Event(EventKind.CONNECTION, endpoint=Endpoint.CONTROL, transport=Transport.TCP, handle=7),
    Event(EventKind.COMMAND, command_id=9, locality=3, command=b"\x80\x01"),
    Event(EventKind.COMMAND, command_id=0xFFFFFFFF),
    Event(EventKind.STOP),
    Event(EventKind.STOP),
]


@pytest.mark.parametrize("event", EVENTS)
def test_events_round_trip_and_every_truncation_is_refused_or_another_command(event: Event) -> None:
    packed = event.pack()
    assert Event.parse(packed) == event
    for cut in range(len(packed)):
        try:
            parsed = Event.parse(packed[:cut])
        except SvsmError:
            continue
        assert event.kind is EventKind.COMMAND
        assert parsed.command == event.command[: cut - 6]


@pytest.mark.parametrize("body", [b"", b"\0", b"\x05", b"\x01\x04\x01\0\0\0\0", b"\x01\x01\x03\0\0\0\0", b"\x03\0"])
def test_events_that_do_not_exist_are_refused(body: bytes) -> None:
    with pytest.raises(SvsmError):
        Event.parse(body)


def test_frames_arrive_whole_and_byte_by_byte() -> None:
    frames = [
        Request(1, Call.OPEN, b"state").pack(),
        Request(0xFFFFFFFF, Call.READ, syscall.encode_read(3, 1 << 40, 77)).pack(),
        Request(2, Call.REPLACE, syscall.encode_replace({3: b"x" * 1000, 4: b""})).pack(),
    ]
    whole = FrameReader().feed(b"".join(frames))
    reader = FrameReader()
    single = [frame for value in b"".join(frames) for frame in reader.feed(bytes([value]))]
    assert whole == single
    requests = [Request.parse(header, body) for header, body in whole]
    assert [request.call for request in requests] == [Call.OPEN, Call.READ, Call.REPLACE]
    assert [request.pack() for request in requests] == frames
    assert syscall.decode_read(requests[1].body) == (3, 1 << 40, 77)
    assert syscall.decode_replace(requests[2].body) == {3: b"x" * 1000, 4: b""}


@pytest.mark.parametrize("length", [0, 11, syscall.MAX_FRAME_BYTES + 1, 0xFFFFFFFF])
def test_an_impossible_length_is_refused_before_anything_is_collected(length: int) -> None:
    with pytest.raises(SvsmError) as caught:
        FrameReader().feed(FrameHeader(length, 1, 1, 0, 0).pack())
    assert caught.value.code == "syscall-frame"


def test_a_request_cannot_claim_descriptors_nor_an_unknown_call() -> None:
    for header, code in (
        (FrameHeader(12, 1, Call.OPEN, 1, 0), "syscall-descriptors"),
        (FrameHeader(12, 1, 99, 0, 0), "syscall-call"),
    ):
        with pytest.raises(SvsmError) as caught:
            Request.parse(header, b"")
        assert caught.value.code == code


def test_replies_round_trip_and_unknown_ones_are_refused() -> None:
    reply = Reply(5, Status.OK, b"abc", 1)
    ((header, body),) = FrameReader().feed(reply.pack())
    assert Reply.parse(header, body) == reply
    for damaged in (header.replace(code=200), header.replace(descriptors=2)):
        with pytest.raises(SvsmError):
            Reply.parse(damaged, body)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        (0).to_bytes(4, "little"),
        syscall.encode_replace([(handle, b"") for handle in range(syscall.MAX_FILES_PER_REPLACE + 1)]),
        syscall.encode_replace([(1, b"a"), (1, b"b")]),
        syscall.encode_replace({1: b"abc"})[:-1],
        syscall.encode_replace({1: b"abc"}) + b"\0",
        b"\x01\0\0\0" + b"\x01\0\0\0" + b"\xff\xff\xff\xff",
    ],
)
def test_replacements_that_make_no_sense_are_refused(body: bytes) -> None:
    with pytest.raises(SvsmError):
        syscall.decode_replace(body)


def test_what_is_too_long_is_refused() -> None:
    with pytest.raises(SvsmError):
        syscall.decode_answer(syscall.encode_answer(1, 2, bytes(syscall.MAX_COMMAND_BYTES + 1)))
    with pytest.raises(SvsmError):
        syscall.decode_write(syscall.encode_write(1, bytes(syscall.MAX_WRITE_BYTES + 1)))
    with pytest.raises(SvsmError):
        syscall.decode_open(b"n" * (syscall.MAX_NAME_BYTES + 1))
    with pytest.raises(SvsmError):
        Request(1, Call.REPLACE, bytes(syscall.MAX_FRAME_BYTES)).pack()
    for name in (b"", b"\xff"):
        with pytest.raises(SvsmError):
            syscall.decode_open(name)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_value_or_a_svsm_error(data: bytes) -> None:
    decoders = (
        Event.parse,
        syscall.decode_open,
        syscall.decode_read,
        syscall.decode_replace,
        syscall.decode_answer,
        syscall.decode_write,
        syscall.decode_handle,
        FrameReader().feed,
    )
    for decode in decoders:
        try:
            decode(data)
        except SvsmError:
            continue
