# SPDX-License-Identifier: MIT OR Apache-2.0
"""CocoonFS: an encrypted, authenticated, journaled file system on a disk that nobody trusts.

Layout (`layout`, `encoding`, `integrity`, `journal`) -> core (`keys`, `entities`, `geometry`, `tree`, `blockmap`,
`allocation`, `index`, `image`, `replay`, `transaction`, `mkfs`) -> `volume`, the only module that the kernel needs. For
offline tools only, and not part of the kernel: `group`, `check`, `repair`, `copy`, `archive`.
All input and output goes through a `BlockDevice`; randomness is an argument.
"""

from __future__ import annotations

from svsm.storage.cocoonfs.commit import PreparedCommit, Transaction
from svsm.storage.cocoonfs.decision import Decision, FoundJournal
from svsm.storage.cocoonfs.layout import DEFAULT_LAYOUT, ImageLayout
from svsm.storage.cocoonfs.volume import FileInfo, Probe, Volume, probe

__all__ = [
    "DEFAULT_LAYOUT",
    "Decision",
    "FileInfo",
    "FoundJournal",
    "ImageLayout",
    "PreparedCommit",
    "Probe",
    "Transaction",
    "Volume",
    "probe",
]
