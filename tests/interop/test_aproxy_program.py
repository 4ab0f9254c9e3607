# SPDX-License-Identifier: MIT OR Apache-2.0
"""COCONUT's own aproxy, the program, between our kernel and our broker.

It is published as source only (coconut-svsm/svsm, `cargo build --release -p aproxy`; the registry's package of that
name is an unrelated program), so this runs where $SVSM_APROXY names a build of it, and nowhere else. What CI relies on
are the recordings of the same program in vectors/aproxy.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from svsm.broker.app import serve
from svsm.formats.errors import PolicyError
from svsm.formats.release_token import VolumeState
from svsm.formats.runtime_messages import Formatted, FormattedAcknowledged
from svsm.kernel.attestation import Release, attest
from svsm.kernel.channels.stream import FramedChannel, StreamChannel
from svsm.kernel.volume_birth import Birth
from tests.key_support import Chip, Desk
from tests.support import await_listener
from tests.unit.kernel.test_volume_birth import Disk

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif("SVSM_APROXY" not in os.environ, reason="COCONUT's aproxy is not built ($SVSM_APROXY)"),
]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path / "broker")


@pytest.fixture
def serial(desk: Desk, tmp_path: Path) -> Iterator[Path]:
    server = serve(desk.broker, socket.create_server(("127.0.0.1", 0)))
    server.start()
    path = tmp_path / "serial"
    words = [os.environ["SVSM_APROXY"], "--protocol", "kbs", "--url", server.url, "--unix", str(path), "--force"]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    await_listener(path, process)
    yield path
    process.terminate()
    process.wait()
    server.stop()


def boot(desk: Desk, serial: Path, chip: Chip | None = None) -> Release:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(serial))
    line = FramedChannel(StreamChannel(connection))
    try:
        return attest(
            line,
            chip or desk.chip(),
            settings=desk.settings,
            configuration_json=desk.configuration.to_json(),
            deadline=time.monotonic() + 10,
        )
    finally:
        line.close()


def test_a_first_format_is_refused_and_a_later_boot_gets_its_key(desk: Desk, serial: Path) -> None:
    release = boot(desk, serial)
    assert (release.state, release.runtime) == (VolumeState.NEW, None)
    disk = Disk()
    with pytest.raises(PolicyError) as refused:
        Birth(state=release.state, session=release.session, can_report=False).decide(disk.opener(b"k"))
    assert (refused.value.code, disk.looks) == ("birth-foreign-proxy", 0)

    ours, relay = desk.attest()
    assert ours.runtime is not None
    _, body = ours.runtime.request(Formatted(session=ours.session, counter=b"c" * 16, root=b"r" * 32))
    assert isinstance(ours.runtime.answer(relay.channel(body)), FormattedAcknowledged)

    later = boot(desk, serial)
    assert (later.state, later.volume_key) == (VolumeState.ACTIVE, release.volume_key)


def test_a_refusal_arrives_and_the_program_lives_on(desk: Desk, serial: Path) -> None:
    with pytest.raises(PolicyError) as refused:
        boot(desk, serial, dataclasses.replace(desk.chip(), measurement=b"m" * 48))
    assert refused.value.code == "attestation-refused"
    assert len(boot(desk, serial).volume_key) == 32
