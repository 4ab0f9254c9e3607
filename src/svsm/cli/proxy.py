# SPDX-License-Identifier: MIT OR Apache-2.0
"""`svsm proxy`: relay a VM's serial line (a Unix stream socket) to a broker's HTTP."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

__all__ = ["configure"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `svsm proxy`."""
    parser.add_argument("--url", required=True, help="the broker, e.g. http://127.0.0.1:8080")
    parser.add_argument("--serial", required=True, type=Path, metavar="SOCKET", help="Unix socket to listen on")
    parser.add_argument("--force", action="store_true", help="replace a socket that nobody listens on any more")
    parser.add_argument(
        "--timeout", type=float, default=30.0, metavar="SECONDS", help="for each exchange (default: 30)"
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    import logging

    from svsm.host.proxy import Limits, listen, serve
    from svsm.host.proxy.kbs_client import check_url

    check_url(arguments.url)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    listener = listen(arguments.serial, replace=arguments.force)
    stop, stopper = os.pipe()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os.write(stopper, b"x"))
    print(f"relaying {arguments.serial} to {arguments.url}", file=sys.stderr, flush=True)
    try:
        serve(listener, arguments.url, limits=Limits(exchange_s=arguments.timeout), stop=stop)
    finally:
        listener.close()
        arguments.serial.unlink(missing_ok=True)
    return 0
