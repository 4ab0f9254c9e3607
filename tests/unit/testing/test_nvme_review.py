# SPDX-License-Identifier: MIT OR Apache-2.0
"""Hostile NVMe controllers, and the review of the driver: every field that it reads has a row."""

from __future__ import annotations

import ast
import re

import pytest

from svsm.testing.nvme_attacks import ATTACKS, Attack
from svsm.testing.nvme_review import REVIEW
from svsm.testing.review import source_of

_PACKAGE = REVIEW.package


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: str(attack.name))
def test_attack(attack: Attack) -> None:
    assert attack.run() == attack.expected


def test_every_register_that_is_read_has_a_row() -> None:
    read = set(re.findall(r"self\._read\(NvmeRegister\.(\w+)", source_of(f"{_PACKAGE}.controller")))
    assert read == {"CAP", "CSTS"}
    fields = " ".join(row.field for row in REVIEW.rows)
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
        for node in ast.walk(ast.parse(source_of(f"{_PACKAGE}.identify")))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in ("host", "namespace", "disk")
    }
    assert read == set(spec)
    fields = " ".join(row.field for row in REVIEW.rows)
    assert not {name for name in spec.values() if name not in fields}


def test_shared_memory_is_read_where_the_review_says() -> None:
    """A new place that reads shared memory needs a row (and an entry here)."""
    found = set()
    for module in ("queue", "controller", "slots", "disk"):
        for function in ast.walk(ast.parse(source_of(f"{_PACKAGE}.{module}"))):
            if isinstance(function, ast.FunctionDef):
                for node in ast.walk(function):
                    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
                        text = ast.unparse(node.value)
                        if text in ("memory", "shared", "self._words") or re.search(r"memory\.(u\d+|bytes)$", text):
                            found.add(f"{module}.{function.name}")
    assert found == {"queue.collect", "queue.pending", "controller._identify", "disk._take"}
