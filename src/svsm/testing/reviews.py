# SPDX-License-Identifier: MIT OR Apache-2.0
"""All reviews, and what fuzzers found of them: ``python -m svsm.testing.reviews NAME`` prints a page.

The findings are read from ``fuzz/review.json`` below the working directory.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from svsm.testing.channel_review import REVIEW as CHANNELS
from svsm.testing.hostile.review import REVIEW as VIRTIO
from svsm.testing.nvme_review import REVIEW as NVME
from svsm.testing.review import Found, Review, markdown

__all__ = ["FOUND", "REVIEWS", "asked", "page", "read_found", "write_found"]

REVIEWS: Final[tuple[Review, ...]] = (VIRTIO, NVME, CHANNELS)
FOUND: Final = Path("fuzz/review.json")
"""Below the repository's root."""


def read_found(path: Path) -> dict[str, dict[str, Found]]:
    """By review and row. Nothing, where the file is not there."""
    if not path.exists():
        return {}
    data = json.loads(path.read_text(encoding="utf-8"))
    return {review: {row: Found(**entry) for row, entry in rows.items()} for review, rows in data.items()}


def write_found(path: Path, found: dict[str, dict[str, Found]]) -> None:
    """The file that `read_found` reads; rows in the order of the reviews, and none that is no more."""
    data = {
        review.name: {
            row.name: {"target": entry.target, "executions": entry.executions, "seconds": round(entry.seconds, 1)}
            for row in review.rows
            if (entry := found.get(review.name, {}).get(row.name)) is not None
        }
        for review in REVIEWS
    }
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def page(name: str) -> str:
    """The page of one review.

    Raises:
        LookupError: There is no such review, or a row's check is not where it says.
    """
    for review in REVIEWS:
        if review.name == name:
            return markdown(review, read_found(FOUND).get(name, {}))
    raise LookupError(f"there is no review {name!r}")


def asked(words: Sequence[str] | None = None) -> str:
    """The page that the command line names; it ends the process where there is none. None for the process's own."""
    parser = argparse.ArgumentParser(prog="python -m svsm.testing.reviews", description="Print the page of a review.")
    parser.add_argument("name", choices=[review.name for review in REVIEWS], help="of the review")
    return page(parser.parse_args(words).name)


if __name__ == "__main__":
    print(asked(), end="")
