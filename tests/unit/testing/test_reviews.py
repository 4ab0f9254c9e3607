# SPDX-License-Identifier: MIT OR Apache-2.0
"""The reviews of the drivers: every check is where it says, and taking it out is noticed, by attacks and by fuzzers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from svsm.fuzz.review import find_removal
from svsm.testing.review import Case, Review, Row, markdown, notices, place, without
from svsm.testing.reviews import FOUND, REVIEWS, read_found

_ROOT = Path(__file__).resolve().parents[3]
_ALL = [(review, row) for review in REVIEWS for row in review.rows]
_ATTACKED = [(review, row) for review, row in _ALL if row.attacks]
_TESTED = [(review, row) for review, row in _ALL if row.test]
_FUZZED = [(review, row) for review, row in _ALL if review.target_of(row)]
_SECONDS = 60.0
"""Of processor time: what a fuzzer may take to find that a check is gone."""
_SLOW = ("no completion", "interrupts without end", "CSTS.RDY and CAP.TO")
"""Without these the attacked driver goes on until its clock is tired of it: seconds."""


_SAMPLE = ("SQID", "CID, range", "desc.id", "used.ring[].id, bits 16 to 31 and range", "MAGIC", "length of a flush")
"""Of the fuzzed rows, what is part of each run."""


def _named(rows: list[tuple[Review, Row]], sample: tuple[Row, ...]) -> list[object]:
    return [
        pytest.param(
            review,
            row,
            id=f"{review.name}-{row.name}",
            marks=() if row in sample and row.field not in _SLOW else pytest.mark.long,
        )
        for review, row in rows
    ]


@pytest.mark.parametrize(("review", "row"), _named(_ATTACKED, tuple(row for _, row in _ATTACKED[::7])))
def test_taking_the_check_out_is_noticed(review: Review, row: Row) -> None:
    assert notices(review, row)


def _unit_test(review: Review, row: Row, *words: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "tests.unit.testing.without_check", review.name, row.name, *words]
    ended = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=100, check=False)
    return ended.returncode, ended.stdout + ended.stderr


@pytest.mark.parametrize(("review", "row"), _named(_TESTED, tuple(row for _, row in _TESTED[::9])))
def test_a_unit_test_fails_without_the_check_and_only_then(review: Review, row: Row) -> None:
    code, said = _unit_test(review, row, "--whole")
    assert code == pytest.ExitCode.OK, said
    code, said = _unit_test(review, row)
    assert code == pytest.ExitCode.TESTS_FAILED, said


@pytest.mark.parametrize(("review", "row"), _named(_FUZZED, tuple(row for _, row in _FUZZED if row.field in _SAMPLE)))
def test_a_fuzzer_finds_that_the_check_is_gone(review: Review, row: Row) -> None:
    found = find_removal(review, row, seconds=_SECONDS)
    assert found is not None
    assert found.seconds < _SECONDS


def test_rows_are_about_what_is_there() -> None:
    for review, row in _ALL:
        assert place(review, row)
        assert row.without != row.check or row.reason
        assert len(row.reason) > 20 or not row.reason, row.name
        # What is said not to matter to the driver as a whole is seen by a unit test, or cannot be taken out.
        assert not row.reason or row.test or row.without == row.check, row.name
        assert bool(row.reason) != bool(review.target_of(row)), row.name
    for review in REVIEWS:
        names = [row.name for row in review.rows]
        assert len(set(names)) == len(names)
        cases = {case.label.partition(" (")[0] for case in _cases(review)}
        assert not {name.partition(" (")[0] for row in review.rows for name in row.attacks} - cases


def _cases(review: Review) -> list[Case]:
    names = [name for row in review.rows for name in row.attacks]
    return list(review.cases_of(names))


def test_the_driver_is_as_before_after_a_mutation() -> None:
    import svsm.storage.drivers.nvme.queue as before

    review, row = next((review, row) for review, row in _ALL if row.field == "SQID")
    with without(review, row):
        from svsm.storage.drivers.nvme import queue as changed

        assert changed is not before
    from svsm.storage.drivers.nvme import queue as after

    assert after is before


@pytest.mark.parametrize("review", REVIEWS, ids=lambda review: str(review.name))
def test_the_page_is_current(review: Review) -> None:
    found = read_found(_ROOT / FOUND)[review.name]
    published = (_ROOT / "docs" / "review" / f"{review.name}.md").read_text(encoding="utf-8")
    assert published == markdown(review, found), f"python -m svsm.testing.reviews {review.name} > docs/review/…"
    assert {row.name for row in review.rows if review.target_of(row)} == set(found), "svsm fuzz review"
