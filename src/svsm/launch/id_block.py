# SPDX-License-Identifier: MIT OR Apache-2.0
"""Checking the ID blocks of an IGVM file: does the owner's signature cover this launch?

The AMD-SP refuses a launch whose digest is not the one in the ID block, or whose signatures are wrong. The same
checks here tell before the launch. Verification is pyca/cryptography's.
"""

from __future__ import annotations

import dataclasses
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384

from svsm.formats.errors import FormatError, IntegrityError
from svsm.formats.igvm import IgvmFile, guest_policy
from svsm.formats.igvm.id_block import split_header
from svsm.formats.igvm.layout import SnpIdBlock
from svsm.formats.snp.id_block import CURVE_P384, EcdsaSignature, IdAuth, IdBlock, PspPublicKey, key_digest

__all__ = ["IdBlockCheck", "check_id_blocks", "demand_id_blocks"]

_MAX_ID_BLOCKS: Final = 16


@dataclasses.dataclass(frozen=True, slots=True)
class IdBlockCheck:
    """What one ID block says and whether it holds."""

    block: IdBlock
    auth: IdAuth
    digest_matches: bool
    """The launch digest is the one that was signed."""
    id_signature_valid: bool
    author_signature_valid: bool | None
    """None without author key."""

    @property
    def holds(self) -> bool:
        """Whether the AMD-SP would accept it."""
        return self.digest_matches and self.id_signature_valid and self.author_signature_valid is not False

    @property
    def id_key_digest(self) -> bytes:
        """As the report will carry it: 48 bytes."""
        return key_digest(self.auth.id_key)

    @property
    def author_key_digest(self) -> bytes:
        """As the report will carry it: 48 bytes, zeroes without author key."""
        return bytes(48) if self.author_signature_valid is None else key_digest(self.auth.author_key)


def check_id_blocks(file: IgvmFile, launch_digest: bytes) -> list[IdBlockCheck]:
    """Check every ID block of `file` against its launch digest and policy.

    Raises:
        FormatError: ``igvm-duplicate`` for several policies; ``igvm-limit`` for more than 16 ID blocks.
    """
    headers = [header.body for header in file.headers if isinstance(header.body, SnpIdBlock)]
    if len(headers) > _MAX_ID_BLOCKS:
        raise FormatError("the file has too many ID blocks", code="igvm-limit", got=len(headers))
    policy = (guest_policy(file) or 0) if headers else 0
    return [_check(header, policy, launch_digest) for header in headers]


def demand_id_blocks(checks: list[IdBlockCheck], launch_digest: bytes) -> None:
    """Refuse unless there is an ID block and all hold.

    Raises:
        IntegrityError: ``id-block-absent``, ``id-block-digest`` or ``id-block-signature``.
    """
    if not checks:
        raise IntegrityError("the file has no ID block", code="id-block-absent")
    for check in checks:
        if not check.digest_matches:
            raise IntegrityError(
                "the ID block was signed for another launch",
                code="id-block-digest",
                hint="a file for a loader with native zero pages is checked with --native-zero",
                expected=check.block.launch_digest,
                got=launch_digest,
            )
        if not check.holds:
            raise IntegrityError("a signature of the ID block does not verify", code="id-block-signature")


def _check(header: SnpIdBlock, policy: int, launch_digest: bytes) -> IdBlockCheck:
    block, auth = split_header(header, policy=policy)
    author = None
    if header.author_key_enabled:
        author = _verifies(auth.author_key, auth.id_key_signature, auth.id_key.pack())
    return IdBlockCheck(
        block,
        auth,
        block.launch_digest == launch_digest,
        _verifies(auth.id_key, auth.id_block_signature, block.pack()),
        author,
    )


def _verifies(key: PspPublicKey, signature: EcdsaSignature, message: bytes) -> bool:
    x, y = key.coordinates
    if key.curve != CURVE_P384:
        return False
    try:
        public = ec.EllipticCurvePublicNumbers(x, y, ec.SECP384R1()).public_key()
    except ValueError:  # not a point of the curve
        return False
    try:
        public.verify(encode_dss_signature(*signature.values), message, ec.ECDSA(SHA384()))
    except InvalidSignature:
        return False
    return True
