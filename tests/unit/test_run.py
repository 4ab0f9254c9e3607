# SPDX-License-Identifier: MIT OR Apache-2.0
"""The program behind `./run test`: what a suite's tests counted is summed and printed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests import run

_SUITE = """
import pytest

@pytest.mark.parametrize("count", [7000, 200, 14])
def test_crash(record_property, count):
    record_property("crash cases", count)

def test_images(record_property):
    record_property("images", 5)

def test_that_counts_no_cases():
    pass
"""


def test_recorded_numbers_are_summed_and_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test_sample.py").write_text(_SUITE, encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\njunit_family = xunit1\nmarkers = long\n", encoding="utf-8")
    limits = {"cases": 5, "budget_s": 300}
    promises = {
        "suite": {"sample": {"path": "test_sample.py", "quick": limits}},
        "skips": {"allowed_in_ci": [], "needs_root": []},
    }
    monkeypatch.setattr(run, "_ROOT", tmp_path)
    monkeypatch.setattr(run, "_promises", lambda: promises)
    monkeypatch.setattr(sys, "argv", ["run", "sample"])
    assert run.main() == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "sample: 7,214 crash cases, 5 images",
        "5 passed, 0 failed, 0 skipped",
    ]
