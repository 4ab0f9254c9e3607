# SPDX-License-Identifier: MIT OR Apache-2.0
"""`svsm`: the command line. One place parses the words, prints errors and picks the exit code.

A command group is a module named in `_GROUPS`, imported only when its name is on the command line, so that no
command pays for the imports of another. Results go to stdout, everything else to stderr. Exit codes: 0 done,
1 failed, 2 usage, 3 refused or verification failed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, Protocol, cast

from svsm import __version__
from svsm.formats.errors import BackendError, SvsmError

__all__ = ["main"]

_DEBUG = "--debug"
_GROUPS = {
    "boot": "build, measure, launch, attest, and serve a TPM: the main job",
    "status": "what runs on a state directory",
    "stop": "stop what runs on a state directory",
    "igvm": "build, inspect and measure IGVM images",
    "report": "show and verify SEV-SNP attestation reports",
    "machine": "the simulated SEV-SNP machine's identity",
    "broker": "the volume owner's key broker",
    "proxy": "relay a VM's serial line to a broker",
    "volume": "make, look into, change and verify CocoonFS volumes offline",
    "fuzz": "look for inputs that our parsers cannot take",
    "tcb": "list what the measured payload consists of",
    "explain": "cause and cure of an error code",
}


_BY_VERB = ("volume",)
"""Groups of so many verbs that a command loads only its own."""


class _Group(Protocol):
    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the group's verbs; each verb's parser sets `run`."""


class _GroupByVerb(Protocol):
    def configure(self, parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
        """The same; `words` follow the group's name, and verbs that they do not name may be left out."""


class _Parser(argparse.ArgumentParser):
    """Asks for the terminal's width once: argparse does for each option, and imports compressors to do it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": _formatter, **options})


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.HelpFormatter(prog, width=_columns() - 2)


@functools.cache
def _columns() -> int:
    try:
        return int(os.environ["COLUMNS"])
    except (KeyError, ValueError):
        with contextlib.suppress(OSError):
            return os.get_terminal_size(1).columns
    return 80


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="svsm",
        description="A Secure VM Service Module and its tools. Start with: svsm boot",
    )
    parser.add_argument("--version", action="version", version=f"svsm {__version__}")
    parser.add_argument(_DEBUG, action="store_true", help="show a traceback with an error; anywhere on the line")
    groups = parser.add_subparsers(dest="group", metavar="COMMAND", required=True)
    chosen = next((word for word in words if not word.startswith("-")), None)
    # A command does not pay for the groups that it does not name either; all of them are for help and for mistakes.
    for name, summary in _GROUPS.items():
        if name != chosen and chosen in _GROUPS:
            continue
        group = groups.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == chosen:
            module = importlib.import_module(f"svsm.cli.{name}")
            if name in _BY_VERB:
                cast(_GroupByVerb, module).configure(group, words[words.index(name) + 1 :])
            else:
                cast(_Group, module).configure(group)
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        words: The arguments; the process's own when None.

    Returns:
        The exit code.
    """
    words = sys.argv[1:] if words is None else words
    # Accepted anywhere on the line: it is what a hint asks to add to a command that was typed already.
    debug = _DEBUG in words
    arguments = _parser(words).parse_args([word for word in words if word != _DEBUG])
    arguments.debug = debug
    try:
        code = cast(int, arguments.run(arguments))
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where an error of it can still be told
        return code
    except SvsmError as error:
        if arguments.debug:
            raise
        _print_error(error, as_json=getattr(arguments, "json", False))
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output went away, which is its right.
        _drop_output()
        return 1
    except OSError as error:
        if arguments.debug:
            raise
        _drop_output()
        refused = BackendError(f"the operating system refused: {error.strerror or error}", code="cli-os")
        if error.filename is not None:
            refused.details["path"] = str(error.filename)
        _print_error(refused, as_json=False)
        return refused.exit_code
    except KeyboardInterrupt:
        return 130


def _drop_output() -> None:
    """Write what can be written; otherwise forget it, so that Python does not complain again while it exits."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_error(error: SvsmError, *, as_json: bool) -> None:
    if as_json:
        import json

        shown = {
            "schema": 1,
            "event": "error",
            "code": error.code,
            "message": error.message,
            "hint": error.hint,
            "details": {
                name: value.hex() if isinstance(value, bytes) else value for name, value in error.details.items()
            },
        }
        print(json.dumps(shown), flush=True)
    print(f"error: {error} [{error.code}]", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)
    print(f"more: svsm explain {error.code}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
