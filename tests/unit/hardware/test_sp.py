# SPDX-License-Identifier: MIT OR Apache-2.0
"""Guest messages: numbers, keys, headers, privilege levels, and what a report says. Each refusal has its place."""

from __future__ import annotations

import os

import pytest

from svsm.broker.verifier import Roots, verify_evidence
from svsm.crypto.guest_channel import MAX_SEQUENCE, open_message, seal_message
from svsm.formats.errors import IntegrityError, ProtocolError
from svsm.formats.snp.firmware_status import FirmwareStatus
from svsm.formats.snp.guest_message import MessageType, ReportRequest, ReportResponse
from svsm.formats.snp.report import Report, parse_report
from svsm.hardware.launch import GuestContext
from svsm.hardware.sp import SecureProcessor
from svsm.testing.machine_harness import throwaway_chip
from tests.simulated import NOW, machine

KEYS = (b"0" * 32, b"1" * 32, b"2" * 32, b"3" * 32)
CONTEXT = GuestContext(
    policy=0x3_0000,
    measurement=b"M" * 48,
    host_data=b"H" * 32,
    report_id=os.urandom(32),
    vmpcks=KEYS,
    family_id=b"F" * 16,
    image_id=b"I" * 16,
    guest_svn=9,
)
DATA = bytes(range(64))


def request(
    sequence: int = 1,
    *,
    vmpck: int = 0,
    vmpl: int = 0,
    flags: int = 1,
    key: bytes | None = None,
    kind: int = MessageType.REPORT_REQUEST,
    payload: bytes | None = None,
    reserved: bytes = bytes(24),
) -> bytes:
    body = payload if payload is not None else ReportRequest(DATA, vmpl, flags, reserved).pack()
    return seal_message(key or KEYS[vmpck], message_type=kind, sequence=sequence, payload=body, vmpck_id=vmpck)


def response(page: bytes, *, vmpck: int = 0) -> tuple[int, int, bytes]:
    header, payload = open_message(KEYS[vmpck], page)
    assert header.message_type == MessageType.REPORT_RESPONSE
    assert header.vmpck_id == vmpck
    return header.sequence, int.from_bytes(payload[:4], "little"), payload


@pytest.fixture
def sp() -> SecureProcessor:
    return SecureProcessor(throwaway_chip(), CONTEXT)


def refusal(sp: SecureProcessor, page: bytes) -> object:
    with pytest.raises(ProtocolError) as error:
        sp.guest_request(page)
    assert error.value.code == "psp-refused"
    return error.value.details["status"]


@pytest.mark.parametrize("version", [3, 5])
def test_report_says_what_was_launched(version: int) -> None:
    chip = throwaway_chip(report_version=version)
    sequence, status, payload = response(SecureProcessor(chip, CONTEXT).guest_request(request()))
    assert (sequence, status) == (2, 0)
    report = parse_report(ReportResponse.parse(payload).report)
    assert report.version == version
    assert report.report_data == DATA
    assert report.measurement == CONTEXT.measurement
    assert report.host_data == CONTEXT.host_data
    assert report.report_id == CONTEXT.report_id
    assert (report.family_id, report.image_id, report.guest_svn) == (b"F" * 16, b"I" * 16, 9)
    assert (report.policy, report.vmpl) == (CONTEXT.policy, 0)
    assert (report.cpuid_family, report.cpuid_model, report.cpuid_stepping) == (0x19, 1, 1)
    assert report.chip_id == chip.chip_id


@pytest.mark.parametrize("version", [3, 5])
def test_the_brokers_verifier_accepts_it(version: int) -> None:
    chip = machine().chip(report_version=version)
    _, _, payload = response(SecureProcessor(chip, CONTEXT).guest_request(request()))
    evidence = {
        "accepted_root": Roots.simulated(machine().root_fingerprint),
        "expected_report_data": DATA,
        "allowed_measurements": [CONTEXT.measurement],
        "expected_host_data": CONTEXT.host_data,
        "at": NOW,
    }
    report = ReportResponse.parse(payload).report
    verdict = verify_evidence(report, chip.certificates, **evidence)  # type: ignore[arg-type]
    assert verdict.accepted, verdict
    changed = bytearray(report)
    changed[0x90] ^= 1
    assert not verify_evidence(bytes(changed), chip.certificates, **evidence).accepted  # type: ignore[arg-type]


def test_numbers_advance_by_two(sp: SecureProcessor) -> None:
    for number in (1, 3, 5):
        assert response(sp.guest_request(request(number)))[0] == number + 1


@pytest.mark.parametrize("number", [2, 3, 1 << 32, MAX_SEQUENCE])
def test_a_number_that_is_not_due(sp: SecureProcessor, number: int) -> None:
    assert refusal(sp, request(number)) == FirmwareStatus.INVALID_PARAM
    assert response(sp.guest_request(request(1)))[0] == 2


def test_replay_is_refused(sp: SecureProcessor) -> None:
    page = request(1)
    sp.guest_request(page)
    assert refusal(sp, page) == FirmwareStatus.INVALID_PARAM
    assert response(sp.guest_request(request(3)))[0] == 4


def test_exhausted_counter(sp: SecureProcessor) -> None:
    sp._counters[0] = MAX_SEQUENCE - 1
    assert refusal(sp, request(MAX_SEQUENCE)) == FirmwareStatus.AEAD_OFLOW


def test_each_key_has_its_own_counter(sp: SecureProcessor) -> None:
    for vmpck in range(4):
        page = sp.guest_request(request(1, vmpck=vmpck, vmpl=3))
        assert response(page, vmpck=vmpck)[:2] == (2, 0)


def test_another_levels_key(sp: SecureProcessor) -> None:
    assert refusal(sp, request(key=KEYS[2])) == FirmwareStatus.BAD_MEASUREMENT
    assert refusal(sp, request(key=os.urandom(32))) == FirmwareStatus.BAD_MEASUREMENT


@pytest.mark.parametrize("bit", [0, 7])
@pytest.mark.parametrize("offset", [*range(0x10), *range(0x20, 0x28), *range(0x30, 0x60), 0x60, 0x61, 0xBF])
def test_every_byte_of_header_and_payload_matters(sp: SecureProcessor, offset: int, bit: int) -> None:
    page = bytearray(request())
    page[offset] ^= 1 << bit
    status = refusal(sp, bytes(page))
    assert status in (FirmwareStatus.INVALID_PARAM, FirmwareStatus.BAD_MEASUREMENT)
    assert response(sp.guest_request(request(1)))[0] == 2


@pytest.mark.parametrize("offset", [0x10, 0x1F, 0x28, 0x2F, 0x38, 0x3B, 0x3D, 0x5F])
def test_reserved_header_bytes(sp: SecureProcessor, offset: int) -> None:
    page = bytearray(request())
    page[offset] = 1
    assert refusal(sp, bytes(page)) == FirmwareStatus.INVALID_PARAM


@pytest.mark.parametrize("page", [b"", bytes(4096), b"\xff" * 4096, bytes(4095)])
def test_what_is_no_message(sp: SecureProcessor, page: bytes) -> None:
    assert refusal(sp, page) == FirmwareStatus.INVALID_PARAM


@pytest.mark.parametrize("kind", [0, 1, 3, 6, 7, 9, 17, 255])
def test_message_types_that_this_firmware_does_not_have(sp: SecureProcessor, kind: int) -> None:
    assert refusal(sp, request(kind=kind)) == FirmwareStatus.INVALID_PARAM


@pytest.mark.parametrize(("vmpck", "vmpl"), [(a, b) for a in range(4) for b in (0, 1, 2, 3, 4, 0xFFFF_FFFF)])
def test_a_key_is_worth_its_level_and_those_below(sp: SecureProcessor, vmpck: int, vmpl: int) -> None:
    _, status, payload = response(sp.guest_request(request(vmpck=vmpck, vmpl=vmpl)), vmpck=vmpck)
    if vmpck <= vmpl <= 3:
        assert status == 0
        assert Report.parse(payload[0x20:]).vmpl == vmpl
    else:
        assert status == 0x16
        assert len(payload) == 0x20


@pytest.mark.parametrize(("flags", "status"), [(0, 0), (1, 0), (2, 0x27), (3, 0x16), (4, 0x16), (1 << 31, 0x16)])
def test_key_selection(sp: SecureProcessor, flags: int, status: int) -> None:
    assert response(sp.guest_request(request(flags=flags)))[1] == status


@pytest.mark.parametrize("payload", [bytes(0x5F), bytes(0x61), bytes(1), bytes(4000)])
def test_request_payload_of_another_size(sp: SecureProcessor, payload: bytes) -> None:
    assert response(sp.guest_request(request(payload=payload)))[:2] == (2, 0x16)


def test_reserved_bytes_of_the_request(sp: SecureProcessor) -> None:
    assert response(sp.guest_request(request(reserved=bytes(23) + b"\1")))[1] == 0x16


def test_a_response_is_no_request(sp: SecureProcessor) -> None:
    page = sp.guest_request(request())
    assert refusal(sp, page) == FirmwareStatus.INVALID_PARAM
    with pytest.raises(IntegrityError):
        open_message(KEYS[1], page)
