# SPDX-License-Identifier: MIT OR Apache-2.0
"""Whether a commit whose journal is durable shall happen: a question to somebody who may not be able to answer.

A journal is the first half of a two-phase commit. Who keeps a ledger of states decides the second half: *yes* carries
the journal out, *no* takes it away, and *unknown* (the ledger cannot be reached) leaves everything as it is, so that
the question can be put again. Without a ledger the answer is always yes.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import NamedTuple

from svsm.formats.errors import PolicyError, StateError

__all__ = ["Decide", "Decision", "FoundJournal", "always_yes", "half_applied", "refused", "undecided"]


class Decision(enum.Enum):
    """An answer about one commit."""

    YES = "yes"
    NO = "no"
    UNKNOWN = "unknown"


class FoundJournal(NamedTuple):
    """A commit that waits for its decision: the state it leads to, already authenticated."""

    counter: int
    root_digest: bytes


Decide = Callable[[FoundJournal], Decision]


def always_yes(found: FoundJournal) -> Decision:
    """The decision without a ledger."""
    del found
    return Decision.YES


def undecided() -> StateError:
    """For a commit that nobody has decided yet."""
    return StateError(
        "whether this commit happens is not decided yet",
        code="cocoonfs-undecided",
        hint="ask again when the ledger can be reached; until then the state before the commit holds",
    )


def refused() -> PolicyError:
    """For a commit that the decision took back."""
    return PolicyError(
        "the commit was refused and taken back; nothing was changed",
        code="cocoonfs-refused",
        hint="the ledger holds another state than this volume expects",
    )


def half_applied() -> StateError:
    """For a commit that was decided before, and must not be undone any more."""
    return StateError(
        "a pending commit was carried out in part, so the state before it is gone",
        code="cocoonfs-half-applied",
        hint="it was decided with yes before; open the volume with that decision again",
    )
