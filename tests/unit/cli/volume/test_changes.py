# SPDX-License-Identifier: MIT OR Apache-2.0
"""`svsm volume write | rm | batch`: commits, what is refused, and what a hostile batch cannot do."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import pytest

from svsm.cli.main import main
from svsm.cli.volume.words import FIRST_INODE
from svsm.storage.cocoonfs.layout import FIRST_USER_INODE
from tests.unit.cli.volume.conftest import STATE, Bench

KEYED = "--key-file @key"


def _stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_write_and_rm(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.put("in", b"x" * 1000)
    before = int(bench.json(f"info @image {KEYED}")["counter"])
    said = bench.json(f"write @image 0x20 @in {KEYED} --flags 0xff")
    assert (said["written"], said["removed"], said["commits"], int(said["counter"])) == (1, 0, 1, before + 1)
    assert bench.files() == {STATE: (3, 5), 0x20: (255, 1000)}
    _stdin(monkeypatch, b"from stdin")
    assert bench.run(f"write @image 0x20 - {KEYED} --force") == b""
    assert bench.run(f"read @image 32 {KEYED}") == b"from stdin"
    assert bench.json(f"rm @image 32 {STATE} {KEYED}")["removed"] == 2
    assert bench.files() == {}


def test_refused_changes(bench: Bench) -> None:
    bench.put("in", b"x")
    bench.put("big", bytes(65 << 10))
    bench.put("most", bytes(60 << 10))
    for line, code in (
        (f"write @image {STATE} @in {KEYED}", "cocoonfs-exists"),
        (f"write @image 15 @in {KEYED}", "cocoonfs-inode"),
        (f"write @image 16 @in {KEYED} --flags 256", "cocoonfs-flags"),
        (f"write @image 16 @none {KEYED}", "volume-input"),
        (f"write @image 16 @ {KEYED}", "volume-input"),
        (f"write @image 16 @big {KEYED}", "cocoonfs-full"),
        (f"write @image 16 @most {KEYED}", "cocoonfs-full"),
        (f"rm @image {STATE} 77 {KEYED}", "cocoonfs-no-such-file"),
        (f"rm @image {STATE} {STATE} {KEYED}", "cocoonfs-no-such-file"),
    ):
        bench.refused(line, code)
    bench.refused("write @image 16 @in --key-file @wrong", "cocoonfs-authentication", code=3)


def test_the_first_number_of_a_file_is_named(bench: Bench) -> None:
    assert FIRST_INODE == FIRST_USER_INODE
    bench.put("in", b"x")
    for line in (f"write @image {FIRST_INODE - 1} @in {KEYED}", f"rm @image 1 {KEYED}"):
        bench.refused(line, "cocoonfs-inode")
        assert f"hint: a file has a number that you choose: {FIRST_INODE} or more" in bench.stderr
    bench.run(f"write @image {FIRST_INODE} @in {KEYED}")


@pytest.mark.parametrize("words", [["--help"], ["write", "--help"]])
def test_the_help_says_what_an_inode_is(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["volume", *words])
    assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "INODE" in said
    assert "choose" in said
    assert str(FIRST_INODE) in said


def _batch(bench: Bench, *lines: str | dict[str, Any], options: str = "") -> dict[str, Any]:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    bench.put("batch", text.replace("@", f"{bench.folder}/").encode())
    return bench.json(f"batch @image @batch {KEYED} {options}")


def test_batch_in_both_forms(bench: Bench) -> None:
    bench.put("in", b"contents")
    said = _batch(
        bench,
        "# a comment",
        "",
        "write 16 @in 7",
        "write 17 @in",
        {"op": "write", "inode": 18, "data": base64.b64encode(b"inline").decode(), "flags": 9},
        {"op": "write", "inode": 19, "file": "@in"},
        "rm 17",
        {"op": "rm", "inode": STATE},
    )
    assert (said["written"], said["removed"], said["commits"]) == (4, 2, 1)
    assert bench.files() == {16: (7, 8), 18: (9, 6), 19: (0, 8)}
    assert bench.run(f"read @image 18 {KEYED}") == b"inline"


def test_batch_in_several_commits(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.put("in", b"x")
    assert _batch(bench, *[f"write {n} @in" for n in range(16, 26)], options="--commit-every 4")["commits"] == 3
    assert _batch(bench, "rm 16", "commit", "commit", "rm 17", {"op": "commit"}, "rm 18")["commits"] == 3
    _stdin(monkeypatch, b"rm 19\nrm 20")
    assert bench.json(f"batch @image - {KEYED}")["removed"] == 2
    assert bench.files().keys() == {STATE, *range(21, 26)}
    assert bench.json(f"batch @image /dev/null {KEYED}")["commits"] == 0


def test_a_wrong_line_undoes_its_commit_and_leaves_those_before(bench: Bench) -> None:
    bench.put("in", b"x")
    bench.put("batch", f"write 16 {bench.folder}/in\ncommit\nwrite 17 {bench.folder}/in\nrm 99\n".encode())
    found = bench.json(f"batch @image @batch {KEYED}", code=1)
    assert (found["code"], found["details"]["line"], found["details"]["commits"]) == ("cocoonfs-no-such-file", 4, 1)
    assert bench.files().keys() == {STATE, 16}


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("frobnicate 1", "volume-batch"),
        ("write 16", "volume-batch"),
        ("write x @in", "volume-batch"),
        ("write 16 @in 1 2", "volume-batch"),
        ("rm", "volume-batch"),
        ("rm -1", "volume-batch"),
        ("rm 36893488147419103232", "volume-batch"),
        ('write 16 "unclosed', "volume-batch"),
        ("{", "volume-batch"),
        ("{" * 100_000, "volume-batch"),
        ('{"a":' * 100_000, "volume-batch"),
        ("{}", "volume-batch"),
        ('{"op": ["write"]}', "volume-batch"),
        ('{"op": "rm"}', "volume-batch"),
        ('{"op": "rm", "inode": true}', "volume-batch"),
        ('{"op": "rm", "inode": 1.5}', "volume-batch"),
        ('{"op": "rm", "inode": 16, "flags": 1}', "volume-batch"),
        ('{"op": "write", "inode": 16}', "volume-batch"),
        ('{"op": "write", "inode": 16, "data": "", "file": "x"}', "volume-batch"),
        ('{"op": "write", "inode": 16, "data": "!!"}', "volume-batch"),
        ('{"op": "write", "inode": 16, "file": 3}', "volume-batch"),
        ('{"op": "write", "inode": 16, "file": "a\\u0000b"}', "volume-batch"),
        ('{"op": "write", "inode": 16, "data": "", "flags": -1}', "volume-batch"),
        ("write 16 a\x00b", "volume-batch"),
        ("write 16 @none", "volume-input"),
        ("write 16 /dev/zero", "cocoonfs-full"),
        (f"write {STATE} @in", "cocoonfs-exists"),
        ("\xff\xfe", "volume-batch"),
        ("x" * 200_000, "volume-batch"),
    ],
)
def test_hostile_lines(bench: Bench, line: str, code: str) -> None:
    bench.put("in", b"x")
    bench.put("batch", b"# first\n\n" + line.replace("@", f"{bench.folder}/").encode("latin-1"))
    details = bench.refused(f"batch @image @batch {KEYED}", code)
    assert (details["line"], details["commits"]) == (3, 0)


def test_a_batch_larger_than_the_volume_is_not_read_into_memory(bench: Bench) -> None:
    bench.put("in", bytes(30 << 10))
    bench.put("batch", "".join(f"write {n} {bench.folder}/in\n" for n in range(16, 30)).encode())
    details = bench.refused(f"batch @image @batch {KEYED}", "cocoonfs-full")
    assert details["line"] == 3
