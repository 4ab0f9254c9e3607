# SPDX-License-Identifier: MIT OR Apache-2.0
"""Entering a role: everything a process gives up before it touches anything hostile, in the order that works.

    no core dump, not dumpable, dies with its parent, no new privileges
    → Landlock rules made (paths are opened while that is still possible)
    → uid and groups dropped; the drop clears PDEATHSIG and may reset dumpable, so both again, then the parent check
    → Landlock in force → seccomp in force

A role must have imported everything by then. What could not be had is in the returned `Isolation`, so that the
operator sees it; nothing is reduced silently. A kernel without seccomp is refused outright.
"""

from __future__ import annotations

import dataclasses
import os
import resource
import signal
from collections.abc import Sequence

from svsm.confine import filter as seccomp
from svsm.confine import landlock, libc
from svsm.confine.lists import Role
from svsm.formats.errors import BackendError, StateError

__all__ = ["Isolation", "bind_to_parent", "drop", "enter", "harden", "report"]

_SET_PDEATHSIG, _SET_DUMPABLE, _SET_NO_NEW_PRIVS = 1, 4, 38


@dataclasses.dataclass(frozen=True, slots=True)
class Isolation:
    """What really holds for a process."""

    role: Role
    uid: int
    """The uid it runs as."""
    own_uid: bool
    """Whether it was given a uid of its own (only where root starts it)."""
    landlock_abi: int
    """The ABI in use, 0 for none."""
    seccomp: bool
    reduced: tuple[str, ...]
    """What is missing, as stable words: ``landlock-absent``, ``landlock-abi-1``; empty when complete."""

    def as_json(self) -> dict[str, object]:
        """The members for `--json`."""
        return {
            "role": self.role.value,
            "uid": self.uid,
            "own_uid": self.own_uid,
            "landlock_abi": self.landlock_abi,
            "seccomp": self.seccomp,
            "reduced": list(self.reduced),
        }


def _must(option: int, argument: int) -> None:
    answer = libc.prctl(option, argument)
    if answer < 0:
        raise BackendError("the kernel refused a process setting", code="confine-prctl", option=option, answer=answer)


def harden() -> None:
    """No core dumps, no dumping or tracing by the same uid, no privileges through exec.

    Raises:
        BackendError: ``confine-prctl``.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _must(_SET_DUMPABLE, 0)
    _must(_SET_NO_NEW_PRIVS, 1)


def bind_to_parent(parent: int) -> None:
    """Die when the parent's thread that started this process dies; refuse to go on when it already has.

    Args:
        parent: The process id that must still be the parent.

    Raises:
        StateError: ``confine-parent``: the parent is gone (or a subreaper took over).
    """
    _must(_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise StateError("the parent process is gone", code="confine-parent", expected=parent, got=os.getppid())


def drop(uid: int | None, *, parent: int) -> None:
    """Become `uid` (and the group of the same number, no others), for good.

    Args:
        uid: The role's own uid; None keeps the present one.
        parent: See `bind_to_parent`; it is done again, because changing the uid clears it.

    Raises:
        BackendError: ``confine-uid``.
    """
    if uid is not None:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        except OSError as error:
            raise BackendError("the process can't take its own uid", code="confine-uid", uid=uid) from error
        if os.getresuid() != (uid, uid, uid) or os.getresgid() != (uid, uid, uid):
            raise BackendError("the process kept another uid", code="confine-uid", uid=uid)
        _must(_SET_DUMPABLE, 0)
    bind_to_parent(parent)


def enter(
    role: Role | str,
    *,
    uid: int | None = None,
    landlock_rules: Sequence[landlock.PathRule] = (),
    tcp: bool = False,
    parent: int | None = None,
    landlock_cap: int | None = None,
) -> Isolation:
    """Confine this process to `role`. Call it once, with every import done, before the first hostile byte.

    Args:
        role: Whose allow list and report.
        uid: The role's own uid where root starts it, else None.
        landlock_rules: The paths that the role may still use.
        tcp: Whether it may use TCP (proxy, broker, host).
        parent: Process id of the parent, taken *before* the fork; None takes the present parent.
        landlock_cap: Use no more than this Landlock ABI.

    Returns:
        What holds now.

    Raises:
        BackendError: ``confine-*`` when the system refuses what must be there.
        StateError: ``confine-parent``.
    """
    role = Role(role)
    parent = os.getppid() if parent is None else parent
    harden()
    bind_to_parent(parent)
    ruleset = landlock.prepare(landlock_rules, tcp=tcp, cap=landlock_cap)
    drop(uid, parent=parent)
    ruleset.enforce()
    seccomp.install(role)
    return report(role, own_uid=uid is not None, landlock_abi=ruleset.abi)


def report(role: Role, *, own_uid: bool, landlock_abi: int) -> Isolation:
    """The report of a process whose filter is in force (the loader takes the steps one by one)."""
    reduced: tuple[str, ...] = ()
    if landlock_abi == 0:
        reduced = ("landlock-absent",)
    elif landlock_abi < landlock.COMPLETE_ABI:
        reduced = (f"landlock-abi-{landlock_abi}",)
    return Isolation(role, os.getuid(), own_uid, landlock_abi, True, reduced)
