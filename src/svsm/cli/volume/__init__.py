# SPDX-License-Identifier: MIT OR Apache-2.0
"""`svsm volume`: make, look into, change, verify and move CocoonFS volumes, offline.

Verbs that look write nothing, a pending commit included: it is shown as carried out, in memory. Verbs that change
take the lock that a running machine holds, and are refused while one does. Each module adds the verbs of one kind, and
imports what they need when they run; a command line that names a verb does not pay for the others.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from typing import Protocol, cast

from svsm.cli.volume.words import FIRST_INODE, Verbs

__all__ = ["HELP", "configure"]

HELP = "make, look into, change and verify CocoonFS volumes offline"
_MODULES = {
    "making": ("create", "provision"),
    "looks": ("info", "ls", "read"),
    "changes": ("write", "rm", "batch"),
    "verifying": ("check", "repair"),
    "records": ("aux",),
    "drawing": ("map",),
    "archives": ("export", "import"),
    "rebuilding": ("resize", "rekey"),
}


class _Module(Protocol):
    def add_verbs(self, verbs: Verbs[argparse.ArgumentParser]) -> None:
        """Add the verbs of this module."""


def configure(parser: argparse.ArgumentParser, words: Sequence[str] = ()) -> None:
    """Add the verbs of `svsm volume`.

    Args:
        parser: Of the group.
        words: What stands behind the group's name; where the first of them is a verb, only its module is loaded.
    """
    parser.epilog = (
        f"A file in a volume has no name but a number (INODE), which whoever writes it chooses, from {FIRST_INODE} on. "
        "svsm volume VERB --help says more."
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    named = [module for module, names in _MODULES.items() if words and words[0] in names]
    for name in named or _MODULES:
        cast(_Module, importlib.import_module(f"{__name__}.{name}")).add_verbs(verbs)
