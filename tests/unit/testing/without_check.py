# SPDX-License-Identifier: MIT OR Apache-2.0
"""Runs the unit test of a review's row, in a process of its own: what a test module has imported, it keeps.

``python -m tests.unit.testing.without_check virtio "Both rings: anything after a violation"`` runs it against the
driver without the row's check; with ``--whole`` against the driver as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import sys

import pytest

from svsm.testing.review import without
from svsm.testing.reviews import REVIEWS

__all__: list[str] = []


def _main() -> int:
    parser = argparse.ArgumentParser(description="Run a row's unit test without the row's check.")
    parser.add_argument("review")
    parser.add_argument("row")
    parser.add_argument("--whole", action="store_true", help="with the check")
    words = parser.parse_args()
    (review,) = (review for review in REVIEWS if review.name == words.review)
    (row,) = (row for row in review.rows if row.name == words.row)
    with contextlib.nullcontext() if words.whole else without(review, row):
        return pytest.main(["-n", "0", "-x", "--tb=line", "-p", "no:cacheprovider", row.test])


if __name__ == "__main__":
    sys.exit(_main())
