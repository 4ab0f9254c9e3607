# SPDX-License-Identifier: MIT OR Apache-2.0
"""Runs a target for a set time in a worker process, minimises what it finds, and sums up."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from svsm.formats.errors import BackendError, StateError

__all__ = ["ENGINES", "Reproducer", "Summary", "choose_engine", "run_target"]

ENGINES = ("auto", "atheris", "builtin")
_MINIMISE_SECONDS = 30.0
_GRACE_SECONDS = 120.0
_COVERAGE = re.compile(rb"\bcov: (\d+)")
_EXECUTED = re.compile(rb"stat::number_of_executed_units: (\d+)")
_PULSE = re.compile(rb"^#(\d+)\t", re.MULTILINE)


@dataclasses.dataclass(frozen=True, slots=True)
class Reproducer:
    """One finding, minimised."""

    file: str
    signature: str


@dataclasses.dataclass(frozen=True, slots=True)
class Summary:
    """What one run did."""

    target: str
    engine: str
    seconds: float
    executions: int
    coverage: int | None
    """Edges that libFuzzer counted; None with the built-in engine."""
    corpus_inputs: int
    """In the corpus folder afterwards."""
    new_inputs: int
    findings: tuple[Reproducer, ...]


def choose_engine(wanted: str) -> str:
    """The engine that "auto" means here.

    Raises:
        StateError: ``fuzz-engine`` when atheris is asked for and not installed.
    """
    there = importlib.util.find_spec("atheris") is not None
    if wanted == "atheris" and not there:
        raise StateError(
            "atheris is not installed here",
            code="fuzz-engine",
            hint="install requirements/dev.txt, or use --engine builtin",
        )
    return wanted if wanted != "auto" else "atheris" if there else "builtin"


def run_target(
    name: str,
    *,
    engine: str,
    corpus: Path,
    extra: list[Path],
    findings: Path,
    seconds: float,
    seed: int,
    registry: str = "svsm.fuzz.targets",
) -> Summary:
    """Fuzz one target.

    Args:
        name: A target's name, known to exist.
        engine: "atheris" or "builtin".
        corpus: Folder to continue from and to add to; made where it is missing.
        extra: Folders with more inputs, only read.
        findings: Folder for reproducers; made where it is missing.
        seconds: Time for the search itself.
        seed: Of the random choices.
        registry: The module whose `find` gives the target, for targets of other programs.

    Raises:
        BackendError: ``fuzz-worker`` when the worker ended without a summary and without a finding.
    """
    corpus.mkdir(parents=True, exist_ok=True)
    findings.mkdir(parents=True, exist_ok=True)
    before = _count(corpus)
    order: dict[str, Any] = {
        "registry": registry,
        "target": name,
        "engine": engine,
        "corpus": str(corpus),
        "extra": [str(folder) for folder in extra if folder.is_dir()],
        "findings": str(findings),
        "seconds": seconds,
        "seed": seed,
    }
    done = _work(order, timeout=seconds + _GRACE_SECONDS)
    executions, coverage = _figures(engine, done)
    reproducers = _minimise(registry, name, findings)
    if done.returncode and not reproducers:
        tail = done.stderr[-400:].decode("utf-8", "replace").strip()
        raise BackendError(
            "the fuzzing process ended without a result",
            code="fuzz-worker",
            hint=tail.splitlines()[-1] if tail else None,
            target=name,
            status=done.returncode,
        )
    after = _count(corpus)
    return Summary(name, engine, seconds, executions, coverage, after, after - before, reproducers)


def _work(order: dict[str, Any], *, timeout: float) -> subprocess.CompletedProcess[bytes]:
    words = [sys.executable, "-m", "svsm.fuzz.worker", json.dumps(order)]
    try:
        return subprocess.run(words, capture_output=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired as late:
        # It could not even be interrupted by its own watchdog: what it wrote until then is what there is.
        return subprocess.CompletedProcess(words, 1, late.stdout or b"", late.stderr or b"")


def _figures(engine: str, done: subprocess.CompletedProcess[bytes]) -> tuple[int, int | None]:
    if engine == "builtin":
        try:
            return int(json.loads(done.stdout.splitlines()[-1])["executions"]), None
        except (IndexError, ValueError, KeyError, TypeError):
            return 0, None
    executed = _EXECUTED.findall(done.stderr) or _PULSE.findall(done.stderr)
    covered = _COVERAGE.findall(done.stderr)
    return int(executed[-1]) if executed else 0, int(covered[-1]) if covered else 0


def _minimise(registry: str, name: str, findings: Path) -> tuple[Reproducer, ...]:
    found = []
    for path in sorted(path for path in findings.iterdir() if path.is_file() and path.suffix != ".txt"):
        order = {
            "registry": registry,
            "target": name,
            "findings": str(findings),
            "minimise": str(path),
            "seconds": _MINIMISE_SECONDS,
        }
        done = _work(order, timeout=2 * _MINIMISE_SECONDS + _GRACE_SECONDS)
        try:
            answer = json.loads(done.stdout.splitlines()[-1])
        except (IndexError, ValueError):
            found.append(Reproducer(str(path), f"the process died: status {done.returncode}"))
            continue
        if answer["file"] is not None:
            found.append(Reproducer(answer["file"], answer["signature"]))
        elif path.name.startswith("finding-") is False:
            found.append(Reproducer(str(path), "libFuzzer's own, does not repeat alone"))
    return tuple({entry.file: entry for entry in found}.values())


def _count(folder: Path) -> int:
    return sum(path.is_file() for path in folder.iterdir())
