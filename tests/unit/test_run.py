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


def _run(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The program on one suite, which promises five cases."""
    (folder / "test_sample.py").write_text(text, encoding="utf-8")
    (folder / "pytest.ini").write_text("[pytest]\njunit_family = xunit1\nmarkers = long\n", encoding="utf-8")
    promises = {
        "suite": {"sample": {"path": "test_sample.py", "quick": {"cases": 5, "budget_s": 300}}},
        "skips": {"allowed_in_ci": [], "needs_root": []},
    }
    monkeypatch.setattr(run, "_ROOT", folder)
    monkeypatch.setattr(run, "_promises", lambda: promises)
    monkeypatch.setattr(sys, "argv", ["run", "sample"])
    return run.main()


def test_recorded_numbers_are_summed_and_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(_SUITE, tmp_path, monkeypatch) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "sample: 7,214 crash cases, 5 images",
        "5 passed, 0 failed, 0 skipped",
    ]


@pytest.mark.parametrize(("in_ci", "code"), [(False, 0), (True, 1)])
def test_a_promise_counts_on_vectors_only_where_they_must_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_ci: bool, code: int
) -> None:
    text = "import pytest\n\n@pytest.mark.parametrize('file', [])\ndef test_each(file):\n    pass\n"
    monkeypatch.setattr(run, "_in_ci", lambda: in_ci)
    assert _run(text, tmp_path, monkeypatch) == code
