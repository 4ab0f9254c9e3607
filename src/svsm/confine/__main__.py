# SPDX-License-Identifier: MIT OR Apache-2.0
"""`python -m svsm.confine` prints the tables of docs/isolation.md."""

from __future__ import annotations

import sys

from svsm.confine.render import tables

sys.stdout.write(tables())
