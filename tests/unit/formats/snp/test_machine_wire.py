# SPDX-License-Identifier: MIT OR Apache-2.0
"""The wire of the simulated machine and the pages of the launch: round trips, truncations, flips, arbitrary bytes."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svsm.formats.errors import FormatError, SvsmError
from svsm.formats.snp import ghcb
from svsm.formats.snp.cpuid_page import CpuidFunction, pack_cpuid_page, parse_cpuid_page
from svsm.formats.snp.guest_message import (
    MAX_PAYLOAD,
    MESSAGE_SIZE,
    MessageHeader,
    ReportRequest,
    ReportResponse,
    message_header,
    parse_message,
)
from svsm.formats.snp.hardware_messages import ANSWER, HEADER_SIZE, MAX_MESSAGE, HostCommand, Message
from svsm.formats.snp.hardware_messages import MAX_PAYLOAD as MAX_MESSAGE_PAYLOAD
from svsm.formats.snp.secrets import SecretsPage, fresh_secrets

KEYS = (b"0" * 32, b"1" * 32, b"2" * 32, b"3" * 32)

# ---- machine messages ---------------------------------------------------------------------------------------------


@given(
    kind=st.integers(0, 0xFFFF),
    arguments=st.lists(st.integers(0, (1 << 64) - 1), max_size=6),
    payload=st.binary(max_size=300),
    identifier=st.integers(0, (1 << 64) - 1),
    status=st.integers(0, (1 << 32) - 1),
)
def test_message_round_trip(kind: int, arguments: list[int], payload: bytes, identifier: int, status: int) -> None:
    message = Message(kind, tuple(arguments), payload, identifier, status)
    parsed = Message.parse(message.pack())
    assert parsed.arguments[: len(arguments)] == tuple(arguments)
    assert not any(parsed.arguments[len(arguments) :])
    assert (parsed.kind, parsed.payload, parsed.identifier, parsed.status) == (kind, payload, identifier, status)
    assert parsed.pack() == message.pack()


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_an_error(data: bytes) -> None:
    try:
        message = Message.parse(data)
    except SvsmError:
        return
    assert message.pack() == data


def test_every_truncation_and_extension() -> None:
    data = Message(1, (2,), b"payload").pack()
    for length in range(len(data)):
        with pytest.raises(FormatError):
            Message.parse(data[:length])
    with pytest.raises(FormatError):
        Message.parse(data + b"\0")
    with pytest.raises(FormatError):
        Message.parse(bytes(MAX_MESSAGE + 1))


@pytest.mark.parametrize("bit", range(32))
def test_magic_and_length_are_checked(bit: int) -> None:
    for start in (0, 20):  # magic, payload length
        data = bytearray(Message(1, (2,), b"payload").pack())
        data[start + bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError):
            Message.parse(bytes(data))


def test_what_does_not_fit_a_message() -> None:
    for message in (
        Message(1, (0,) * 7),
        Message(1, (), bytes(MAX_MESSAGE_PAYLOAD + 1)),
        Message(1 << 16),
        Message(1, (1 << 64,)),
        Message(1, (-1,)),
    ):
        with pytest.raises(FormatError):
            message.pack()
    assert len(Message(1, (), bytes(MAX_MESSAGE_PAYLOAD)).pack()) == MAX_MESSAGE == HEADER_SIZE + MAX_MESSAGE_PAYLOAD


def test_an_answer_belongs_to_its_request() -> None:
    answer = Message(HostCommand.VMRUN, (1,), b"secret", identifier=7).answer(5, status=3, payload=b"x")
    assert answer == Message(HostCommand.VMRUN | ANSWER, (5,), b"x", 7, 3)
    assert "secret" not in repr(Message(1, (), b"secret"))


# ---- GHCB ---------------------------------------------------------------------------------------------------------

_entries = st.builds(
    ghcb.PageStateEntry,
    st.integers(0, (1 << 40) - 1).map(lambda page: page << 12),
    st.sampled_from(ghcb.PageOperation),
    st.booleans(),
)


@given(st.lists(_entries, min_size=1, max_size=ghcb.PSC_MAX_ENTRIES), st.binary(max_size=20))
def test_page_states_round_trip(entries: list[ghcb.PageStateEntry], tail: bytes) -> None:
    assert ghcb.parse_page_states(ghcb.pack_page_states(entries) + tail) == entries


def test_page_state_words_are_those_of_the_specification() -> None:
    entry = ghcb.PageStateEntry(0x4000_0000, ghcb.PageOperation.SHARED, True)
    assert ghcb.pack_page_states([entry]) == bytes(8) + bytes.fromhex("00 00 00 40 00 00 20 01")


@given(st.binary(max_size=64))
def test_any_bytes_are_page_states_or_an_error(data: bytes) -> None:
    try:
        entries = ghcb.parse_page_states(data)
    except SvsmError:
        return
    assert 0 < len(entries) <= ghcb.PSC_MAX_ENTRIES


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(7),
        bytes(8),
        bytes.fromhex("0000fd0000000000") + bytes(8 * 254),  # end beyond the last entry
        bytes.fromhex("0200010000000000") + bytes(32),  # current behind end
        bytes.fromhex("0000000001000000") + bytes(8),  # reserved word
        bytes(8) + (1 << 57).to_bytes(8, "little"),
        bytes(8) + (0 << 52).to_bytes(8, "little"),
        bytes(8) + (5 << 52).to_bytes(8, "little"),
        bytes(8) + (1 << 52 | 1).to_bytes(8, "little"),
    ],
)
def test_impossible_page_states(data: bytes) -> None:
    with pytest.raises(FormatError):
        ghcb.parse_page_states(data)


@pytest.mark.parametrize("gpa", [1, 1 << 52, -4096])
def test_page_states_that_cannot_be_written(gpa: int) -> None:
    with pytest.raises(FormatError):
        ghcb.pack_page_states([ghcb.PageStateEntry(gpa, ghcb.PageOperation.PRIVATE, False)])
    with pytest.raises(FormatError):
        ghcb.pack_page_states([])


@pytest.mark.parametrize(
    ("value", "target"),
    [
        (0x0000_0000_0000_0016, 0),
        (0x0000_0002_0000_0016, 2),
        (0x0000_0000_0000_0017, None),
        (0x0000_0000_0000_1016, None),
        (0x0000_0100_0000_0016, None),
        (0x100, None),
    ],
)
def test_run_vmpl_in_the_msr_protocol(value: int, target: int | None) -> None:
    assert ghcb.msr_run_vmpl_target(value) == target


def test_exit_info_of_a_guest_request() -> None:
    assert ghcb.split_guest_request_result(0x0000_0002_0000_0016) == (0x16, 2)


# ---- guest messages, secrets, CPUID --------------------------------------------------------------------------------


def test_guest_message_offsets_are_those_of_the_specification() -> None:
    header = message_header(message_type=5, sequence=0x0102030405060708, payload_size=0x60, vmpck_id=2)
    data = header.replace(tag=b"T" * 16).pack()
    assert data[0x00:0x10] == b"T" * 16
    assert data[0x20:0x28] == bytes([8, 7, 6, 5, 4, 3, 2, 1])
    assert data[0x30:0x3D] == bytes.fromhex("01 01 6000 05 01 6000 00000000 02")
    assert header.aad == data[0x30:]
    assert ReportRequest(b"D" * 64, 1, 2, bytes(24)).pack()[0x40:0x48] == bytes.fromhex("0100000002000000")
    assert ReportResponse.SIZE == 0x4C0


@given(st.binary(min_size=0x60, max_size=0x60))
@settings(max_examples=50)
def test_any_header_is_refused_or_round_trips(data: bytes) -> None:
    try:
        header, payload = parse_message(data.ljust(MESSAGE_SIZE, b"\0"))
    except SvsmError:
        return
    assert header.pack() == data
    assert len(payload) == header.payload_size


@pytest.mark.parametrize("size", [0, MAX_PAYLOAD + 1, 0xFFFF])
def test_guest_message_payload_sizes(size: int) -> None:
    with pytest.raises(FormatError):
        message_header(message_type=5, sequence=1, payload_size=size, vmpck_id=0)
    header = message_header(message_type=5, sequence=1, payload_size=1, vmpck_id=0).replace(payload_size=size)
    with pytest.raises(FormatError):
        parse_message(header.pack().ljust(MESSAGE_SIZE, b"\0"))


@pytest.mark.parametrize(("vmpck", "allowed"), [(0, True), (3, True), (4, False), (255, False)])
def test_there_are_four_keys(vmpck: int, allowed: bool) -> None:
    header = message_header(message_type=5, sequence=1, payload_size=1, vmpck_id=0).replace(vmpck_id=vmpck)
    page = header.pack().ljust(MESSAGE_SIZE, b"\0")
    if allowed:
        assert isinstance(parse_message(page)[0], MessageHeader)
    else:
        with pytest.raises(FormatError):
            parse_message(page)


def test_secrets_page_offsets_are_those_of_the_specification() -> None:
    data = fresh_secrets(vmpcks=KEYS, fms=0xA00F11, tsc_factor=9).pack()
    assert data[0x08:0x0C] == bytes.fromhex("110fa000")
    assert data[0x20:0xA0] == b"".join(KEYS)
    page = SecretsPage.parse(data)
    assert page.vmpcks == KEYS
    guest = page.replace(
        svsm_base=0x1000, svsm_size=0x2000, svsm_caa=0x3000, svsm_max_version=1, svsm_guest_vmpl=2
    ).pack()
    assert guest[0x140:0x15D] == bytes.fromhex("0010000000000000 0020000000000000 0030000000000000 01000000 02")


def test_cpuid_page_round_trip_and_bounds() -> None:
    functions = [CpuidFunction(n, 0, 0, 0, 1, 2, 3, 4, 0) for n in range(64)]
    page = pack_cpuid_page(functions)
    assert parse_cpuid_page(page) == functions
    assert page[:4] == (64).to_bytes(4, "little")
    with pytest.raises(FormatError):
        pack_cpuid_page([*functions, functions[0]])
    for offset in (4, 8, 16 + 40):
        with pytest.raises(FormatError):
            parse_cpuid_page(page[:offset] + b"\1" + page[offset + 1 :])
    for data in (b"", page[:-1], (65).to_bytes(4, "little") + page[4:], os.urandom(16)):
        with pytest.raises(FormatError):
            parse_cpuid_page(data)


@pytest.mark.parametrize(
    ("access", "word"),
    [
        (ghcb.IoAccess(0x3F8, 1, reading=False, string=False), 0x03F8_0010),
        (ghcb.IoAccess(0xCFC, 4, reading=True, string=False), 0x0CFC_0041),
        (ghcb.IoAccess(0x60, 2, reading=True, string=False), 0x0060_0021),
        (ghcb.IoAccess(0x3E8, 1, reading=True, string=True), 0x03E8_021D),
    ],
)
def test_a_port_access_is_one_word(access: ghcb.IoAccess, word: int) -> None:
    assert access.pack() == word
    assert ghcb.IoAccess.parse(word) == access


@pytest.mark.parametrize(
    "word", [0, 0x03F8_0030, 0x03F8_0070, 0x03F8_0012, 0x03F8_0014, 0x03F8_0090, 1 << 32 | 0x10, -16]
)
def test_another_word_is_no_port_access(word: int) -> None:
    with pytest.raises(FormatError) as caught:
        ghcb.IoAccess.parse(word)
    assert caught.value.code == "ghcb-io"


@pytest.mark.parametrize(("port", "width"), [(1 << 16, 1), (-1, 1), (0, 3), (0, 8), (0, 0)])
def test_no_such_port(port: int, width: int) -> None:
    with pytest.raises(FormatError) as caught:
        ghcb.IoAccess(port, width, reading=True, string=False).pack()
    assert caught.value.code == "ghcb-io"
