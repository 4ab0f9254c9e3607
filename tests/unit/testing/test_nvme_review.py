# SPDX-License-Identifier: MIT OR Apache-2.0
"""Hostile NVMe controllers, and the review: every check is where it says, and taking it out is noticed."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from svsm.testing.nvme_attacks import ATTACKS, Attack
from svsm.testing.nvme_review import ROWS, Row, markdown, notices, place, source_of

_ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: str(attack.name))
def test_attack(attack: Attack) -> None:
    assert attack.run() == attack.expected


_SLOW = ("no completion", "interrupts without end", "CSTS.RDY and CAP.TO")
"""Without these the driver goes on until its clock is tired of it: seconds."""


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=f"{row.part}-{row.field}", marks=pytest.mark.long if row.field in _SLOW else ())
        for row in ROWS
        if row.attacks
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
    names = [attack.name for attack in ATTACKS]
    assert len(set(names)) == len(names)
    assert not {name for row in ROWS for name in row.attacks} - set(names)


def test_the_driver_is_as_before_after_a_mutation() -> None:
    assert notices(next(row for row in ROWS if row.field == "SQID"))
    assert all(attack.run() == attack.expected for attack in ATTACKS[:3])


def test_every_register_that_is_read_has_a_row() -> None:
    read = set(re.findall(r"self\._read\(NvmeRegister\.(\w+)", source_of("controller")))
    assert read == {"CAP", "CSTS"}
    fields = " ".join(row.field for row in ROWS)
    assert not {name for name in read if name not in fields}


def test_every_identify_field_that_is_read_has_a_row() -> None:
    spec = {
        "size_blocks": "NSZE",
        "format": "FLBAS",
        "format_count": "NLBAF",
        "format_at": "LBADS",
        "protection": "DPS",
        "attributes": "NSATTR",
        "submission_sizes": "SQES",
        "completion_sizes": "CQES",
        "controller_type": "CNTRLTYPE",
        "namespaces": "NN",
        "transfer_shift": "MDTS",
        "most_commands": "MAXCMD",
        "volatile_cache": "VWC",
        "optional_commands": "ONCS",
    }
    read = {
        node.attr
        for node in ast.walk(ast.parse(source_of("identify")))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in ("host", "namespace", "disk")
    }
    assert read == set(spec)
    fields = " ".join(row.field for row in ROWS)
    assert not {name for name in spec.values() if name not in fields}


def test_shared_memory_is_read_where_the_review_says() -> None:
    """A new place that reads shared memory needs a row (and an entry here)."""
    found = set()
    for module in ("queue", "controller", "slots", "disk"):
        for function in ast.walk(ast.parse(source_of(module))):
            if isinstance(function, ast.FunctionDef):
                for node in ast.walk(function):
                    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
                        text = ast.unparse(node.value)
                        if text in ("memory", "shared", "self._words") or re.search(r"memory\.(u\d+|bytes)$", text):
                            found.add(f"{module}.{function.name}")
    assert found == {"queue.collect", "queue.pending", "controller._identify", "disk._take"}


def test_the_page_is_current() -> None:
    published = (_ROOT / "docs" / "review" / "nvme.md").read_text(encoding="utf-8")
    assert published == markdown(), "run: python -m svsm.testing.nvme_review > docs/review/nvme.md"
