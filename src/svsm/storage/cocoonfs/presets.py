# SPDX-License-Identifier: MIT OR Apache-2.0
"""Configurations by name: hash family, cipher and strength, and block sizes in bytes, as a person gives them.

Which hash a strength gets follows the reference program: what has to resist collisions (nodes and data of the tree)
gets twice the strength in bits, everything else 256 bits, because an HMAC or KDF is as strong as its key.
"""

from __future__ import annotations

from svsm.formats.errors import FormatError
from svsm.storage.cocoonfs.layout import ImageLayout
from svsm.storage.cocoonfs.primitives import AES, TDES

__all__ = ["CIPHERS", "HASH_FAMILIES", "STRENGTHS", "layout_of", "names_of", "sizes_of"]

STRENGTHS = (128, 192, 256)

_HASHES: dict[tuple[str, int], tuple[int, int]] = {
    ("sha1", 128): (0x0004, 0x0004),
    ("sha2", 128): (0x000B, 0x000B),
    ("sha2", 192): (0x000C, 0x000B),
    ("sha2", 256): (0x000D, 0x000B),
    ("sha3", 128): (0x0027, 0x0027),
    ("sha3", 192): (0x0028, 0x0027),
    ("sha3", 256): (0x0029, 0x0027),
    ("sm3", 128): (0x0012, 0x0012),
}
"""(family, strength) -> (hash of nodes and data, hash of everything else)."""

_CIPHERS: dict[tuple[str, int], tuple[int, int]] = {
    **{("aes", bits): (AES, bits) for bits in STRENGTHS},
    **{("camellia", bits): (0x0026, bits) for bits in STRENGTHS},
    ("sm4", 128): (0x0013, 128),
    ("tdes", 128): (TDES, 192),
}

_SIZES = 7
"""How many bytes of a packed configuration are block sizes; algorithms follow."""

HASH_FAMILIES = tuple(dict.fromkeys(family for family, _ in _HASHES))
CIPHERS = tuple(dict.fromkeys(name for name, _ in _CIPHERS))


def _log2(name: str, size: int, unit: int) -> int:
    if size < unit or size & (size - 1):
        raise FormatError(
            f"the {name} size must be a power of two of at least {unit} bytes",
            code="cocoonfs-layout",
            field=name,
            got=size,
        )
    return (size // unit).bit_length() - 1


def layout_of(
    hash_family: str = "sha2",
    cipher: str = "aes",
    strength: int = 128,
    *,
    allocation_block_bytes: int = 128,
    io_block_bytes: int | None = None,
    data_block_bytes: int | None = None,
    tree_node_bytes: int | None = None,
    bitmap_block_bytes: int | None = None,
    leaf_node_bytes: int | None = None,
    internal_node_bytes: int | None = None,
) -> ImageLayout:
    """The configuration with these properties; what is not given is what the reference program would choose.

    Args:
        hash_family: One of `HASH_FAMILIES`.
        cipher: One of `CIPHERS`.
        strength: 128, 192 or 256 bits.
        allocation_block_bytes: A power of two from 128.
        io_block_bytes: 1 to 64 allocation blocks; 512, or one allocation block where that is larger.
        data_block_bytes: 1 to 64 allocation blocks; one IO block.
        tree_node_bytes: At least an IO block; 1024, or one IO block where that is larger.
        bitmap_block_bytes: At least an allocation block; 512, or one data block where that is larger.
        leaf_node_bytes: 1 to 64 allocation blocks; one.
        internal_node_bytes: 1 to 64 allocation blocks; one.

    Raises:
        FormatError: ``cocoonfs-strength``, ``cocoonfs-layout``, ``cocoonfs-unsupported-…``.
    """
    hashes, ciphers = _HASHES.get((hash_family, strength)), _CIPHERS.get((cipher, strength))
    if hashes is None or ciphers is None:
        raise FormatError(
            f"{hash_family} with {cipher} does not exist in strength {strength}",
            code="cocoonfs-strength",
            hint=f"hashes: {', '.join(HASH_FAMILIES)}; ciphers: {', '.join(CIPHERS)}; strengths: 128, 192, 256",
        )
    unit = allocation_block_bytes
    allocation_log2 = _log2("allocation block", unit, 128)
    io_bytes = io_block_bytes or max(512, unit)
    data_bytes = data_block_bytes or io_bytes
    strong, other = hashes
    layout = ImageLayout(
        allocation_log2,
        _log2("IO block", io_bytes, unit),
        _log2("tree node", tree_node_bytes or max(1024, io_bytes), io_bytes),
        _log2("data block", data_bytes, unit),
        _log2("bitmap block", bitmap_block_bytes or max(512, data_bytes, unit), unit),
        _log2("leaf node", leaf_node_bytes or unit, unit),
        _log2("internal node", internal_node_bytes or unit, unit),
        strong,
        strong,
        other,
        other,
        other,
        *ciphers,
    )
    layout.validate()
    return layout


def names_of(layout: ImageLayout) -> tuple[str, str, int] | None:
    """Hash family, cipher and strength of a configuration as `layout_of` takes them; None for another combination.

    Args:
        layout: The configuration; it is valid.
    """
    for family, strength in _HASHES:
        for cipher, bits in _CIPHERS:
            if bits == strength and layout_of(family, cipher, strength).pack()[_SIZES:] == layout.pack()[_SIZES:]:
                return family, cipher, strength
    return None


def sizes_of(layout: ImageLayout) -> dict[str, int]:
    """Block sizes of a configuration in bytes as `layout_of` takes them."""
    return {
        "allocation_block_bytes": layout.ab_bytes,
        "io_block_bytes": layout.io_bytes,
        "data_block_bytes": layout.data_ab * layout.ab_bytes,
        "tree_node_bytes": layout.node_bytes,
        "bitmap_block_bytes": layout.bitmap_ab * layout.ab_bytes,
        "leaf_node_bytes": layout.leaf_ab * layout.ab_bytes,
        "internal_node_bytes": layout.internal_ab * layout.ab_bytes,
    }
