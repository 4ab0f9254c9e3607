# SPDX-License-Identifier: MIT OR Apache-2.0
"""The reference program reads what `svsm volume` wrote, and `svsm volume` checks what the reference program wrote."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from svsm.cli.main import main
from tests.support import peer

pytestmark = pytest.mark.interop
KEY = bytes(range(40, 72)).hex()
KIND = "00000012-3456-789a-bcde-f01234567890"


class _Both:
    """Our command and the reference program on the same files of one folder; @ stands for it."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys, self._program = folder, capsys, peer("cocoonfs")
        (folder / "key").write_text(KEY)

    def _words(self, line: str) -> list[str]:
        return [word.replace("@", f"{self.folder}/") for word in line.split()]

    def ours(self, line: str, *, code: int = 0, key: bool = True) -> dict[str, Any]:
        """`svsm volume …` with the key and --json."""
        words = [*self._words(line), *(["--key-file", str(self.folder / "key")] if key else [])]
        self._capsys.readouterr()
        found = main(["volume", *words, "--json"])
        out, err = self._capsys.readouterr()
        assert found == code, err
        parsed: dict[str, Any] = json.loads(out)
        return parsed

    def theirs(self, line: str) -> str:
        """The reference program on @image."""
        command = [str(self._program), "-i", str(self.folder / "image"), "-f", *self._words(line)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    def their_files(self) -> dict[int, bytes]:
        """All files as the reference program reads them."""
        found = {}
        for line in self.theirs(f"list-files -K {KEY}").splitlines():
            (self.folder / "out").unlink(missing_ok=True)
            self.theirs(f"read-file -K {KEY} -o @out {line.split()[0]}")
            found[int(line.split()[0])] = (self.folder / "out").read_bytes()
        return found

    def put(self, name: str, data: bytes) -> None:
        """A file of the folder."""
        (self.folder / name).write_bytes(data)

    def is_clean(self) -> bool:
        """Whether our check finds nothing at all."""
        report = self.ours("check @image")
        return report["good"] and not report["findings"]


@pytest.fixture
def both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> _Both:
    """See `_Both`."""
    return _Both(tmp_path, capsys)


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--profile tuned",
        "--profile tuned --hash sha3 --cipher camellia --strength 256",
        "--hash sm3 --cipher sm4 --data-block 2KiB --leaf-node 512 --aux-reserve 1KiB",
    ],
)
def test_they_read_what_we_made_and_we_check_what_they_wrote(both: _Both, options: str) -> None:
    both.ours(f"create @image --size 512KiB --salt ddee {options}")
    contents = {inode: bytes([inode]) * (inode - 16) * 700 for inode in range(16, 30)}
    for inode, data in contents.items():
        both.put(f"f{inode}", data)
    both.put("batch", "".join(f"write {inode} {both.folder}/f{inode}\n" for inode in list(contents)[1:]).encode())
    both.ours("write @image 16 @f16")
    both.ours("batch @image @batch --commit-every 5")
    both.ours("rm @image 20 21")
    del contents[20], contents[21]
    assert both.their_files() == contents
    both.theirs(f"write-file -K {KEY} -i @f29 40")
    both.theirs(f"remove-file -K {KEY} 16")
    contents = {**contents, 40: contents[29]}
    del contents[16]
    assert {file["inode"]: file["bytes"] for file in both.ours("ls @image")["files"]} == {
        inode: len(data) for inode, data in contents.items()
    }
    assert both.is_clean()
    assert both.ours("map @image")["totals"]["free"] == both.ours("info @image")["free_bytes"]


def test_what_they_made(both: _Both) -> None:
    """A volume of the reference program's: checked, exported, resized, rekeyed, and read by it again."""
    both.put("f", b"theirs" * 500)
    both.theirs(f"mkfs -K {KEY} -I ddee -H sha2 -C aes -t 128 -s 256K")
    for inode in (16, 1 << 40):
        both.theirs(f"write-file -K {KEY} -i @f {inode}")
    assert both.is_clean()
    info = both.ours("info @image")
    assert (info["profile"], info["algorithms"], info["files"]) == ("reference", "sha2 aes 128", 2)
    both.ours("export @image -o @tar")
    both.ours("resize @image 512KiB --profile tuned")
    assert both.their_files() == {16: b"theirs" * 500, 1 << 40: b"theirs" * 500}
    both.ours("rm @image 16")
    both.ours("import @image @tar --force")
    assert both.their_files().keys() == {16, 1 << 40}
    both.ours(f"rekey @image --new-key-file @key --salt {'ab' * 255}")
    assert both.their_files().keys() == {16, 1 << 40}
    assert both.is_clean()


def test_auxiliary_metadata_and_announcements(both: _Both) -> None:
    both.put("record", b"a wrapped key")
    both.put("f", b"contents")
    both.ours("provision @image --size 256KiB --salt ddee --aux-reserve 1KiB", key=False)
    both.ours(f"aux add @image {KIND} @record", key=False)
    assert both.theirs("aux-fs-metadata list-entries").split()[0] == KIND
    both.theirs(f"write-file -K {KEY} -i @f 16")  # their first use makes it
    assert both.ours("info @image")["aux_records"] == 1
    both.theirs(f"aux-fs-metadata edit add-entry -i @f {KIND}")
    both.ours(f"aux remove @image {KIND} --index 0")
    (both.folder / "out").unlink(missing_ok=True)
    both.theirs(f"aux-fs-metadata read-entry -o @out {KIND} 0")
    assert (both.folder / "out").read_bytes() == b"contents"
    assert both.is_clean()
