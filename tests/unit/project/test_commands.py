# SPDX-License-Identifier: MIT OR Apache-2.0
"""The command line as a whole: every group exists, pages name only commands that exist, and streams that break."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from svsm import __version__
from svsm.cli import main as command_line

ROOT = Path(__file__).parents[3]
GROUPS = tuple(command_line._GROUPS)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def svsm(*words: str, stdout: int | None = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "svsm.cli.main", *words],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )


def parser_of(group: str) -> argparse.ArgumentParser:
    return subparsers(command_line._parser([group]))[group]


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def leaves(parser: argparse.ArgumentParser, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], set[str]]]:
    """Every full command below `parser`, with its options."""
    below = subparsers(parser)
    if not below:
        yield words, {option for action in parser._actions for option in action.option_strings}
    for name, child in below.items():
        yield from leaves(child, (*words, name))


COMMANDS = {words: options for group in GROUPS for words, options in leaves(parser_of(group), (group,))}


@pytest.mark.parametrize("group", GROUPS)
def test_every_group_has_a_module_that_configures_itself(group: str) -> None:
    module = importlib.import_module(f"svsm.cli.{group}")
    assert "configure" in module.__all__
    assert module.__doc__
    for words, _ in leaves(parser_of(group), (group,)):
        parser = command_line._parser(words)
        for word in words:
            parser = subparsers(parser)[word]
        assert callable(parser.get_default("run")), words


def mentioned(text: str) -> Iterator[tuple[str, ...]]:
    """`svsm …` command lines in code spans and indented or fenced blocks, as words."""
    spans = re.findall(r"`([^`\n]+)`", text)
    spans += [line.strip() for line in text.splitlines() if line.startswith("    ")]
    for block in re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        spans += block.replace("\\\n", " ").splitlines()
    for span in spans:
        found = re.match(r"(?:\$ )?(?:\./run )?svsm ([a-z].*)", span.strip())
        if found:
            yield tuple(found[1].split())


def command_named(words: tuple[str, ...]) -> tuple[str, ...] | None:
    """The command at the start of `words`: a whole one, or a group; None when there is no such command."""
    for length in (3, 2, 1):
        if words[:length] in COMMANDS:
            return words[:length]
    return words[:1] if words[0] in GROUPS and len(words) == 1 else None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_only_commands_and_options_that_exist(page: Path) -> None:
    wrong = []
    for words in mentioned(page.read_text(encoding="utf-8")):
        command = command_named(words)
        if command is None:
            wrong.append(" ".join(words))
            continue
        for word in words[len(command) :]:
            if word in ("|", "&&", ";", ">", "#"):
                break
            option = re.match(r"--[a-z][a-z-]*", word)
            if option and option[0] not in COMMANDS.get(command, set()):
                wrong.append(f"{' '.join(command)} has no {option[0]}")
    assert not wrong


def test_readme_names_every_command() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = {line for line in text.splitlines() if line.startswith("| `svsm ")}
    missing = []
    for words in COMMANDS:
        if words[0] in ("boot", "status", "stop"):
            wanted = f"`{words[0]}`" if words[0] != "boot" else "`svsm boot`"
            found = any(wanted in row for row in rows)
        else:
            mine = [row for row in rows if row.startswith(f"| `svsm {words[0]}")]
            found = any(re.search(rf"[ `]{re.escape(' '.join(words[1:]) or words[0])}[ `]", row) for row in mine)
        if not found:
            missing.append(" ".join(words))
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert not [target for target in targets if not (page.parent / target).exists()]


def test_run_commands_that_pages_name_exist() -> None:
    script = (ROOT / "run").read_text(encoding="utf-8")
    known = set(re.findall(r"^  ([a-z]+)\)", script, re.MULTILINE)) | {"help", "peers"}
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for command in re.findall(r"`?\./run ([a-z]+)", page.read_text(encoding="utf-8")):
            assert command in known, (page.name, command)


def test_version() -> None:
    done = svsm("--version")
    assert (done.returncode, done.stdout) == (0, f"svsm {__version__}\n")


@pytest.mark.parametrize(
    "words", [(), ("nonsense",), ("igvm",), ("igvm", "measure"), ("tcb", "--what"), ("--nothing",)]
)
def test_a_usage_error_is_two_and_silent_on_stdout(words: tuple[str, ...]) -> None:
    done = svsm(*words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("usage: ")


@pytest.mark.parametrize("words", [("explain",), ("tcb", "--json")])
def test_a_reader_that_goes_away_is_no_noise(words: tuple[str, ...]) -> None:
    read, write = os.pipe()
    os.close(read)
    done = svsm(*words, stdout=write)
    os.close(write)
    assert done.returncode == 1
    assert done.stderr == ""


def test_a_full_disk_under_stdout_is_an_error_with_a_code() -> None:
    with open("/dev/full", "wb") as full:
        done = svsm("explain", stdout=full.fileno())
    assert done.returncode == 1
    assert "[cli-os]" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_error_names_its_code_and_debug_shows_where() -> None:
    done = svsm("explain", "nothing-like-it")
    assert done.returncode == 1
    assert "[explain-unknown]" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Traceback" in svsm("--debug", "explain", "nothing-like-it").stderr
