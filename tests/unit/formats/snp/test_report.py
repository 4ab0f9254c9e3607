# SPDX-License-Identifier: MIT OR Apache-2.0
"""The report record: its layout, what each version reserves, and that nothing else is refused or lost."""

from __future__ import annotations

import dataclasses
import random

import pytest

from svsm.formats.errors import FormatError
from svsm.formats.record import Unsigned
from svsm.formats.snp.policy import GuestPolicy, PlatformInfo
from svsm.formats.snp.report import P384_ORDER, REPORT_BYTES, SIGNED_BYTES, Report, parse_report, validate_report

# AMD 56860 rev 1.58 table 23, as reference implementations and real reports agree on it.
_OFFSETS = {
    "version": 0x000,
    "guest_svn": 0x004,
    "policy": 0x008,
    "family_id": 0x010,
    "image_id": 0x020,
    "vmpl": 0x030,
    "signature_algorithm": 0x034,
    "current_tcb": 0x038,
    "platform_info": 0x040,
    "key_info": 0x048,
    "reserved_4c": 0x04C,
    "report_data": 0x050,
    "measurement": 0x090,
    "host_data": 0x0C0,
    "id_key_digest": 0x0E0,
    "author_key_digest": 0x110,
    "report_id": 0x140,
    "report_id_ma": 0x160,
    "reported_tcb": 0x180,
    "cpuid_family": 0x188,
    "cpuid_model": 0x189,
    "cpuid_stepping": 0x18A,
    "reserved_18b": 0x18B,
    "chip_id": 0x1A0,
    "committed_tcb": 0x1E0,
    "current_build": 0x1E8,
    "current_minor": 0x1E9,
    "current_major": 0x1EA,
    "reserved_1eb": 0x1EB,
    "committed_build": 0x1EC,
    "committed_minor": 0x1ED,
    "committed_major": 0x1EE,
    "reserved_1ef": 0x1EF,
    "launch_tcb": 0x1F0,
    "launch_mit_vector": 0x1F8,
    "current_mit_vector": 0x200,
    "reserved_208": 0x208,
    "signature_r": 0x2A0,
    "signature_s": 0x2E8,
    "reserved_330": 0x330,
}


def _signed(version: int) -> Report:
    return Report.blank(version).with_signature(1, P384_ORDER - 1)


def _with_byte(report: Report, offset: int, value: int) -> Report:
    data = bytearray(report.pack())
    data[offset] = value
    return Report.parse(bytes(data))


def test_every_field_is_where_the_specification_has_it() -> None:
    names = [field.name for field in dataclasses.fields(_signed(2))]
    assert names == list(_OFFSETS)
    for name, offset in _OFFSETS.items():
        value = getattr(_with_byte(Report.parse(bytes(REPORT_BYTES)), offset, 0x5A), name)
        assert value == 0x5A if isinstance(value, int) else value[0] == 0x5A, name


def test_any_1184_bytes_survive_a_round_trip() -> None:
    source = random.Random(1)
    for _ in range(20):
        data = source.randbytes(REPORT_BYTES)
        assert Report.parse(data).pack() == data


@pytest.mark.parametrize("version", [2, 3, 4, 5])
def test_a_blank_report_lacks_only_its_signature(version: int) -> None:
    with pytest.raises(FormatError) as refused:
        validate_report(Report.blank(version))
    assert refused.value.code == "report-signature-range"
    validate_report(_signed(version))
    assert parse_report(_signed(version).pack()) == _signed(version)


def test_every_wrong_length_is_refused() -> None:
    data = _signed(5).pack()
    for length in (*range(REPORT_BYTES), REPORT_BYTES + 1, 4096):
        with pytest.raises(FormatError) as refused:
            parse_report(data.ljust(4096, b"\0")[:length])
        assert refused.value.code == "report-length"


@pytest.mark.parametrize("version", [0, 1, 6, 0xFFFF_FFFF])
def test_other_versions_are_refused(version: int) -> None:
    with pytest.raises(FormatError, match="version"):
        validate_report(_signed(3).replace(version=version))
    with pytest.raises(FormatError, match="version"):
        Report.blank(version)


def _reserved_offsets(version: int) -> set[int]:
    """Bytes that must be zero, written down apart from the implementation."""
    reserved = {0x49, 0x4A, 0x4B, *range(0x4C, 0x50), *range(0x18B, 0x1A0), 0x1EB, 0x1EF, *range(0x208, 0x2A0)}
    reserved |= {*range(0x2D0, 0x2E8), *range(0x318, 0x330), *range(0x330, 0x4A0)}
    if version < 3:
        reserved |= set(range(0x188, 0x18B))
    if version < 5:
        reserved |= set(range(0x1F8, 0x208))
    return reserved


@pytest.mark.parametrize("version", [2, 3, 4, 5])
def test_exactly_the_reserved_bytes_must_be_zero(version: int) -> None:
    report = _signed(version)
    reserved = _reserved_offsets(version)
    judged_elsewhere = {*range(0x004), *range(0x030, 0x038), 0x48}
    for offset in set(range(REPORT_BYTES)) - judged_elsewhere:
        changed = _with_byte(report, offset, report.pack()[offset] ^ 0x01)
        if offset in reserved:
            with pytest.raises(FormatError) as refused:
                validate_report(changed)
            assert refused.value.code == "report-reserved", hex(offset)
        elif offset < SIGNED_BYTES:
            validate_report(changed)


@pytest.mark.parametrize(
    ("key_info", "valid"),
    [
        (0, True),
        (1, True),
        (2, True),
        (1 << 2, True),
        (7 << 2, True),
        *((key << 2, False) for key in range(2, 7)),
        (1 << 5, False),
    ],
)
def test_key_info_has_three_signing_keys_and_reserved_bits(key_info: int, *, valid: bool) -> None:
    report = _signed(3).replace(key_info=key_info)
    if valid:
        validate_report(report)
    else:
        with pytest.raises(FormatError) as refused:
            validate_report(report)
        assert refused.value.code == "report-reserved"


def test_key_info_is_taken_apart() -> None:
    report = Report.blank(3).replace(key_info=0b00111)
    assert (report.author_key_enabled, report.mask_chip_key, report.signing_key) == (True, True, 1)


@pytest.mark.parametrize(
    ("r", "s"), [(0, 1), (1, 0), (P384_ORDER, 1), (1, P384_ORDER), (1 << 384, 1), (1, (1 << 576) - 1)]
)
def test_r_and_s_lie_between_zero_and_the_order(r: int, s: int) -> None:
    report = Report.blank(3).replace(signature_r=r.to_bytes(72, "little"), signature_s=s.to_bytes(72, "little"))
    with pytest.raises(FormatError) as refused:
        validate_report(report)
    assert refused.value.code in {"report-signature-range", "report-reserved"}
    with pytest.raises(FormatError):
        Report.blank(3).with_signature(r, s)


def test_r_and_s_are_little_endian() -> None:
    report = Report.blank(3).with_signature(0x0102, 0x0304)
    assert (report.signature_r[:3], report.signature_s[:3]) == (b"\x02\x01\0", b"\x04\x03\0")
    assert report.signature == (0x0102, 0x0304)


@pytest.mark.parametrize("algorithm", [0, 2, 0x0100_0000])
def test_only_ecdsa_p384_is_an_algorithm(algorithm: int) -> None:
    with pytest.raises(FormatError) as refused:
        validate_report(_signed(3).replace(signature_algorithm=algorithm))
    assert refused.value.code == "report-signature-algorithm"


@pytest.mark.parametrize(
    ("vmpl", "valid"), [(0, True), (3, True), (0xFFFF_FFFF, True), (4, False), (0xFFFF_FFFE, False)]
)
def test_vmpl_is_a_level_or_the_host(vmpl: int, *, valid: bool) -> None:
    report = _signed(3).replace(vmpl=vmpl)
    if valid:
        validate_report(report)
    else:
        with pytest.raises(FormatError) as refused:
            validate_report(report)
        assert refused.value.code == "report-vmpl-range"


def test_policy_bits_have_their_names() -> None:
    policy = GuestPolicy(0xB_0A1F)
    assert policy.abi == (0x0A, 0x1F)
    assert policy.names() == ["smt", "debug"]
    assert policy.has(GuestPolicy.MUST_BE_ONE)
    assert policy.reserved == 0
    assert GuestPolicy(1 << 26 | 1 << 63).reserved == 1 << 26 | 1 << 63


def test_platform_bits_have_their_names() -> None:
    info = PlatformInfo(0b1010_0001)
    assert info.names() == ["smt-enabled", "alias-check-complete", "sev-tio"]
    assert info.reserved == 0
    assert PlatformInfo(1 << 6 | 1 << 8).reserved == 1 << 6 | 1 << 8


def test_field_markers_cover_the_signed_part() -> None:
    widths = [field.width_bytes for field in Report._fields]
    assert sum(widths) == REPORT_BYTES
    assert all(isinstance(field.marker, Unsigned) or field.width_bytes > 2 for field in Report._fields)
