# SPDX-License-Identifier: MIT OR Apache-2.0
"""Confinement of a process: system call allow lists, Landlock, uid, limits. docs/isolation.md has the tables.

Imports nothing of svsm but the errors, so that every role, trusted or not, and the measured payload can use it.
"""

from svsm.confine.landlock import PathRule
from svsm.confine.lists import Role
from svsm.confine.process import Isolation, enter, harden

__all__ = ["Isolation", "PathRule", "Role", "enter", "harden"]
