# SPDX-License-Identifier: MIT OR Apache-2.0
"""The four messages between kernel and proxy in COCONUT's dialect, and ours beside them.

Order on one connection: negotiation request, negotiation answer, attestation request, attestation answer; then, if
both sides said so, channel frames in both directions. Member order and base64 flavour (standard, padded) are those
that COCONUT's aproxy was recorded with.

Extension: the kernel names what it understands in `extensions` of its first message; a proxy that knows the
extension repeats it in its answer. COCONUT's proxy ignores the member, and so shows that it is not ours ("foreign").

* ``channel``: after the attestation answer, frames ``{"channel": "<base64>"}`` are relayed unread between kernel and
  broker; and a failed attestation may carry the broker's reason code in ``reason`` (unauthenticated, for display).

Parsers here check shape and size. What is *believed* is decided in `svsm.kernel.attestation`.
"""

from __future__ import annotations

import dataclasses
import re

from svsm.formats.errors import ProtocolError
from svsm.formats.record import Buffer
from svsm.formats.strict_json import Members, base64_std, compact, parse_object

__all__ = [
    "CHANNEL_EXTENSION",
    "MAX_BODY_BYTES",
    "PARAMETERS",
    "VERSION",
    "AttestationAnswer",
    "AttestationRequest",
    "ChannelFrame",
    "Decryption",
    "NegotiationAnswer",
    "NegotiationRequest",
]

VERSION = (0, 1, 0)
"""The only version of this wire."""

PARAMETERS = ("EcPublicKeyBytes", "Challenge")
"""What is hashed into REPORT_DATA, and in which order."""

CHANNEL_EXTENSION = "channel"

MAX_BODY_BYTES = 1 << 20
_MAX_EVIDENCE_BYTES = 256 << 10
_MAX_CHALLENGE_BYTES = 1024
_MAX_COORDINATE_BYTES = 256
_MAX_SECRET_BYTES = 64 << 10
_MAX_CHANNEL_BYTES = 256 << 10
_REASON = re.compile(r"[a-z0-9]+(-[a-z0-9]+){0,7}")


@dataclasses.dataclass(frozen=True, slots=True)
class NegotiationRequest:
    """Kernel → proxy, first message."""

    extensions: tuple[str, ...] = ()
    """What the kernel understands beyond COCONUT's wire."""

    def pack(self) -> bytes:
        """The message's bytes."""
        message: dict[str, object] = {"version": list(VERSION), "tee": "snp"}
        if self.extensions:
            message["extensions"] = list(self.extensions)
        return compact(message)

    @classmethod
    def parse(cls, body: Buffer) -> NegotiationRequest:
        """Read it.

        Raises:
            FormatError: ``json-*``.
            ProtocolError: ``negotiation-version`` or ``negotiation-tee``.
        """
        members = parse_object(body, what="negotiation request", max_bytes=MAX_BODY_BYTES)
        version = members.items("version", max_items=8)
        if version != list(VERSION) or any(isinstance(part, bool) for part in version):
            raise ProtocolError("the peer speaks another version of the attestation wire", code="negotiation-version")
        _require_snp(members)
        return cls(extensions=_extensions(members))


@dataclasses.dataclass(frozen=True, slots=True)
class NegotiationAnswer:
    """Proxy → kernel: the broker's challenge and what to hash."""

    challenge: bytes
    parameters: tuple[str, ...] = PARAMETERS
    extensions: tuple[str, ...] = ()

    def pack(self) -> bytes:
        """The message's bytes."""
        message: dict[str, object] = {"challenge": base64_std(self.challenge), "params": list(self.parameters)}
        if self.extensions:
            message["extensions"] = list(self.extensions)
        return compact(message)

    @classmethod
    def parse(cls, body: Buffer) -> NegotiationAnswer:
        """Read it; `parameters` and the challenge's length are the host's word still.

        Raises:
            FormatError: ``json-*``.
        """
        members = parse_object(body, what="negotiation answer", max_bytes=MAX_BODY_BYTES)
        return cls(
            challenge=members.bytes_std("challenge", max_bytes=_MAX_CHALLENGE_BYTES),
            parameters=members.texts("params", max_items=16, max_length=64),
            extensions=_extensions(members),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class AttestationRequest:
    """Kernel → proxy: the evidence."""

    report: bytes
    """The attestation report, 1184 bytes where the kernel is ours."""
    certificates: bytes | None
    """The host's certificate table; None leaves the member out."""
    challenge: bytes
    key_x: bytes
    """Ephemeral P-521 key: x, 66 bytes big-endian where the kernel is ours."""
    key_y: bytes

    def pack(self) -> bytes:
        """The message's bytes."""
        snp: dict[str, object] = {"report": base64_std(self.report)}
        if self.certificates is not None:
            snp["certs_buf"] = base64_std(self.certificates)
        return compact(
            {
                "tee": "snp",
                "evidence": {"Snp": snp},
                "challenge": base64_std(self.challenge),
                "key": {"x": base64_std(self.key_x), "y": base64_std(self.key_y)},
            }
        )

    @classmethod
    def parse(cls, body: Buffer) -> AttestationRequest:
        """Read it. A `certs_buf` of null is refused, as COCONUT's proxy does.

        Raises:
            FormatError: ``json-*``.
            ProtocolError: ``negotiation-tee``.
        """
        members = parse_object(body, what="attestation request", max_bytes=MAX_BODY_BYTES)
        _require_snp(members)
        snp = members.members("evidence").members("Snp")
        key = members.members("key")
        certificates = None
        if "certs_buf" in snp:
            certificates = snp.bytes_std("certs_buf", max_bytes=_MAX_EVIDENCE_BYTES)
        return cls(
            report=snp.bytes_std("report", max_bytes=_MAX_EVIDENCE_BYTES),
            certificates=certificates,
            challenge=members.bytes_std("challenge", max_bytes=_MAX_CHALLENGE_BYTES),
            key_x=key.bytes_std("x", max_bytes=_MAX_COORDINATE_BYTES),
            key_y=key.bytes_std("y", max_bytes=_MAX_COORDINATE_BYTES),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Decryption:
    """How the secret was encrypted: the parts of the broker's JWE, taken apart by the proxy."""

    epk_x: bytes
    epk_y: bytes
    wrapped_cek: bytes
    aad: bytes
    """ASCII bytes of the JWE's base64url `protected` string: the authenticated header as received."""
    iv: bytes
    tag: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class AttestationAnswer:
    """Proxy → kernel: the key, or no."""

    success: bool
    secret: bytes | None = None
    """The JWE's ciphertext."""
    decryption: Decryption | None = None
    token: str | None = None
    """The broker's compact JWS, unchanged."""
    reason: str | None = None
    """Of a refusal: the broker's code, as the proxy tells it. Never trusted, only shown."""

    def pack(self) -> bytes:
        """The message's bytes, byte for byte COCONUT's where there is no `reason`."""
        message: dict[str, object] = {"success": self.success}
        if self.secret is not None:
            message["secret"] = base64_std(self.secret)
        message["decryption"] = None if self.decryption is None else _pack_decryption(self.decryption)
        message["token"] = None if self.token is None else {"Jwt": self.token}
        if self.reason is not None:
            message["reason"] = self.reason
        return compact(message)

    @classmethod
    def parse(cls, body: Buffer) -> AttestationAnswer:
        """Read it. A reason that isn't a plain code is dropped: it goes to a console.

        Raises:
            FormatError: ``json-*``.
        """
        members = parse_object(body, what="attestation answer", max_bytes=MAX_BODY_BYTES)
        reason = members.value("reason") if "reason" in members else None
        return cls(
            success=members.flag("success"),
            secret=None if members.is_null("secret") else members.bytes_std("secret", max_bytes=_MAX_SECRET_BYTES),
            decryption=None if members.is_null("decryption") else _parse_decryption(members.members("decryption")),
            token=None
            if members.is_null("token")
            else members.members("token").text("Jwt", max_length=_MAX_SECRET_BYTES),
            reason=reason if isinstance(reason, str) and len(reason) <= 64 and _REASON.fullmatch(reason) else None,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class ChannelFrame:
    """Either direction, after attestation: one sealed message of the run-time channel, opaque to the proxy."""

    sealed: bytes

    def pack(self) -> bytes:
        """The message's bytes."""
        return compact({"channel": base64_std(self.sealed)})

    @classmethod
    def parse(cls, body: Buffer) -> ChannelFrame:
        """Read it.

        Raises:
            FormatError: ``json-*``.
        """
        members = parse_object(body, what="channel frame", max_bytes=MAX_BODY_BYTES)
        return cls(sealed=members.bytes_std("channel", max_bytes=_MAX_CHANNEL_BYTES))


def _extensions(members: Members) -> tuple[str, ...]:
    return members.texts("extensions", max_items=16, max_length=64) if "extensions" in members else ()


def _require_snp(members: Members) -> None:
    if members.text("tee", max_length=32) != "snp":
        raise ProtocolError("the peer names another kind of confidential VM", code="negotiation-tee")


def _pack_decryption(parts: Decryption) -> dict[str, object]:
    return {
        "epk": {"x": base64_std(parts.epk_x), "y": base64_std(parts.epk_y)},
        "wrapped_cek": base64_std(parts.wrapped_cek),
        "aad": base64_std(parts.aad),
        "iv": base64_std(parts.iv),
        "tag": base64_std(parts.tag),
    }


def _parse_decryption(members: Members) -> Decryption:
    epk = members.members("epk")
    return Decryption(
        epk_x=epk.bytes_std("x", max_bytes=_MAX_COORDINATE_BYTES),
        epk_y=epk.bytes_std("y", max_bytes=_MAX_COORDINATE_BYTES),
        wrapped_cek=members.bytes_std("wrapped_cek", max_bytes=1024),
        aad=members.bytes_std("aad", max_bytes=8192),
        iv=members.bytes_std("iv", max_bytes=64),
        tag=members.bytes_std("tag", max_bytes=64),
    )
