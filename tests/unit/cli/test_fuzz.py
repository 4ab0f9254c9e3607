# SPDX-License-Identifier: MIT OR Apache-2.0
"""`svsm fuzz`, `svsm.testing.hostile` and `svsm.testing.reviews`: what names nothing is an error, not an empty run."""

from __future__ import annotations

import io
import socket
from pathlib import Path

import pytest

from svsm.cli.main import main
from svsm.fuzz.targets import TARGETS
from svsm.testing.hostile.__main__ import main as hostile
from svsm.testing.reviews import asked


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["no-such-target"], 1, "[fuzz-target]"),
        (["review", "--row", "no such row"], 1, "[fuzz-row]"),
        (["settings", "--reproduce", "no such file"], 1, "hint: --reproduce names one input"),
        (["settings", "--reproduce", "/"], 1, "[fuzz-input]"),
        (["settings", "--distil", "nowhere", "--corpus", "no such folder"], 1, "hint: --corpus names a folder"),
        (["settings", "--time", "soon"], 2, "soon is no time"),
        (["settings", "--time", "0"], 2, "0 is no time"),
    ],
)
def test_what_names_nothing_is_refused(
    words: list[str], status: int, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(main(["fuzz", "--corpus", str(tmp_path), "--findings", str(tmp_path), *words]))
    said = capsys.readouterr()
    assert ended.value.code == status
    assert text in said.err
    assert not said.out


def test_without_a_target_all_of_them_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["fuzz"])
    assert ended.value.code == 2
    said = set(capsys.readouterr().err.replace(",", " ").split())
    assert said >= {target.name for target in TARGETS}


@pytest.mark.parametrize("words", [["run", "99"], ["0"], ["serve", "--attack", "no such attack"]])
def test_an_attack_that_does_not_exist_is_a_usage_error(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert hostile(words) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: there is no ")
    assert not said.out


@pytest.mark.parametrize("words", [[], ["nothing"]])
def test_a_review_that_does_not_exist_is_a_usage_error(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        asked(words)
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.err.startswith("usage: ")
    assert not said.out


@pytest.mark.parametrize("name", ["none/socket", "x" * 120])
def test_a_socket_that_cannot_be_made_is_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert hostile(["serve", "--attack", "honest", "--socket", str(tmp_path / name)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: cannot listen: ")
    assert f"({tmp_path / name})" in said
    assert "hint: " in said


def test_it_says_that_it_listens_when_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "socket"
    reached: list[str] = []

    class Out(io.StringIO):
        def write(self, text: str) -> int:
            if text.startswith("listening on "):
                with socket.socket(socket.AF_UNIX) as client:
                    client.connect(text.removeprefix("listening on ").strip())
                    reached.append(text)
            return len(text)

    monkeypatch.setattr("sys.stderr", Out())
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert hostile(["serve", "--number", "1", "--seconds", "0.1", "--socket", str(path)]) == 0
    assert reached == [f"listening on {path}"]
