# SPDX-License-Identifier: MIT OR Apache-2.0
"""The volume as kernel and tools see it. CocoonFS is the only format; nothing outside `storage` needs to know."""

from __future__ import annotations

from svsm.storage.cocoonfs.commit import PreparedCommit, Transaction
from svsm.storage.cocoonfs.decision import Decision, FoundJournal
from svsm.storage.cocoonfs.expected import Expected
from svsm.storage.cocoonfs.headers import Probe, probe, read_creation_info
from svsm.storage.cocoonfs.layout import DEFAULT_LAYOUT
from svsm.storage.cocoonfs.volume import FileInfo, Volume

__all__ = [
    "DEFAULT_LAYOUT",
    "Decision",
    "Expected",
    "FileInfo",
    "FoundJournal",
    "PreparedCommit",
    "Probe",
    "Transaction",
    "Volume",
    "probe",
    "read_creation_info",
]
