# SPDX-License-Identifier: MIT OR Apache-2.0
"""AMD's certificates: the parts of X.509 that they use, and the extensions that bind a key to a chip and a TCB.

Why a reader of our own: every VCEK has serial number 0, which RFC 5280 forbids and pyca/cryptography warns about and
may refuse one day; and AMD's extensions have encodings of their own. What is read here is read strictly and kept with
its exact bytes, because the exact bytes of `tbs` are what a signature covers. Nothing here verifies a signature, looks
at a clock or knows whom to trust: that is `svsm.broker.verifier`.

Extensions are below 1.3.6.1.4.1.3704.1 (AMD 57230 rev 0.57 §3): patch levels are DER INTEGERs; the chip id is 64 raw
bytes on old VCEKs, the same in an OCTET STRING on newer ones, and 8 raw bytes on Turin. Which it is follows from the
*length*: a raw id may well begin with 0x04.

The simulated chip's certificates carry AMD's names and, so that nobody mistakes them, a mark: a serialNumber attribute
in every name, and a non-critical extension on root and intermediate.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import datetime
from collections.abc import Mapping
from typing import Final

from svsm.formats.errors import FormatError
from svsm.formats.record import Buffer
from svsm.formats.snp.der import DerReader, Element, Tag, decode_oid

__all__ = [
    "AMD_OID",
    "MARK_EXTENSION_OID",
    "MARK_NAME_VALUE",
    "MAX_CERTIFICATE_BYTES",
    "Certificate",
    "Name",
    "RevocationList",
    "VekExtensions",
    "certificates_from",
    "parse_certificate",
    "parse_crl",
    "vek_extensions",
]

MAX_CERTIFICATE_BYTES: Final = 16 * 1024
MAX_CRL_BYTES: Final = 256 * 1024
MAX_BUNDLE_CERTIFICATES: Final = 8
MAX_EXTENSIONS: Final = 32

AMD_OID: Final = "1.3.6.1.4.1.3704.1"
STRUCT_VERSION_OID: Final = AMD_OID + ".1"
PRODUCT_OID: Final = AMD_OID + ".2"
LEVEL_OIDS: Final[dict[str, str]] = {
    "bootloader": AMD_OID + ".3.1",
    "tee": AMD_OID + ".3.2",
    "snp": AMD_OID + ".3.3",
    "microcode": AMD_OID + ".3.8",
    "fmc": AMD_OID + ".3.9",
}
SPARE_LEVEL_OIDS: Final = tuple(f"{AMD_OID}.3.{n}" for n in (4, 5, 6, 7))
HWID_OID: Final = AMD_OID + ".4"
CSP_ID_OID: Final = AMD_OID + ".5"

BASIC_CONSTRAINTS_OID: Final = "2.5.29.19"
KEY_USAGE_OID: Final = "2.5.29.15"

MARK_NAME_VALUE: Final = "SIMULATED-BY-SVSM"
"""Value of the serialNumber attribute in every name of a simulated chain."""
MARK_EXTENSION_OID: Final = "2.999.83.86.83.77.1"
"""Below the arc that ITU-T reserves for examples (X.660), so that it can never mean something else."""
MARK_EXTENSION_VALUE: Final = b"\x0c\x09simulated"
"""DER UTF8String."""

_NAME_OIDS: Final[dict[str, str]] = {
    "2.5.4.3": "CN",
    "2.5.4.5": "serialNumber",
    "2.5.4.6": "C",
    "2.5.4.7": "L",
    "2.5.4.8": "ST",
    "2.5.4.10": "O",
    "2.5.4.11": "OU",
}
_AMD_NAME: Final = {
    "C": "US",
    "L": "Santa Clara",
    "ST": "CA",
    "O": "Advanced Micro Devices",
    "OU": "Engineering",
}

# RSASSA-PSS, SHA-384, MGF1 with SHA-384: the object identifiers as DER has them.
_PSS: Final = "1.2.840.113549.1.1.10"
_MGF1: Final = "1.2.840.113549.1.1.8"
_SHA384: Final = "2.16.840.1.101.3.4.2.2"
_SALT_BYTES: Final = 48


@dataclasses.dataclass(frozen=True, slots=True)
class Name:
    """A distinguished name. Two names are equal when their bytes are."""

    raw: bytes
    attributes: tuple[tuple[str, str], ...]
    """(attribute, value) in order; attributes without a short name appear by object identifier."""

    @property
    def common_name(self) -> str:
        """The CN, "" unless there is exactly one."""
        found = [value for key, value in self.attributes if key == "CN"]
        return found[0] if len(found) == 1 else ""

    @property
    def marked(self) -> bool:
        """Whether the simulation mark is in it."""
        return ("serialNumber", MARK_NAME_VALUE) in self.attributes

    @property
    def like_amd(self) -> bool:
        """Whether it is one of AMD's: their five attributes and one CN, nothing else but the simulation mark."""
        others = [item for item in self.attributes if item != ("serialNumber", MARK_NAME_VALUE)]
        keys = [key for key, _ in others]
        return len(keys) == len(set(keys)) and dict(others) == {**_AMD_NAME, "CN": self.common_name}


@dataclasses.dataclass(frozen=True, slots=True)
class Certificate:
    """An X.509 v3 certificate, signed by RSASSA-PSS with SHA-384 and a salt of 48 bytes."""

    raw: bytes
    tbs: bytes
    """What the signature covers."""
    serial: int
    issuer: Name
    not_before: datetime.datetime
    not_after: datetime.datetime
    subject: Name
    public_key: bytes
    """SubjectPublicKeyInfo, DER."""
    extensions: Mapping[str, tuple[bool, bytes]] = dataclasses.field(hash=False)
    """Object identifier → (critical, value)."""
    signature: bytes

    @property
    def marked(self) -> bool:
        """Whether any trace of the simulation mark is on it."""
        return self.subject.marked or self.issuer.marked or MARK_EXTENSION_OID in self.extensions

    def authority(self) -> tuple[bool, int | None]:
        """BasicConstraints: (is an authority, path length limit).

        Raises:
            FormatError: ``der``.
        """
        if BASIC_CONSTRAINTS_OID not in self.extensions:
            return False, None
        reader = DerReader(self.extensions[BASIC_CONSTRAINTS_OID][1])
        inner = reader.read(Tag.SEQUENCE).reader()
        reader.finish()
        authority = inner.next_is(Tag.BOOLEAN) and inner.read(Tag.BOOLEAN).content == b"\xff"
        limit = inner.read(Tag.INTEGER).integer() if inner.next_is(Tag.INTEGER) else None
        inner.finish()
        return authority, limit

    def may_sign_certificates(self) -> bool:
        """Whether KeyUsage has keyCertSign.

        Raises:
            FormatError: ``der``.
        """
        if KEY_USAGE_OID not in self.extensions:
            return False
        reader = DerReader(self.extensions[KEY_USAGE_OID][1])
        bits = reader.read(Tag.BIT_STRING).content
        reader.finish()
        return len(bits) >= 2 and bool(bits[1] & 0x04)


@dataclasses.dataclass(frozen=True, slots=True)
class VekExtensions:
    """What AMD's extensions bind a VCEK or VLEK to."""

    struct_version: int
    product: str
    """"Milan-B0", "Genoa", …"""
    levels: Mapping[str, int] = dataclasses.field(hash=False)
    """Security patch level by component; "fmc" only where there is one."""
    hwid: bytes | None
    """64 bytes, or 8 on Turin; None on a VLEK."""
    csp_id: str | None
    """Who was given a VLEK."""


@dataclasses.dataclass(frozen=True, slots=True)
class RevocationList:
    """A certificate revocation list."""

    tbs: bytes
    issuer: Name
    this_update: datetime.datetime
    next_update: datetime.datetime | None
    revoked: frozenset[int]
    """Serial numbers."""
    signature: bytes


def parse_certificate(data: Buffer) -> Certificate:
    """Decode one certificate.

    Args:
        data: DER, or PEM with one certificate.

    Raises:
        FormatError: ``certificate-size``, ``certificate-pem``, ``certificate-version``, ``certificate-algorithm``,
            ``certificate-extension`` or ``der``.
    """
    raw = bytes(data)
    if _is_pem(raw):
        found = certificates_from(raw)
        if len(found) != 1:
            raise FormatError("exactly one certificate was expected", code="certificate-pem", got=len(found))
        return found[0]
    if not 0 < len(raw) <= MAX_CERTIFICATE_BYTES:
        raise FormatError("not the size of a certificate", code="certificate-size", got=len(raw))
    tbs, signature = _signed(raw)
    reader = tbs.reader()
    version = reader.read(Tag.explicit(0)).reader().read(Tag.INTEGER).integer()
    if version != 2:
        raise FormatError("not an X.509 v3 certificate", code="certificate-version", got=version + 1)
    serial = reader.read(Tag.INTEGER).integer()
    _demand_pss(reader.read(Tag.SEQUENCE))
    issuer = _name(reader.read(Tag.SEQUENCE))
    validity = reader.read(Tag.SEQUENCE).reader()
    not_before, not_after = _time(validity.any()), _time(validity.any())
    validity.finish()
    subject = _name(reader.read(Tag.SEQUENCE))
    public_key = reader.read(Tag.SEQUENCE).raw
    extensions = _extensions(reader)
    reader.finish()
    return Certificate(raw, tbs.raw, serial, issuer, not_before, not_after, subject, public_key, extensions, signature)


def certificates_from(data: Buffer) -> list[Certificate]:
    """Decode every certificate of a file: one in DER, or up to eight in PEM.

    Raises:
        FormatError: ``certificate-pem``, and what `parse_certificate` raises.
    """
    raw = bytes(data)
    if not _is_pem(raw):
        return [parse_certificate(raw)]
    if len(raw) > 2 * MAX_BUNDLE_CERTIFICATES * MAX_CERTIFICATE_BYTES:
        raise FormatError("the PEM file is too large", code="certificate-size", got=len(raw))
    begin, end = b"-----BEGIN CERTIFICATE-----", b"-----END CERTIFICATE-----"
    blocks = raw.split(begin)[1:]
    if not 0 < len(blocks) <= MAX_BUNDLE_CERTIFICATES:
        raise FormatError("the PEM file holds no certificate, or too many", code="certificate-pem", got=len(blocks))
    return [parse_certificate(_pem_body(block, end)) for block in blocks]


def _is_pem(raw: bytes) -> bool:
    # DER starts with a SEQUENCE; text may precede the first block of a PEM file.
    return raw[:1] != bytes([Tag.SEQUENCE]) and b"-----BEGIN" in raw


def _pem_body(block: bytes, end: bytes) -> bytes:
    body, found, _ = block.partition(end)
    try:
        decoded = base64.b64decode(b"".join(body.split()), validate=True)
    except (binascii.Error, ValueError):
        decoded = b""
    if not found or decoded[:1] != bytes([Tag.SEQUENCE]):
        raise FormatError("the PEM file is damaged", code="certificate-pem")
    return decoded


def parse_crl(data: Buffer) -> RevocationList:
    """Decode a certificate revocation list (DER).

    Raises:
        FormatError: ``certificate-size``, ``certificate-algorithm`` or ``der``.
    """
    raw = bytes(data)
    if not 0 < len(raw) <= MAX_CRL_BYTES:
        raise FormatError("not the size of a revocation list", code="certificate-size", got=len(raw))
    tbs, signature = _signed(raw)
    reader = tbs.reader()
    if reader.next_is(Tag.INTEGER):
        reader.read(Tag.INTEGER)
    _demand_pss(reader.read(Tag.SEQUENCE))
    issuer = _name(reader.read(Tag.SEQUENCE))
    this_update = _time(reader.any())
    next_update = None
    if reader.next_is(Tag.UTC_TIME) or reader.next_is(Tag.GENERALIZED_TIME):
        next_update = _time(reader.any())
    revoked: set[int] = set()
    if reader.next_is(Tag.SEQUENCE):
        entries = reader.read(Tag.SEQUENCE).reader()
        while entries.remaining:
            revoked.add(entries.read(Tag.SEQUENCE).reader().read(Tag.INTEGER).integer())
    if reader.next_is(Tag.explicit(0)):
        reader.read(Tag.explicit(0))
    reader.finish()
    return RevocationList(tbs.raw, issuer, this_update, next_update, frozenset(revoked), signature)


def vek_extensions(certificate: Certificate) -> VekExtensions:
    """Read AMD's extensions from a VCEK or VLEK.

    Raises:
        FormatError: ``vek-extension`` when one is missing or malformed, or a spare patch level is not zero.
    """
    levels = {name: _level(certificate, oid) for name, oid in LEVEL_OIDS.items() if oid in certificate.extensions}
    missing = {"bootloader", "tee", "snp", "microcode"} - set(levels)
    if missing:
        raise FormatError("the certificate lacks a patch level", code="vek-extension", field=", ".join(sorted(missing)))
    for oid in SPARE_LEVEL_OIDS:
        if oid in certificate.extensions and _level(certificate, oid):
            raise FormatError("a spare patch level is in use", code="vek-extension", field=oid)
    product = _ia5(certificate, PRODUCT_OID)
    if product is None:
        raise FormatError("the certificate does not name its product", code="vek-extension", field=PRODUCT_OID)
    return VekExtensions(
        struct_version=_level(certificate, STRUCT_VERSION_OID),
        product=product,
        levels=levels,
        hwid=_hwid(certificate),
        csp_id=_ia5(certificate, CSP_ID_OID),
    )


def _level(certificate: Certificate, oid: str) -> int:
    value = certificate.extensions.get(oid, (False, b""))[1]
    reader = DerReader(value)
    number = reader.read(Tag.INTEGER).integer() if value else -1
    reader.finish()
    if not 0 <= number <= 0xFF:
        raise FormatError("a patch level is missing or not 0 to 255", code="vek-extension", field=oid, got=number)
    return number


def _ia5(certificate: Certificate, oid: str) -> str | None:
    if oid not in certificate.extensions:
        return None
    reader = DerReader(certificate.extensions[oid][1])
    text = reader.read(Tag.IA5_STRING).text()
    reader.finish()
    return text


def _hwid(certificate: Certificate) -> bytes | None:
    if HWID_OID not in certificate.extensions:
        return None
    value = certificate.extensions[HWID_OID][1]
    # By length: a raw id of 64 or 8 bytes may begin with what looks like a tag.
    if len(value) in (64, 8):
        return value
    if len(value) in (66, 10) and value[0] == Tag.OCTET_STRING and value[1] == len(value) - 2:
        return value[2:]
    raise FormatError("the chip id has none of its known lengths", code="vek-extension", field=HWID_OID, got=len(value))


def _signed(raw: bytes) -> tuple[Element, bytes]:
    """Split SIGNED{…}: what was signed, and the signature. Both algorithm fields must be the one AMD uses."""
    outer = DerReader(raw)
    sequence = outer.read(Tag.SEQUENCE).reader()
    outer.finish()
    tbs = sequence.read(Tag.SEQUENCE)
    _demand_pss(sequence.read(Tag.SEQUENCE))
    bits = sequence.read(Tag.BIT_STRING).content
    sequence.finish()
    if not bits or bits[0]:
        raise FormatError("a signature is not a whole number of bytes", code="der")
    return tbs, bits[1:]


def _demand_pss(algorithm: Element) -> None:
    if not _is_pss_sha384(algorithm):
        raise FormatError(
            "not signed by RSASSA-PSS with SHA-384, MGF1 with SHA-384 and a salt of 48 bytes",
            code="certificate-algorithm",
            section="AMD 57230 §3.1",
        )


def _is_pss_sha384(algorithm: Element) -> bool:
    reader = algorithm.reader()
    if decode_oid(reader.read(Tag.OID).content) != _PSS or not reader.next_is(Tag.SEQUENCE):
        return False
    parameters = reader.read(Tag.SEQUENCE).reader()
    reader.finish()
    digest = parameters.read(Tag.explicit(0)).reader().read(Tag.SEQUENCE)
    mask = parameters.read(Tag.explicit(1)).reader().read(Tag.SEQUENCE).reader()
    mask_name = decode_oid(mask.read(Tag.OID).content)
    mask_digest = mask.read(Tag.SEQUENCE)
    salt = parameters.read(Tag.explicit(2)).reader().read(Tag.INTEGER).integer()
    # Some of AMD's certificates write the default trailer out, some leave it away as DER wants it.
    trailer = parameters.read(Tag.explicit(3)).reader().read(Tag.INTEGER).integer() if parameters.remaining else 1
    parameters.finish()
    digests = _algorithm_name(digest) == _algorithm_name(mask_digest) == _SHA384
    return digests and mask_name == _MGF1 and salt == _SALT_BYTES and trailer == 1


def _algorithm_name(algorithm: Element) -> str:
    reader = algorithm.reader()
    name = decode_oid(reader.read(Tag.OID).content)
    if reader.remaining:
        reader.read(Tag.NULL)
    reader.finish()
    return name


def _name(element: Element) -> Name:
    attributes: list[tuple[str, str]] = []
    reader = element.reader()
    while reader.remaining:
        relative = reader.read(Tag.SET).reader()
        pair = relative.read(Tag.SEQUENCE).reader()
        relative.finish()
        oid = decode_oid(pair.read(Tag.OID).content)
        value = pair.any().text()
        pair.finish()
        attributes.append((_NAME_OIDS.get(oid, oid), value))
    return Name(element.raw, tuple(attributes))


def _time(element: Element) -> datetime.datetime:
    """UTCTime or GeneralizedTime in the one form that RFC 5280 §4.1.2.5 allows."""
    digits = element.content[:-1]
    width = {Tag.UTC_TIME: 12, Tag.GENERALIZED_TIME: 14}.get(element.tag)
    if len(digits) != width or not digits.isdigit() or element.content[-1:] != b"Z":
        raise FormatError("not a certificate's time", code="der")
    text = digits.decode("ascii")
    if element.tag == Tag.UTC_TIME:
        text = ("19" if text[:2] >= "50" else "20") + text
    try:
        return datetime.datetime.strptime(text, "%Y%m%d%H%M%S").replace(tzinfo=datetime.UTC)
    except ValueError:
        raise FormatError("a certificate's time does not exist", code="der") from None


def _extensions(tbs: DerReader) -> dict[str, tuple[bool, bytes]]:
    wrapper = tbs.read(Tag.explicit(3)).reader()
    reader = wrapper.read(Tag.SEQUENCE).reader()
    wrapper.finish()
    found: dict[str, tuple[bool, bytes]] = {}
    while reader.remaining:
        item = reader.read(Tag.SEQUENCE).reader()
        oid = decode_oid(item.read(Tag.OID).content)
        critical = item.next_is(Tag.BOOLEAN) and item.read(Tag.BOOLEAN).content == b"\xff"
        value = item.read(Tag.OCTET_STRING).content
        item.finish()
        if oid in found or len(found) >= MAX_EXTENSIONS:
            raise FormatError(
                "an extension is given twice, or there are too many", code="certificate-extension", got=oid
            )
        found[oid] = (critical, value)
    return found
