# SPDX-License-Identifier: MIT OR Apache-2.0
"""`svsm status`: what runs on a state directory, and what is not protected yet."""

from __future__ import annotations

import argparse
import json

from svsm.cli.state_option import add_state

__all__ = ["configure"]

_NOT_PROTECTED = "putting an active volume back to an older state is not noticed yet (no ledger)"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `svsm status`."""
    add_state(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from svsm.cli.supervisor.state import StateDirectory, default_directory

    path = arguments.state or default_directory()
    state = StateDirectory.existing(path)
    process_id = state.running_process()
    ready: dict[str, object] = {}
    ready_file = state.folder("run") / "ready.json"
    if process_id is not None and ready_file.exists():
        ready = json.loads(ready_file.read_text(encoding="utf-8"))
    phase = "stopped" if process_id is None else "ready" if ready else "starting"
    facts: dict[str, object] = {
        "state": str(path),
        "status": phase,
        "process_id": process_id,
        "name": state.name,
        "volume_id": str(state.volume_id),
        **{key: ready[key] for key in ("tcti", "launch_digest", "payload_digest", "ek_name", "broker") if key in ready},
        "not_protected": [_NOT_PROTECTED],
    }
    if arguments.json:
        print(json.dumps({"schema": 1, **facts}))
        return 0
    for name, value in facts.items():
        if name == "not_protected":
            print(f"{'not protected':16} {_NOT_PROTECTED}")
        elif value is not None:
            print(f"{name.replace('_', ' '):16} {value}")
    return 0
