# SPDX-License-Identifier: MIT OR Apache-2.0
"""The simulated chip's certificate authority: ARK → ASK → VCEK, in AMD's shape and under its own mark.

Names, extensions, encodings, algorithms and dates follow AMD's (57230 rev 0.57 §3), so that verifiers written for real
chips read this evidence unmodified. Two things are not AMD's and say that no silicon is behind it: a serialNumber
attribute in every name, and a non-critical extension on ARK and ASK. The VCEK carries no foreign extension, because
verifiers refuse one there. Its serial number is 1: AMD writes 0, which RFC 5280 forbids.

A machine is minted once and kept in a directory of its own, 0700, private keys 0600:

    machine.json      product, chip id, TCB, firmware version
    vcek.pem          the chip's certificate          vcek.key.pem   the chip's key
    cert_chain.pem    ASK, ARK, as AMD's key server gives them
    ask.key.pem, ark.key.pem                          the authority's keys: only `Authority.load` reads them

The directory appears by one rename, complete or not at all. Whoever can read ark.key.pem or ask.key.pem can sign any
report under this root; that is why a broker accepts a simulated root only by name, volume by volume.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import secrets
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from svsm.formats.errors import StateError
from svsm.formats.snp import certificate_table, certs
from svsm.formats.snp.report import Report
from svsm.formats.snp.tcb import Line, Tcb
from svsm.hardware.chip import DEFAULT_PLATFORM_INFO, Chip, Firmware
from svsm.hardware.report_signer import sign_report

__all__ = ["MODELS", "Authority", "Machine", "Model"]

_DAY: Final = datetime.timedelta(days=1)
_AUTHORITY_DAYS: Final = 25 * 365
_VCEK_DAYS: Final = 7 * 365
_PSS: Final = padding.PSS(padding.MGF1(hashes.SHA384()), 48)
_EMPTY_LEVEL: Final = b"\x02\x01\x00"


@dataclasses.dataclass(frozen=True, slots=True)
class Model:
    """What a simulated chip of one product line says about itself."""

    product: str
    """Product name in the VCEK, as AMD writes it for this line."""
    cpuid: tuple[int, int, int]
    """Combined family, combined model, stepping."""
    firmware: tuple[int, int, int]
    """Major, minor, build."""
    tcb: Tcb


MODELS: Final[dict[Line, Model]] = {
    Line.MILAN: Model("Milan-B0", (0x19, 0x01, 1), (1, 55, 29), Tcb(bootloader=4, tee=0, snp=24, microcode=219)),
    Line.GENOA: Model("Genoa", (0x19, 0x11, 1), (1, 55, 40), Tcb(bootloader=10, tee=0, snp=23, microcode=84)),
    Line.TURIN: Model("Turin", (0x1A, 0x02, 1), (1, 58, 1), Tcb(fmc=1, bootloader=2, tee=1, snp=3, microcode=70)),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Authority:
    """Root and intermediate with their keys."""

    line: Line
    ark_key: rsa.RSAPrivateKey = dataclasses.field(repr=False)
    ask_key: rsa.RSAPrivateKey = dataclasses.field(repr=False)
    ark: x509.Certificate
    ask: x509.Certificate

    @classmethod
    def create(
        cls,
        line: Line,
        *,
        now: datetime.datetime,
        keys: tuple[rsa.RSAPrivateKey, rsa.RSAPrivateKey] | None = None,
    ) -> Authority:
        """Make a new root and intermediate.

        Args:
            line: The product line whose names they carry.
            now: The certificates are valid from a day before.
            keys: RSA-4096 keys of ARK and ASK; made here, which takes seconds, unless given.
        """
        ark_key, ask_key = keys or (_new_rsa(), _new_rsa())
        ark = _authority_certificate(line, f"ARK-{line}", ark_key, None, now).sign(
            ark_key, hashes.SHA384(), rsa_padding=_PSS
        )
        ask = _authority_certificate(line, f"SEV-{line}", ask_key, ark, now).sign(
            ark_key, hashes.SHA384(), rsa_padding=_PSS
        )
        return cls(line, ark_key, ask_key, ark, ask)

    def issue_vcek(
        self, key: ec.EllipticCurvePublicKey, *, chip_id: bytes, tcb: Tcb, now: datetime.datetime
    ) -> x509.Certificate:
        """Certify a chip's key for one TCB.

        Args:
            key: The VCEK, P-384.
            chip_id: 64 bytes, or 8 for Turin.
            tcb: The TCB that the key is derived from.
            now: The certificate is valid from a day before, for seven years.

        Raises:
            StateError: ``machine-chip-id`` for a wrong length.
        """
        if len(chip_id) != self.line.chip_id_bytes:
            raise StateError(
                "not the length of a chip id",
                code="machine-chip-id",
                expected=self.line.chip_id_bytes,
                got=len(chip_id),
            )
        builder = (
            x509.CertificateBuilder()
            .serial_number(1)
            .subject_name(_name("SEV-VCEK"))
            .issuer_name(self.ask.subject)
            .not_valid_before(now - _DAY)
            .not_valid_after(now + _VCEK_DAYS * _DAY)
            .public_key(key)
        )
        for oid, value in _vek_extensions(self.line, chip_id, tcb):
            builder = builder.add_extension(
                x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value), critical=False
            )
        return builder.sign(self.ask_key, hashes.SHA384(), rsa_padding=_PSS)


@dataclasses.dataclass(frozen=True, slots=True)
class Machine:
    """One simulated chip: who it is, and the key that signs its reports."""

    line: Line
    chip_id: bytes
    """64 bytes, or 8 on Turin."""
    tcb: Tcb
    vcek: bytes
    """Certificates in DER."""
    ask: bytes
    ark: bytes
    key: ec.EllipticCurvePrivateKey = dataclasses.field(repr=False)

    @classmethod
    def create(cls, authority: Authority, *, now: datetime.datetime) -> Machine:
        """Make a chip with a random id and key, and let the authority certify it.

        Args:
            authority: Who signs; its line is the chip's.
            now: The certificate is valid from a day before.
        """
        line = authority.line
        key = ec.generate_private_key(ec.SECP384R1())
        chip_id = secrets.token_bytes(line.chip_id_bytes)
        tcb = MODELS[line].tcb
        vcek = authority.issue_vcek(key.public_key(), chip_id=chip_id, tcb=tcb, now=now)
        return cls(
            line=line,
            chip_id=chip_id,
            tcb=tcb,
            vcek=vcek.public_bytes(Encoding.DER),
            ask=authority.ask.public_bytes(Encoding.DER),
            ark=authority.ark.public_bytes(Encoding.DER),
            key=key,
        )

    @property
    def model(self) -> Model:
        """What chips of this line say about themselves."""
        return MODELS[self.line]

    def chip(self, *, report_version: int = 5) -> Chip:
        """This machine as the simulated hardware wants it: its identity, and a signer.

        Args:
            report_version: 3 or 5.
        """
        family, model, stepping = self.model.cpuid
        return Chip(
            line=self.line,
            family=family,
            model=model,
            stepping=stepping,
            chip_id=self.chip_id.ljust(64, b"\0"),
            tcb=self.tcb,
            sign=lambda report: Report.parse(self.sign_report(report)),
            certificates=self.certificates(),
            report_version=report_version,
            firmware=Firmware(*self.model.firmware),
        )

    @property
    def root_fingerprint(self) -> bytes:
        """SHA-256 of the ARK in DER, 32 bytes: the name by which a verifier may be told to trust this root."""
        return hashlib.sha256(self.ark).digest()

    def certificates(self) -> bytes:
        """The certificate table that the host hands out: VCEK, ASK, ARK."""
        return certificate_table.pack_table(
            {certificate_table.VCEK: self.vcek, certificate_table.ASK: self.ask, certificate_table.ARK: self.ark}
        )

    def new_report(self, version: int) -> Report:
        """A report that says what this chip says of itself, the guest's fields still empty.

        Args:
            version: 2 to 5.

        Raises:
            FormatError: ``report-version``.
        """
        report = Report.blank(version)
        tcb = self.tcb.pack(self.line)
        major, minor, build = self.model.firmware
        family, model, stepping = self.model.cpuid if report.has_cpuid else (0, 0, 0)
        return report.replace(
            platform_info=DEFAULT_PLATFORM_INFO,
            chip_id=self.chip_id.ljust(64, b"\0"),
            current_tcb=tcb,
            reported_tcb=tcb,
            committed_tcb=tcb,
            launch_tcb=tcb,
            cpuid_family=family,
            cpuid_model=model,
            cpuid_stepping=stepping,
            current_major=major,
            current_minor=minor,
            current_build=build,
            committed_major=major,
            committed_minor=minor,
            committed_build=build,
        )

    def sign_report(self, report: Report) -> bytes:
        """Sign exactly what the report says, with the VCEK. Returns 1184 bytes."""
        return sign_report(self.key, report)


def _new_rsa() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=4096)


def _name(common_name: str) -> x509.Name:
    """AMD's attributes in AMD's order, and the mark."""
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "Engineering"),
            x509.NameAttribute(NameOID.COUNTRY_NAME, "US"),
            x509.NameAttribute(NameOID.LOCALITY_NAME, "Santa Clara"),
            x509.NameAttribute(NameOID.STATE_OR_PROVINCE_NAME, "CA"),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Advanced Micro Devices"),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
            x509.NameAttribute(NameOID.SERIAL_NUMBER, certs.MARK_NAME_VALUE),
        ]
    )


def _authority_certificate(
    line: Line, common_name: str, key: rsa.RSAPrivateKey, issuer: x509.Certificate | None, now: datetime.datetime
) -> x509.CertificateBuilder:
    """ARK (issuer None) or ASK, ready to be signed."""
    public = key.public_key()
    subject = _name(common_name)
    builder = (
        x509.CertificateBuilder()
        .serial_number(0x10000 if issuer is None else 0x10001)
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.subject)
        .not_valid_before(now - _DAY)
        .not_valid_after(now + _AUTHORITY_DAYS * _DAY)
        .public_key(public)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None if issuer is None else 0), critical=True)
        .add_extension(_key_usage(crl_sign=issuer is None), critical=True)
        .add_extension(_crl_distribution_point(line), critical=False)
        .add_extension(_mark_extension(), critical=False)
    )
    if issuer is not None:
        identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        builder = builder.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False
        )
    return builder


def _mark_extension() -> x509.UnrecognizedExtension:
    return x509.UnrecognizedExtension(x509.ObjectIdentifier(certs.MARK_EXTENSION_OID), certs.MARK_EXTENSION_VALUE)


def _key_usage(*, crl_sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _crl_distribution_point(line: Line) -> x509.CRLDistributionPoints:
    # AMD's address, since verifiers compare it. Nothing of ours is there: this root has no revocation list.
    url = x509.UniformResourceIdentifier(f"https://kdsintf.amd.com/vcek/v1/{line}/crl")
    return x509.CRLDistributionPoints([x509.DistributionPoint([url], None, None, None)])


def _vek_extensions(line: Line, chip_id: bytes, tcb: Tcb) -> list[tuple[str, bytes]]:
    """AMD's extensions with their DER values."""
    product = MODELS[line].product.encode("ascii")
    spare = certs.SPARE_LEVEL_OIDS[1:] if line.has_fmc else certs.SPARE_LEVEL_OIDS
    hwid = chip_id if line.has_fmc else bytes([0x04, len(chip_id)]) + chip_id
    return [
        (certs.STRUCT_VERSION_OID, b"\x02\x01\x01" if line.has_fmc else b"\x02\x01\x00"),
        (certs.PRODUCT_OID, bytes([0x16, len(product)]) + product),
        *((certs.LEVEL_OIDS[name], _level(level)) for name, level in tcb.components().items()),
        *((oid, _EMPTY_LEVEL) for oid in spare),
        (certs.HWID_OID, hwid),
    ]


def _level(level: int) -> bytes:
    """A DER INTEGER of one or two content bytes."""
    return bytes([0x02, 0x01, level]) if level < 0x80 else bytes([0x02, 0x02, 0x00, level])
