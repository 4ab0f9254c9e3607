# SPDX-License-Identifier: MIT OR Apache-2.0
"""The key broker's HTTP bodies in COCONUT's dialect of the KBS protocol, both sides.

POST /kbs/v0/auth → challenge and session cookie; POST /kbs/v0/attest → token; GET /kbs/v0/resource/… → the secret as
a flattened JSON JWE. POST /svsm/v0/channel is ours: one sealed message of the run-time channel each way.

Two base64 flavours meet here: nonces and evidence are standard and padded, everything of JOSE is url-safe and bare.
The JWE's `protected` string is kept as received, because its ASCII bytes are the additional authenticated data: a
relay that parses the header and writes it again changes what the kernel authenticates.
"""

from __future__ import annotations

import dataclasses
import re

from svsm.formats.errors import FormatError, ProtocolError
from svsm.formats.negotiation import AttestationRequest, Decryption
from svsm.formats.record import Buffer
from svsm.formats.strict_json import Members, base64_std, base64_url, compact, from_base64_url, parse_object

__all__ = [
    "ATTEST_PATH",
    "AUTH_PATH",
    "CHANNEL_PATH",
    "COOKIE_NAME",
    "DEFAULT_RESOURCE_PATH",
    "ERROR_TYPE_PREFIX",
    "KBS_VERSION",
    "MAX_BODY_BYTES",
    "RESOURCE_PREFIX",
    "AttestAnswer",
    "AttestRequest",
    "AuthAnswer",
    "AuthRequest",
    "ChannelBody",
    "ErrorBody",
    "Jwe",
    "JweHeader",
    "format_cookie",
    "parse_cookie_header",
    "parse_resource_path",
]

KBS_VERSION = "0.4.0"
AUTH_PATH = "/kbs/v0/auth"
ATTEST_PATH = "/kbs/v0/attest"
RESOURCE_PREFIX = "/kbs/v0/resource/"
DEFAULT_RESOURCE_PATH = "/kbs/v0/resource/default/sample/test"
"""Hard-coded in COCONUT's proxy; our broker answers it with the key of the session's volume."""
CHANNEL_PATH = "/svsm/v0/channel"
COOKIE_NAME = "kbs-session-id"
ERROR_TYPE_PREFIX = "https://github.com/confidential-containers/kbs/errors/"

MAX_BODY_BYTES = 1 << 20
_MAX_EVIDENCE_BYTES = 256 << 10
_MAX_NONCE_BYTES = 1024
_MAX_COORDINATE_BYTES = 256
_MAX_SECRET_BYTES = 64 << 10
_MAX_TOKEN_CHARACTERS = 64 << 10
_MAX_CHANNEL_BYTES = 256 << 10

_COMPONENT = re.compile(r"[A-Za-z0-9_-]+[A-Za-z0-9_.-]*")
_SESSION = re.compile(r"[A-Za-z0-9_-]{1,128}")
_CODE = re.compile(r"[a-z0-9]+(-[a-z0-9]+){0,7}")
_JWE_ALGORITHM = "ECDH-ES+A256KW"
_JWE_ENCRYPTION = "A256GCM"
_JWE_CURVE = "P-521"


@dataclasses.dataclass(frozen=True, slots=True)
class AuthRequest:
    """POST /kbs/v0/auth."""

    def pack(self) -> bytes:
        """The body."""
        return compact({"version": KBS_VERSION, "tee": "snp", "extra-params": ""})

    @classmethod
    def parse(cls, body: Buffer) -> AuthRequest:
        """Read it; `extra-params` may be anything.

        Raises:
            FormatError: ``json-*``.
            ProtocolError: ``kbs-version`` or ``kbs-tee``.
        """
        members = parse_object(body, what="auth request", max_bytes=MAX_BODY_BYTES)
        if members.text("version", max_length=32) != KBS_VERSION:
            raise ProtocolError("the client speaks another version of the KBS protocol", code="kbs-version")
        if members.text("tee", max_length=32) != "snp":
            raise ProtocolError("the client names another kind of confidential VM", code="kbs-tee")
        return cls()


@dataclasses.dataclass(frozen=True, slots=True)
class AuthAnswer:
    """The challenge."""

    nonce: bytes

    def pack(self) -> bytes:
        """The body."""
        return compact({"nonce": base64_std(self.nonce), "extra-params": ""})

    @classmethod
    def parse(cls, body: Buffer) -> AuthAnswer:
        """Read it; `extra-params` must be there and may be anything.

        Raises:
            FormatError: ``json-*``.
        """
        members = parse_object(body, what="auth answer", max_bytes=MAX_BODY_BYTES)
        members.value("extra-params")
        return cls(nonce=members.bytes_std("nonce", max_bytes=_MAX_NONCE_BYTES))


@dataclasses.dataclass(frozen=True, slots=True)
class AttestRequest:
    """POST /kbs/v0/attest: the evidence, over this nonce and this key."""

    nonce: bytes
    key_x: bytes
    key_y: bytes
    report: bytes
    certificates: bytes | None

    @classmethod
    def from_attestation(cls, request: AttestationRequest) -> AttestRequest:
        """What the proxy makes of the kernel's request: the same values in another spelling."""
        return cls(
            nonce=request.challenge,
            key_x=request.key_x,
            key_y=request.key_y,
            report=request.report,
            certificates=request.certificates,
        )

    def pack(self) -> bytes:
        """The body, byte for byte as COCONUT's proxy writes it."""
        certificates = None if self.certificates is None else base64_std(self.certificates)
        key = {
            "kty": "EC",
            "crv": _JWE_CURVE,
            "alg": _JWE_ALGORITHM,
            "x": base64_url(self.key_x),
            "y": base64_url(self.key_y),
        }
        return compact(
            {
                "init-data": None,
                "runtime-data": {"nonce": base64_std(self.nonce), "tee-pubkey": key},
                "tee-evidence": {
                    "primary_evidence": {"certs-buf": certificates, "snp-report": base64_std(self.report)},
                    "additional_evidence": "",
                },
            }
        )

    @classmethod
    def parse(cls, body: Buffer) -> AttestRequest:
        """Read it.

        Raises:
            FormatError: ``json-*``.
            ProtocolError: ``kbs-key`` when the key is not an EC key on P-521 for ECDH-ES+A256KW.
        """
        members = parse_object(body, what="attest request", max_bytes=MAX_BODY_BYTES)
        runtime = members.members("runtime-data")
        key = runtime.members("tee-pubkey")
        for name, wanted in (("kty", "EC"), ("crv", _JWE_CURVE), ("alg", _JWE_ALGORITHM)):
            if key.text(name, max_length=32) != wanted:
                raise ProtocolError("the client's key is of a kind that is not served", code="kbs-key", field=name)
        evidence = members.members("tee-evidence").members("primary_evidence")
        certificates = None
        if not evidence.is_null("certs-buf"):
            certificates = evidence.bytes_std("certs-buf", max_bytes=_MAX_EVIDENCE_BYTES)
        return cls(
            nonce=runtime.bytes_std("nonce", max_bytes=_MAX_NONCE_BYTES),
            key_x=key.bytes_url("x", max_bytes=_MAX_COORDINATE_BYTES),
            key_y=key.bytes_url("y", max_bytes=_MAX_COORDINATE_BYTES),
            report=evidence.bytes_std("snp-report", max_bytes=_MAX_EVIDENCE_BYTES),
            certificates=certificates,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class AttestAnswer:
    """The token. Any string: the relay doesn't look inside."""

    token: str

    def pack(self) -> bytes:
        """The body."""
        return compact({"token": self.token})

    @classmethod
    def parse(cls, body: Buffer) -> AttestAnswer:
        """Read it.

        Raises:
            FormatError: ``json-*``.
        """
        members = parse_object(body, what="attest answer", max_bytes=MAX_BODY_BYTES)
        return cls(token=members.text("token", max_length=_MAX_TOKEN_CHARACTERS))


@dataclasses.dataclass(frozen=True, slots=True)
class JweHeader:
    """The protected header of ECDH-ES+A256KW on P-521 with A256GCM."""

    epk_x: bytes
    epk_y: bytes

    def protected(self) -> str:
        """base64url of compact JSON in the member order that survives COCONUT's parse-and-write-again."""
        epk = {"crv": _JWE_CURVE, "kty": "EC", "x": base64_url(self.epk_x), "y": base64_url(self.epk_y)}
        return base64_url(compact({"alg": _JWE_ALGORITHM, "enc": _JWE_ENCRYPTION, "epk": epk}))

    @classmethod
    def parse(cls, protected: str) -> JweHeader:
        """Read it. No member that would change the key derivation (`apu`, `apv`) or the processing (`crit`, `zip`).

        Raises:
            FormatError: ``json-*``.
            ProtocolError: ``jwe-header``.
        """
        header = _jwe_header(protected)
        wanted = (("alg", _JWE_ALGORITHM), ("enc", _JWE_ENCRYPTION))
        epk = header.members("epk")
        if any(header.text(name, max_length=32) != value for name, value in wanted):
            raise ProtocolError("the secret is encrypted in a way that is not served", code="jwe-header")
        if header.names & {"apu", "apv", "crit", "zip"} or epk.text("crv", max_length=32) != _JWE_CURVE:
            raise ProtocolError("the secret is encrypted in a way that is not served", code="jwe-header")
        return cls(
            epk_x=epk.bytes_url("x", max_bytes=_MAX_COORDINATE_BYTES),
            epk_y=epk.bytes_url("y", max_bytes=_MAX_COORDINATE_BYTES),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Jwe:
    """A flattened JSON JWE (RFC 7516 §7.2.2) without unprotected headers and without `aad` member."""

    protected: str
    """base64url, as received."""
    encrypted_key: bytes
    iv: bytes
    ciphertext: bytes
    tag: bytes

    def pack(self) -> bytes:
        """The body."""
        return compact(
            {
                "protected": self.protected,
                "encrypted_key": base64_url(self.encrypted_key),
                "iv": base64_url(self.iv),
                "ciphertext": base64_url(self.ciphertext),
                "tag": base64_url(self.tag),
            }
        )

    @classmethod
    def parse(cls, body: Buffer) -> Jwe:
        """Read it.

        Raises:
            FormatError: ``json-*``.
        """
        members = parse_object(body, what="JWE", max_bytes=MAX_BODY_BYTES)
        return cls(
            protected=members.text("protected", max_length=8192),
            encrypted_key=members.bytes_url("encrypted_key", max_bytes=1024),
            iv=members.bytes_url("iv", max_bytes=64),
            ciphertext=members.bytes_url("ciphertext", max_bytes=_MAX_SECRET_BYTES),
            tag=members.bytes_url("tag", max_bytes=64),
        )

    def decryption(self) -> Decryption:
        """What the proxy hands to the kernel: the parts, with the header's bytes as they came.

        Raises:
            FormatError: ``json-*`` when the header has no usable `epk`. Nothing else of it is judged here: the
                kernel does that, and the relay is not trusted anyway.
        """
        epk = _jwe_header(self.protected).members("epk")
        return Decryption(
            epk_x=epk.bytes_url("x", max_bytes=_MAX_COORDINATE_BYTES),
            epk_y=epk.bytes_url("y", max_bytes=_MAX_COORDINATE_BYTES),
            wrapped_cek=self.encrypted_key,
            aad=self.protected.encode(),
            iv=self.iv,
            tag=self.tag,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class ChannelBody:
    """POST /svsm/v0/channel, both ways: one sealed message."""

    frame: bytes

    def pack(self) -> bytes:
        """The body."""
        return compact({"frame": base64_std(self.frame)})

    @classmethod
    def parse(cls, body: Buffer) -> ChannelBody:
        """Read it.

        Raises:
            FormatError: ``json-*``.
        """
        members = parse_object(body, what="channel body", max_bytes=MAX_BODY_BYTES)
        return cls(frame=members.bytes_std("frame", max_bytes=_MAX_CHANNEL_BYTES))


@dataclasses.dataclass(frozen=True, slots=True)
class ErrorBody:
    """Body of every answer that is not 200."""

    variant: str
    """KBS error variant, e.g. "PolicyDeny"."""
    detail: str
    code: str
    """Our stable code; the proxy may pass it on as `reason`."""

    def pack(self) -> bytes:
        """The body."""
        return compact({"type": ERROR_TYPE_PREFIX + self.variant, "detail": self.detail, "code": self.code})

    @classmethod
    def code_of(cls, body: Buffer) -> str | None:
        """The code in somebody's error body, if it has a well-formed one. Never raises."""
        try:
            members = parse_object(body, what="error body", max_bytes=MAX_BODY_BYTES)
            code = members.text("code", max_length=64)
        except FormatError:
            return None
        return code if _CODE.fullmatch(code) else None


def format_cookie(session: str) -> str:
    """Value of Set-Cookie. HttpOnly and Path beyond COCONUT's own broker; Secure would stop plain HTTP relays."""
    return f"{COOKIE_NAME}={session}; Path=/; HttpOnly"


def parse_cookie_header(header: str) -> str | None:
    """The session in a Cookie header; None when there is none, or more than one."""
    found = []
    for pair in header.split(";", 64)[:64]:
        name, separator, value = pair.strip().partition("=")
        if separator and name == COOKIE_NAME:
            found.append(value)
    if len(found) != 1 or not _SESSION.fullmatch(found[0]):
        return None
    return found[0]


def parse_resource_path(path: str) -> tuple[str, str, str] | None:
    """Repository, type and tag of a resource path; None when it is not one."""
    if not path.startswith(RESOURCE_PREFIX) or len(path) > 512:
        return None
    parts = path[len(RESOURCE_PREFIX) :].split("/")
    if len(parts) != 3 or not all(_COMPONENT.fullmatch(part) for part in parts):
        return None
    return parts[0], parts[1], parts[2]


def _jwe_header(protected: str) -> Members:
    return parse_object(from_base64_url(protected, what="JWE header"), what="JWE header", max_bytes=8192)
