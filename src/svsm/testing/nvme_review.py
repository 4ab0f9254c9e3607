# SPDX-License-Identifier: MIT OR Apache-2.0
"""The review of the NVMe driver: `svsm.testing.review` over the attacks of `svsm.testing.nvme_attacks`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Final

from svsm.testing.nvme_review_rows import ROWS
from svsm.testing.review import Case, Review

__all__ = ["REVIEW"]

_HEAD: Final = """# Review: what an NVMe controller controls

Made from `svsm.testing.nvme_review_rows` by `python -m svsm.testing.reviews nvme`; a test fails when it differs.

Everything below is written by the controller or its host. "Checked in" is the function that judges it; "noticed by"
names attacks of `svsm.testing.nvme_attacks`, of which at least one no longer gets what it should when the check is
taken out of the source: the tests do that, row by row. The last column is what `svsm fuzz review` measured: the target
that found the removal by itself, from an empty corpus, with the processor time and the number of inputs that it took.
Where no attack sees the removal through the whole driver, the row says why, or names the unit test of the part that
fails without the check; one with neither attack, unit test nor target says why there is nothing to take out.
What a controller controls and the driver never looks at (submission queue entries and PRP lists after they were
written, the version register, serial number and names, NCAP, NUSE, reserved fields) has no row: there is nothing to
check. What no check can find (old contents replayed, sectors swapped, data corrupted, a flush that did nothing) is for
the file system above: it authenticates.
"""


def _cases(attacks: ModuleType, names: Sequence[str]) -> Iterator[Case]:
    for attack in attacks.ATTACKS:
        if attack.name in names:
            yield Case(attack.name, attack.run, attack.expected)


REVIEW: Final = Review(
    name="nvme",
    package="svsm.storage.drivers.nvme",
    rows=ROWS,
    head=_HEAD,
    attacker="controller",
    rebuilt=("svsm.testing.nvme_model", "svsm.testing.nvme_attacks", "svsm.testing.virtio_harness"),
    attacks="svsm.testing.nvme_attacks",
    cases=_cases,
    targets={"": "nvme", "pci": "nvme-pci"},
)
