# SPDX-License-Identifier: MIT OR Apache-2.0
"""`svsm fuzz` and `python -m svsm.testing.hostile`: what names nothing is an error, never a run without findings."""

from __future__ import annotations

from pathlib import Path

import pytest

from svsm.cli.main import main
from svsm.testing.hostile.__main__ import main as hostile


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["no-such-target"], 1, "[fuzz-target]"),
        (["review", "--row", "no such row"], 1, "[fuzz-row]"),
        (["settings", "--time", "soon"], 2, "soon is no time"),
        (["settings", "--time", "0"], 2, "0 is no time"),
    ],
)
def test_what_names_nothing_is_refused(
    words: list[str], status: int, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(main(["fuzz", *words, "--corpus", str(tmp_path), "--findings", str(tmp_path)]))
    said = capsys.readouterr()
    assert ended.value.code == status
    assert text in said.err
    assert not said.out


@pytest.mark.parametrize("words", [["run", "99"], ["0"], ["serve", "--attack", "no such attack"]])
def test_an_attack_that_does_not_exist_is_a_usage_error(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert hostile(words) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: there is no ")
    assert not said.out
