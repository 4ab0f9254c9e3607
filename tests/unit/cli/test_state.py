# SPDX-License-Identifier: MIT OR Apache-2.0
"""The state directory: versioned, locked, private, and never converted or adopted silently."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from svsm.cli.supervisor.state import StateDirectory, default_directory
from svsm.formats.errors import BackendError, StateError


def test_a_new_directory_is_private_and_keeps_its_identity(tmp_path: Path) -> None:
    first = StateDirectory.open_for_boot(tmp_path / "s")
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o700
    for name in ("machine", "broker", "host", "run"):
        assert first.folder(name).stat().st_mode & 0o777 == 0o700
    assert StateDirectory.existing(tmp_path / "s").volume_id == first.volume_id


def test_a_second_instance_is_refused_by_name(tmp_path: Path) -> None:
    StateDirectory.open_for_boot(tmp_path / "s")
    with pytest.raises(StateError) as refused:
        StateDirectory.open_for_boot(tmp_path / "s")
    assert refused.value.code == "state-busy"
    assert refused.value.details["process_id"] == os.getpid()


def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = f"""
import os, pathlib
from svsm.cli.supervisor.state import StateDirectory
StateDirectory.open_for_boot(pathlib.Path({str(tmp_path / "s")!r}))
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert StateDirectory.existing(tmp_path / "s").running_process() is None
    StateDirectory.open_for_boot(tmp_path / "s")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"version": 1}'])
def test_a_damaged_identity_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(StateError) as refused:
        StateDirectory.open_for_boot(tmp_path)
    assert refused.value.code == "state-foreign"
    assert (tmp_path / "state.json").read_text() == text


def test_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"version": 2, "name": "x", "volume_id": "y"}))
    with pytest.raises(StateError) as refused:
        StateDirectory.open_for_boot(tmp_path)
    assert refused.value.code == "state-version"


def test_somebody_elses_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(StateError) as refused:
        StateDirectory.open_for_boot(tmp_path)
    assert refused.value.code == "state-foreign"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["lock", "thesis.tex"]


def test_where_the_state_is_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_directory() == tmp_path / "svsm"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_directory() == tmp_path / ".local" / "state" / "svsm"


def test_a_file_in_the_place_of_the_directory_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    for use in (StateDirectory.open_for_boot, StateDirectory.existing):
        with pytest.raises(BackendError) as refused:
            use(tmp_path / "f")
        assert refused.value.code == "state-unusable"
