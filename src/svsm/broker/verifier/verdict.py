# SPDX-License-Identifier: MIT OR Apache-2.0
"""What verification answers: a verdict with every check by name, in the order in which they were made.

A verdict is accepted only when every check that ran passed and the evidence was proved authentic. The first failed
check gives the reason, a stable code. A check that needed a value nobody gave is `not_checked`, and says so: that is
the difference between "the measurement is right" and "nobody asked".
"""

from __future__ import annotations

import dataclasses
import enum

from svsm.formats.errors import PolicyError
from svsm.formats.snp.report import Report

__all__ = ["Check", "Result", "Verdict"]


class Result(enum.StrEnum):
    """How one check ended."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_CHECKED = "not_checked"
    """It needs a value that neither an option nor the policy gave."""
    NOT_REACHED = "not_reached"
    """Evidence that is not authentic is not looked at further."""


@dataclasses.dataclass(frozen=True, slots=True)
class Check:
    """One check and its outcome."""

    name: str
    result: Result
    detail: str
    code: str | None = None
    """The reason code where it failed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """The answer about one piece of evidence."""

    accepted: bool
    reason: str | None
    """Code of the first failed check; None exactly when accepted."""
    checks: tuple[Check, ...]
    report: Report | None
    """None when the bytes are not a report. Its fields are authentic only where `authentic` says so."""
    authentic: bool
    """Chain and signature hold: the report's fields are what a chip under an accepted root signed."""
    root_fingerprint: bytes | None
    """SHA-256 of the root certificate in DER, where one was accepted."""
    simulated: bool
    """The root is a simulated one."""
    line: str | None
    """"Milan", "Genoa", "Turin", where the chain holds."""
    key: str | None
    """"VCEK" or "VLEK", where the chain holds."""

    @property
    def not_checked(self) -> tuple[str, ...]:
        """Names of the checks that need a value nobody gave."""
        return tuple(check.name for check in self.checks if check.result is Result.NOT_CHECKED)

    @property
    def detail(self) -> str:
        """Why, in a sentence for the owner's log; never for the caller."""
        for check in self.checks:
            if check.result is Result.FAILED:
                return check.detail
        return "accepted"

    def require(self) -> Report:
        """The report, where the evidence was accepted.

        Raises:
            PolicyError: With the reason as its code otherwise.
        """
        if not self.accepted or self.report is None:
            reason = self.reason or "report-refused"
            raise PolicyError(f"the evidence is refused: {self.detail}", code=reason)
        return self.report

    def to_json(self) -> dict[str, object]:
        """Stable keys, plain values."""
        return {
            "accepted": self.accepted,
            "reason": self.reason,
            "detail": self.detail,
            "authentic": self.authentic,
            "root": None if self.root_fingerprint is None else self.root_fingerprint.hex(),
            "simulated": self.simulated,
            "product": self.line,
            "key": self.key,
            "not_checked": list(self.not_checked),
            "checks": [
                {"name": check.name, "result": str(check.result), "code": check.code, "detail": check.detail}
                for check in self.checks
            ],
        }
