# SPDX-License-Identifier: MIT OR Apache-2.0
"""The allow lists as Markdown: what docs/isolation.md shows, made from what is enforced."""

from __future__ import annotations

import errno

from svsm.confine.lists import KILL, ROLES, Allow, Condition, Role, Test, refused

__all__ = ["tables"]

_ARGUMENT = ("first", "second", "third", "fourth", "fifth", "sixth")


def _shown(value: int) -> str:
    return str(value) if value < 10 else hex(value)


def _condition(condition: Condition | None) -> str:
    if condition is None:
        return ""
    what = _ARGUMENT[condition.argument] + " argument "
    values = ", ".join(_shown(value) for value in condition.values)
    if condition.test is Test.OWN_PROCESS:
        what += "is the process itself" + (f" or {values}" if values else "")
    else:
        what += f"{condition.test.value} {values}"
    other = "dies" if condition.otherwise == KILL else errno.errorcode[condition.otherwise]
    return f"{what}; else {other}"


def _row(entry: Allow) -> str:
    return f"| {' '.join(f'`{call}`' for call in entry.calls)} | {_condition(entry.condition)} | {entry.reason} |"


def _table(entries: tuple[Allow, ...]) -> list[str]:
    return ["| calls | only when | why |", "|---|---|---|", *(_row(entry) for entry in entries), ""]


def tables() -> str:
    """Every role's list: what all share once, then what each adds, then what answers with an errno."""
    shared = tuple(entry for entry in ROLES[Role.SERVICE] if all(entry in entries for entries in ROLES.values()))
    lines = ["### Every role", "", *_table(shared)]
    for role, entries in ROLES.items():
        lines += [f"### {role.value}", "", "Besides what every role may:", ""]
        lines += _table(tuple(entry for entry in entries if entry not in shared))
    lines += ["### Answered with an errno instead of death", "", "Where the role's own list does not allow them:", ""]
    lines += ["| calls | answer | why |", "|---|---|---|"]
    everything = {entry: None for role in ROLES for entry in refused(role).values()}
    for entry in everything:
        calls = " ".join(f"`{call}`" for call in entry.calls)
        lines.append(f"| {calls} | {errno.errorcode[entry.errno]} | {entry.reason} |")
    return "\n".join(lines) + "\n"
