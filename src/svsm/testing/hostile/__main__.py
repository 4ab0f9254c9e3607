# SPDX-License-Identifier: MIT OR Apache-2.0
"""``python -m svsm.testing.hostile [NUMBER …]``: run the attacks against the virtio driver and print the matrix.

A line per case and ring: number, ring, what came of it, the case. Exit 0 when everything is as it must be, else 1.
"""

from __future__ import annotations

import sys

from svsm.testing.hostile.attacks import ABSENT, ATTACKS, NUMBERS, Attack
from svsm.testing.hostile.trial import RINGS


def _line(number: int, ring: str, outcome: str, name: str) -> None:
    print(f"{number:2}  {ring:13}  {outcome:34}  {name}")


def _try(attack: Attack, ring: str) -> bool:
    try:
        outcome = str(attack.run(ring))
    except Exception as error:  # the finding that this program is for
        outcome = f"FINDING {type(error).__name__}: {error}"
    expected = str(attack.expected[ring])
    _line(attack.number, ring, outcome, attack.name)
    if outcome != expected:
        print(f"    must be: {expected}")
    return outcome == expected


def main(arguments: list[str]) -> int:
    """Run the attacks with these numbers, or all."""
    try:
        numbers = [int(argument) for argument in arguments] or list(NUMBERS)
    except ValueError:
        print(__doc__, file=sys.stderr)
        return 2
    wrong = count = 0
    for number in numbers:
        for attack in ATTACKS:
            if attack.number == number:
                for ring in RINGS:
                    if ring in attack.expected:
                        count += 1
                        wrong += not _try(attack, ring)
        for ring in RINGS:
            if (number, ring) in ABSENT:
                _line(number, ring, "-", ABSENT[number, ring])
    print(f"{count} cells, {wrong} not as they must be")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
