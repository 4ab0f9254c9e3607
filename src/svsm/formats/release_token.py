# SPDX-License-Identifier: MIT OR Apache-2.0
"""The claims of the broker's token: what it says, under its signature, about one release of one volume's key."""

from __future__ import annotations

import dataclasses
import enum

from svsm.formats.errors import FormatError
from svsm.formats.record import Buffer
from svsm.formats.strict_json import base64_url, canonical, parse_object

__all__ = ["MAX_CLAIMS_BYTES", "SESSION_BYTES", "ReleaseClaims", "VolumeState"]

MAX_CLAIMS_BYTES = 8192
SESSION_BYTES = 16
_VERSION = 1


class VolumeState(enum.StrEnum):
    """Where a volume is in its life."""

    NEW = "new"
    """Never reported durable state: a blank disk may be formatted."""
    ACTIVE = "active"
    """Has state: a blank disk is an attack or a loss."""


@dataclasses.dataclass(frozen=True, slots=True)
class ReleaseClaims:
    """Claims, boot-protocol.md §3.5."""

    challenge: bytes
    key_hash: bytes
    """SHA-256(x ‖ y) of the kernel's ephemeral key, 32 bytes."""
    volume_id: str
    state: VolumeState
    session: bytes
    """16 bytes."""
    share_x: bytes
    """The broker's ephemeral P-521 share for the run-time channel."""
    share_y: bytes
    confirmation: bytes
    """HMAC that proves knowledge of the volume key, 32 bytes."""

    def pack(self) -> bytes:
        """Canonical JSON."""
        return canonical(
            {
                "version": _VERSION,
                "challenge": base64_url(self.challenge),
                "key_hash": self.key_hash.hex(),
                "volume_id": self.volume_id,
                "state": self.state.value,
                "session": self.session.hex(),
                "share": {"x": base64_url(self.share_x), "y": base64_url(self.share_y)},
                "confirmation": self.confirmation.hex(),
            }
        )

    @classmethod
    def parse(cls, data: Buffer) -> ReleaseClaims:
        """Read them (after the signature was checked).

        Raises:
            FormatError: ``json-*`` or ``token-claims``.
        """
        members = parse_object(data, what="token claims", max_bytes=MAX_CLAIMS_BYTES)
        state = members.text("state", max_length=16)
        if members.number("version", maximum=1 << 32) != _VERSION or state not in {s.value for s in VolumeState}:
            raise FormatError("the token's claims are of another kind", code="token-claims", got=state)
        share = members.members("share")
        return cls(
            challenge=members.bytes_url("challenge", max_bytes=64),
            key_hash=members.bytes_hex("key_hash", length=32),
            volume_id=members.text("volume_id", max_length=36),
            state=VolumeState(state),
            session=members.bytes_hex("session", length=SESSION_BYTES),
            share_x=share.bytes_url("x", max_bytes=66),
            share_y=share.bytes_url("y", max_bytes=66),
            confirmation=members.bytes_hex("confirmation", length=32),
        )
