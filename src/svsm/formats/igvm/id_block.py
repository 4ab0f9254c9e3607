# SPDX-License-Identifier: MIT OR Apache-2.0
"""From an IGVM file's ID block header to what SNP_LAUNCH_FINISH takes.

The header holds the same data in another arrangement, without the policy, which is in GUEST_POLICY and is part of
what the ID key signed. The header's `reserved` word in a key is no part of the form that the AMD-SP hashes. Nothing
is judged here: the AMD-SP, or `svsm.launch.id_block`, does that.
"""

from __future__ import annotations

from typing import Final

from svsm.formats.igvm.layout import PublicKey, Signature, SnpIdBlock
from svsm.formats.snp.id_block import EcdsaSignature, IdAuth, IdBlock, PspPublicKey

__all__ = ["split_header"]

_COMPONENT: Final = bytes(72)
_NO_SIGNATURE: Final = EcdsaSignature(_COMPONENT, _COMPONENT, bytes(368))
_NO_KEY: Final = PspPublicKey(0, _COMPONENT, _COMPONENT, bytes(880))


def split_header(header: SnpIdBlock, *, policy: int) -> tuple[IdBlock, IdAuth]:
    """What a loader passes to SNP_LAUNCH_FINISH for an ID block header.

    Args:
        header: From the file.
        policy: Of the file's GUEST_POLICY.
    """
    block = IdBlock(header.ld, header.family_id, header.image_id, header.version, header.guest_svn, policy)
    enabled = bool(header.author_key_enabled)
    auth = IdAuth(
        header.id_key_algorithm,
        header.author_key_algorithm if enabled else 0,
        bytes(56),
        _signature(header.id_key_signature),
        _key(header.id_public_key),
        bytes(60),
        _signature(header.author_key_signature) if enabled else _NO_SIGNATURE,
        _key(header.author_public_key) if enabled else _NO_KEY,
        bytes(892),
    )
    return block, auth


def _key(key: PublicKey) -> PspPublicKey:
    return PspPublicKey(key.curve, key.qx, key.qy, bytes(880))


def _signature(signature: Signature) -> EcdsaSignature:
    return EcdsaSignature(signature.r, signature.s, bytes(368))
