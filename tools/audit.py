# SPDX-License-Identifier: MIT OR Apache-2.0
"""`./run audit`: known vulnerabilities of what is locked, and the bill of materials.

pip-audit ends well when its vulnerability service could not be asked, with each package merely "skipped". That must
not look like an all-clear, so this reads its JSON answer and says in one line how many packages were audited and how
many were not. A vulnerability fails; so does a lock that pip-audit lists incompletely. `--strict` also fails when
anything could not be audited, for places where the service is known to be reachable.

The bill of materials (CycloneDX) says what is locked and under which licences, the same bytes wherever it is made:
no time stamps, no registry addresses, no paths of this machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
_LOCK = _ROOT / "requirements" / "guest.txt"
_SBOM = _ROOT / "build" / "svsm.cdx.json"
_LICENCES = {"unicorn": "GPL-2.0-only"}
"""Where a package's own metadata names the licence of something else (unicorn: of its Python files only)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Findings:
    """What pip-audit said."""

    audited: tuple[str, ...]
    not_audited: dict[str, str]
    vulnerable: dict[str, tuple[str, ...]]


def locked(lock: str) -> dict[str, str]:
    """Name to version of every package in the text of a lock file."""
    return dict(re.findall(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;\\]+)", lock, re.MULTILINE))


def read_answer(answer: str) -> Findings:
    """Sort pip-audit's JSON answer.

    Raises:
        ValueError: It is not an answer of the known form.
    """
    audited: list[str] = []
    not_audited: dict[str, str] = {}
    vulnerable: dict[str, tuple[str, ...]] = {}
    for entry in json.loads(answer)["dependencies"]:
        name = entry["name"]
        if "skip_reason" in entry:
            not_audited[name] = entry["skip_reason"]
            continue
        audited.append(name)
        if entry["vulns"]:
            vulnerable[name] = tuple(found["id"] for found in entry["vulns"])
    return Findings(tuple(audited), not_audited, vulnerable)


def verdict(findings: Findings, expected: dict[str, str], *, strict: bool) -> tuple[list[str], bool]:
    """The lines to print, and whether all is well."""
    lines = []
    seen = {*findings.audited, *findings.not_audited}
    missing = sorted(expected.keys() - seen)
    for name, ids in sorted(findings.vulnerable.items()):
        lines.append(f"VULNERABLE {name} {expected.get(name, '?')}: {', '.join(ids)}")
    for name in missing:
        lines.append(f"MISSING from the audit's answer: {name}")
    for name, reason in sorted(findings.not_audited.items()):
        lines.append(f"not audited: {name} {expected.get(name, '?')}: {reason.partition(':')[0]}")
    summary = (
        f"{len(findings.audited)} of {len(expected)} locked packages audited, {len(findings.vulnerable)} vulnerable"
    )
    if findings.not_audited:
        summary += (
            f"; {len(findings.not_audited)} could NOT be audited (the vulnerability service did not know or answer)"
        )
    lines.append(summary)
    bad = bool(findings.vulnerable or missing or (strict and findings.not_audited))
    return lines, not bad


def _audit() -> str:
    command = [sys.executable, "-m", "pip_audit", "--require-hashes", "--disable-pip", "--progress-spinner", "off"]
    command += ["-f", "json", "-r", str(_LOCK)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    # 0: nothing found, 1: something found; both come with an answer. Anything else, or no answer, is told as it is.
    if not done.stdout.startswith("{"):
        raise ValueError(f"pip-audit gave no answer: {done.stderr.strip()[-500:]}")
    return done.stdout


def bill_of_materials(lock: Path) -> bytes:
    """The bill of materials as canonical JSON."""
    command = [
        sys.executable,
        "-m",
        "cyclonedx_py",
        "requirements",
        str(lock),
        "--output-reproducible",
        "--short-PURLs",
    ]
    command += ["--pyproject", str(_ROOT / "pyproject.toml"), "-o", "-"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    document: dict[str, Any] = json.loads(done.stdout)
    for component in document["components"]:
        # The tool adds where it believes that the registry keeps the files; the hashes are in the lock.
        component.pop("externalReferences", None)
        component.pop("description", None)
        licence = _licence(component["name"], component["version"])
        if licence:
            component["licenses"] = [licence]
    document["metadata"].setdefault("properties", []).append(
        {"name": "svsm:lock-sha256", "value": hashlib.sha256(lock.read_bytes()).hexdigest()}
    )
    return json.dumps(document, indent=1, sort_keys=True).encode() + b"\n"


def _licence(name: str, version: str) -> dict[str, Any] | None:
    try:
        installed = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    if installed.version != version:
        return None
    expression = _LICENCES.get(name) or installed.metadata.json.get("license_expression")
    if expression:
        return {"expression": expression}
    text = installed.metadata.json.get("license")
    return {"license": {"name": text}} if text and "\n" not in text else None


def main() -> int:
    """Audit and write the bill of materials; 0 when nothing is known to be vulnerable."""
    parser = argparse.ArgumentParser(prog="./run audit", description="Known vulnerabilities, and an SBOM.")
    parser.add_argument("--strict", action="store_true", help="also fail when a package could not be audited")
    arguments = parser.parse_args()
    expected = locked(_LOCK.read_text(encoding="utf-8"))
    try:
        lines, well = verdict(read_answer(_audit()), expected, strict=arguments.strict)
    except (ValueError, KeyError, TypeError) as error:
        lines, well = [f"the audit could not be made: {error}"], False
    document = bill_of_materials(_LOCK)
    listed = len(json.loads(document)["components"])
    if listed != len(expected):
        lines, well = [*lines, f"the bill of materials lists {listed} of {len(expected)} packages"], False
    _SBOM.parent.mkdir(parents=True, exist_ok=True)
    _SBOM.write_bytes(document)
    print("\n".join([*lines, f"bill of materials: {_SBOM.relative_to(_ROOT)}, {listed} packages"]))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
