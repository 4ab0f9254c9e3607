# SPDX-License-Identifier: MIT OR Apache-2.0
"""Plaintext of the run-time channel: canonical JSON, one message per frame.

Requests come from the kernel; every answer repeats the sequence number of its request (`reply_to`), so that an
answer withheld by the host and delivered later cannot stand for another request's. The ledger's OPEN and COMMIT
become further types with the same envelope.
"""

from __future__ import annotations

import dataclasses
import re

from svsm.formats.errors import FormatError
from svsm.formats.record import Buffer
from svsm.formats.release_token import SESSION_BYTES
from svsm.formats.strict_json import Members, canonical, parse_object

__all__ = ["MAX_MESSAGE_BYTES", "Formatted", "FormattedAcknowledged", "Refused", "parse_answer", "parse_request"]

MAX_MESSAGE_BYTES = 16 << 10
COUNTER_BYTES = 16
_MAX_ROOT_BYTES = 64
_MAX_SEQUENCE = (1 << 48) - 1
_CODE = re.compile(r"[a-z0-9]+(-[a-z0-9]+){0,7}")


@dataclasses.dataclass(frozen=True, slots=True)
class Formatted:
    """Kernel → broker: the volume's first state is durable."""

    session: bytes
    """16 bytes."""
    counter: bytes
    """CocoonFS update counter, 16 bytes."""
    root: bytes
    """Root digest of the authentication tree, 1 to 64 bytes."""

    def pack(self) -> bytes:
        """Canonical JSON."""
        return canonical({"type": "formatted", **_state(self.session, self.counter, self.root)})


@dataclasses.dataclass(frozen=True, slots=True)
class FormattedAcknowledged:
    """Broker → kernel: recorded; the volume is active with exactly this state."""

    reply_to: int
    session: bytes
    counter: bytes
    root: bytes

    def pack(self) -> bytes:
        """Canonical JSON."""
        state = _state(self.session, self.counter, self.root)
        return canonical({"type": "formatted-acknowledged", "reply_to": self.reply_to, **state})


@dataclasses.dataclass(frozen=True, slots=True)
class Refused:
    """Broker → kernel: no, with the broker's code."""

    reply_to: int
    reason: str

    def pack(self) -> bytes:
        """Canonical JSON."""
        return canonical({"type": "refused", "reply_to": self.reply_to, "reason": self.reason})


def parse_request(plaintext: Buffer) -> Formatted:
    """What the kernel asks.

    Raises:
        FormatError: ``json-*`` or ``runtime-message``.
    """
    members = parse_object(plaintext, what="run-time request", max_bytes=MAX_MESSAGE_BYTES)
    if members.text("type", max_length=64) != "formatted":
        raise FormatError("the run-time request is of an unknown type", code="runtime-message")
    session, counter, root = _parse_state(members)
    return Formatted(session=session, counter=counter, root=root)


def parse_answer(plaintext: Buffer) -> FormattedAcknowledged | Refused:
    """What the broker answers.

    Raises:
        FormatError: ``json-*`` or ``runtime-message``.
    """
    members = parse_object(plaintext, what="run-time answer", max_bytes=MAX_MESSAGE_BYTES)
    kind = members.text("type", max_length=64)
    reply_to = members.number("reply_to", maximum=_MAX_SEQUENCE)
    if kind == "formatted-acknowledged":
        session, counter, root = _parse_state(members)
        return FormattedAcknowledged(reply_to=reply_to, session=session, counter=counter, root=root)
    reason = members.text("reason", max_length=64) if kind == "refused" else ""
    if not _CODE.fullmatch(reason):
        raise FormatError("the run-time answer is of an unknown type", code="runtime-message")
    return Refused(reply_to=reply_to, reason=reason)


def _state(session: bytes, counter: bytes, root: bytes) -> dict[str, str]:
    if len(session) != SESSION_BYTES or len(counter) != COUNTER_BYTES or not 0 < len(root) <= _MAX_ROOT_BYTES:
        raise FormatError("a session, counter or root has the wrong length", code="runtime-message")
    return {"session": session.hex(), "counter": counter.hex(), "root": root.hex()}


def _parse_state(members: Members) -> tuple[bytes, bytes, bytes]:
    session = members.bytes_hex("session", length=SESSION_BYTES)
    counter = members.bytes_hex("counter", length=COUNTER_BYTES)
    digits = members.text("root", max_length=2 * _MAX_ROOT_BYTES)
    if not digits:
        raise FormatError("a root digest is empty", code="runtime-message")
    return session, counter, members.bytes_hex("root", length=len(digits) // 2)
