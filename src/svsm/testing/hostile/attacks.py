# SPDX-License-Identifier: MIT OR Apache-2.0
"""The catalogue: what a malicious virtio block device can do, by number, and how the driver must react.

The cases themselves are in `ring_attacks`, `register_attacks` and `time_attacks`; importing this module registers
them all.
"""

from __future__ import annotations

from svsm.testing.hostile import register_attacks, ring_attacks, time_attacks
from svsm.testing.hostile.catalogue import ABSENT, ATTACKS, NUMBERS, Attack

__all__ = ["ABSENT", "ATTACKS", "MODULES", "NUMBERS", "Attack"]

MODULES = (ring_attacks, register_attacks, time_attacks)
