# SPDX-License-Identifier: MIT OR Apache-2.0
"""Commits by a program with a fault: how a volume gets into a state that is authentic and wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

from svsm.storage.cocoonfs import Volume
from svsm.storage.cocoonfs import transaction as transaction_module

__all__ = ["commit_with_a_fault", "leak"]


def commit_with_a_fault(volume: Volume, fault: Callable[[Any], None]) -> None:
    """Write a file (inode 30), and do `fault` to the layout of that commit before its index is laid out."""
    original = transaction_module._Layout._index

    def faulty(layout: Any) -> object:
        fault(layout)
        return original(layout)

    with mock.patch.object(transaction_module._Layout, "_index", faulty), volume.transaction() as transaction:
        transaction.write(30, b"thirty")


def leak(layout: Any) -> None:
    """Twice, blocks are taken and never used: 6 and 3 allocation blocks in turn."""
    for _ in range(2):
        layout._lay(layout.space.pieces(6, 1), bytes(6 * layout.layout.ab_bytes))
        layout.space.pieces(3, 1)
