# SPDX-License-Identifier: MIT OR Apache-2.0
"""The key's whole way through real processes: kernel code here, `svsm proxy` and `svsm broker serve` as programs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from svsm.formats.errors import BackendError, PolicyError, SvsmError
from svsm.formats.launch_configuration import LaunchConfiguration
from svsm.formats.release_token import VolumeState
from svsm.formats.runtime_messages import Formatted, FormattedAcknowledged
from svsm.formats.settings import Settings
from svsm.kernel.attestation import Release, attest
from svsm.kernel.channels.stream import FramedChannel, StreamChannel
from svsm.kernel.runtime_channel import exchange
from tests.key_support import DIGEST, Chip, simulated_root
from tests.support import await_listener

pytestmark = pytest.mark.e2e

SVSM = [sys.executable, "-m", "svsm.cli.main"]


@dataclasses.dataclass
class Installation:
    """An owner's broker, a host's proxy, and what a kernel's image and launch would hold."""

    state: Path
    serial: Path
    url: str
    settings: Settings
    configuration: LaunchConfiguration

    def run(self, *words: str) -> str:
        done = subprocess.run(
            [*SVSM, "broker", *words, "--state", str(self.state)], capture_output=True, text=True, timeout=30
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def connect(self) -> FramedChannel:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(self.serial))
        return FramedChannel(StreamChannel(connection))

    def boot(self, line: FramedChannel, chip: Chip | None = None) -> Release:
        return attest(
            line,
            chip or Chip(host_data=self.configuration.host_data()),
            settings=self.settings,
            configuration_json=self.configuration.to_json(),
            deadline=time.monotonic() + 10,
        )


@contextlib.contextmanager
def program(*words: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([*SVSM, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=10)


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    folder = tmp_path_factory.mktemp("key")
    state, serial, output = folder / "state", folder / "serial.sock", folder / "launch.json"
    words = ["--root", simulated_root(0), "--name", "vm", "--tpm", "tpm0:socket", "--allow", DIGEST.hex()]
    subprocess.run(
        [*SVSM, "broker", "volume", "create", "--state", str(state), *words, "--output", str(output)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    with program("broker", "serve", "--state", str(state)) as broker:
        assert broker.stdout is not None
        url = broker.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url)
        with program("proxy", "--url", url, "--serial", str(serial)) as proxy:
            await_listener(serial, proxy)
            configuration = LaunchConfiguration.parse(output.read_bytes())
            found = Installation(state, serial, url, Settings(broker_public_key=b"x"), configuration)
            key = json.loads(found.run("key", "--json"))
            found.settings = Settings.parse(Settings(broker_public_key=bytes.fromhex(key["public_key"])).pack())
            yield found


def test_first_format_and_later_boots(installation: Installation) -> None:
    line = installation.connect()
    release = installation.boot(line)
    assert release.state is VolumeState.NEW
    assert release.runtime is not None
    message = Formatted(session=release.session, counter=b"c" * 16, root=b"r" * 32)
    for number in range(2):
        answer = exchange(line, release.runtime, message, deadline=time.monotonic() + 10)
        assert answer == FormattedAcknowledged(
            reply_to=number, session=release.session, counter=b"c" * 16, root=b"r" * 32
        )
    line.close()
    line = installation.connect()
    again = installation.boot(line)
    assert (again.state, again.volume_key) == (VolumeState.ACTIVE, release.volume_key)
    line.close()
    shown = json.loads(installation.run("volume", "show", "--json"))["volumes"][0]
    assert (shown["state"], shown["counter"]) == ("active", (b"c" * 16).hex())


def test_a_changed_image_is_refused_with_the_hint_and_admitted_by_the_owner(installation: Installation) -> None:
    changed = Chip(host_data=installation.configuration.host_data(), measurement=b"m" * 48)
    line = installation.connect()
    with pytest.raises(PolicyError) as refused:
        installation.boot(line, changed)
    line.close()
    assert refused.value.exit_code == 3
    assert refused.value.details["reason"] == "broker-measurement-not-allowed"
    assert "svsm broker volume allow" in (refused.value.hint or "")
    installation.run("volume", "allow", "vm", (b"m" * 48).hex())
    line = installation.connect()
    assert len(installation.boot(line, changed).volume_key) == 32
    line.close()


def test_refusals_reach_the_kernel_and_the_trail(installation: Installation) -> None:
    for chip in (
        Chip(host_data=installation.configuration.host_data(), machine_number=1),
        Chip(host_data=installation.configuration.host_data(), policy=0xB0000),
    ):
        line = installation.connect()
        with pytest.raises(PolicyError) as refused:
            installation.boot(line, chip)
        line.close()
        assert refused.value.details["reason"] == "broker-evidence-refused"
    lines = json.loads(installation.run("audit", "--json"))["lines"]
    assert [line["reason"] for line in lines][-2:] == ["root-unknown", "report-debug"]


def test_a_forged_channel_message_gets_no_answer(installation: Installation) -> None:
    line = installation.connect()
    installation.boot(line)
    line.send(b'{"channel":"' + b"AAAA" * 16 + b'"}', deadline=time.monotonic() + 5)
    with pytest.raises(SvsmError) as ended:
        line.receive(deadline=time.monotonic() + 5)
    assert isinstance(ended.value, BackendError)
    line.close()
    line = installation.connect()
    assert installation.boot(line).runtime is not None
    line.close()
