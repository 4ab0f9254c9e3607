# SPDX-License-Identifier: MIT OR Apache-2.0
"""What an attester sends to a verifier: reports, certificate tables, certificates, and all of it together.

Where a certificate is accepted by us and by pyca, both must have read the same: a difference between two parsers is
how one program is shown a certificate that another does not see.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import warnings

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from svsm.broker.verifier.roots import Roots
from svsm.broker.verifier.verify import verify
from svsm.formats.snp.certificate_table import ARK, ASK, CRL, MAX_ENTRIES, VCEK, pack_table, parse_table
from svsm.formats.snp.certs import (
    Certificate,
    certificates_from,
    parse_certificate,
    parse_crl,
    vek_extensions,
)
from svsm.formats.snp.evidence import MAX_EVIDENCE_BYTES, open_evidence
from svsm.formats.snp.report import REPORT_BYTES, Report, parse_report, validate_report
from svsm.fuzz.choices import Choices
from svsm.fuzz.target import Target, expect, judge
from svsm.fuzz.targets.material import BORN, chip_machine

__all__ = ["ROWS"]


def _report(data: bytes) -> None:
    choices = Choices(data)
    raw = choices.edited(_signed_report(choices.pick((2, 3, 5)))) if choices.flag() else choices.rest()
    if choices.flag():
        raw = raw[:REPORT_BYTES].ljust(REPORT_BYTES, b"\0")
    report = parse_report(raw)
    expect(report.pack() == raw, "an accepted report packs to itself")
    judge(lambda: validate_report(report))
    judge(lambda: (report.signature, report.guest_policy, report.platform, report.has_cpuid))
    judge(lambda: str(report.guest_policy))


@functools.cache
def _signed_report(version: int) -> bytes:
    machine = chip_machine()
    blank = machine.new_report(version)
    return machine.sign_report(blank.replace(report_data=bytes(range(64)), policy=0x30000, report_id_ma=b"\xff" * 32))


def _table(data: bytes) -> None:
    choices = Choices(data)
    raw = choices.edited(_tables()[choices.below(2)]) if choices.flag() else choices.rest()
    found = parse_table(raw)
    expect(len(found) <= MAX_ENTRIES, "a table is bounded")
    expect(sum(map(len, found.values())) <= len(raw), "no byte of a table is in two certificates")
    expect(parse_table(pack_table(found)) == found, "what is in a table survives another table")


@functools.cache
def _tables() -> tuple[bytes, bytes]:
    machine = chip_machine()
    return machine.certificates(), pack_table({VCEK: b"v" * 40, ASK: b"a" * 30, ARK: b"r" * 20, CRL: b"c"})


def _certificate(data: bytes) -> None:
    choices = Choices(data)
    raw = choices.edited(_certificates()[choices.below(3)]) if choices.flag() else choices.rest()
    judge(lambda: certificates_from(raw))
    judge(lambda: parse_crl(raw))
    found = parse_certificate(raw)
    expect(found.raw == raw and found.tbs in raw, "a certificate keeps its bytes")
    judge(lambda: found.authority)
    judge(lambda: vek_extensions(found))
    _compare(found, raw)


def _compare(ours: Certificate, raw: bytes) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pyca complains about what it accepts all the same
            theirs = x509.load_der_x509_certificate(raw)
            facts = (
                theirs.serial_number,
                theirs.tbs_certificate_bytes,
                theirs.not_valid_before_utc,
                theirs.not_valid_after_utc,
                theirs.issuer.public_bytes(),
            )
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion):
        return
    mine = (ours.serial, ours.tbs, ours.not_before, ours.not_after, ours.issuer.raw)
    expect(mine == facts, "pyca reads the same certificate")


@functools.cache
def _certificates() -> tuple[bytes, bytes, bytes]:
    machine = chip_machine()
    return machine.vcek, machine.ask, machine.ark


def _crl_seed() -> bytes:
    key = ec.derive_private_key(0xC21, ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ARK-Milan")])
    builder = x509.CertificateRevocationListBuilder().issuer_name(name).last_update(BORN)
    revoked = x509.RevokedCertificateBuilder().serial_number(5).revocation_date(BORN).build()
    builder = builder.next_update(BORN + datetime.timedelta(days=1)).add_revoked_certificate(revoked)
    return builder.sign(key, hashes.SHA384()).public_bytes(Encoding.DER)


def _evidence(data: bytes) -> None:
    choices = Choices(data)
    honest = _signed_report(5) + _tables()[0]
    raw = choices.edited(honest) if choices.flag() else choices.rest()
    evidence = open_evidence(raw[: MAX_EVIDENCE_BYTES + 1])
    expect(len(evidence.report) == REPORT_BYTES, "evidence has a report")
    expect(len(evidence.chain) <= 2 * MAX_ENTRIES, "evidence has a bounded chain")


def _verify(data: bytes) -> None:
    """A verdict only ever says yes to the bytes that the chip signed."""
    choices = Choices(data)
    machine = chip_machine()
    honest = _signed_report(choices.pick((3, 5)))
    report = choices.edited(honest)
    vek, ask, ark = (choices.edited(der) for der in _certificates())
    crl = choices.edited(_crl_seed()) if choices.flag() else None
    verdict = verify(report, vek, chain=(ask, ark), roots=_roots(), at=BORN + datetime.timedelta(days=30), crl=crl)
    untouched = report == honest and (vek, ask, ark) == _certificates() and crl is None
    expect(verdict.accepted or not untouched, "honest evidence is accepted")
    if verdict.accepted:
        signed = Report.parse(report).replace(signature_r=bytes(72), signature_s=bytes(72))
        expect(signed.signed_part == Report.parse(honest).signed_part, "an accepted report is what was signed")
        expect(hashlib.sha256(ark).digest() == machine.root_fingerprint, "an accepted chain ends at the given root")


@functools.cache
def _roots() -> Roots:
    return Roots.simulated(chip_machine().root_fingerprint)


ROWS = (
    Target("snp-report", "attestation reports", _report, lambda: [b"\1", b"\1\1", b"\1\2"], max_bytes=2048),
    Target("certificate-table", "the table of certificates beside a report", _table, lambda: [b"\1", b"\1\1"]),
    Target(
        "certificates",
        "AMD's certificates and revocation lists in DER and PEM, compared with pyca",
        _certificate,
        lambda: [b"\1", b"\1\1", b"\1\2", b"\0" + _crl_seed()],
        max_bytes=4096,
    ),
    Target("evidence", "evidence files of all forms", _evidence, lambda: [b"\1", b"\0{}"], max_bytes=4096),
    Target("verify", "verification of a report with its chain", _verify, lambda: [b"", bytes(8)], max_bytes=512),
)
