# SPDX-License-Identifier: MIT OR Apache-2.0
"""`svsm volume`: what it prints, and that it changes nothing."""

from __future__ import annotations

import argparse
import base64
import json
import os
from pathlib import Path

import pytest

from svsm.cli import volume as command
from svsm.formats.errors import SvsmError
from svsm.storage.cocoonfs import Volume
from svsm.storage.drivers.file import FileDevice

KEY = bytes(range(32))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(64 << 10))
    (tmp_path / "key").write_text(KEY.hex() + "\n")
    (tmp_path / "raw").write_bytes(KEY)
    (tmp_path / "wrong").write_bytes(b"\1" * 32)
    volume = Volume.create(FileDevice(os.open(path, os.O_RDWR)), KEY, salt=b"\xdd\xee\xff")
    with volume.transaction() as transaction:
        transaction.write(0x1_0000_0000, b"state", 3)
    volume.close()
    return path


def _run(*words: str | Path) -> int:
    parser = argparse.ArgumentParser()
    command.configure(parser)
    arguments = parser.parse_args([str(word) for word in words])
    code: int = arguments.run(arguments)
    return code


@pytest.mark.parametrize("key", ["key", "raw"])
def test_ls_and_read(image: Path, key: str, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    before = image.read_bytes()
    key_file = image.parent / key
    assert _run("ls", image, "--key-file", key_file) == 0
    assert capfdbinary.readouterr().out == b"0x100000000  flags 0x03  5 bytes\n"
    assert _run("ls", image, "--key-file", key_file, "--json") == 0
    files = [{"inode": 0x1_0000_0000, "flags": 3, "length": 5}]
    assert json.loads(capfdbinary.readouterr().out) == {"schema": 1, "files": files}
    assert _run("read", image, "0x100000000", "--key-file", key_file) == 0
    assert capfdbinary.readouterr().out == b"state"
    assert _run("read", image, "0x100000000", "--key-file", key_file, "--json") == 0
    assert base64.b64decode(json.loads(capfdbinary.readouterr().out)["data"]) == b"state"
    assert image.read_bytes() == before


def test_info(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("info", image, "--json") == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["salt"] == "ddeeff"
    assert plain["io_block_bytes"] == 512
    assert _run("info", image, "--json", "--key-file", image.parent / "key") == 0
    full = json.loads(capsys.readouterr().out)
    assert full["schema"] == 1
    assert (full["files"], full["size_bytes"], full["commit_pending"]) == (1, 64 << 10, False)
    assert full | plain == full
    assert _run("info", image) == 0
    assert "salt" in capsys.readouterr().out


def test_pending_commit_is_shown_and_left(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    device = FileDevice(os.open(image, os.O_RDWR))
    transaction = Volume.open(device, KEY).transaction()
    transaction.write(0x1_0000_0000, b"later", 3)
    transaction.prepare()
    device.close()
    before = image.read_bytes()
    assert _run("info", image, "--json", "--key-file", image.parent / "key") == 0
    assert json.loads(capsys.readouterr().out)["commit_pending"] is True
    assert image.read_bytes() == before


def test_output(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key_file, output = image.parent / "key", tmp_path / "out"
    assert _run("read", image, "0x100000000", "--key-file", key_file, "--output", output) == 0
    assert output.read_bytes() == b"state"
    assert output.stat().st_mode & 0o777 == 0o600
    assert capsys.readouterr().out == ""
    with pytest.raises(SvsmError) as caught:
        _run("read", image, "0x100000000", "--key-file", key_file, "--output", output)
    assert caught.value.code == "volume-output"
    assert _run("read", image, "0x100000000", "--key-file", key_file, "--output", output, "--force") == 0


@pytest.mark.parametrize(
    ("words", "code", "exit_code"),
    [
        (("ls", "{image}", "--key-file", "{folder}/wrong"), "cocoonfs-authentication", 3),
        (("ls", "{image}", "--key-file", "{folder}/none"), "volume-key-file", 3),
        (("ls", "{folder}/none", "--key-file", "{folder}/key"), "volume-image", 1),
        (("ls", "{folder}", "--key-file", "{folder}/key"), "block-io", 1),
        (("ls", "{folder}/raw", "--key-file", "{folder}/key"), "cocoonfs-no-magic", 1),
        (("read", "{image}", "77", "--key-file", "{folder}/key"), "cocoonfs-no-such-file", 1),
    ],
)
def test_refusals(image: Path, words: tuple[str, ...], code: str, exit_code: int) -> None:
    with pytest.raises(SvsmError) as caught:
        _run(*[word.format(image=image, folder=image.parent) for word in words])
    assert (caught.value.code, caught.value.exit_code) == (code, exit_code)
