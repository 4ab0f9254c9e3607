# SPDX-License-Identifier: MIT OR Apache-2.0
"""Hashes and MACs through pyca/cryptography, so that the kernel's come from the measured libcrypto."""

from __future__ import annotations

from cryptography.hazmat.primitives import constant_time, hashes, hmac

from svsm.formats.record import Buffer

__all__ = ["equal", "hmac_sha256", "sha256", "sha512"]


def sha256(*parts: Buffer) -> bytes:
    """SHA-256 of the parts one after another: 32 bytes (FIPS 180-4)."""
    return _digest(hashes.SHA256(), parts)


def sha512(*parts: Buffer) -> bytes:
    """SHA-512 of the parts one after another: 64 bytes (FIPS 180-4)."""
    return _digest(hashes.SHA512(), parts)


def hmac_sha256(key: bytes, message: Buffer) -> bytes:
    """HMAC-SHA-256: 32 bytes (RFC 2104)."""
    mac = hmac.HMAC(key, hashes.SHA256())
    mac.update(bytes(message))
    return mac.finalize()


def equal(left: bytes, right: bytes) -> bool:
    """Whether two byte strings are equal, in time that depends on their lengths only."""
    return constant_time.bytes_eq(left, right)


def _digest(algorithm: hashes.HashAlgorithm, parts: tuple[Buffer, ...]) -> bytes:
    digest = hashes.Hash(algorithm)
    for part in parts:
        digest.update(bytes(part))
    return digest.finalize()
