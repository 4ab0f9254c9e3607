# SPDX-License-Identifier: MIT OR Apache-2.0
"""Any device whatever against the virtio driver: nothing but `svsm.formats.errors`, no wrong contents, no
private byte, an end.

`Trial` makes the demands; whatever the outcome is, it is allowed here.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from svsm.formats.errors import ProtocolError
from svsm.formats.virtio import BlkConfig
from svsm.storage.drivers.virtio.blk_config import CONFIG_BYTES, parse_geometry
from svsm.testing.hostile.mixture import mixture
from svsm.testing.hostile.trial import RINGS, run
from svsm.testing.vhost_user_trial import run_mixture

_SETTINGS = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("ring", RINGS)
@_SETTINGS
@given(data=st.binary(max_size=60), rounds=st.integers(0, 60))
def test_any_device(ring: str, data: bytes, rounds: int) -> None:
    run(mixture(data, rounds=rounds), ring)


@pytest.mark.long
@pytest.mark.parametrize("ring", RINGS)
def test_many_devices(ring: str) -> None:
    source = random.Random(ring)
    for _ in range(400):
        run(mixture(source.randbytes(source.randrange(80)), rounds=source.randrange(80)), ring)


@pytest.mark.parametrize("ring", RINGS[::3])
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.binary(max_size=60), rounds=st.integers(0, 60))
def test_any_back_end(ring: str, data: bytes, rounds: int) -> None:
    run_mixture(data, ring, rounds=rounds)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("ring", RINGS)
def test_many_back_ends(ring: str) -> None:
    source = random.Random(ring)
    for _ in range(100):
        run_mixture(source.randbytes(source.randrange(80)), ring, rounds=source.randrange(80))


@given(data=st.binary(min_size=CONFIG_BYTES, max_size=BlkConfig.SIZE), features=st.integers(0, (1 << 64) - 1))
def test_any_configuration(data: bytes, features: int) -> None:
    try:
        geometry = parse_geometry(data, features)
    except ProtocolError:
        return
    block = geometry.block_size_bytes
    assert block in {1 << shift for shift in range(9, 21)}
    assert geometry.size_bytes % 512 == 0  # as stated; the driver uses whole blocks of it (case 20 of the catalogue)
    assert geometry.size_bytes < 1 << 63
    assert geometry.transfer_bytes % block == 0
    assert geometry.transfer_bytes >= block
    assert geometry.queues >= 1
    for limits in (geometry.discard, geometry.write_zeroes):
        if limits is not None:
            assert limits.sectors > 0
            assert limits.sectors * 512 % block == 0
            assert 1 <= limits.segments <= 64


@given(
    capacity=st.integers(0, (1 << 64) - 1) | st.integers(0, 1 << 48),
    exponent=st.integers(0, 31),
    size_max=st.integers(0, (1 << 32) - 1),
    limits=st.tuples(*[st.integers(0, (1 << 32) - 1) | st.integers(0, 64)] * 3),
)
def test_configurations_that_nearly_fit(
    capacity: int, exponent: int, size_max: int, limits: tuple[int, int, int]
) -> None:
    config = BlkConfig(
        capacity=capacity,
        blk_size=1 << exponent,
        size_max=size_max,
        num_queues=1,
        max_discard_sectors=limits[0],
        max_discard_seg=limits[1],
        discard_sector_alignment=limits[2],
    )
    test_any_configuration.hypothesis.inner_test(config.pack(), (1 << 64) - 1)  # type: ignore[attr-defined]
