# SPDX-License-Identifier: MIT OR Apache-2.0
"""AMD's certificates: what the reader sees and refuses, and that damaged bytes never raise another error."""

from __future__ import annotations

import base64
import datetime
import random

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from svsm.formats.errors import FormatError, SvsmError
from svsm.formats.snp.certs import (
    HWID_OID,
    LEVEL_OIDS,
    PRODUCT_OID,
    Certificate,
    certificates_from,
    parse_certificate,
    parse_crl,
    vek_extensions,
)
from svsm.formats.snp.der import DerReader, Tag, decode_oid
from svsm.formats.snp.tcb import Line
from tests.simulated import NOW, authority, machine


def _pem(der: bytes) -> bytes:
    body = base64.encodebytes(der)
    return b"-----BEGIN CERTIFICATE-----\n" + body + b"-----END CERTIFICATE-----\n"


def _with_extension(certificate: Certificate, oid: str, value: bytes | None) -> Certificate:
    extensions = dict(certificate.extensions)
    if value is None:
        del extensions[oid]
    else:
        extensions[oid] = (False, value)
    return Certificate(
        certificate.raw,
        certificate.tbs,
        certificate.serial,
        certificate.issuer,
        certificate.not_before,
        certificate.not_after,
        certificate.subject,
        certificate.public_key,
        extensions,
        certificate.signature,
    )


def test_the_reader_agrees_with_pyca() -> None:
    for der in (machine().vcek, machine().ask, machine().ark):
        ours, theirs = parse_certificate(der), x509.load_der_x509_certificate(der)
        assert ours.tbs == theirs.tbs_certificate_bytes
        assert ours.signature == theirs.signature
        assert ours.serial == theirs.serial_number
        assert (ours.not_before, ours.not_after) == (theirs.not_valid_before_utc, theirs.not_valid_after_utc)
        assert ours.subject.raw == theirs.subject.public_bytes()
        assert ours.issuer.raw == theirs.issuer.public_bytes()
        assert {oid: critical for oid, (critical, _) in ours.extensions.items()} == {
            item.oid.dotted_string: item.critical for item in theirs.extensions
        }


def test_names_and_mark() -> None:
    vcek, ask, ark = map(parse_certificate, (machine().vcek, machine().ask, machine().ark))
    assert [c.subject.common_name for c in (vcek, ask, ark)] == ["SEV-VCEK", "SEV-Milan", "ARK-Milan"]
    assert all(c.subject.like_amd and c.subject.marked and c.issuer.marked for c in (vcek, ask, ark))
    assert (ark.authority(), ask.authority(), vcek.authority()) == ((True, None), (True, 0), (False, None))
    assert [c.may_sign_certificates() for c in (ark, ask, vcek)] == [True, True, False]


@pytest.mark.parametrize("line", list(Line))
def test_extensions_bind_chip_and_tcb(line: Line) -> None:
    extensions = vek_extensions(parse_certificate(machine(line).vcek))
    assert dict(extensions.levels) == machine(line).tcb.components()
    assert extensions.hwid == machine(line).chip_id
    assert extensions.product.partition("-")[0] == line
    assert extensions.csp_id is None


def test_the_chip_id_is_known_by_its_length() -> None:
    vcek = parse_certificate(machine().vcek)
    for raw in (b"\x04\x3e" + bytes(62), b"\x04\x06" + bytes(6), b"\xff" * 64):
        assert vek_extensions(_with_extension(vcek, HWID_OID, raw)).hwid == raw
    wrapped = b"\x04\x40" + b"\x04\x3e" + bytes(62)
    assert vek_extensions(_with_extension(vcek, HWID_OID, wrapped)).hwid == wrapped[2:]
    for bad in (b"", bytes(65), bytes(66), b"\x04\x3f" + bytes(64), bytes(10), bytes(128)):
        with pytest.raises(FormatError) as refused:
            vek_extensions(_with_extension(vcek, HWID_OID, bad))
        assert refused.value.code == "vek-extension"
    assert vek_extensions(_with_extension(vcek, HWID_OID, None)).hwid is None


def test_patch_levels_are_one_byte_values_in_minimal_integers() -> None:
    vcek = parse_certificate(machine().vcek)
    oid = LEVEL_OIDS["snp"]
    assert vek_extensions(_with_extension(vcek, oid, b"\x02\x02\x00\xd9")).levels["snp"] == 0xD9
    for bad in (
        b"\x02\x02\x01\x00",
        b"\x02\x01\xff",
        b"\x02\x02\x00\x10",
        b"\x02\x00",
        b"\x04\x01\x01",
        b"\x02\x01\x01\x00",
    ):
        with pytest.raises(FormatError):
            vek_extensions(_with_extension(vcek, oid, bad))


@pytest.mark.parametrize("oid", [PRODUCT_OID, LEVEL_OIDS["bootloader"], LEVEL_OIDS["microcode"]])
def test_a_missing_extension_is_refused(oid: str) -> None:
    with pytest.raises(FormatError) as refused:
        vek_extensions(_with_extension(parse_certificate(machine().vcek), oid, None))
    assert refused.value.code == "vek-extension"


def test_a_spare_level_in_use_is_refused() -> None:
    with pytest.raises(FormatError):
        vek_extensions(_with_extension(parse_certificate(machine().vcek), "1.3.6.1.4.1.3704.1.3.5", b"\x02\x01\x01"))


def test_pem_bundles() -> None:
    ders = [machine().vcek, machine().ask, machine().ark]
    assert [c.raw for c in certificates_from(b"some text\n" + b"".join(map(_pem, ders)))] == ders
    assert parse_certificate(_pem(ders[0])).raw == ders[0]
    for bad in (
        _pem(ders[0]) + _pem(ders[1]),
        _pem(ders[0])[:-40],
        _pem(b"text"),
        _pem(_pem(ders[0])),
        b"-----BEGIN CERTIFICATE-----",
        _pem(ders[0]).replace(b"MII", b"M!I", 1),
    ):
        with pytest.raises(FormatError) as refused:
            parse_certificate(bad)
        assert refused.value.code == "certificate-pem"
    with pytest.raises(FormatError):
        certificates_from(_pem(ders[0]) * 9)


def test_other_algorithms_are_refused() -> None:
    keys = authority()
    builder = (
        x509.CertificateBuilder()
        .serial_number(1)
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "SEV-VCEK")]))
        .issuer_name(keys.ask.subject)
        .not_valid_before(NOW)
        .not_valid_after(NOW + datetime.timedelta(days=1))
        .public_key(machine().key.public_key())
    )
    salt_32 = padding.PSS(padding.MGF1(hashes.SHA384()), 32)
    mask_256 = padding.PSS(padding.MGF1(hashes.SHA256()), 48)
    signed = [
        builder.sign(keys.ask_key, hashes.SHA384(), rsa_padding=salt_32),
        builder.sign(keys.ask_key, hashes.SHA384(), rsa_padding=mask_256),
        builder.sign(keys.ask_key, hashes.SHA256(), rsa_padding=padding.PSS(padding.MGF1(hashes.SHA256()), 48)),
        builder.sign(keys.ask_key, hashes.SHA384()),
        builder.sign(machine().key, hashes.SHA384()),
    ]
    for certificate in signed:
        with pytest.raises(FormatError) as refused:
            parse_certificate(certificate.public_bytes(Encoding.DER))
        assert refused.value.code in {"certificate-algorithm", "der"}


@pytest.mark.parametrize("der", [machine().vcek, machine().ark], ids=["vcek", "ark"])
def test_every_truncation_is_refused(der: bytes) -> None:
    for length in range(len(der)):
        with pytest.raises(FormatError):
            parse_certificate(der[:length])
    with pytest.raises(FormatError):
        parse_certificate(der + b"\0")


def test_every_flipped_bit_gives_a_certificate_or_a_refusal() -> None:
    der = machine().vcek
    outcomes = {"refused": 0, "read": 0}
    for position in range(len(der)):
        changed = bytearray(der)
        changed[position] ^= 1 << (position % 8)
        try:
            certificate = parse_certificate(bytes(changed))
            assert certificate.raw == bytes(changed)
            vek_extensions(certificate)
            certificate.authority()
        except SvsmError:
            outcomes["refused"] += 1
        else:
            outcomes["read"] += 1
    assert min(outcomes.values()) > 100


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_cleanly(data: bytes) -> None:
    for parser in (parse_certificate, parse_crl, certificates_from):
        with pytest.raises(FormatError):
            parser(data)


def test_huge_input_is_refused_before_it_is_read() -> None:
    for data in (bytes([0x30]) + bytes(1 << 20), b"-----BEGIN CERTIFICATE-----" * 40000):
        with pytest.raises(FormatError):
            certificates_from(data)


def test_a_revocation_list_is_read() -> None:
    keys = authority()
    builder = x509.CertificateRevocationListBuilder().issuer_name(keys.ark.subject).last_update(NOW)
    builder = builder.next_update(NOW + datetime.timedelta(days=30))
    for serial in (0x10001, 77):
        builder = builder.add_revoked_certificate(
            x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(NOW).build()
        )
    pss = padding.PSS(padding.MGF1(hashes.SHA384()), 48)
    signed = builder.sign(keys.ark_key, hashes.SHA384(), rsa_padding=pss)
    der = signed.public_bytes(Encoding.DER)
    parsed = parse_crl(der)
    assert parsed.revoked == {0x10001, 77}
    assert parsed.this_update == NOW
    assert parsed.tbs == signed.tbs_certlist_bytes
    for length in range(len(der)):
        with pytest.raises(FormatError):
            parse_crl(der[:length])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x30",
        b"\x30\x80",
        b"\x30\x81\x05hello",
        b"\x30\x82\x00\x85" + bytes(0x85),
        b"\x30\x84\x00\x00\x00\x01a",
        b"\x30\x05abc",
        b"\x1f\x01a",
        b"\x30\xff",
    ],
)
def test_der_lengths_are_minimal_and_inside(data: bytes) -> None:
    with pytest.raises(FormatError) as refused:
        DerReader(data).any()
    assert refused.value.code == "der"


@pytest.mark.parametrize("content", [b"", b"\x00\x01", b"\xff\x80"])
def test_der_integers_are_minimal(content: bytes) -> None:
    with pytest.raises(FormatError):
        DerReader(bytes([Tag.INTEGER, len(content)]) + content).any().integer()


def test_object_identifiers() -> None:
    assert decode_oid(bytes.fromhex("2b060104019c780104")) == "1.3.6.1.4.1.3704.1.4"
    assert decode_oid(bytes.fromhex("883753")) == "2.999.83"
    for bad in (b"", b"\x80", b"\x2b\x80\x01", b"\x2b\x81", bytes(65), b"\x2b" + b"\xff" * 30 + b"\x01"):
        with pytest.raises(FormatError):
            decode_oid(bad)


def test_oversized_random_bytes() -> None:
    source = random.Random(2)
    for _ in range(50):
        with pytest.raises(FormatError):
            certificates_from(b"\x30" + source.randbytes(2000))


def _der(tag: int, *parts: bytes) -> bytes:
    content = b"".join(parts)
    length = len(content)
    size = bytes([length]) if length < 128 else bytes([0x82]) + length.to_bytes(2, "big")
    return bytes([tag]) + size + content


@pytest.mark.parametrize("first", [b"\x7f", b"\x80"], ids=["positive", "negative"])
def test_a_number_that_python_would_not_print_is_a_refusal(first: bytes) -> None:
    # Python raises ValueError where an int of more than 4300 digits becomes text: in an error message, for instance.
    genuine = parse_certificate(machine().vcek)
    algorithm = DerReader(machine().vcek).any().reader()
    algorithm.any()
    pss = algorithm.any().raw
    huge = _der(Tag.INTEGER, first + bytes(8000))
    tbs = _der(Tag.SEQUENCE, _der(Tag.explicit(0), huge), _der(Tag.INTEGER, b"\x01"), pss)
    certificate = _der(Tag.SEQUENCE, tbs, pss, _der(Tag.BIT_STRING, b"\0" + genuine.signature))
    with pytest.raises(FormatError) as refused:
        parse_certificate(certificate)
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize("text", [b"a\nb", b"\x1b[2J", b"x" * 257, b"\xff"])
def test_text_is_short_and_prints(text: bytes) -> None:
    with pytest.raises(FormatError):
        DerReader(_der(Tag.UTF8_STRING, text)).any().text()
