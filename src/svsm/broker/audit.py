# SPDX-License-Identifier: MIT OR Apache-2.0
"""The audit trail: every decision with its reason, chained by hashes.

A decision has a line of its own, or is one of the ``count`` in a line's details, for decisions of one kind since
``since`` (`svsm.broker.tally` says which).

A line's hash covers the hash before it, so lines cannot be changed, dropped or reordered in the middle without
recomputing all that follow; keep the last hash elsewhere to notice a cut at the end. Lines are written in the same
transaction as what they speak of. No secret is ever in one.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable

from svsm.crypto.digests import sha256
from svsm.formats.errors import IntegrityError
from svsm.formats.strict_json import canonical

__all__ = ["FIRST_HASH", "AuditLine", "verify_chain"]

FIRST_HASH = bytes(32)
"""What the first line's hash covers in place of a predecessor."""


@dataclasses.dataclass(frozen=True, slots=True)
class AuditLine:
    """One decision, or many of one kind."""

    sequence: int
    """1, 2, 3, …"""
    at: str
    """ISO 8601, UTC."""
    event: str
    """"volume-create", "volume-allow", "attest", "release", "channel", "formatted"."""
    decision: str
    """"granted" or "refused"."""
    reason: str | None
    """Stable code of a refusal."""
    volume_id: str | None
    session: str | None
    """Hexadecimal."""
    details: dict[str, str]
    """For people: what was measured, which check failed."""
    hash: bytes
    """32 bytes."""

    @property
    def decisions(self) -> int:
        """How many decisions the line stands for."""
        return int(self.details.get("count", "1"))

    @classmethod
    def following(
        cls,
        previous: tuple[int, bytes],
        *,
        at: str,
        event: str,
        reason: str | None,
        volume_id: str | None,
        session: bytes | None,
        details: dict[str, str],
    ) -> AuditLine:
        """The line after `previous` (sequence, hash); a reason makes it a refusal."""
        sequence, before = previous[0] + 1, previous[1]
        line = cls(
            sequence=sequence,
            at=at,
            event=event,
            decision="granted" if reason is None else "refused",
            reason=reason,
            volume_id=volume_id,
            session=None if session is None else session.hex(),
            details=details,
            hash=b"",
        )
        return dataclasses.replace(line, hash=sha256(before, line.covered()))

    def covered(self) -> bytes:
        """What the hash covers after its predecessor."""
        return canonical(self.to_json())

    def to_json(self) -> dict[str, object]:
        """All but the hash, as plain values."""
        return {
            "sequence": self.sequence,
            "at": self.at,
            "event": self.event,
            "decision": self.decision,
            "reason": self.reason,
            "volume_id": self.volume_id,
            "session": self.session,
            "details": self.details,
        }

    def details_json(self) -> str:
        """How the database keeps `details`."""
        return json.dumps(self.details, sort_keys=True)


def verify_chain(lines: Iterable[AuditLine]) -> int:
    """Check a whole trail from its first line.

    Returns:
        The number of lines.

    Raises:
        IntegrityError: ``broker-audit-chain`` at the first line that does not fit.
    """
    before, count = FIRST_HASH, 0
    for count, line in enumerate(lines, 1):
        if line.sequence != count or sha256(before, line.covered()) != line.hash:
            raise IntegrityError("the audit trail was changed", code="broker-audit-chain", sequence=count)
        before = line.hash
    return count
