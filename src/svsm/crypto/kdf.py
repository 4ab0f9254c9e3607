# SPDX-License-Identifier: MIT OR Apache-2.0
"""Key derivation: JOSE's Concat KDF for the wrapped secret, HKDF for everything that is ours.

Every use of HKDF has a label of its own (`info`), listed here so that no two uses can share one:

* ``svsm key confirmation v1`` - MAC key under which the broker proves that it knows the volume key;
* ``svsm run-time channel v1 kernel to broker`` and ``… broker to kernel`` - one key per direction;
* ``svsm vault v1 …`` - the wrapping key of one volume's secret in the broker's vault.
"""

from __future__ import annotations

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.concatkdf import ConcatKDFHash
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

__all__ = [
    "CHANNEL_TO_BROKER",
    "CHANNEL_TO_KERNEL",
    "KEY_CONFIRMATION",
    "VAULT_PREFIX",
    "concat_kdf",
    "hkdf",
]

KEY_CONFIRMATION = b"svsm key confirmation v1"
CHANNEL_TO_BROKER = b"svsm run-time channel v1 kernel to broker"
CHANNEL_TO_KERNEL = b"svsm run-time channel v1 broker to kernel"
VAULT_PREFIX = b"svsm vault v1 "


def concat_kdf(z: bytes, *, algorithm: bytes, length: int) -> bytes:
    """The single-step KDF of ECDH-ES (NIST SP 800-56A, RFC 7518 §4.6.2) with SHA-256, empty apu and apv.

    Args:
        z: The ECDH shared secret, at the curve's full width.
        algorithm: AlgorithmID, e.g. ``b"ECDH-ES+A256KW"``.
        length: Of the key to derive, in bytes.
    """
    other_info = len(algorithm).to_bytes(4, "big") + algorithm + bytes(4) + bytes(4) + (8 * length).to_bytes(4, "big")
    return ConcatKDFHash(algorithm=hashes.SHA256(), length=length, otherinfo=other_info).derive(z)


def hkdf(secret: bytes, *, salt: bytes | None, info: bytes, length: int = 32) -> bytes:
    """HKDF-SHA-256 (RFC 5869), extract and expand."""
    return HKDF(algorithm=hashes.SHA256(), length=length, salt=salt, info=info).derive(secret)
