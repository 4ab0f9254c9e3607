# SPDX-License-Identifier: MIT OR Apache-2.0
"""The volume as kernel and tools see it. CocoonFS is the only format; nothing outside `storage` needs to know."""

from __future__ import annotations

from svsm.storage.cocoonfs import (
    DEFAULT_LAYOUT,
    Decision,
    Expected,
    FileInfo,
    FoundJournal,
    PreparedCommit,
    Probe,
    Transaction,
    Volume,
    probe,
    read_creation_info,
)

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
