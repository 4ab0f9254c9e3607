# SPDX-License-Identifier: MIT OR Apache-2.0
"""The review of the virtio driver: every check is where it says, and taking it out is noticed."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from svsm.testing.hostile.attacks import ATTACKS
from svsm.testing.hostile.review import ROWS, Row, markdown, notices, place, source_of

_ROOT = Path(__file__).resolve().parents[3]
_TESTED = [row for row in ROWS if row.attacks]


_QUICK = 5
"""Every fifth row is part of each run, all of them of the long one."""


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=f"{row.part}-{row.field}", marks=() if index % _QUICK == 0 else pytest.mark.long)
        for index, row in enumerate(_TESTED)
    ],
)
def test_taking_the_check_out_is_noticed(row: Row) -> None:
    assert place(row)
    assert row.without != row.check
    assert notices(row)


@pytest.mark.parametrize("row", [row for row in ROWS if not row.attacks], ids=lambda row: f"{row.part}-{row.field}")
def test_a_row_without_attacks_says_why(row: Row) -> None:
    assert place(row)
    assert len(row.reason) > 20


def test_attacks_exist() -> None:
    names = {attack.name for attack in ATTACKS}
    assert not {name for row in ROWS for name in row.attacks} - names


def test_every_register_that_is_read_has_a_row() -> None:
    read = set(re.findall(r"self\._read\(MmioRegister\.(\w+)", source_of("mmio"))) - {"CONFIG"}
    assert len(read) > 8
    fields = " ".join(row.field for row in ROWS)
    assert not {name for name in read if name not in fields}


def test_every_configuration_field_that_is_read_has_a_row() -> None:
    read = {
        node.attr
        for node in ast.walk(ast.parse(source_of("blk_config")))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "config"
    }
    assert len(read) > 8
    fields = " ".join(row.field for row in ROWS)
    assert not {name for name in read if name not in fields}


def test_shared_memory_is_read_where_the_review_says() -> None:
    """A new place that reads shared memory needs a row (and an entry here)."""
    found = set()
    for module in ("split", "packed", "queue", "blk_lane", "blk", "mmio"):
        tree = ast.parse(source_of(module))
        for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
            for node in ast.walk(function):
                if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
                    text = ast.unparse(node.value)
                    if text in ("u16", "u32", "u64", "shared") or re.search(r"memory\.(u\d+|bytes)$", text):
                        found.add(f"{module}.{function.name}")
    assert found == {
        *("split.publish", "split.collect", "split.pending"),
        *("packed._wants_notification", "packed.collect", "packed.pending"),
        *("blk_lane.drain", "blk_lane.finish_control"),
    }


def test_the_page_is_current() -> None:
    published = (_ROOT / "docs" / "review" / "virtio.md").read_text(encoding="utf-8")
    assert published == markdown(), "run: python -m svsm.testing.hostile.review > docs/review/virtio.md"
