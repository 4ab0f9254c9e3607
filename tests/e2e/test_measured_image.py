# SPDX-License-Identifier: MIT OR Apache-2.0
"""What is measured is what runs: the checkout does not matter, another image is another digest, and shows."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_private_key

ROOT = Path(__file__).parents[2]
MARKER = b"measured"
pytestmark = [pytest.mark.e2e, pytest.mark.long]


class Checkout:
    """A copy of the sources, with a state of its own."""

    def __init__(self, folder: Path) -> None:
        self.sources = folder / "src"
        self.state = folder / "state"
        self.out = folder / "out"
        shutil.copytree(ROOT / "src", self.sources, ignore=shutil.ignore_patterns("__pycache__"))

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "svsm.cli.main", *arguments],
            env={**os.environ, "PYTHONPATH": str(self.sources), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def boot(self, *options: str) -> tuple[int, list[dict[str, Any]]]:
        """Boot until ready or refused, then stop: exit code and events."""
        command = [sys.executable, "-m", "svsm.cli.main", "boot", "--state", str(self.state), "--json", *options]
        environment = {**os.environ, "PYTHONPATH": str(self.sources), "PYTHONDONTWRITEBYTECODE": "1"}
        with open(self.out, "wb") as out:
            started = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL, env=environment)
        try:
            deadline = time.monotonic() + 60
            while started.poll() is None and b'"event": "ready"' not in self.out.read_bytes():
                assert time.monotonic() < deadline, self.out.read_text()
                time.sleep(0.02)
            if started.poll() is None:
                started.send_signal(signal.SIGINT)
            code = started.wait(30)
        finally:
            started.kill()
        return code, [json.loads(line) for line in self.out.read_text().splitlines() if line.startswith("{")]

    def build(self, image: Path) -> str:
        """Build an image for this state's broker; its launch digest."""
        key = load_der_private_key((self.state / "broker" / "signing.key").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        public = self.state.parent / "broker.pem"
        public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
        done = self.run("igvm", "build", "-o", str(image), "--broker-key", str(public), "--json")
        assert done.returncode == 0, done.stderr
        return str(json.loads(done.stdout)["launch_digest"])

    def edit(self, name: str, old: str, new: str) -> None:
        path = self.sources / "svsm" / name
        text = path.read_text()
        assert text.count(old) == 1
        path.write_text(text.replace(old, new))

    def volume(self) -> str:
        done = self.run("broker", "volume", "show", "--state", str(self.state), "--json")
        (row,) = json.loads(done.stdout)["volumes"]
        return str(row["volume_id"])


def event(events: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    found = [entry for entry in events if entry["event"] == kind]
    assert found, events[-3:]
    return found[0]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_the_checkout_does_not_run_inside(checkout: Checkout, tmp_path: Path) -> None:
    _, events = checkout.boot()
    first = event(events, "ready")
    image = tmp_path / "image.igvm"
    assert checkout.build(image) == first["launch_digest"]
    for room in ("kernel", "storage", "services"):
        for source in (checkout.sources / "svsm" / room).rglob("*.py"):
            source.write_text("raise RuntimeError('the checkout was imported')\n")
    code, events = checkout.boot("--image", str(image))
    again = event(events, "ready")
    assert [again[key] for key in ("launch_digest", "ek_name")] == [first[key] for key in ("launch_digest", "ek_name")]
    assert code in (0, 130)


def test_one_docstring_byte_is_refused_until_it_is_allowed(checkout: Checkout, tmp_path: Path) -> None:
    _, events = checkout.boot()
    first = event(events, "ready")
    checkout.edit("kernel/boot.py", '"""The kernel: ', '"""The Kernel: ')
    image = tmp_path / "image.igvm"
    digest = checkout.build(image)
    assert digest != first["launch_digest"]
    code, events = checkout.boot("--image", str(image))
    assert code == 3
    hint = event(events, "error")["hint"]
    command = hint[hint.index("svsm broker volume allow") :].split()
    assert digest in command
    allowed = checkout.run(*command[1:])  # as printed: nothing to be filled in by hand
    assert allowed.returncode == 0, allowed.stderr
    _, events = checkout.boot("--image", str(image))
    assert event(events, "ready")["ek_name"] == first["ek_name"]


def test_a_tpm_that_answers_with_a_marker_shows_the_marker(checkout: Checkout) -> None:
    """The image is what runs: a changed TPM service, enrolled as such, is seen by who asks for random bytes."""
    checkout.edit(
        "services/vtpm/library.py",
        "        return bytes(ffi.buffer(self._response[0], self._size[0]))\n",
        "        answer = bytes(ffi.buffer(self._response[0], self._size[0]))\n"
        '        if command[6:10] == bytes.fromhex("0000017b"):  # TPM2_GetRandom\n'
        f"            answer = answer[:12] + ({MARKER!r} * 9)[: len(answer) - 12]\n"
        "        return answer\n",
    )
    _, events = checkout.boot()
    event(events, "ready")
    facts = {entry["name"]: entry["value"] for entry in events if entry["event"] == "fact"}
    assert MARKER.hex() in facts["socket_random"]
