# SPDX-License-Identifier: MIT OR Apache-2.0
"""What whole-system tests share: one owner with a broker, a proxy, a machine and an image, made once per run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import boot_support
from tests.e2e.boot_support import Estate, Vm


@pytest.fixture(scope="session")
def owner() -> Iterator[Estate]:
    """The owner of all volumes in this run."""
    with boot_support.estate() as made:
        yield made


@pytest.fixture(scope="session")
def used(owner: Estate) -> Vm:
    """A VM that has booted once and was stopped; tests boot its twins, never itself."""
    vm = owner.vm()
    with vm.boot() as instance:
        instance.ready()
        assert instance.stop() == 0
    return vm


@pytest.fixture
def place() -> Iterator[Path]:
    """An empty folder with a path short enough for sockets."""
    folder = boot_support.short_folder()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def as_root() -> None:
    """For tests that need role uids."""
    if os.geteuid() != 0:
        pytest.skip("roles have uids of their own only where root starts them")
