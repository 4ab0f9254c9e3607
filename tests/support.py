# SPDX-License-Identifier: MIT OR Apache-2.0
"""What tests share: where foreign vectors and foreign programs are, and when their absence is a failure.

Elsewhere a missing peer skips with a reason; in CI (CI=true) it fails, because a check that silently did not run
must not look like one that passed.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from svsm.testing.listening import listens

__all__ = ["absent", "await_listener", "in_ci", "peer", "peer_source", "vectors"]

_ROOT = Path(__file__).resolve().parent.parent

_PEER_FOLDERS = ("/usr/bin", "/usr/sbin", "/usr/local/bin")


def in_ci() -> bool:
    """Whether this run decides about a landing."""
    return os.environ.get("CI", "").lower() in {"1", "true", "yes"}


def absent(reason: str) -> BaseException:
    """The exception to raise for something that is missing: a failure in CI, a skip elsewhere."""
    if in_ci():
        return pytest.fail.Exception(f"required in CI: {reason}")
    return pytest.skip.Exception(reason)


@functools.cache
def _vectors_root() -> Path | None:
    named = os.environ.get("SVSM_VECTORS")
    for candidate in [Path(named)] if named else [_ROOT.parent / "shared" / "vectors"]:
        if candidate.is_dir():
            return candidate
    return None


def vectors(group: str) -> Path:
    """The folder of one group of foreign vectors (`snp`, `igvm`, `cocoonfs`, `aproxy`).

    Looks in $SVSM_VECTORS, then beside the checkout; skips, or fails in CI, where neither exists.
    """
    root = _vectors_root()
    if root is None or not (root / group).is_dir():
        raise absent(f"foreign vectors '{group}' are not on this machine (set SVSM_VECTORS)")
    return root / group


def peer(name: str) -> Path:
    """The path of somebody else's program. Looks in $SVSM_PEERS (a folder), `.peers/bin`, then PATH."""
    folders = [
        os.environ.get("SVSM_PEERS", ""),
        str(_ROOT / ".peers" / "bin"),
        os.environ.get("PATH", ""),
        *_PEER_FOLDERS,
    ]
    found = shutil.which(name, path=os.pathsep.join(folder for folder in folders if folder))
    if found is None:
        raise absent(f"the peer program '{name}' is not installed")
    return Path(found)


def peer_source(name: str) -> Path | None:
    """A peer's source that no registry has: in $SVSM_PEER_SOURCES (a folder), else in one beside the checkout.

    What needs it and finds none skips, in CI too (tests/promises.toml, `allowed_in_ci`).
    """
    named = os.environ.get("SVSM_PEER_SOURCES")
    path = (Path(named) if named else _ROOT.parent / "shared" / "peers") / name
    return path if path.is_file() else None


def await_listener(path: Path, process: subprocess.Popen[Any], *, seconds: float = 60.0) -> None:
    """Wait until a program listens on a Unix socket: its file is there a moment before that, and refuses."""
    deadline = time.monotonic() + seconds
    while not listens(path):
        assert process.poll() is None, f"it ended before it listened on {path}"
        assert time.monotonic() < deadline, f"nobody listens on {path}"
        time.sleep(0.01)
