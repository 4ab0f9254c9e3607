# SPDX-License-Identifier: MIT OR Apache-2.0
"""A boot can say whether our code or the environment changed since the last one."""

from __future__ import annotations

import dataclasses
import io
import zipfile
from pathlib import Path

import pytest

from svsm.cli.supervisor.release import Release, last_release, remember, what_changed
from svsm.launch.payload import Payload, build_payload


@pytest.fixture(scope="module")
def payload() -> Payload:
    return build_payload()


def test_code_and_environment_are_told_apart(payload: Payload) -> None:
    before = Release.of(payload, "1")
    manifest = dataclasses.replace(payload.manifest, libraries={**payload.manifest.libraries, "libc.so.6": "0" * 64})
    other_environment = Release.of(dataclasses.replace(payload, manifest=manifest), "2")
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(payload.archive)) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name) + (b"x" if name == "code/svsm/kernel/boot.pyc" else b""))
    other_code = Release.of(dataclasses.replace(payload, archive=changed.getvalue()), "3")
    other_loader = Release.of(dataclasses.replace(payload, loader=payload.loader + b"#"), "4")

    assert what_changed(before, before) is None
    assert what_changed(None, before) is None
    assert "own code did not" in str(what_changed(before, other_environment))
    assert "environment did not" in str(what_changed(before, other_code))
    assert "environment did not" in str(what_changed(before, other_loader))
    assert "both changed" in str(what_changed(other_environment, other_code))


def test_the_note_survives_and_damage_is_no_failure(payload: Payload, tmp_path: Path) -> None:
    release = Release.of(payload, "1")
    assert last_release(tmp_path) is None
    remember(tmp_path, release)
    assert last_release(tmp_path) == release
    for damage in ("", "[]", "{}", "nonsense"):
        (tmp_path / "release.json").write_text(damage)
        assert last_release(tmp_path) is None
