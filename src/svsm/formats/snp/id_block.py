# SPDX-License-Identifier: MIT OR Apache-2.0
"""ID block and ID authentication information of SNP_LAUNCH_FINISH (AMD 56860 rev 1.58 §8.18, tables 74 to 76).

The owner of a guest signs what the guest must be (digest, policy, identity) with the ID key; an author key may sign
the ID key. The firmware refuses a launch that is something else, and reports show the digests of both keys.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Final

from svsm.formats.record import U32, U64, Bytes, Nested, Record, record

__all__ = [
    "ALGORITHM_ECDSA_P384_SHA384",
    "CURVE_P384",
    "EcdsaSignature",
    "IdAuth",
    "IdBlock",
    "PspPublicKey",
    "key_digest",
]

ALGORITHM_ECDSA_P384_SHA384: Final = 1
CURVE_P384: Final = 2


@record(size=512, byte_order="little")
class EcdsaSignature(Record):
    """R and S, little-endian, left-aligned."""

    r: Annotated[bytes, Bytes(72)]
    s: Annotated[bytes, Bytes(72)]
    reserved_90: Annotated[bytes, Bytes(368)]

    @property
    def values(self) -> tuple[int, int]:
        """R and S as integers."""
        return int.from_bytes(self.r, "little"), int.from_bytes(self.s, "little")


@record(size=0x404, byte_order="little")
class PspPublicKey(Record):
    """A public key as the firmware takes and hashes it."""

    curve: U32
    qx: Annotated[bytes, Bytes(72)]
    qy: Annotated[bytes, Bytes(72)]
    reserved_94: Annotated[bytes, Bytes(880)]

    @property
    def coordinates(self) -> tuple[int, int]:
        """The point; whether it lies on the curve is for who uses it."""
        return int.from_bytes(self.qx, "little"), int.from_bytes(self.qy, "little")


@record(size=96, byte_order="little")
class IdBlock(Record):
    """What the ID key signs."""

    launch_digest: Annotated[bytes, Bytes(48)]
    family_id: Annotated[bytes, Bytes(16)]
    image_id: Annotated[bytes, Bytes(16)]
    version: U32
    guest_svn: U32
    policy: U64


@record(size=4096, byte_order="little")
class IdAuth(Record):
    """Who vouches for an ID block."""

    id_key_algorithm: U32
    author_key_algorithm: U32
    reserved_008: Annotated[bytes, Bytes(56)]
    id_block_signature: Annotated[EcdsaSignature, Nested()]
    id_key: Annotated[PspPublicKey, Nested()]
    reserved_644: Annotated[bytes, Bytes(60)]
    id_key_signature: Annotated[EcdsaSignature, Nested()]
    author_key: Annotated[PspPublicKey, Nested()]
    reserved_c84: Annotated[bytes, Bytes(892)]


def key_digest(key: PspPublicKey) -> bytes:
    """SHA-384 of the key in its 0x404-byte form: what a report shows."""
    return hashlib.sha384(key.pack()).digest()
