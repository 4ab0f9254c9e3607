# SPDX-License-Identifier: MIT OR Apache-2.0
"""The built wheel and sdist are svsm: installed alone they boot, and they measure the same payload as the checkout.

The wheel is built from the sdist, and that from a copy of the project's files, so that a file which packaging forgets
is missing here. It goes into a fresh environment with the runtime lock only: no unicorn, so no guest runs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from svsm import __version__
from tests.e2e import boot_support
from tests.support import absent

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "requirements" / "runtime.txt"


@dataclasses.dataclass(frozen=True)
class Installation:
    """A folder with the project's files, one with the unpacked sdist, and an environment with the wheel."""

    folder: Path
    project: Path
    sdist: Path
    svsm: Path

    def environment(self, source: Path | None = None) -> dict[str, str]:
        """No code cache of another run, and the sources of `source` before anything installed."""
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "SVSM_TEST_RUN") if name in os.environ}
        kept |= {"HOME": str(self.folder), "XDG_CACHE_HOME": str(self.folder / f"cache-{source and source.name}")}
        return kept | ({"PYTHONPATH": str(source / "src")} if source else {})

    def run(self, *words: str, source: Path | None = None) -> subprocess.CompletedProcess[str]:
        program = [sys.executable, "-m", "svsm.cli.main"] if source else [str(self.svsm)]
        return subprocess.run(
            [*program, *words],
            env=self.environment(source),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def measured(self, source: Path | None = None) -> dict[str, Any]:
        done = self.run("tcb", "--json", source=source)
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer


def do(*command: str | Path, cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.fixture(scope="module")
def installed() -> Iterator[Installation]:
    if not (ROOT / ".git").exists():
        raise absent("this is not a git checkout")
    folder = boot_support.short_folder()
    project = folder / "project"
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.split("\0"):
        if name and (ROOT / name).exists():
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, project / name)
    do(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", cwd=project)
    (archive,) = (folder / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    venv.create(folder / "venv", with_pip=True)
    pip: list[str | Path] = [
        folder / "venv" / "bin" / "python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
    ]
    do(*pip, "--require-hashes", "--no-deps", "-r", LOCK, cwd=folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    # With its dependencies checked, and none to be had from anywhere but what the lock has put there.
    do(*pip, "--no-index", wheel, cwd=folder)
    yield Installation(folder, project, folder / archive.name.removesuffix(".tar.gz"), folder / "venv" / "bin" / "svsm")
    shutil.rmtree(folder)


def test_the_command_alone(installed: Installation) -> None:
    assert installed.run("--version").stdout == f"svsm {__version__}\n"
    page = installed.run("explain", "explain-unknown")
    assert page.returncode == 0, page.stderr
    whole = installed.run("explain", "--markdown").stdout
    assert whole == installed.run("explain", "--markdown", source=installed.project).stdout
    assert len(whole) > 10_000


def test_the_wheel_has_what_the_source_has(installed: Installation) -> None:
    (package,) = (installed.folder / "venv").glob("lib/python*/site-packages/svsm")
    there = {str(path.relative_to(package)) for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    source = installed.project / "src" / "svsm"
    here = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert there == here


def test_the_sdist_has_what_a_packager_needs(installed: Installation) -> None:
    for name in ("run", "tests/run.py", "docs/errors.md", "requirements/dev.txt", "LICENSE-MIT", ".ci/run"):
        assert (installed.sdist / name).read_bytes() == (installed.project / name).read_bytes(), name


def test_checkout_sdist_and_wheel_measure_the_same(installed: Installation) -> None:
    wheel = installed.measured()
    assert len(wheel["archive_sha256"]) == 64
    assert installed.measured(installed.project) == wheel
    assert installed.measured(installed.sdist) == wheel


def booted(installed: Installation, state: Path, source: Path | None = None) -> list[dict[str, Any]]:
    """Boot, stop as soon as it is ready, and return the events."""
    program = [sys.executable, "-m", "svsm.cli.main"] if source else [str(installed.svsm)]
    with subprocess.Popen(
        [*program, "boot", "--json", "--state", str(state)],
        env=installed.environment(source),
        cwd=installed.folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        events = []
        for line in process.stdout:
            events.append(json.loads(line))
            if events[-1]["event"] == "ready":
                assert installed.run("stop", "--state", str(state)).returncode == 0
        assert process.wait(60) == 0, events[-3:]
    return events


def test_it_boots_and_finds_its_tpm_again(installed: Installation) -> None:
    state = installed.folder / "state"
    first, second = ({e["event"]: e for e in booted(installed, state)}["ready"] for _ in range(2))
    assert first["ek_name"] == second["ek_name"]
    assert first["launch_digest"] == second["launch_digest"]
    elsewhere = {e["event"]: e for e in booted(installed, installed.folder / "other", installed.project)}["ready"]
    assert elsewhere["payload_digest"] == first["payload_digest"]
    assert elsewhere["launch_digest"] != first["launch_digest"], "another owner's broker is pinned in that image"


def test_without_the_guest_extra_it_says_that_no_guest_runs(installed: Installation) -> None:
    text = json.dumps(booted(installed, installed.folder / "state"))
    assert "unicorn" in text
    assert "svsm[guest]" in text
