# SPDX-License-Identifier: MIT OR Apache-2.0
"""What a fuzzer once found stays fixed: every file under fuzz/reproducers runs, in the folder of its target."""

from __future__ import annotations

from pathlib import Path

import pytest

from svsm.fuzz.target import execute
from svsm.fuzz.targets import find

_FOLDER = Path(__file__).resolve().parents[3] / "fuzz" / "reproducers"
_FILES = sorted(path for path in _FOLDER.glob("*/*") if path.is_file())


@pytest.mark.parametrize("path", _FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_reproducer(path: Path) -> None:
    execute(find(path.parent.name), path.read_bytes())


def test_there_are_some() -> None:
    assert _FILES
