# SPDX-License-Identifier: MIT OR Apache-2.0
"""Verification of SEV-SNP evidence: one function that makes every check in its order and answers with a verdict.

Bytes come from an attacker, so nothing they hold raises: a malformed report or certificate is a refusal with the
parser's code. Only the caller's own mistakes (a naive date, a wrong root name, a policy that nothing can match) raise.

Authenticity comes first and stops at its first failure, because the fields of a report that nobody signed mean
nothing. What the owner demands comes after it, and there every check runs: an operator who has three things to fix
sees three.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Final

from svsm.broker.verifier import chain as chains
from svsm.broker.verifier.policy import ReportPolicy
from svsm.broker.verifier.roots import Roots, fingerprint
from svsm.broker.verifier.rules import AUTHENTICITY_RULES, POLICY_RULES, Case
from svsm.broker.verifier.verdict import Check, Result, Verdict
from svsm.formats.errors import FormatError, StateError, SvsmError
from svsm.formats.record import Buffer
from svsm.formats.snp import certificate_table
from svsm.formats.snp.certs import Certificate, certificates_from
from svsm.formats.snp.report import Report, SigningKey, parse_report

__all__ = ["CHECK_NAMES", "verify", "verify_evidence"]

_CACHED_BYTES: Final = 8192
_CHAIN_CHECKS = ("report-format", "certificates", "root", "mark", "names", "chain", "validity", "revocation")
CHECK_NAMES = (
    *_CHAIN_CHECKS,
    *(name for name, _ in AUTHENTICITY_RULES),
    *(name for name, _ in POLICY_RULES),
)
"""Every check in the order in which it is made."""


class _Refused(Exception):
    """Ends verification; what failed is in the list of checks already."""


class _Sheet:
    """Collects checks as they are made, and what has been learnt on the way."""

    def __init__(self) -> None:
        self.checks: list[Check] = []
        self.report: Report | None = None
        self.chain: chains.Chain | None = None
        self.authentic = False

    def attempt(self, name: str, check: Callable[[], str | None]) -> bool:
        """Make one check; returns whether verification may go on as if it held."""
        try:
            detail = check()
        except SvsmError as error:
            self.checks.append(Check(name, Result.FAILED, str(error), error.code))
            return False
        if detail is None:
            self.checks.append(Check(name, Result.NOT_CHECKED, "no value was given to check against"))
        else:
            self.checks.append(Check(name, Result.PASSED, detail))
        return True

    def demand(self, name: str, check: Callable[[], str | None]) -> None:
        """Make one check that everything after it rests on."""
        if not self.attempt(name, check):
            raise _Refused

    def verdict(self) -> Verdict:
        """Close the sheet."""
        made = {check.name for check in self.checks}
        rest = [Check(name, Result.NOT_REACHED, "an earlier check failed") for name in CHECK_NAMES if name not in made]
        reason = next((check.code for check in self.checks if check.result is Result.FAILED), None)
        chain = self.chain
        return Verdict(
            accepted=self.authentic and reason is None and not rest,
            reason=reason,
            checks=(*self.checks, *rest),
            report=self.report,
            authentic=self.authentic,
            root_fingerprint=None if chain is None else fingerprint(chain.root),
            simulated=chain is not None and chain.simulated,
            line=None if chain is None else chain.line.value,
            key=None if chain is None else chain.key,
        )


def verify(
    report: Buffer,
    vek: Buffer,
    *,
    chain: Sequence[Buffer] = (),
    roots: Roots,
    at: datetime.datetime,
    policy: ReportPolicy | None = None,
    crl: Buffer | None = None,
) -> Verdict:
    """Verify a report against the certificate of the key that signed it.

    Args:
        report: The 1184 bytes.
        vek: The VCEK or VLEK, DER, or PEM that may hold its chain as well.
        chain: More certificates (ASK or ASVK, ARK), DER or PEM, in any order. AMD's own need not be given.
        roots: Whom to trust.
        at: The time to judge dates by; with a time zone.
        policy: What to demand; by default VMPL 0, no debugging, no migration agent.
        crl: The root's revocation list, DER.

    Returns:
        The verdict; malformed input is a refusal.

    Raises:
        StateError: ``verify-time`` when `at` has no time zone.
    """
    return _verify(report, lambda parsed: [vek, *chain], roots, at, policy or ReportPolicy(), crl)


def verify_evidence(
    report: Buffer,
    certificates: Buffer,
    *,
    accepted_root: Roots | str,
    expected_report_data: bytes,
    allowed_measurements: Collection[bytes],
    expected_host_data: bytes,
    policy: ReportPolicy | None = None,
    at: datetime.datetime,
    vek: Buffer | None = None,
    crl: Buffer | None = None,
) -> Verdict:
    """Verify what a confidential VM sent: a report and the certificate table that its host attached.

    The three expected values have no default on purpose: a broker that forgets one must not compile a policy that
    accepts everything.

    Args:
        report: The 1184 bytes.
        certificates: The certificate table; may be empty where `vek` is given.
        accepted_root: Whom to trust, or the text of a volume's row (`Roots.parse`).
        expected_report_data: 64 bytes.
        allowed_measurements: Launch digests, 48 bytes each; empty allows none.
        expected_host_data: 32 bytes.
        policy: Further demands.
        at: The time to judge dates by; with a time zone.
        vek: The VCEK or VLEK from a store of the broker's own; used instead of the table's.
        crl: The root's revocation list, DER.

    Returns:
        The verdict; malformed input is a refusal.

    Raises:
        StateError: ``verify-time``, ``root-name`` or ``report-policy``: the caller's mistakes.
    """
    roots = Roots.parse(accepted_root) if isinstance(accepted_root, str) else accepted_root
    demands = dataclasses.replace(
        policy or ReportPolicy(),
        report_data=bytes(expected_report_data),
        measurements=frozenset(bytes(value) for value in allowed_measurements),
        host_data=bytes(expected_host_data),
    )
    return _verify(report, functools.partial(_from_table, certificates, vek), roots, at, demands, crl)


def _from_table(table: Buffer, stored: Buffer | None, report: Report) -> list[Buffer]:
    """The signing key's certificate and its chain, as the report's SIGNING_KEY and the table's GUIDs name them."""
    entries = certificate_table.parse_table(table)
    wanted = certificate_table.VLEK if report.signing_key == SigningKey.VLEK else certificate_table.VCEK
    vek = entries.get(wanted) if stored is None else stored
    if vek is None:
        raise FormatError(
            "the host attached no certificate of the key that signed the report",
            code="evidence-no-certificate",
            hint="the host must give its VCEK with the report (extended guest request), or the broker must have it",
        )
    others: list[Buffer] = [entries[guid] for guid in (certificate_table.ASK, certificate_table.ARK) if guid in entries]
    return [vek, *others]


def _verify(
    report: Buffer,
    collect: Callable[[Report], Sequence[Buffer]],
    roots: Roots,
    at: datetime.datetime,
    policy: ReportPolicy,
    crl: Buffer | None,
) -> Verdict:
    if at.tzinfo is None:
        raise StateError("the time to judge by needs a time zone", code="verify-time")
    sheet = _Sheet()
    try:
        case = _authenticate(sheet, report, collect, roots, at, policy, crl)
    except _Refused:
        return sheet.verdict()
    sheet.authentic = True
    for name, rule in POLICY_RULES:
        sheet.attempt(name, functools.partial(rule, case))
    return sheet.verdict()


def _authenticate(
    sheet: _Sheet,
    report: Buffer,
    collect: Callable[[Report], Sequence[Buffer]],
    roots: Roots,
    at: datetime.datetime,
    policy: ReportPolicy,
    crl: Buffer | None,
) -> Case:
    parsed: list[Report] = []
    found: list[Certificate] = []
    chain: list[chains.Chain] = []

    def read_report() -> str:
        parsed.append(parse_report(report))
        return f"version {parsed[0].version}"

    def read_certificates() -> str:
        for item in collect(parsed[0]):
            found.extend(_certificates(bytes(item)))
        return f"{len(found)} given"

    def choose_root() -> str:
        chain.append(chains.find_chain(found, roots))
        return ("simulated " if chain[0].simulated else "AMD ") + fingerprint(chain[0].root).hex()

    sheet.demand("report-format", read_report)
    sheet.report = parsed[0]
    sheet.demand("certificates", read_certificates)
    sheet.demand("root", choose_root)
    sheet.demand("mark", lambda: chains.check_mark(chain[0]))
    sheet.demand("names", lambda: chains.check_names(chain[0]))
    sheet.demand("chain", lambda: chains.check_signatures(chain[0]))
    sheet.chain = chain[0]
    sheet.demand("validity", lambda: chains.check_dates(chain[0], at))
    list_bytes = None if crl is None else bytes(crl)
    sheet.demand("revocation", lambda: chains.check_revocation(chain[0], list_bytes, at))
    case: list[Case] = []

    def signing_key(rule: Callable[[Case], str | None]) -> str | None:
        case.append(Case(parsed[0], chain[0], chain[0].extensions(), policy))
        return rule(case[0])

    for index, (name, rule) in enumerate(AUTHENTICITY_RULES):
        if index == 0:
            sheet.demand(name, functools.partial(signing_key, rule))
        else:
            sheet.demand(name, functools.partial(rule, case[0]))
    return case[0]


def _certificates(data: bytes) -> tuple[Certificate, ...]:
    """Parsed certificates of one blob."""
    # Parsing costs more than a cached signature check; what is larger than AMD's chains must not fill the cache.
    return _cached_certificates(data) if len(data) <= _CACHED_BYTES else tuple(certificates_from(data))


@functools.lru_cache(maxsize=1024)
def _cached_certificates(data: bytes) -> tuple[Certificate, ...]:
    return tuple(certificates_from(data))
