# SPDX-License-Identifier: MIT OR Apache-2.0
"""Targets with defects, for the test that runs them in processes of their own."""

from __future__ import annotations

import os
import time

from svsm.fuzz.target import Target


def _raises(data: bytes) -> None:
    if len(data) > 3 and data[:2] == b"BU" and data[3] > 0x7F:
        raise KeyError(data[2])


def _hangs(data: bytes) -> None:
    if data[:1] == b"H":
        time.sleep(60)


def _dies(data: bytes) -> None:
    if data[:1] == b"D":
        os._exit(7)


_TARGETS = {"raises": Target("raises", "", _raises, lambda: [b"BU\0\0tail" * 9]), "hangs": Target("hangs", "", _hangs)}
_TARGETS["dies"] = Target("dies", "", _dies, lambda: [b"D"])


def find(name: str) -> Target:
    """One of them."""
    return _TARGETS[name]
