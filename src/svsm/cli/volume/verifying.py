# SPDX-License-Identifier: MIT OR Apache-2.0
"""`svsm volume check | repair`: verify everything, and mend what can be mended without deciding anything.

Exit code 3 says that something is wrong, a key that does not fit included; the report is on stdout in either case.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from svsm.cli.volume import access, words
from svsm.cli.volume.meter import meter

if TYPE_CHECKING:
    from svsm.storage.cocoonfs.check import CheckReport

__all__ = ["add_verbs"]

_GOOD, _WRONG = 0, 3


def add_verbs(verbs: words.Verbs[argparse.ArgumentParser]) -> None:
    """Add the verbs of this module."""
    check = words.verb(verbs, "check", "verify everything, without writing", _check)
    repair = words.verb(
        verbs,
        "repair",
        "check, and mend what an interruption left behind; damaged files are named and stay as they are",
        _repair,
    )
    for parser, writes in ((check, False), (repair, True)):
        words.add_key(parser)
        words.add_json(parser)
        words.add_access(parser, writes=writes)


def _check(arguments: argparse.Namespace) -> int:
    from svsm.storage.cocoonfs.check import check

    key = access.needed_key(arguments)
    device = access.disk(arguments.image)
    try:
        with meter() as progress:
            report = check(device, key, progress=progress, allow_weak=arguments.allow_weak)
    finally:
        device.close()
    access.emit(report.to_json(), _told(report), as_json=arguments.json)
    return _GOOD if report.is_good else _WRONG


def _repair(arguments: argparse.Namespace) -> int:
    from svsm.storage.cocoonfs.headers import find_header
    from svsm.storage.cocoonfs.repair import repair

    key = access.needed_key(arguments)
    with access.writable(arguments) as device:
        if not arguments.allow_weak:
            find_header(device).layout.refuse_weak()
        with meter() as progress:
            report = repair(device, key, progress=progress)
    text = _told(report.before)
    if report.after is not None:
        text += ["", *(f"mended: {sentence}" for sentence in report.done), "", "after that:", *_told(report.after)]
    elif report.is_good:
        text.append("There was nothing to mend.")
    else:
        text.append("Nothing was written: what is wrong here cannot be mended without a copy.")
    access.emit(report.to_json(), text, as_json=arguments.json)
    return _GOOD if report.is_good else _WRONG


def _told(report: CheckReport) -> list[str]:
    """The report for a person: findings with what to do, then what was looked at, then the verdict."""
    text: list[str] = []
    for finding in report.findings:
        text.append(f"{finding.severity.value}: {finding.place} [{finding.kind}]")
        text.append(f"    {finding.sentence}")
    text += [f"… and {count} more of [{kind}]" for kind, count in report.more.items()]
    if report.opened:
        text.append(f"{report.files} files and {report.data_blocks} data blocks were verified.")
        text.append(f"counter {report.counter}, root digest {report.root_digest.hex()}")
    text.append(_verdict(report))
    return text


def _verdict(report: CheckReport) -> str:
    if report.is_good:
        return "The volume is good."
    if not report.opened:
        return "The volume cannot be checked: it does not open."
    worst = report.worst.value
    if worst == "warning":
        return "No data is concerned; `svsm volume repair` mends this."
    return "The volume is damaged: read the files that are not concerned (svsm volume read), and restore a copy."
