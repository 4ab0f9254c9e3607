# SPDX-License-Identifier: MIT OR Apache-2.0
"""The Python blocks of docs/volume.md do what they say."""

from __future__ import annotations

import re
from pathlib import Path

from svsm.storage.drivers.memory import MemoryDevice

PAGE = Path(__file__).resolve().parents[4] / "docs" / "volume.md"


def test_blocks_run(tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    names: dict[str, object] = {
        "device": MemoryDevice(1 << 20),
        "key": bytes(range(32)),
        "new_key": bytes(32),
        "salt": b"\xdd\xee\xff",
        "state": b"state",
        "image": tmp_path / "volume.img",
    }
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert len(blocks) >= 6
    for block in blocks:
        # Lines are kept where they are in the page, so that an error names them.
        source = "\n" * text.count("\n", 0, block.start(1)) + block[1]
        exec(compile(source, str(PAGE), "exec"), names)  # noqa: S102 - our own page
