# SPDX-License-Identifier: MIT OR Apache-2.0
"""Messages between the parts of the system, parser by parser: JSON and binary, plain and framed.

Every family is a row: what parses, and what must come back from `pack`. JSON may be written in many ways, so there the
invariant is that what was understood survives being written and read again; binary records pack to the same bytes.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any, Protocol

from svsm.abi import syscall
from svsm.formats import kbs, negotiation, runtime_messages, tpm
from svsm.formats.errors import SvsmError
from svsm.formats.frames import MAX_FRAME_BYTES, FrameDecoder, encode_frame
from svsm.formats.guest_mailbox import MailboxControl
from svsm.formats.release_token import ReleaseClaims, VolumeState
from svsm.formats.snp import ghcb, guest_message, hardware_messages, vcpu_messages
from svsm.formats.snp.secrets import SecretsPage
from svsm.formats.snp.vmsa import Vmsa
from svsm.formats.strict_json import canonical, parse_object
from svsm.formats.swtpm import ControlMessage, DataFrame, DataReader
from svsm.fuzz.choices import Choices
from svsm.fuzz.target import Target, expect, judge

__all__ = ["ROWS"]


class _Packs(Protocol):
    def pack(self) -> bytes:
        """The bytes."""


_POINT = bytes(range(66))
_JSON: tuple[tuple[Callable[[bytes], _Packs], _Packs], ...] = (
    (negotiation.NegotiationRequest.parse, negotiation.NegotiationRequest(extensions=("channel",))),
    (negotiation.NegotiationAnswer.parse, negotiation.NegotiationAnswer(challenge=b"c" * 32, extensions=("channel",))),
    (
        negotiation.AttestationRequest.parse,
        negotiation.AttestationRequest(
            report=b"r" * 40, certificates=b"c" * 9, challenge=b"c" * 32, key_x=_POINT, key_y=_POINT
        ),
    ),
    (
        negotiation.AttestationAnswer.parse,
        negotiation.AttestationAnswer(
            success=True,
            secret=b"s" * 32,
            decryption=negotiation.Decryption(
                epk_x=_POINT, epk_y=_POINT, wrapped_cek=b"w" * 40, aad=b"aad", iv=b"i" * 12, tag=b"t" * 16
            ),
            token="a.b.c",
        ),
    ),
    (negotiation.AttestationAnswer.parse, negotiation.AttestationAnswer(success=False, reason="broker-busy")),
    (negotiation.ChannelFrame.parse, negotiation.ChannelFrame(sealed=b"sealed")),
    (kbs.AuthRequest.parse, kbs.AuthRequest()),
    (kbs.AuthAnswer.parse, kbs.AuthAnswer(nonce=b"n" * 32)),
    (
        kbs.AttestRequest.parse,
        kbs.AttestRequest(nonce=b"n" * 32, key_x=_POINT, key_y=_POINT, report=b"r" * 40, certificates=b"c" * 9),
    ),
    (kbs.AttestAnswer.parse, kbs.AttestAnswer(token="a.b.c")),
    (
        kbs.Jwe.parse,
        kbs.Jwe(
            protected=kbs.JweHeader(epk_x=_POINT, epk_y=_POINT).protected(),
            encrypted_key=b"w" * 40,
            iv=b"i" * 12,
            ciphertext=b"c" * 32,
            tag=b"t" * 16,
        ),
    ),
    (kbs.ChannelBody.parse, kbs.ChannelBody(frame=b"frame")),
    (
        ReleaseClaims.parse,
        ReleaseClaims(
            challenge=b"c" * 32,
            key_hash=b"h" * 32,
            volume_id="00000000-1111-2222-3333-444444444444",
            state=VolumeState.NEW,
            session=b"s" * 16,
            share_x=_POINT,
            share_y=_POINT,
            confirmation=b"m" * 32,
        ),
    ),
    (
        runtime_messages.parse_request,
        runtime_messages.Formatted(session=b"s" * 16, counter=b"c" * 16, root=b"r" * 32),
    ),
    (
        runtime_messages.parse_answer,
        runtime_messages.FormattedAcknowledged(reply_to=3, session=b"s" * 16, counter=b"c" * 16, root=b"r" * 32),
    ),
    (runtime_messages.parse_answer, runtime_messages.Refused(reply_to=3, reason="broker-busy")),
)


def _json_messages(data: bytes) -> None:
    """First byte: which message. All parsers also see the bytes, because a proxy may send any of them."""
    choices = Choices(data)
    parse, honest = choices.pick(_JSON)
    body = choices.edited(honest.pack()) if choices.flag() else choices.rest()
    for other, _ in _JSON:
        if other is not parse:
            judge(other, body)
    found = parse(body)
    expect(parse(found.pack()) == found, "what was understood survives the wire")


def _json_seeds() -> list[bytes]:
    return [bytes([index, 0]) + honest.pack() for index, (_, honest) in enumerate(_JSON)]


def _strict_json(data: bytes) -> None:
    found = parse_object(data, what="input", max_bytes=4096)
    loaded = json.loads(data)
    expect(set(loaded) == set(found.names), "json reads the same members")
    for name in found.names:
        expect(json.dumps(found.value(name)) == json.dumps(loaded[name]), "json reads the same values")
        if name.isprintable():  # which names are asked for is never the sender's choice
            _every_reading(found, name)
    try:
        spelled = canonical(loaded)
    except ValueError:  # half a surrogate pair, or a number without end: `Members` gives out neither
        return
    expect(parse_object(spelled, what="input", max_bytes=1 << 16).names == found.names, "canonical JSON keeps members")


def _every_reading(found: Any, name: str) -> None:
    for read in (
        lambda: found.text(name, max_length=64),
        lambda: found.number(name, maximum=1 << 32),
        lambda: found.flag(name),
        lambda: found.members(name),
        lambda: found.items(name, max_items=8),
        lambda: found.texts(name, max_items=8, max_length=16),
        lambda: found.objects(name, max_items=8),
        lambda: found.bytes_std(name, max_bytes=64),
        lambda: found.bytes_url(name, max_bytes=64),
        lambda: found.bytes_hex(name, length=4),
    ):
        judge(read)


_STRICT_SEEDS = [
    b'{"a":1,"b":[true,null,"x\\u00e9"],"c":{"d":"AAAA"}}',
    b'{"a":-0.5e3}',
    b'{"a":"\\ud83d\\ude00","bb":"deadbeef"}',
    b"[" * 50,
]


def _cookies(data: bytes) -> None:
    text = data.decode("latin-1")
    session = kbs.parse_cookie_header(text)
    if session is not None:
        judge(lambda: expect(kbs.parse_cookie_header(kbs.format_cookie(session).split(";")[0]) == session, "cookies"))
    found = kbs.parse_resource_path(text)
    expect(found is None or all(len(name) < len(text) for name in found), "names are parts of the path")
    judge(lambda: kbs.ErrorBody.code_of(data))
    judge(lambda: kbs.JweHeader.parse(text))


def _frames(data: bytes) -> None:
    """A stream gives the same frames, or the same refusal, however it is cut."""
    choices = Choices(data)
    limit = choices.pick((64, 4096, MAX_FRAME_BYTES))
    sizes = [1 + choices.below(32) for _ in range(4)]
    stream = choices.rest()
    whole = _fed(FrameDecoder(max_bytes=limit).feed, [stream])
    single = _fed(FrameDecoder(max_bytes=limit).feed, [stream[at : at + 1] for at in range(len(stream))])
    decoder, at = FrameDecoder(max_bytes=limit), 0
    pieces: list[bytes] = []
    while at < len(stream):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(stream[at : at + size])
        at += size
    cut = _fed(decoder.feed, pieces)
    expect(_agree(single, cut) and _agree(single, whole), "frames do not depend on the pieces")
    expect(single[1] != "" or decoder.pending_bytes <= limit + 8, "a decoder's memory is bounded")
    for body in single[0]:
        expect(FrameDecoder(max_bytes=limit).feed(encode_frame(body)) == [body], "a frame survives the wire")


def _fed(feed: Callable[[bytes], list[Any]], pieces: list[bytes]) -> tuple[list[Any], str]:
    found: list[Any] = []
    for piece in pieces:
        try:
            found += feed(piece)
        except SvsmError as error:
            return found, error.code
    return found, ""


def _agree(single: tuple[list[Any], str], other: tuple[list[Any], str]) -> bool:
    """Whether a stream in larger pieces gave the same; what came in the same piece as a refusal is lost with it."""
    frames, code = single
    return other[1] == code and (other[0] == frames or (code != "" and other[0] == frames[: len(other[0])]))


def _frame_seeds() -> list[bytes]:
    header = b"\1\3\5\7\x10"
    return [header + encode_frame(b"{}") + encode_frame(b"x" * 40), header + b"\xff" * 8 + b"x"]


def _swtpm(data: bytes) -> None:
    """Control messages, and the data stream in pieces."""
    judge(lambda: ControlMessage.parse(data))
    for size in (1, 3, 64):
        reader = DataReader()
        pieces = [data[at : at + size] for at in range(0, len(data), size)]
        found, code = _fed(reader.feed, pieces)
        frames: list[DataFrame] = found
        expect(all(10 <= len(frame.command) <= 4096 for frame in frames), "a TPM command has a possible size")
        if size == 1:
            first, ended = (found, code), reader.ended
        expect(_agree(first, (found, code)) and ended == reader.ended, "commands do not depend on the pieces")
    fresh = DataReader()
    if fresh.is_command(data):
        expect(fresh.feed(data) == [DataFrame(data, None)], "the short cut and the reader agree")


def _swtpm_seeds() -> list[bytes]:
    command = tpm.startup()
    prefixed = (8).to_bytes(4, "big") + b"\3" + len(command).to_bytes(4, "big") + command
    hashed = (7).to_bytes(4, "big") + (4).to_bytes(4, "big") + b"abcd"
    return [command, command * 3, prefixed, prefixed + (20).to_bytes(4, "big"), hashed, (17).to_bytes(4, "big") * 2]


def _tpm_responses(data: bytes) -> None:
    for read in (tpm.parse_create_primary, tpm.parse_properties, tpm.response_code, tpm.ek_name):
        judge(functools.partial(read, data))
    expect(tpm.command_code(data) is None or len(data) >= 10, "a command code has a command")


def _tpm_seeds() -> list[bytes]:
    properties = b"\x80\x01\0\0\0\x1b\0\0\0\0" + b"\0\0\0\0\6\0\0\0\1" + b"\0\0\1\0\x32\x2e\x30\0"
    public = b"\0\1\0\x0b\0\3\0\xb2\0\0\0\6\0\x80\0\x43\0\x10\x08\0\0\0\0\0\0\4abcd"
    created = b"\x80\x02\0\0\0\x40\0\0\0\0\x80\xff\xff\xff\0\0\0\x40" + len(public).to_bytes(2, "big") + public
    return [properties, created, tpm.failure_response()]


_BINARY: tuple[tuple[Callable[[bytes], _Packs], bytes], ...] = (
    (hardware_messages.Message.parse, hardware_messages.Message(1, (1, 2), b"payload", 7, 0).pack()),
    (vcpu_messages.parse_message, vcpu_messages.ack(3)),
    (
        vcpu_messages.parse_message,
        vcpu_messages.MapMessage(vcpu_messages.Kind.MAP, 0, 5, 0x1000, 0x2000, 1, 3).pack(),
    ),
    (vcpu_messages.parse_message, vcpu_messages.UnmapMessage(vcpu_messages.Kind.UNMAP, 0, 5, 0x1000, 0x2000).pack()),
    (MailboxControl.parse, MailboxControl(request=1, flags=8, rax=6).pack()),
    (Vmsa.parse, Vmsa(rip=0x1000, efer=0xD00).pack()),
    (SecretsPage.parse, b"\4" + bytes(4095)),
)


def _binary_messages(data: bytes) -> None:
    choices = Choices(data)
    parse, honest = choices.pick(_BINARY)
    body = choices.edited(honest) if choices.flag() else choices.rest()
    for other, _ in _BINARY:
        if other is not parse:
            judge(other, body)
    expect(parse(body).pack() == body, "an accepted message packs to itself")


def _page_states(data: bytes) -> None:
    entries = ghcb.parse_page_states(data)
    expect(len(entries) <= ghcb.PSC_MAX_ENTRIES, "a page-state list is bounded")
    expect(all(entry.gpa % 4096 == 0 for entry in entries), "pages start at pages")
    expect(ghcb.parse_page_states(ghcb.pack_page_states(entries)) == entries, "a page-state list survives")
    for at in range(0, len(data) - 8, 8):
        target = ghcb.msr_run_vmpl_target(int.from_bytes(data[at : at + 8], "little"))
        expect(target is None or 0 <= target < 256, "a VMPL has eight bits")


def _page_state_seeds() -> list[bytes]:
    entry = ghcb.PageStateEntry
    first = [entry(0x1000 * n, ghcb.PageOperation.PRIVATE, large=False) for n in range(4)]
    return [
        ghcb.pack_page_states(first),
        ghcb.pack_page_states([entry(0x20_0000, ghcb.PageOperation.SHARED, large=True)]) + bytes(64),
    ]


_SYSCALL_BODIES: tuple[Callable[[bytes], object], ...] = (
    syscall.decode_handle,
    syscall.decode_open,
    syscall.decode_read,
    syscall.decode_replace,
    syscall.decode_answer,
    syscall.decode_write,
    syscall.Event.parse,
)


def _syscall_frames(data: bytes) -> None:
    """The stream in pieces, and each body read as each call's."""
    whole = _fed(syscall.FrameReader().feed, [data])
    pieces = _fed(syscall.FrameReader().feed, [data[at : at + 1] for at in range(len(data))])
    expect(_agree(pieces, whole), "frames do not depend on the pieces")
    for header, body in pieces[0]:
        judge(syscall.Request.parse, header, body)
        judge(syscall.Reply.parse, header, body)
        for decode in _SYSCALL_BODIES:
            judge(decode, body)
        outcome = judge(syscall.Event.parse, body)
        if not outcome.reason:
            expect(syscall.Event.parse(body).pack() == body, "an accepted event packs to itself")


def _syscall_seeds() -> list[bytes]:
    bodies = (
        (syscall.Call.OPEN, b"state"),
        (syscall.Call.READ, syscall.encode_read(1, 0, 10)),
        (syscall.Call.REPLACE, syscall.encode_replace({1: b"abc", 2: b""})),
        (syscall.Call.ANSWER, syscall.encode_answer(1, 2, b"response")),
        (syscall.Call.WRITE, syscall.encode_write(1, b"line\n")),
    )
    frames = [syscall.Request(number, call, body).pack() for number, (call, body) in enumerate(bodies)]
    event = syscall.Event(syscall.EventKind.COMMAND, command_id=1, locality=0, command=tpm.startup())
    return [*frames, b"".join(frames), syscall.Reply(1, syscall.Status.OK, event.pack()).pack()]


def _guest_message(data: bytes) -> None:
    page = data.ljust(guest_message.MESSAGE_SIZE, b"\0")
    header, payload = guest_message.parse_message(page)
    expect(len(payload) == header.payload_size and len(header.aad) == 48, "a payload has the announced size")
    expect(header.pack() == page[: guest_message.HEADER_SIZE], "an accepted header packs to itself")


def _guest_message_seeds() -> list[bytes]:
    kinds = guest_message.MessageType
    return [
        guest_message.message_header(message_type=kind, sequence=1, payload_size=96, vmpck_id=0).pack() + b"p" * 96
        for kind in (kinds.REPORT_REQUEST, kinds.REPORT_RESPONSE)
    ]


ROWS = (
    Target("strict-json", "the JSON reader, compared with json", _strict_json, lambda: _STRICT_SEEDS, max_bytes=1024),
    Target("json-messages", "attestation, KBS, claims, run-time channel: bodies", _json_messages, _json_seeds),
    Target("kbs-headers", "cookies, resource paths, errors, JWE headers", _cookies, lambda: [b"kbs-session-id=a"]),
    Target("frames", "the serial line's frames, in pieces", _frames, _frame_seeds, max_bytes=1024),
    Target("swtpm-framing", "swtpm control messages and the data stream, in pieces", _swtpm, _swtpm_seeds),
    Target("tpm-responses", "responses of the TPM library that svsm reads itself", _tpm_responses, _tpm_seeds),
    Target("binary-messages", "host, vCPU, mailbox, VMSA, secrets: records", _binary_messages, lambda: [
        bytes([index, 0]) + honest[:512] for index, (_, honest) in enumerate(_BINARY)
    ]),
    Target("page-states", "page-state-change lists and GHCB MSR requests", _page_states, _page_state_seeds),
    Target("syscall-frames", "the syscall interface's frames and bodies", _syscall_frames, _syscall_seeds),
    Target("guest-message", "headers of guest messages", _guest_message, _guest_message_seeds),
)  # fmt: skip
