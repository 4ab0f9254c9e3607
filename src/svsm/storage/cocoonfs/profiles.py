# SPDX-License-Identifier: MIT OR Apache-2.0
"""Named block sizes: the reference program's, and others that were chosen by measurement for our volumes.

Both are plain CocoonFS, which any implementation opens. The tuned ones authenticate larger blocks: fewer MACs and a
smaller tree for each byte, paid for with more bytes hashed by a small change, and with 512 bytes for the smallest file.
"""

from __future__ import annotations

from svsm.storage.cocoonfs.layout import ImageLayout
from svsm.storage.cocoonfs.presets import layout_of, sizes_of

__all__ = ["PROFILES", "REFERENCE", "TUNED", "profile_of"]

REFERENCE: dict[str, int] = {}
"""What `layout_of` takes to do as the reference program does: nothing."""

TUNED: dict[str, int] = {
    "allocation_block_bytes": 512,
    "io_block_bytes": 4096,
    "data_block_bytes": 4096,
    "tree_node_bytes": 4096,
}
"""An IO block of 4 KiB is also what today's disks write in one piece."""

PROFILES = {"reference": REFERENCE, "tuned": TUNED}
"""By name; each goes with any algorithms."""


def profile_of(layout: ImageLayout) -> str | None:
    """The name of the profile whose block sizes a configuration has, whatever its algorithms are."""
    for name, sizes in PROFILES.items():
        if sizes_of(layout_of("sha2", "aes", 128, **sizes)) == sizes_of(layout):
            return name
    return None
