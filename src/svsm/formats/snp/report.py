# SPDX-License-Identifier: MIT OR Apache-2.0
"""The attestation report of SEV-SNP: 1184 bytes, little-endian (AMD 56860 rev 1.58 table 23).

One record serves versions 2 to 5. They differ only in which bytes are reserved: the CPUID bytes exist from version 3
on, the mitigation vectors from version 5 on, and `validate` demands zeros where a version has nothing. Parsing keeps
every bit, so a report that fails `validate` can still be shown.

The signature covers bytes 0x000 to 0x29F only. The 368 bytes after it are signed by nobody: whoever carries a report
can write there, so `validate` demands zeros there as well. And since ECDSA accepts (R, n−S) wherever it accepts
(R, S), neither a report's bytes nor its signature identify it: freshness comes from REPORT_DATA.

Nothing here trusts a report: `validate` is about form, the broker's verifier about truth.
"""

from __future__ import annotations

from typing import Annotated, Final

from svsm.formats.errors import FormatError
from svsm.formats.record import U8, U32, U64, Buffer, Bytes, Record, record
from svsm.formats.snp.policy import GuestPolicy, PlatformInfo

__all__ = [
    "P384_ORDER",
    "REPORT_BYTES",
    "SIGNED_BYTES",
    "VMPL_HOST",
    "Report",
    "SigningKey",
    "parse_report",
    "validate_report",
]

REPORT_BYTES: Final = 0x4A0
SIGNED_BYTES: Final = 0x2A0
VMPL_HOST: Final = 0xFFFF_FFFF
"""VMPL of a report that the host asked for, not the guest."""

ECDSA_P384_SHA384: Final = 1
P384_ORDER: Final = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973
"""n of P-384 (SP 800-186 §3.2.1.4)."""

_VERSIONS: Final = (2, 3, 4, 5)
_NO_MIGRATION_AGENT: Final = b"\xff" * 32


class SigningKey:
    """Values of KEY_INFO.SIGNING_KEY."""

    VCEK: Final = 0
    VLEK: Final = 1
    NONE: Final = 7


@record(size=REPORT_BYTES, byte_order="little")
class Report(Record):
    """The report as it stands in memory."""

    version: U32
    guest_svn: U32
    """From the ID block; 0 without one."""
    policy: U64
    """See `GuestPolicy`."""
    family_id: Annotated[bytes, Bytes(16)]
    image_id: Annotated[bytes, Bytes(16)]
    vmpl: U32
    """0 to 3, or `VMPL_HOST`."""
    signature_algorithm: U32
    current_tcb: Annotated[bytes, Bytes(8)]
    """TCB versions need the product line to be read: see `svsm.formats.snp.tcb`."""
    platform_info: U64
    """See `PlatformInfo`."""
    key_info: U32
    reserved_4c: U32
    report_data: Annotated[bytes, Bytes(64)]
    """Chosen by the guest."""
    measurement: Annotated[bytes, Bytes(48)]
    """The launch digest."""
    host_data: Annotated[bytes, Bytes(32)]
    """Chosen by the host at launch, not measured."""
    id_key_digest: Annotated[bytes, Bytes(48)]
    author_key_digest: Annotated[bytes, Bytes(48)]
    report_id: Annotated[bytes, Bytes(32)]
    report_id_ma: Annotated[bytes, Bytes(32)]
    """All 0xFF without a migration agent."""
    reported_tcb: Annotated[bytes, Bytes(8)]
    """The one that the signing key is derived from."""
    cpuid_family: U8
    """Combined family; version 3 and later, as the next two."""
    cpuid_model: U8
    cpuid_stepping: U8
    reserved_18b: Annotated[bytes, Bytes(21)]
    chip_id: Annotated[bytes, Bytes(64)]
    """Zero when masked."""
    committed_tcb: Annotated[bytes, Bytes(8)]
    current_build: U8
    current_minor: U8
    current_major: U8
    reserved_1eb: U8
    committed_build: U8
    committed_minor: U8
    committed_major: U8
    reserved_1ef: U8
    launch_tcb: Annotated[bytes, Bytes(8)]
    launch_mit_vector: U64
    """Version 5 and later, as the next."""
    current_mit_vector: U64
    reserved_208: Annotated[bytes, Bytes(152)]
    signature_r: Annotated[bytes, Bytes(72)]
    """Little-endian; so is S."""
    signature_s: Annotated[bytes, Bytes(72)]
    reserved_330: Annotated[bytes, Bytes(368)]
    """Not covered by the signature."""

    @classmethod
    def blank(cls, version: int) -> Report:
        """A valid report with nothing in it, to be filled by `replace`: no migration agent, algorithm set.

        Raises:
            FormatError: ``report-version`` for a version that is not laid out here.
        """
        if version not in _VERSIONS:
            raise FormatError("no such report version", code="report-version", got=version)
        empty = cls.parse(bytes(REPORT_BYTES))
        return empty.replace(
            version=version,
            policy=GuestPolicy.MUST_BE_ONE,
            signature_algorithm=ECDSA_P384_SHA384,
            report_id_ma=_NO_MIGRATION_AGENT,
        )

    @property
    def signed_part(self) -> bytes:
        """What the signature covers: the first 0x2A0 bytes."""
        return self.pack()[:SIGNED_BYTES]

    @property
    def signature(self) -> tuple[int, int]:
        """R and S as integers."""
        return int.from_bytes(self.signature_r, "little"), int.from_bytes(self.signature_s, "little")

    def with_signature(self, r: int, s: int) -> Report:
        """A copy that carries this signature.

        Raises:
            FormatError: ``report-signature-range`` unless 0 < r, s < n.
        """
        if not (0 < r < P384_ORDER and 0 < s < P384_ORDER):
            raise FormatError("R and S must lie between 0 and the group order", code="report-signature-range")
        return self.replace(signature_r=r.to_bytes(72, "little"), signature_s=s.to_bytes(72, "little"))

    @property
    def guest_policy(self) -> GuestPolicy:
        """POLICY with its bits named."""
        return GuestPolicy(self.policy)

    @property
    def platform(self) -> PlatformInfo:
        """PLATFORM_INFO with its bits named."""
        return PlatformInfo(self.platform_info)

    @property
    def signing_key(self) -> int:
        """KEY_INFO bits 4:2; see `SigningKey`."""
        return (self.key_info >> 2) & 7

    @property
    def author_key_enabled(self) -> bool:
        """KEY_INFO bit 0: an author key signed the ID key."""
        return bool(self.key_info & 1)

    @property
    def mask_chip_key(self) -> bool:
        """KEY_INFO bit 1: the host has the firmware leave reports unsigned."""
        return bool(self.key_info & 2)

    @property
    def has_cpuid(self) -> bool:
        """Whether this version carries the CPUID bytes."""
        return self.version >= 3

    @property
    def has_mitigation_vectors(self) -> bool:
        """Whether this version carries the mitigation vectors."""
        return self.version >= 5

    @property
    def has_migration_agent(self) -> bool:
        """Whether a migration agent is bound to this guest."""
        return self.report_id_ma != _NO_MIGRATION_AGENT


def parse_report(data: Buffer) -> Report:
    """Decode and validate a report.

    Args:
        data: 1184 bytes, as the firmware wrote them.

    Raises:
        FormatError: ``report-length``, or what `validate_report` raises.
    """
    if len(data) != REPORT_BYTES:
        raise FormatError("a report has 1184 bytes", code="report-length", expected=REPORT_BYTES, got=len(data))
    report = Report.parse(data)
    validate_report(report)
    return report


def validate_report(report: Report) -> None:
    """Demand what the format of a *signed* report demands, whatever the report claims.

    Raises:
        FormatError: ``report-version``, ``report-reserved`` (with ``offset``), ``report-signature-algorithm``,
            ``report-signature-range``, ``report-vmpl-range``.
    """
    if report.version not in _VERSIONS:
        raise FormatError("the report's version is not one of 2 to 5", code="report-version", got=report.version)
    for offset, value in _reserved(report):
        if value:
            raise FormatError(
                "the report has bits set that its version reserves",
                code="report-reserved",
                offset=offset,
                section="AMD 56860 table 23",
            )
    if report.signature_algorithm != ECDSA_P384_SHA384:
        raise FormatError(
            "the report is not signed by ECDSA P-384 with SHA-384",
            code="report-signature-algorithm",
            expected=ECDSA_P384_SHA384,
            got=report.signature_algorithm,
        )
    if report.vmpl > 3 and report.vmpl != VMPL_HOST:
        raise FormatError("there is no such VMPL", code="report-vmpl-range", got=report.vmpl)
    r, s = report.signature
    if not (0 < r < P384_ORDER and 0 < s < P384_ORDER):
        raise FormatError("R or S is not between 0 and the group order", code="report-signature-range")


def _reserved(report: Report) -> tuple[tuple[int, bool], ...]:
    """Each reserved place: (offset, whether anything is set there)."""
    early = not report.has_cpuid
    return (
        (0x048, bool(report.key_info >> 5) or 2 <= report.signing_key <= 6),
        (0x04C, bool(report.reserved_4c)),
        (0x188, early and bool(report.cpuid_family or report.cpuid_model or report.cpuid_stepping)),
        (0x18B, any(report.reserved_18b)),
        (0x1EB, bool(report.reserved_1eb)),
        (0x1EF, bool(report.reserved_1ef)),
        (0x1F8, not report.has_mitigation_vectors and bool(report.launch_mit_vector or report.current_mit_vector)),
        (0x208, any(report.reserved_208)),
        (0x2A0 + 48, any(report.signature_r[48:])),
        (0x2E8 + 48, any(report.signature_s[48:])),
        (0x330, any(report.reserved_330)),
    )
