# SPDX-License-Identifier: MIT OR Apache-2.0
"""The main job with the key over each of our own devices: a 16550, a virtio console, a virtio socket device.

The device runs in the device role; the kernel finds it in the device tree, and drives it by exits. QEMU's COM3 is in
`test_boot_disks`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from svsm.host.devices.key_channel import KeyChannel
from tests.e2e.boot_support import Estate, Script, Vm, random_bytes, sha256_of, svsm
from tests.e2e.test_boot_refusals import foreign_token, hangs_up, huge_frame, swapped_jwe

pytestmark = pytest.mark.e2e

CHANNELS = [str(kind) for kind in KeyChannel if kind is not KeyChannel.STREAM]


@pytest.mark.parametrize("channel", ["virtio-console", *(pytest.param(c, marks=pytest.mark.long) for c in CHANNELS)])
def test_a_boot_over_it(used: Vm, channel: str) -> None:
    vm = used.twin()
    with vm.boot("--channel", channel) as instance:
        instance.ready()
        assert "opened" in instance.facts()["cocoonfs"]
        assert random_bytes(vm.state / "run" / "vtpm0.sock") is not None
        assert instance.stop() == 0


@pytest.mark.long
@pytest.mark.parametrize("channel", CHANNELS)
def test_a_first_format_over_it_and_the_next_boot_over_another(owner: Estate, channel: str) -> None:
    """The broker's acknowledgement comes over the same line, long after the key."""
    vm = owner.vm()
    names = []
    for option in (channel, "stream", channel):
        with vm.boot("--channel", option) as instance:
            ready = instance.ready()
            names.append((ready["ek_name"], ready["guest_ek_name"]))
            assert vm.row()["state"] == "active"
            assert instance.stop() == 0
    assert len(set(names)) == 1


@pytest.mark.long
@pytest.mark.parametrize("channel", CHANNELS)
@pytest.mark.parametrize(
    ("script", "exit_code", "code"),
    [
        (foreign_token, 3, "token-signature"),
        (swapped_jwe, 3, "attestation-confirmation"),
        (huge_frame, 1, "frame-too-long"),
    ],
)
def test_a_dishonest_proxy_gets_nowhere_over_it(
    used: Vm, channel: str, script: Script, exit_code: int, code: str
) -> None:
    vm = used.twin()
    before = sha256_of(vm.disk)
    with vm.middleman(script) as middle, vm.boot("--channel", channel, serial=middle.path) as instance:
        ended = instance.ended(seconds=90)
    assert middle.seen
    assert instance.find("ready") is None
    assert (ended.exit_code, ended.code) == (exit_code, code)
    assert sha256_of(vm.disk) == before


@pytest.mark.long
def test_a_proxy_that_hangs_up_is_seen_over_vsock(used: Vm) -> None:
    vm = used.twin()
    with vm.middleman(hangs_up) as middle, vm.boot("--channel", "vsock", serial=middle.path) as instance:
        ended = instance.ended(seconds=90)
    assert (ended.exit_code, ended.code) == (1, "channel-closed")


@pytest.mark.parametrize(
    "words",
    [
        ("--channel", "carrier-pigeon"),
        ("--channel", "vsock", "--disk", "qemu-virtio"),
        ("--channel", "uart16550", "--disk", "direct:x"),
    ],
)
def test_what_does_not_go_together(words: tuple[str, ...], tmp_path: Path) -> None:
    done = svsm("boot", "--state", str(tmp_path / "s"), *words, check=False)
    assert done.returncode == 2
    assert "channel" in done.stderr
    assert not (tmp_path / "s").exists()
