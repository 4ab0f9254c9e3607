# SPDX-License-Identifier: MIT OR Apache-2.0
"""The package gives its names when they are asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

from svsm.storage import cocoonfs


def test_every_name_of_the_package_is_in_the_module_that_it_names() -> None:
    assert sorted(cocoonfs._HOMES) == sorted(cocoonfs.__all__)
    for name, home in cocoonfs._HOMES.items():
        found = getattr(cocoonfs, name)
        assert getattr(found, "__module__", f"{cocoonfs.__name__}.{home}") == f"{cocoonfs.__name__}.{home}"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = cocoonfs.nothing  # type: ignore[attr-defined]


def test_looking_at_a_header_does_not_load_what_writes() -> None:
    code = "import sys, svsm.storage.cocoonfs.headers; print(*sorted(n for n in sys.modules if 'cocoonfs.' in n))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    names = {name.rpartition(".")[2] for name in loaded}
    assert "headers" in names
    assert not names & {"volume", "commit", "transaction", "mkfs", "provisioning", "replay", "tree"}
