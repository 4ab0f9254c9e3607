# SPDX-License-Identifier: MIT OR Apache-2.0
"""`svsm stop`: end the instance that runs on a state directory, in order (TPM2_Shutdown, flush, close)."""

from __future__ import annotations

import argparse

from svsm.cli.state_option import add_state

__all__ = ["configure"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `svsm stop`."""
    add_state(parser)
    parser.add_argument("--timeout", type=float, default=15.0, metavar="SECONDS", help="how long to wait (default: 15)")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from svsm.cli.supervisor.state import StateDirectory, default_directory

    path = arguments.state or default_directory()
    stopped = StateDirectory.existing(path).stop(timeout_s=arguments.timeout)
    print("stopped" if stopped else "nothing was running")
    return 0
