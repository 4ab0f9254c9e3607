# SPDX-License-Identifier: MIT OR Apache-2.0
"""Real SEV-SNP reports and AMD certificates: each accepted or refused for the reason that its origin states.

Origins, versions and expected verdicts: README.md beside the vectors.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib

import pytest

from svsm.broker.verifier import ReportPolicy, Roots, Verdict, verify
from svsm.broker.verifier.roots import AMD_FINGERPRINTS, amd_certificates
from svsm.broker.verifier.verify import verify_evidence
from svsm.formats.snp import certificate_table
from svsm.formats.snp.certs import certificates_from, parse_certificate, vek_extensions
from svsm.formats.snp.evidence import open_evidence
from svsm.formats.snp.report import P384_ORDER, SIGNED_BYTES, Report, parse_report
from svsm.formats.snp.tcb import Line
from tests.support import vectors

_AT = datetime.datetime(2026, 6, 1, tzinfo=datetime.UTC)
_BEFORE_VLEK_END = datetime.datetime(2025, 6, 1, tzinfo=datetime.UTC)


@dataclasses.dataclass(frozen=True, slots=True)
class _Vector:
    evidence: str
    certificate: str | None
    line: str
    version: int
    tcb: tuple[int, int, int, int]
    reason: str | None = None
    at: datetime.datetime = _AT
    provisional: bool = False


_VECTORS = [
    _Vector("milan-v2-vcek.report.bin", "milan-v2-vcek.vcek.der", "Milan", 2, (3, 0, 8, 115), provisional=True),
    _Vector("milan-v2-debug.report.bin", "milan-v2-debug.vcek.der", "Milan", 2, (2, 0, 5, 68), "report-debug"),
    _Vector(
        "milan-v3-vlek-vmpl1.report.bin",
        "milan-v3-vlek-vmpl1.vlek.der",
        "Milan",
        3,
        (4, 0, 24, 217),
        "report-vmpl",
        _BEFORE_VLEK_END,
        provisional=True,
    ),
    _Vector("azure-milan-v2.hcl-report.bin", "azure-milan-v2.vcek.pem", "Milan", 2, (3, 0, 8, 115), provisional=True),
    _Vector("azure-milan-v3.evidence.json", None, "Milan", 3, (4, 0, 24, 219)),
    _Vector("azure-genoa-v3.evidence.json", None, "Genoa", 3, (10, 0, 23, 84)),
    _Vector("azure-genoa-v3.report.bin", "azure-genoa-v3.vcek.pem", "Genoa", 3, (10, 0, 23, 84)),
]
_IDS = [vector.evidence for vector in _VECTORS]


def _load(vector: _Vector) -> tuple[bytes, bytes]:
    folder = vectors("snp")
    evidence = open_evidence((folder / vector.evidence).read_bytes())
    certificate = evidence.vek if vector.certificate is None else (folder / vector.certificate).read_bytes()
    assert certificate is not None
    return evidence.report, certificate


def _judge(vector: _Vector, policy: ReportPolicy | None = None, roots: Roots | None = None) -> Verdict:
    report, certificate = _load(vector)
    return verify(report, certificate, roots=roots or Roots.amd(), at=vector.at, policy=policy)


@pytest.mark.parametrize("vector", _VECTORS, ids=_IDS)
def test_each_report_is_judged_as_its_origin_says(vector: _Vector) -> None:
    verdict = _judge(vector)
    assert verdict.reason == vector.reason
    assert verdict.accepted == (vector.reason is None)
    assert verdict.authentic
    assert not verdict.simulated
    assert verdict.line == vector.line
    assert verdict.root_fingerprint == AMD_FINGERPRINTS[Line(vector.line)]
    assert verdict.report is not None
    assert verdict.report.version == vector.version
    assert verdict.report.pack() == _load(vector)[0]


@pytest.mark.parametrize("vector", _VECTORS, ids=_IDS)
def test_patch_levels_are_those_of_the_origin(vector: _Vector) -> None:
    extensions = vek_extensions(certificates_from(_load(vector)[1])[0])
    levels = extensions.levels
    assert (levels["bootloader"], levels["tee"], levels["snp"], levels["microcode"]) == vector.tcb


def test_nothing_else_is_wrong_with_the_debug_report() -> None:
    assert _judge(_VECTORS[1], ReportPolicy(allow_debug=True)).accepted


def test_the_vlek_report_fails_by_vmpl_and_masked_chip_only() -> None:
    policy = ReportPolicy(vmpls=frozenset({1}), allow_masked_chip_id=True)
    verdict = _judge(_VECTORS[2], policy)
    assert verdict.accepted
    assert verdict.key == "VLEK"
    assert _judge(_VECTORS[2], ReportPolicy(vmpls=frozenset({1}))).reason == "report-chip-masked"
    assert _judge(dataclasses.replace(_VECTORS[2], at=_AT)).reason == "chain-expired"


@pytest.mark.parametrize("vector", _VECTORS, ids=_IDS)
def test_provisional_firmware_is_refused_where_policy_says(vector: _Vector) -> None:
    policy = ReportPolicy(allow_provisional=False, allow_debug=True, vmpls=frozenset({0, 1}), allow_masked_chip_id=True)
    assert _judge(vector, policy).reason == ("report-provisional" if vector.provisional else None)


def test_a_line_that_is_not_accepted_is_refused() -> None:
    assert _judge(_VECTORS[0], roots=Roots.amd(Line.GENOA)).reason == "root-unknown"
    assert _judge(_VECTORS[5], roots=Roots.amd(Line.MILAN)).reason == "root-unknown"
    assert _judge(_VECTORS[5], roots=Roots.amd(Line.GENOA)).accepted


@pytest.mark.parametrize("name", ["legacy", "new"])
def test_certificates_with_bad_signatures_are_refused(name: str) -> None:
    folder = vectors("snp")
    bad = (folder / f"invalid-signature-{name}-hwid.vcek.der").read_bytes()
    assert vek_extensions(parse_certificate(bad)).hwid is not None
    report = (folder / "milan-v2-vcek.report.bin").read_bytes()
    assert verify(report, bad, roots=Roots.amd(), at=_AT).reason == "chain-signature"


def test_the_turin_chain_is_good() -> None:
    folder = vectors("snp")
    vcek = (folder / "turin.vcek.der").read_bytes()
    extensions = vek_extensions(parse_certificate(vcek))
    assert (len(extensions.hwid or b""), extensions.levels["fmc"], extensions.struct_version) == (8, 0, 1)
    report, _ = _load(_VECTORS[0])
    for chain in ([], [(folder / "turin.cert_chain.pem").read_bytes()]):
        verdict = verify(report, vcek, chain=chain, roots=Roots.amd(), at=_AT)
        passed = [check.name for check in verdict.checks if check.result == "passed"]
        assert passed[:7] == ["report-format", "certificates", "root", "mark", "names", "chain", "validity"]
        assert verdict.line == "Turin"
        assert verdict.reason == "report-tcb"  # there is no Turin report anywhere: this one is Milan's


@pytest.mark.parametrize("line", list(Line))
def test_shipped_certificates_are_the_published_ones(line: Line) -> None:
    published = certificates_from((vectors("snp") / f"{line.value.lower()}.ask_ark_asvk.pem").read_bytes())
    ark, ask, asvk = amd_certificates(line)
    assert [ask.raw, ark.raw, asvk.raw] == [certificate.raw for certificate in published]
    assert hashlib.sha256(ark.raw).digest() == AMD_FINGERPRINTS[line]


def test_wrong_certificates_for_a_real_report() -> None:
    folder = vectors("snp")
    report, vcek = _load(_VECTORS[0])
    milan, genoa = amd_certificates(Line.MILAN), amd_certificates(Line.GENOA)

    def reason(certificate: bytes, *chain: bytes) -> str | None:
        return verify(report, certificate, chain=chain, roots=Roots.amd(), at=_AT).reason

    assert reason(vcek, milan[1].raw, milan[0].raw) is None
    assert reason((folder / "milan-v2-debug.vcek.der").read_bytes()) == "report-tcb-mismatch"
    assert reason(_load(_VECTORS[3])[1]) == "report-chip-mismatch"
    assert reason(_load(_VECTORS[2])[1]) == "chain-expired"
    assert reason(_load(_VECTORS[6])[1]) == "report-tcb-mismatch"
    assert reason(vcek, genoa[0].raw) == "root-unknown"
    assert reason(milan[2].raw, milan[0].raw) == "chain-incomplete"
    # An ASVK, or another line's ASK, beside a VCEK is not its issuer; AMD's own is used and the stranger ignored.
    assert reason(vcek, milan[2].raw, genoa[1].raw) is None


def test_a_table_with_a_real_vcek_serves_a_broker() -> None:
    report, vcek = _load(_VECTORS[0])
    parsed = parse_report(report)
    table = certificate_table.pack_table({certificate_table.VCEK: vcek})
    verdict = verify_evidence(
        report,
        table,
        accepted_root="amd:Milan",
        expected_report_data=parsed.report_data,
        allowed_measurements=[parsed.measurement],
        expected_host_data=parsed.host_data,
        at=_AT,
    )
    assert verdict.accepted


def _flipped(report: bytes, position: int, bit: int) -> bytes:
    changed = bytearray(report)
    changed[position] ^= 1 << bit
    return bytes(changed)


def test_a_flipped_bit_in_each_signed_byte_is_refused() -> None:
    report, vcek = _load(_VECTORS[0])
    for position in range(SIGNED_BYTES):
        verdict = verify(_flipped(report, position, position % 8), vcek, roots=Roots.amd(), at=_AT)
        assert not verdict.authentic, hex(position)
        assert not verdict.accepted


@pytest.mark.long
@pytest.mark.parametrize("vector", [_VECTORS[0], _VECTORS[5]], ids=["milan-v2", "genoa-v3"])
def test_every_flipped_bit_of_the_signed_part_is_refused(vector: _Vector) -> None:
    report, vcek = _load(vector)
    for position in range(SIGNED_BYTES):
        for bit in range(8):
            verdict = verify(_flipped(report, position, bit), vcek, roots=Roots.amd(), at=_AT)
            assert not verdict.authentic, (hex(position), bit)


def test_every_bit_of_the_368_unsigned_bytes_is_refused() -> None:
    report, vcek = _load(_VECTORS[0])
    for position in range(0x330, 0x4A0):
        for bit in range(8):
            verdict = verify(_flipped(report, position, bit), vcek, roots=Roots.amd(), at=_AT)
            assert verdict.reason == "report-reserved", hex(position)


def test_every_bit_of_the_signature_is_refused() -> None:
    report, vcek = _load(_VECTORS[0])
    for position in range(0x2A0, 0x330):
        verdict = verify(_flipped(report, position, position % 8), vcek, roots=Roots.amd(), at=_AT)
        assert verdict.reason in {"report-signature", "report-reserved", "report-signature-range"}, hex(position)


def test_a_malleable_twin_of_a_real_report_verifies() -> None:
    # Documented, not wished for: whoever wants freshness must look at REPORT_DATA, never at the report's bytes.
    report, vcek = _load(_VECTORS[0])
    parsed = Report.parse(report)
    r, s = parsed.signature
    assert verify(parsed.with_signature(r, P384_ORDER - s).pack(), vcek, roots=Roots.amd(), at=_AT).accepted
