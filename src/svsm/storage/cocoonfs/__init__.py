# SPDX-License-Identifier: MIT OR Apache-2.0
"""CocoonFS: an encrypted, authenticated, journaled file system on a disk that nobody trusts.

Layout (`layout`, `encoding`, `integrity`, `journal`) -> core (`keys`, `entities`, `geometry`, `tree`, `blockmap`,
`allocation`, `index`, `image`, `replay`, `transaction`, `mkfs`, `provisioning`) -> `volume`, the only module that the
kernel needs. For offline tools only, and not part of the kernel: `presets`, `offline`, `group`, `check`, `repair`,
`copy`, `archive`.
All input and output goes through a `BlockDevice`; randomness is an argument.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from svsm.storage.cocoonfs.aux import AuxEntry, AuxMetadata
    from svsm.storage.cocoonfs.commit import PreparedCommit, Transaction
    from svsm.storage.cocoonfs.decision import Decision, FoundJournal
    from svsm.storage.cocoonfs.expected import Expected
    from svsm.storage.cocoonfs.headers import CreationInfo, Probe, probe, read_creation_info
    from svsm.storage.cocoonfs.layout import DEFAULT_LAYOUT, ImageLayout
    from svsm.storage.cocoonfs.provisioning import provision
    from svsm.storage.cocoonfs.volume import FileInfo, Volume

__all__ = [
    "DEFAULT_LAYOUT",
    "AuxEntry",
    "AuxMetadata",
    "CreationInfo",
    "Decision",
    "Expected",
    "FileInfo",
    "FoundJournal",
    "ImageLayout",
    "PreparedCommit",
    "Probe",
    "Transaction",
    "Volume",
    "probe",
    "provision",
    "read_creation_info",
]

_HOMES = {
    "AuxEntry": "aux",
    "AuxMetadata": "aux",
    "CreationInfo": "headers",
    "DEFAULT_LAYOUT": "layout",
    "Decision": "decision",
    "Expected": "expected",
    "FileInfo": "volume",
    "FoundJournal": "decision",
    "ImageLayout": "layout",
    "PreparedCommit": "commit",
    "Probe": "headers",
    "Transaction": "commit",
    "Volume": "volume",
    "probe": "headers",
    "provision": "provisioning",
    "read_creation_info": "headers",
}

if not TYPE_CHECKING:  # a checker that sees it takes every name for one of the package

    def __getattr__(name: str) -> object:
        """A name of the package, from its module: who asks for one does not pay for the others."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
