# SPDX-License-Identifier: MIT OR Apache-2.0
"""CocoonFS: an encrypted, authenticated, journaled file system on a disk that nobody trusts.

Layout (`layout`, `encoding`, `integrity`, `journal`) -> core (`keys`, `entities`, `geometry`, `tree`, `blockmap`,
`allocation`, `index`, `image`, `replay`, `transaction`, `mkfs`, `provisioning`) -> `volume`, the only module that the
kernel needs. For offline tools only, and not part of the kernel: `presets`, `offline`, `group`, `check`, `repair`,
`copy`, `archive`.
All input and output goes through a `BlockDevice`; randomness is an argument.
"""

from __future__ import annotations

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
