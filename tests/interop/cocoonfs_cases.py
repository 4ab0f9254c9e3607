# SPDX-License-Identifier: MIT OR Apache-2.0
"""Random configurations of CocoonFS, as this implementation and as the reference program name them."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

from svsm.storage.cocoonfs import ImageLayout
from svsm.storage.cocoonfs.presets import layout_of

__all__ = ["ALGORITHMS", "Case", "case_of"]

_OPTIONS = {
    "allocation_block_bytes": "--allocation-block-size",
    "io_block_bytes": "--io-block-size",
    "data_block_bytes": "--auth-tree-data-block-size",
    "tree_node_bytes": "--auth-tree-node-size",
    "bitmap_block_bytes": "--allocation-bitmap-file-block-size",
    "leaf_node_bytes": "--inode-index-tree-leaf-node-size",
    "internal_node_bytes": "--inode-index-tree-internal-node-size",
}
ALGORITHMS = [
    *itertools.product(("sha2", "sha3"), ("aes", "camellia"), (128, 192, 256)),
    *itertools.product(("sha2", "sha3", "sm3"), ("sm4",), (128,)),
    *itertools.product(("sm3",), ("aes", "camellia"), (128,)),
]


@dataclass(frozen=True, slots=True)
class Case:
    """What a seed chooses.

    Attributes:
        seed: The seed.
        algorithms: Hash family, cipher, strength.
        sizes: Block sizes in bytes, as `layout_of` names them.
        salt: The salt.
        size: Size of the image in bytes.
        reserve: For auxiliary metadata, in bytes; None where there is no reserve.
        announced: Whether the volume is announced first, and made by the other side.
        trim: Whether our commits give blocks up.
        many: Whether there are enough files for an index of several levels.
    """

    seed: int
    algorithms: tuple[str, str, int]
    sizes: dict[str, int]
    salt: bytes
    size: int
    reserve: int | None
    announced: bool
    trim: bool
    many: bool

    @property
    def layout(self) -> ImageLayout:
        """The configuration."""
        family, cipher, strength = self.algorithms
        return layout_of(family, cipher, strength, **self.sizes)

    @property
    def options(self) -> list[str]:
        """What the program is told of it, the reserve for auxiliary metadata aside."""
        family, cipher, strength = self.algorithms
        sizes = [item for name, value in self.sizes.items() for item in (_OPTIONS[name], f"{value}B")]
        names = ["-H", family, "-C", cipher, "-t", str(strength), "-I", self.salt.hex()]
        return [*names, "-s", f"{self.size // 128 * 128}B", *sizes]

    @property
    def operations(self) -> list[str]:
        """What is done in both directions."""
        chosen = {"announce": self.announced, "mkfs": not self.announced, "trim": self.trim, "many files": self.many}
        always = ["create", "replace", "grow", "unlink", "auxiliary metadata", "journal"]
        return [*always, *(name for name, taken in chosen.items() if taken)]


def case_of(seed: int) -> Case:
    """The configuration of a seed."""
    rng = random.Random(f"configuration {seed}")
    unit = 128 << rng.choice([0, 0, 1, 2, 5])
    io = unit << rng.randint(0, 6 if unit < 1024 else 2)
    sizes = {
        "allocation_block_bytes": unit,
        "io_block_bytes": io,
        "data_block_bytes": unit << rng.randint(0, 6 if unit < 1024 else 2),
        "tree_node_bytes": io << rng.randint(0, 3) if io > 128 else 256,
        "bitmap_block_bytes": unit << rng.randint(0, 4),
        "leaf_node_bytes": unit << rng.randint(0, 3),
        "internal_node_bytes": unit << rng.randint(0, 3),
    }
    largest = max(io, sizes["data_block_bytes"], sizes["tree_node_bytes"])
    size = max(256 << 10, 96 * largest) + 512 * rng.randint(0, 40) // largest * largest
    return Case(
        seed,
        ALGORITHMS[seed % len(ALGORITHMS)],
        sizes,
        rng.randbytes(rng.randint(0, 255)),
        size,
        (None, 500, 1000)[seed % 3],
        announced=seed % 4 == 1,
        trim=seed % 2 == 0,
        many=seed % 5 == 0,
    )
