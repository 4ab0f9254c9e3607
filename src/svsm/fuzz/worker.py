# SPDX-License-Identifier: MIT OR Apache-2.0
"""The process in which a target runs: a child of its own, because code under test may hang, eat memory or die.

Its first argument is a JSON object (see `main`). Nothing of svsm is imported before atheris is there: it instruments
modules as they are imported. Findings are written as they are found, one file per signature, so that nothing is lost
when the process dies; with atheris, libFuzzer adds files for time-outs and memory of its own making.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from svsm.fuzz.target import Finding, Target

__all__ = ["main", "save_input", "write_finding"]

_MEMORY_BYTES = 4 << 30
_RSS_MB = 2048


def save_input(folder: Path, data: bytes) -> Path:
    """Keep an input under the hash of its contents, as libFuzzer names them."""
    path = folder / hashlib.sha1(data, usedforsecurity=False).hexdigest()
    if not path.exists():
        path.write_bytes(data)
    return path


def write_finding(folder: Path, finding: Finding, data: bytes) -> Path:
    """Keep the input of a finding and beside it the text; a later one of the same signature replaces it."""
    path = folder / f"finding-{hashlib.sha256(finding.signature.encode()).hexdigest()[:12]}"
    path.write_bytes(data)
    path.with_name(f"{path.name}.txt").write_text(f"{finding.signature}\n\n{finding.text}", encoding="utf-8")
    return path


def main() -> int:
    """Do what the JSON object in argv[1] says.

    Always: ``registry`` (the module whose `find` knows the target), ``target``, ``findings`` (a folder), ``seconds``.
    To minimise: ``minimise`` (a file). To fuzz: ``engine``, ``corpus`` (a folder), ``extra`` (folders that are only
    read), ``seed``. The last line on stdout is a JSON object, except with atheris, whose statistics are on stderr.
    """
    order: dict[str, Any] = json.loads(sys.argv[1])
    if order.get("minimise"):
        return _minimise(order)
    if order["engine"] == "atheris":
        return _atheris(order)
    return _builtin(order)


def _target(order: dict[str, Any]) -> Target:
    target: Target = importlib.import_module(order["registry"]).find(order["target"])
    return target


def _limit_memory() -> None:
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _inputs(target: Target, folders: list[str]) -> list[bytes]:
    files = [path for folder in folders for path in sorted(Path(folder).glob("*")) if path.is_file()]
    return [*target.seeds(), *(path.read_bytes() for path in files)]


def _builtin(order: dict[str, Any]) -> int:
    from svsm.fuzz.builtin import fuzz
    from svsm.fuzz.watch import watched

    _limit_memory()
    target = watched(_target(order))
    findings, corpus = Path(order["findings"]), Path(order["corpus"])

    def keep(finding: Finding, data: bytes) -> None:
        write_finding(findings, finding, data)

    run = fuzz(
        target,
        _inputs(target, [order["corpus"], *order["extra"]]),
        seed=order["seed"],
        seconds=order["seconds"],
        on_finding=keep,
    )
    for data in run.kept:
        save_input(corpus, data)
    print(json.dumps({"executions": run.executions, "reasons": run.reasons}))
    return 0


def _minimise(order: dict[str, Any]) -> int:
    from svsm.fuzz.builtin import minimised
    from svsm.fuzz.watch import watched

    _limit_memory()
    target = watched(_target(order))
    path = Path(order["minimise"])
    data, finding = minimised(target, path.read_bytes(), seconds=order["seconds"])
    written = None
    if finding is not None:
        path.unlink()
        path.with_name(f"{path.name}.txt").unlink(missing_ok=True)
        written = str(write_finding(Path(order["findings"]), finding, data))
    print(json.dumps({"file": written, "signature": finding.signature if finding else None, "bytes": len(data)}))
    return 0


def _atheris(order: dict[str, Any]) -> int:
    import atheris

    with atheris.instrument_imports(include=["svsm", "h11", order["registry"].partition(".")[0]]):
        target = _target(order)
        from svsm.fuzz.target import Finding, execute

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    findings = Path(order["findings"])
    shortest: dict[str, int] = {}

    def one(data: bytes) -> None:
        try:
            execute(target, data)
        except Finding as finding:
            if len(data) < shortest.get(finding.signature, sys.maxsize):
                shortest[finding.signature] = len(data)
                write_finding(findings, finding, data)

    for data in target.seeds():
        save_input(Path(order["corpus"]), data)
    words = [
        sys.argv[0],
        order["corpus"],
        *order["extra"],
        f"-max_total_time={max(1, round(order['seconds']))}",
        f"-seed={order['seed'] or 1}",
        f"-max_len={target.max_bytes}",
        f"-timeout={max(10, round(5 * target.cpu_seconds))}",
        f"-rss_limit_mb={_RSS_MB}",
        f"-artifact_prefix={order['findings']}{os.sep}",
        "-print_final_stats=1",
        "-verbosity=1",
    ]
    atheris.Setup(words, one, enable_python_coverage=True)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
