# SPDX-License-Identifier: MIT OR Apache-2.0
"""Compact JWS by one pinned key: what makes the broker's answer the broker's.

The verifier knows the key and hence the algorithm before it reads a byte of the token: P-384 means ES384. The
header is compared with the only one that is ever written; nothing in it selects anything, and no key, key id or URL
in a token is looked at. `typ` separates these signatures from any other that the same key might make.
"""

from __future__ import annotations

import dataclasses

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

from svsm.formats.errors import FormatError, IntegrityError
from svsm.formats.strict_json import base64_url, compact, from_base64_url

__all__ = ["MAX_TOKEN_CHARACTERS", "SigningKey", "VerifiedToken", "verify_token"]

MAX_TOKEN_CHARACTERS = 16 << 10
_HEADER = base64_url(compact({"alg": "ES384", "typ": "svsm-release+jws"}))
_SCALAR_BYTES = 48
_ALGORITHM = ec.ECDSA(hashes.SHA384())


@dataclasses.dataclass(frozen=True, slots=True)
class VerifiedToken:
    """A token whose signature is good."""

    payload: bytes
    signing_input: bytes
    """What was signed: header and payload, without the signature (which another valid one could replace)."""


class SigningKey:
    """The broker's P-384 key."""

    def __init__(self, private_key: ec.EllipticCurvePrivateKey) -> None:
        self._private_key = private_key
        self.public_der = private_key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        """SubjectPublicKeyInfo, DER: what the owner's settings page pins."""

    @classmethod
    def generate(cls) -> SigningKey:
        """A fresh key."""
        return cls(ec.generate_private_key(ec.SECP384R1()))

    @classmethod
    def from_der(cls, der: bytes) -> SigningKey:
        """Load unencrypted PKCS #8.

        Raises:
            FormatError: ``token-key``.
        """
        try:
            key = serialization.load_der_private_key(der, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
            raise FormatError("the signing key is not a P-384 private key", code="token-key")
        return cls(key)

    def to_der(self) -> bytes:
        """Unencrypted PKCS #8; for a file that only the broker can read."""
        return self._private_key.private_bytes(
            serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    def sign_token(self, payload: bytes) -> str:
        """A compact JWS over `payload`."""
        signing_input = f"{_HEADER}.{base64_url(payload)}"
        r, s = decode_dss_signature(self._private_key.sign(signing_input.encode("ascii"), _ALGORITHM))
        raw = r.to_bytes(_SCALAR_BYTES, "big") + s.to_bytes(_SCALAR_BYTES, "big")
        return f"{signing_input}.{base64_url(raw)}"


def verify_token(token: str, *, public_der: bytes) -> VerifiedToken:
    """Check a compact JWS against the pinned key.

    Args:
        token: As received.
        public_der: SubjectPublicKeyInfo of the only accepted key, P-384.

    Raises:
        FormatError: ``token-key`` when `public_der` is not such a key.
        IntegrityError: ``token-signature`` for everything that is wrong with the token.
    """
    key = _load_public(public_der)
    parts = token.split(".", 3) if len(token) <= MAX_TOKEN_CHARACTERS else []
    try:
        if len(parts) != 3 or parts[0] != _HEADER:
            raise FormatError("not a token of this kind", code="token-signature")
        payload = from_base64_url(parts[1], what="token payload")
        raw = from_base64_url(parts[2], what="token signature")
        if len(raw) != 2 * _SCALAR_BYTES:
            raise FormatError("a signature has the wrong length", code="token-signature")
        signature = encode_dss_signature(
            int.from_bytes(raw[:_SCALAR_BYTES], "big"), int.from_bytes(raw[_SCALAR_BYTES:], "big")
        )
        signing_input = f"{parts[0]}.{parts[1]}".encode("ascii")
        key.verify(signature, signing_input, _ALGORITHM)
    except (FormatError, InvalidSignature):
        raise IntegrityError(
            "the token is not signed by the broker that this image pins",
            code="token-signature",
            hint="the proxy must lead to the broker whose public key is in the image's settings page",
        ) from None
    return VerifiedToken(payload=payload, signing_input=signing_input)


def _load_public(der: bytes) -> ec.EllipticCurvePublicKey:
    try:
        key = serialization.load_der_public_key(der)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise FormatError("the pinned broker key is not a P-384 public key", code="token-key")
    return key
