# SPDX-License-Identifier: MIT OR Apache-2.0
"""Power cuts during everything that writes, enumerated: what was there before or after it, never anything else.

Each workload promises how many cases its enumeration has, at least; their sums are what `docs/volume.md` says, and
`./run test` prints how many there were. A barrier that is left out must be noticed, or stand in `UNNOTICED` with its
reason.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import pytest

from svsm.testing.powercut import Mark
from tests.unit.storage.cocoonfs import workloads
from tests.unit.storage.cocoonfs.cuts import Judgements, cases, enumerate_cuts
from tests.unit.storage.cocoonfs.recorder import CONFIGURATIONS

# At least so many cases: in the quick run, with trims on blocks of 512 bytes; in the long one, in all configurations.
PROMISED: dict[str, tuple[int, int]] = {
    "create_replace_unlink": (600, 12300),
    "grow_and_shrink": (900, 15350),
    "many_files": (450, 8600),
    "aux_with_key": (500, 10950),
    "aux_without_key": (50, 400),
    "much_aux_without_key": (0, 4950),
    "over_a_torn_head": (400, 8450),
    "groups": (380, 7650),
    "decided_no": (200, 4300),
    "decided_later": (380, 7200),
    "replay_at_open": (450, 8300),
    "taken_back_at_open": (140, 3050),
    "creation_over_nothing": (430, 6750),
    "creation_over_a_volume": (430, 6750),
    "first_format": (450, 11000),
    "first_format_from_the_backup": (450, 10750),
    "announcing_over_a_volume": (65, 1000),
    "announcing_over_an_interrupted_creation": (75, 1050),
    "repair_of_torn_parts": (180, 3200),
    "repair_of_a_leak": (240, 4850),
}
QUICK = [name for name, (quick, _) in PROMISED.items() if quick]
TRIMS = CONFIGURATIONS[1]


def test_what_is_promised() -> None:
    """The sums, and that no workload is left out."""
    assert set(PROMISED) == {workload.__name__ for workload in workloads.WORKLOADS}
    assert sum(quick for quick, _ in PROMISED.values()) >= 5_000
    assert sum(long for _, long in PROMISED.values()) >= 100_000


@pytest.mark.parametrize("name", QUICK)
def test_old_or_new(name: str, record_property: Callable[[str, object], None]) -> None:
    count = enumerate_cuts(getattr(workloads, name)(TRIMS), samples=2, every=6)
    record_property("crash cases", count.cases)
    assert count.faults == []
    assert count.cases >= PROMISED[name][0]
    assert len(count.seen) >= 2


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", PROMISED)
def test_old_or_new_at_length(name: str, record_property: Callable[[str, object], None]) -> None:
    total = 0
    much = name == "much_aux_without_key"
    for configuration in CONFIGURATIONS:
        count = enumerate_cuts(
            getattr(workloads, name)(configuration), samples=2 if much else 100, every=6 if much else 1
        )
        assert count.faults == []
        assert len(count.seen) >= 2
        total += count.cases
    record_property("crash cases", total)
    assert total >= PROMISED[name][1]


@pytest.mark.parametrize("name", ["create_replace_unlink", "aux_without_key", "first_format"])
def test_what_is_not_opened_again(name: str) -> None:
    """Where the enumeration takes an outcome over from an earlier medium, opening comes to the same."""
    workload = getattr(workloads, name)(TRIMS)
    judgements = Judgements(workload.judge, workload.block_size)
    for case in itertools.islice(cases(workload.initial, workload.events, samples=2, every=5), 0, None, 12):
        afresh = Judgements(workload.judge, workload.block_size).of(case.content)
        assert judgements.of(case.content) == afresh, case.how


_CHECKSUM = (
    "a protected extent of which only a part arrived does not verify; the format asks for zeros first all the same"
)
_ONE_COPY = "all of it happens to one copy while the other is whole; only the last barrier keeps them apart"
_STILL_NO = "nothing is lost where the decision is no; with yes it is noticed (decided_later, behind 'prepared')"
_WAS_BLANK = "there was no magic to be taken away; over a volume it is noticed (creation_over_a_volume)"
_BACKUP_COUNTS = "the copy in the backup place is whole, and counts if the header at the beginning does not verify"
_HEADER_COUNTS = (
    "the backup does not count while the static header is intact, and what follows ends it or writes it anew"
)
_OLD_ALLOWED = "until it is reported, the older announcement may be found; a later barrier makes its end durable"

# Barriers (numbers in the recording) whose absence no enumerated crash shows.
UNNOTICED: dict[str, dict[int, str]] = {
    "aux_without_key": dict.fromkeys((0, 2, 4, 6), _CHECKSUM),
    "over_a_torn_head": {0: _CHECKSUM},
    "decided_no": {1: _STILL_NO},
    "creation_over_nothing": {0: _WAS_BLANK},
    "first_format": {
        0: _WAS_BLANK,
        1: _CHECKSUM,
        3: _BACKUP_COUNTS,
        6: _HEADER_COUNTS,
        7: _HEADER_COUNTS,
    },
    "first_format_from_the_backup": {0: _BACKUP_COUNTS, 3: _HEADER_COUNTS, 4: _HEADER_COUNTS},
    "announcing_over_a_volume": {
        1: _CHECKSUM,
        3: _CHECKSUM,
        4: _CHECKSUM,
        6: _BACKUP_COUNTS,
        7: _CHECKSUM,
        9: _HEADER_COUNTS,
    },
    "announcing_over_an_interrupted_creation": {
        0: _OLD_ALLOWED,
        1: _OLD_ALLOWED,
        2: _CHECKSUM,
        4: _CHECKSUM,
        5: _CHECKSUM,
        7: _BACKUP_COUNTS,
        8: _CHECKSUM,
        10: _HEADER_COUNTS,
    },
    "repair_of_torn_parts": {0: _CHECKSUM, 1: _ONE_COPY, 2: _CHECKSUM, 3: _ONE_COPY, 4: _ONE_COPY},
}


def _unnoticed(name: str, samples: int, every: int) -> set[int]:
    workload = getattr(workloads, name)(TRIMS)
    return {
        barrier
        for barrier in range(workload.barriers)
        if not enumerate_cuts(workload, samples=samples, every=every, without=[barrier], first_fault=True).faults
    }


def test_each_barrier_of_a_commit_is_needed() -> None:
    """Two consecutive transactions with trims on: four barriers each, and each is noticed where it is missing."""
    assert workloads.create_replace_unlink(TRIMS).barriers == 8
    assert _unnoticed("create_replace_unlink", samples=4, every=3) == set()


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [name for name in PROMISED if name != "much_aux_without_key"])
def test_each_barrier_is_needed(name: str) -> None:
    assert _unnoticed(name, samples=20, every=1) == set(UNNOTICED.get(name, {}))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_barriers_between_extents_are_needed() -> None:
    """One change of much auxiliary metadata without the key: of the three barriers of each extent the last is noticed.

    The other two, behind its zeros and behind its tail, keep parts of one extent apart, which its checksum tells.
    """
    whole = workloads.much_aux_without_key(TRIMS)
    end = whole.events.index(Mark("started 1"))
    workload = dataclasses.replace(whole, events=whole.events[:end])
    assert workload.barriers % 3 == 0
    for barrier in range(workload.barriers):
        count = enumerate_cuts(workload, samples=1, every=6, without=[barrier], first_fault=True)
        assert bool(count.faults) == (barrier % 3 == 2), f"barrier {barrier}"
