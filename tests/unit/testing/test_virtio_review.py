# SPDX-License-Identifier: MIT OR Apache-2.0
"""The review of the virtio driver: every field that it reads has a row."""

from __future__ import annotations

import ast
import re

from svsm.testing.hostile.review import REVIEW
from svsm.testing.review import source_of

_PACKAGE = REVIEW.package


def test_every_register_that_is_read_has_a_row() -> None:
    read = set(re.findall(r"self\._read\(MmioRegister\.(\w+)", source_of(f"{_PACKAGE}.mmio"))) - {"CONFIG"}
    assert len(read) > 8
    fields = " ".join(row.field for row in REVIEW.rows)
    assert not {name for name in read if name not in fields}


def test_every_configuration_field_that_is_read_has_a_row() -> None:
    read = {
        node.attr
        for node in ast.walk(ast.parse(source_of(f"{_PACKAGE}.blk_config")))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "config"
    }
    assert len(read) > 8
    fields = " ".join(row.field for row in REVIEW.rows)
    assert not {name for name in read if name not in fields}


def test_shared_memory_is_read_where_the_review_says() -> None:
    """A new place that reads shared memory needs a row (and an entry here)."""
    found = set()
    for module in ("split", "packed", "queue", "blk_lane", "blk", "mmio"):
        tree = ast.parse(source_of(f"{_PACKAGE}.{module}"))
        for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
            for node in ast.walk(function):
                if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
                    text = ast.unparse(node.value)
                    if text in ("u16", "u32", "u64", "shared") or re.search(r"memory\.(u\d+|bytes)$", text):
                        found.add(f"{module}.{function.name}")
    assert found == {
        *("split.publish", "split.collect", "split.pending"),
        *("packed._wants_notification", "packed.collect", "packed.pending"),
        *(
            "blk_lane._form",
            "blk_lane.drain",
            "blk_lane.finish_control",
        ),  # the first makes the views that `drain` reads
    }
