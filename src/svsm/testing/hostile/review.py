# SPDX-License-Identifier: MIT OR Apache-2.0
"""The review of the virtio driver: `svsm.testing.review` over the attacks of `svsm.testing.hostile`."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Final

from svsm.testing.hostile.review_rows import ROWS
from svsm.testing.review import Case, Review

if TYPE_CHECKING:
    from svsm.testing.hostile.catalogue import Attack

__all__ = ["REVIEW"]

_HEAD: Final = """# Review: what a virtio disk controls

Made from `svsm.testing.hostile.review_rows` by `python -m svsm.testing.reviews virtio`; a test fails when it differs.

Everything below is written by the device or its host. "Checked in" is the function that judges it; "noticed by" names
attacks of `svsm.testing.hostile.attacks`, of which at least one no longer gets what it should when the check is taken
out of the source: the tests do that, row by row. The last column is what `svsm fuzz review` measured: the target that
found the removal by itself, from an empty corpus, with the processor time and the number of inputs that it took.
Where no attack sees the removal through the whole driver, the row says why, or names the unit test of the part that
fails without the check; one with neither attack, unit test nor target says why there is nothing to take out.
What a device controls and the driver never looks at (descriptors and available ring after they were written,
indirect tables, vendor id, topology, geometry, seg_max) has no row: there is nothing to check.
"""


def _cases(attacks: ModuleType, names: Sequence[str]) -> Iterator[Case]:
    for attack in attacks.ATTACKS:
        if attack.name in names:
            for ring, expected in attack.expected.items():
                yield Case(f"{attack.name} ({ring})", functools.partial(_outcome, attack, ring), str(expected))


def _outcome(attack: Attack, ring: str) -> str:
    return str(attack.run(ring))


REVIEW: Final = Review(
    name="virtio",
    package="svsm.storage.drivers.virtio",
    rows=ROWS,
    head=_HEAD,
    attacker="device",
    rebuilt=("svsm.testing.hostile", "svsm.testing.virtio_harness"),
    attacks="svsm.testing.hostile.attacks",
    cases=_cases,
    targets={"": "virtio-mmio-split", "packed": "virtio-mmio-packed"},
)
