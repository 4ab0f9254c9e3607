# SPDX-License-Identifier: MIT OR Apache-2.0
"""`--state DIR`, which the commands on an instance have in common; `supervisor.state` takes longer to import."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["add_state"]


def add_state(parser: argparse.ArgumentParser) -> None:
    """Add the option; None stands for `supervisor.state.default_directory`."""
    parser.add_argument(
        "--state",
        type=Path,
        metavar="DIR",
        help="state directory (default: $XDG_STATE_HOME/svsm, else ~/.local/state/svsm)",
    )
