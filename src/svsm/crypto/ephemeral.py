# SPDX-License-Identifier: MIT OR Apache-2.0
"""Ephemeral P-521 keys: the kernel's, one per attestation attempt, and the broker's.

Coordinates travel as 66 bytes big-endian each, leading zeros kept; any other length is refused, because the length
is part of what REPORT_DATA's hash can be confused about.
"""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric import ec

from svsm.formats.errors import FormatError

__all__ = ["COORDINATE_BYTES", "EphemeralKey", "check_point"]

COORDINATE_BYTES = 66
"""Width of a P-521 coordinate."""


class EphemeralKey:
    """A P-521 key pair whose private half never leaves the object."""

    def __init__(self, private_key: ec.EllipticCurvePrivateKey) -> None:
        numbers = private_key.public_key().public_numbers()
        self._private_key = private_key
        self.x = numbers.x.to_bytes(COORDINATE_BYTES, "big")
        """Public x, 66 bytes big-endian."""
        self.y = numbers.y.to_bytes(COORDINATE_BYTES, "big")
        """Public y, 66 bytes big-endian."""

    @classmethod
    def generate(cls) -> EphemeralKey:
        """A fresh key."""
        return cls(ec.generate_private_key(ec.SECP521R1()))

    def exchange(self, x: bytes, y: bytes) -> bytes:
        """ECDH with the peer's public point.

        Returns:
            The shared x coordinate, 66 bytes.

        Raises:
            FormatError: ``key-point``.
        """
        return self._private_key.exchange(ec.ECDH(), check_point(x, y))


def check_point(x: bytes, y: bytes) -> ec.EllipticCurvePublicKey:
    """The public key at these coordinates.

    Raises:
        FormatError: ``key-point`` when they are not 66 bytes each or not a point of P-521.
    """
    try:
        if len(x) != COORDINATE_BYTES or len(y) != COORDINATE_BYTES:
            raise ValueError
        numbers = ec.EllipticCurvePublicNumbers(int.from_bytes(x, "big"), int.from_bytes(y, "big"), ec.SECP521R1())
        return numbers.public_key()
    except ValueError:
        raise FormatError("a public key is not a point of P-521", code="key-point") from None
