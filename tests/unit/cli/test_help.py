# SPDX-License-Identifier: MIT OR Apache-2.0
"""What `--help` says to a new user, of every command."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest

from svsm.cli.main import _GROUPS, _parser


def _below(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _below(inner)
        else:
            yield parser.prog, action


@pytest.mark.parametrize("group", _GROUPS)
def test_a_default_is_told_in_one_way(group: str) -> None:
    seen = 0
    for prog, action in _below(_parser([group])):
        seen += 1
        assert action.help, (prog, action.dest)
        if action.default is argparse.SUPPRESS or isinstance(action.default, bytes) or not action.default:
            continue  # nothing, a flag that is off, or an empty value
        assert "(default: " in action.help, (prog, action.dest)
    assert seen > 2  # --help, --version and --debug are there anyhow


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--landlock-abi", "as an older Linux would"),
        ("--disk", "process:SOCKET: a program that listens there"),
        ("--state", "(default: $XDG_STATE_HOME/svsm"),
    ],
)
def test_boot_explains_what_it_asks_for(option: str, words: str) -> None:
    found = [action.help for _, action in _below(_parser(["boot"])) if option in action.option_strings]
    assert words in str(found)
