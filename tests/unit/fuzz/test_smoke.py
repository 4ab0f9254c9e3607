# SPDX-License-Identifier: MIT OR Apache-2.0
"""Every target for a moment, with the engine that is always there; its corpus in the repository first."""

from __future__ import annotations

from pathlib import Path

import pytest

from svsm.fuzz.builtin import fuzz
from svsm.fuzz.target import Target
from svsm.fuzz.targets import TARGETS

_CORPUS = Path(__file__).resolve().parents[3] / "fuzz" / "corpus"
_SECONDS = 0.3
_LONG_SECONDS = 10.0


def _inputs(target: Target) -> list[bytes]:
    folder = _CORPUS / target.name
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [*target.seeds(), *(path.read_bytes() for path in files)]


def _search(target: Target, seconds: float, seed: int) -> None:
    run = fuzz(target, _inputs(target), seed=seed, seconds=seconds)
    assert run.executions > 0
    assert not run.findings, "\n".join(text for _, text in run.findings.values())


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_moment_of_each(target: Target) -> None:
    _search(target, _SECONDS, 1)


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_little_longer(target: Target) -> None:
    _search(target, _LONG_SECONDS, 2)


def test_the_corpus_is_small_and_of_known_targets() -> None:
    for folder in _CORPUS.iterdir():
        assert folder.name in {target.name for target in TARGETS}
        sizes = [path.stat().st_size for path in folder.iterdir()]
        assert sum(sizes) <= 32 << 10, folder.name
