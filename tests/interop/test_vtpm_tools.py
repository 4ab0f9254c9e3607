# SPDX-License-Identifier: MIT OR Apache-2.0
"""Other people's clients against the vTPM service: tpm2-tools over three transports, swtpm_ioctl, and swtpm itself.

The dictionary-attack comparison runs the same scenario of wrong guesses and kills against swtpm and against ours:
the counter must move alike, because a TPM that forgets guesses when it is killed protects nothing.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Protocol

import pytest

from svsm.formats import tpm
from tests.support import await_listener, peer

pytestmark = pytest.mark.interop

NV_ATTRIBUTES = "ownerread|ownerwrite|authread|authwrite"


def _free_ports() -> int:
    """A port that is free, and the next one too."""
    for port in range(24000 + os.getpid() % 1000 * 8, 65000, 4):
        try:
            first = socket.create_server(("127.0.0.1", port))
        except OSError:
            continue
        with first:
            try:
                socket.create_server(("127.0.0.1", port + 1)).close()
            except OSError:
                continue
        return port
    raise OSError("no free ports")


class Server:
    """A TPM server process of either kind on a Unix socket pair."""

    def __init__(self, command: list[str], where: Path, *, announces: bool) -> None:
        self.where = where
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=where.parent)
        self.ready: dict[str, object] = {}
        if announces and self.process.stdout is not None:
            self.ready = json.loads(self.process.stdout.readline())
        else:
            await_listener(where, self.process)

    @property
    def tcti(self) -> str:
        """What tpm2-tools take."""
        return f"swtpm:path={self.where}"

    def _close(self) -> None:
        self.process.wait(15)
        if self.process.stdout is not None:
            self.process.stdout.close()

    def stop(self) -> None:
        """In order."""
        self.process.send_signal(signal.SIGTERM)
        self._close()

    def stores(self, *, fail: bool) -> None:
        """From here on stores fail, or work again."""
        assert self.process.stdout is not None
        self.process.send_signal(signal.SIGUSR1 if fail else signal.SIGUSR2)
        assert json.loads(self.process.stdout.readline()) == {"event": "stores", "fail": fail}

    def kill(self) -> None:
        """At once, with its service."""
        service = self.ready.get("service_pid")
        self.process.kill()
        if isinstance(service, int):
            os.kill(service, signal.SIGKILL)
        self._close()


def our_server(folder: Path, *more: str) -> Server:
    where = folder / "ours.sock"
    command = [sys.executable, "-m", "svsm.testing.tpm_harness", "--state", str(folder / "ours.state")]
    return Server([*command, "--unix", str(where), *more], where, announces=True)


def swtpm_server(folder: Path) -> Server:
    where = folder / "swtpm.sock"
    (folder / "swtpm").mkdir(exist_ok=True)
    where.unlink(missing_ok=True)
    command = [str(peer("swtpm")), "socket", "--tpm2", "--tpmstate", f"dir={folder / 'swtpm'}"]
    command += ["--flags", "not-need-init,startup-clear", "--server", f"type=unixio,path={where}"]
    return Server([*command, "--ctrl", f"type=unixio,path={where}.ctrl"], where, announces=False)


class Tools:
    """tpm2-tools, each run in `folder` against one TPM."""

    def __init__(self, folder: Path, tcti: str) -> None:
        self.folder = folder
        self.environment = {**os.environ, "TPM2TOOLS_TCTI": tcti, "TSS2_LOG": "all+none"}

    def run(self, name: str, *arguments: str, allow: bool = False) -> subprocess.CompletedProcess[bytes]:
        """One tool; unless `allow`, it must succeed."""
        command = [str(peer(f"tpm2_{name}")), *arguments]
        where = self.folder
        done = subprocess.run(command, cwd=where, env=self.environment, capture_output=True, timeout=60, check=False)
        assert allow or done.returncode == 0, (command, done.stderr.decode())
        return done


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    peer("tpm2_getrandom")
    made = our_server(tmp_path)
    yield made
    if made.process.poll() is None:
        made.stop()


def test_random_keys_nv_and_quotes(server: Server, tmp_path: Path) -> None:
    tools = Tools(tmp_path, server.tcti)
    assert len(tools.run("getrandom", "--hex", "16").stdout) == 32
    tools.run("createprimary", "-C", "o", "-G", "ecc", "-c", "primary.ctx")
    tools.run("flushcontext", "-t")
    tools.run("nvdefine", "-C", "o", "-s", "32", "-a", NV_ATTRIBUTES, "0x1500001")
    (tmp_path / "value").write_bytes(bytes(range(32)))
    tools.run("nvwrite", "-C", "o", "-i", "value", "0x1500001")
    assert tools.run("nvread", "-C", "o", "-s", "32", "0x1500001").stdout == bytes(range(32))
    tools.run("createek", "-c", "ek.ctx", "-G", "rsa", "-u", "ek.pub")
    tools.run("flushcontext", "-t")
    attestation = ["-G", "ecc", "-g", "sha256", "-s", "ecdsa"]
    tools.run("createak", "-C", "ek.ctx", "-c", "ak.ctx", *attestation, "-u", "ak.pem", "-f", "pem")
    tools.run("flushcontext", "-t")
    tools.run("pcrextend", "16:sha256=" + "11" * 32)
    files = ["-m", "quote", "-s", "signature"]
    tools.run("quote", "-c", "ak.ctx", "-l", "sha256:0,16", "-q", "aabb", *files, "-o", "pcrs")
    check = ["-u", "ak.pem", *files, "-f", "pcrs", "-g", "sha256", "-q"]
    tools.run("checkquote", *check, "aabb")
    wrong = tools.run("checkquote", *check, "aabc", allow=True)
    assert wrong.returncode != 0


def test_the_announced_ek_name_is_the_one_that_tpm2_tools_compute(server: Server, tmp_path: Path) -> None:
    tools = Tools(tmp_path, server.tcti)
    tools.run("createek", "-c", "ek.ctx", "-G", "rsa", "-u", "ek.pub")
    public = (tmp_path / "ek.pub").read_bytes()  # TPM2B_PUBLIC
    assert int.from_bytes(public[:2], "big") == len(public) - 2
    assert tpm.ek_name(public[2:]).hex() == server.ready["ek_name"]


def test_state_persists_over_stops_and_kills(server: Server, tmp_path: Path) -> None:
    tools = Tools(tmp_path, server.tcti)
    tools.run("nvdefine", "-C", "o", "-s", "8", "-a", NV_ATTRIBUTES, "0x1500002")
    for round_number in range(4):
        (tmp_path / "value").write_bytes(round_number.to_bytes(8, "big"))
        tools.run("nvwrite", "-C", "o", "-i", "value", "0x1500002")
        server.stop() if round_number % 2 else server.kill()
        again = our_server(tmp_path)
        assert again.ready["ek_name"] == server.ready["ek_name"]
        server.process, server.ready = again.process, again.ready
        assert tools.run("nvread", "-C", "o", "-s", "8", "0x1500002").stdout == round_number.to_bytes(8, "big")


def test_tcp_and_the_simulators_protocol(tmp_path: Path) -> None:
    peer("tpm2_getrandom")
    first = _free_ports()
    server = our_server(tmp_path, "--tcp", str(first))
    try:
        assert len(Tools(tmp_path, f"swtpm:host=127.0.0.1,port={first}").run("getrandom", "--hex", "4").stdout) == 8
    finally:
        server.stop()
    second = _free_ports()
    server = our_server(tmp_path, "--mssim", str(second))
    try:
        tools = Tools(tmp_path, f"mssim:host=127.0.0.1,port={second}")
        assert len(tools.run("getrandom", "--hex", "4").stdout) == 8
        tools.run("pcrextend", "16:sha256=" + "11" * 32)
        assert b"0x0000" not in tools.run("pcrread", "sha256:16").stdout  # connecting again was no power cycle
    finally:
        server.stop()


def test_a_store_that_fails_reaches_the_tool_as_a_failure(server: Server, tmp_path: Path) -> None:
    tools = Tools(tmp_path, server.tcti)
    server.stores(fail=True)
    assert tools.run("nvdefine", "-C", "o", "-s", "8", "-a", NV_ATTRIBUTES, "0x1500003", allow=True).returncode != 0
    assert tools.run("getrandom", "4", allow=True).returncode != 0
    server.stores(fail=False)
    ioctl = [str(peer("swtpm_ioctl")), "--unix", f"{server.where}.ctrl"]
    subprocess.run([*ioctl, "-i"], check=True, capture_output=True)
    tools.run("startup", "-c")
    assert b"0x1500003" not in tools.run("getcap", "handles-nv-index").stdout


def test_swtpm_ioctl(server: Server, tmp_path: Path) -> None:
    ioctl = [str(peer("swtpm_ioctl")), "--unix", f"{server.where}.ctrl"]

    def run(*arguments: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run([*ioctl, *arguments], capture_output=True, timeout=20, check=False)

    assert b"0xbcbf" in run("-c").stdout
    assert run("-l", "2").returncode == 0
    assert run("-l", "0").returncode == 0
    assert run("-h", "measured").returncode == 0
    assert run("-e").returncode == 0
    assert run("-r", "3").returncode == 0
    assert run("-g").returncode == 0
    for kind in ("permanent", "volatile", "savestate"):
        assert run("--save", kind, str(tmp_path / "leak")).returncode != 0
        assert not (tmp_path / "leak").exists() or (tmp_path / "leak").stat().st_size == 0
    assert run("-v").returncode != 0
    assert run("--stop").returncode == 0
    assert run("-i").returncode == 0
    assert run("-s").returncode == 0


SCENARIO = [
    *("guess", "guess", "kill", "guess", "stop", "guess", "kill", "kill"),
    *("guess", "reset", "guess", "stop", "kill", "guess"),
]  # fmt: skip


class Served(Protocol):
    """A TPM behind a Unix socket, as the scenario wants it."""

    @property
    def where(self) -> Path:
        """Its data socket."""

    @property
    def tcti(self) -> str:
        """What tpm2-tools take."""

    def stop(self) -> object:
        """In order."""

    def kill(self) -> object:
        """At once."""


def _raw(server: Served, command: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(20)
        client.connect(str(server.where))
        client.sendall(command)
        return client.recv(4096)


def _counter(server: Served) -> dict[int, int]:
    properties = tpm.parse_properties(_raw(server, tpm.get_capability(6, 0x20E, 4)))
    return {key: properties[key] for key in (0x20E, 0x20F, 0x210, 0x211)}


def _guess(server: Served) -> list[int]:
    """Wrong passwords until the TPM has judged one; the first use after a reset is answered RETRY."""
    body = bytes.fromhex("01500003015000030000000d4000000900000000047878787800080000")
    command = tpm.CommandHeader(0x8002, 10 + len(body), 0x14E).pack() + body
    codes = [tpm.response_code(_raw(server, command))]
    while codes[-1] == 0x922 and len(codes) < 4:
        codes.append(tpm.response_code(_raw(server, command)))
    return codes


def play_guesses(folder: Path, start: Callable[[], Served], scenario: Sequence[str], *, orderly: bool) -> list[object]:
    """The dictionary-attack counter through wrong guesses, kills, stops and resets.

    Args:
        folder: For the tools' files.
        start: Starts the TPM, again and again; it has been told TPM2_Startup(CLEAR).
        scenario: Of "guess", "kill", "stop", "reset".
        orderly: Whether a stop tells the TPM (TPM2_Shutdown) by itself.

    Returns:
        What was seen: (step, counter and parameters) and the codes of guesses.
    """
    server = start()
    try:
        tools = Tools(folder, server.tcti)
        tools.run("nvdefine", "-C", "o", "-s", "8", "-p", "right", "-a", "authread|authwrite", "0x1500003")
        (folder / "value").write_bytes(bytes(8))
        tools.run("nvwrite", "-C", "0x1500003", "-P", "right", "-i", "value", "0x1500003")
        tools.run("dictionarylockout", "-s", "-n", "5", "-t", "1000", "-l", "1000")
        seen: list[object] = [_counter(server)]
        for step in scenario:
            if step == "guess":
                seen.append(_guess(server))
            elif step == "reset":
                tools.run("dictionarylockout", "-c")
            elif step == "kill":
                server.kill()
                server = start()
            elif step == "stop":
                if not orderly:
                    _raw(server, tpm.shutdown())
                server.stop()
                server = start()
            seen.append((step, _counter(server)))
    except BaseException:
        server.kill()
        raise
    server.stop()
    return seen


def _write_until_killed(where: Path, first: int, told: list[int]) -> None:
    """Write first, first + 1, … into the index; `told` gets each number when sent, its negative when acknowledged."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(where))
        number = first
        while True:
            body = bytes.fromhex("4000000101500004000000094000000900000000000008")
            body += number.to_bytes(8, "big") + b"\0\0"
            told.append(number)
            try:
                client.sendall(tpm.CommandHeader(0x8002, 10 + len(body), 0x137).pack() + body)
                response = client.recv(4096)
            except OSError:
                return
            if not response or tpm.response_code(response):
                return
            told.append(-number)
            number += 1


@pytest.mark.parametrize("rounds", [6, pytest.param(50, marks=pytest.mark.long)])
def test_every_acknowledged_write_survives_kills_at_random_moments(server: Server, tmp_path: Path, rounds: int) -> None:
    tools = Tools(tmp_path, server.tcti)
    tools.run("nvdefine", "-C", "o", "-s", "8", "-a", NV_ATTRIBUTES, "0x1500004")
    random = Random(rounds)
    told: list[int] = []
    number = 1
    for turn in range(rounds):
        before = len(told)
        writer = threading.Thread(target=_write_until_killed, args=(server.where, number, told))
        writer.start()
        # Two of three kills come while it writes, the others at any moment, maybe before its first command.
        while turn % 3 and len(told) < before + 4 and writer.is_alive():
            time.sleep(0.001)
        time.sleep(random.uniform(0.005, 0.06))
        server.kill()
        writer.join()
        again = our_server(tmp_path)
        assert again.ready["ek_name"] == server.ready["ek_name"]
        server.process, server.ready = again.process, again.ready
        value = int.from_bytes(tools.run("nvread", "-C", "o", "-s", "8", "0x1500004").stdout, "big")
        if told:
            acknowledged = max((-entry for entry in told if entry < 0), default=0)
            assert acknowledged <= value <= max(told) or not acknowledged
            number = max(told) + 1
    assert sum(entry < 0 for entry in told) > rounds  # many writes were acknowledged


def test_the_dictionary_attack_counter_moves_as_swtpms(tmp_path: Path) -> None:
    peer("swtpm")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    ours = play_guesses(tmp_path / "a", lambda: our_server(tmp_path / "a"), SCENARIO, orderly=True)
    # this swtpm does not tell its TPM when it is stopped
    theirs = play_guesses(tmp_path / "b", lambda: swtpm_server(tmp_path / "b"), SCENARIO, orderly=False)
    assert ours == theirs
    counters = [step[1][0x20E] for step in ours if isinstance(step, tuple)]
    assert max(counters) >= 3  # the scenario did count
