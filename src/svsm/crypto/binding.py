# SPDX-License-Identifier: MIT OR Apache-2.0
"""What kernel and broker both compute over one attestation: REPORT_DATA, the key hash, the key confirmation."""

from __future__ import annotations

from svsm.crypto.digests import hmac_sha256, sha256, sha512
from svsm.crypto.kdf import KEY_CONFIRMATION, hkdf

__all__ = ["key_confirmation", "key_hash", "report_data"]


def report_data(key_x: bytes, key_y: bytes, challenge: bytes) -> bytes:
    """SHA-512(x ‖ y ‖ challenge), 64 bytes: what ties a report to one key and one challenge (COCONUT's order)."""
    return sha512(key_x, key_y, challenge)


def key_hash(key_x: bytes, key_y: bytes) -> bytes:
    """SHA-256(x ‖ y), 32 bytes: how the token names the kernel's key."""
    return sha256(key_x, key_y)


def key_confirmation(volume_key: bytes, *, challenge: bytes, key_x: bytes, key_y: bytes) -> bytes:
    """HMAC(KDF(volume key), SHA-256(challenge ‖ x ‖ y)), 32 bytes: the signer knew the key that was wrapped."""
    mac_key = hkdf(volume_key, salt=None, info=KEY_CONFIRMATION)
    return hmac_sha256(mac_key, sha256(challenge, key_x, key_y))
