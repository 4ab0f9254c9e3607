# SPDX-License-Identifier: MIT OR Apache-2.0
"""Where every module of the real kernel and the real vTPM came from, told by the processes themselves.

The system boots from a copy of the sources with two additions: the kernel tells its modules and their origins on its
console when it has booted, and the TPM service answers a TPM command that does not exist with its own. Everything else
is what is released, so the names can be compared with the closure that docs/TCB.md lists for each role.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from svsm.formats.tpm import CommandHeader
from svsm.launch.payload import build_payload
from svsm.launch.payload_tcb import tcb_table
from tests.e2e.boot_support import short_folder
from tests.e2e.tpm_support import System, TpmClient

pytestmark = [pytest.mark.e2e, pytest.mark.long]

ROOT = Path(__file__).parents[2]
CODE = 0x2000_0ACE
PART_CHARACTERS = 1500

TELL = """

def _origins() -> str:
    import json
    import sys

    # Cryptography puts a wrapper, which has no origin, around modules with deprecated names.
    modules = {name: module.__dict__.get("_module", module) for name, module in list(sys.modules.items())}
    specs = {name: getattr(module, "__spec__", None) for name, module in modules.items()}
    return json.dumps({name: getattr(spec, "origin", None) for name, spec in specs.items()})
"""

Origins = Mapping[str, "str | None"]


def edit(path: Path, old: str, new: str, *, behind: str = "") -> None:
    text = path.read_text()
    assert text.count(old) == 1, path
    path.write_text(text.replace(old, new) + behind)


def sources(folder: Path) -> Path:
    copy = folder / "src"
    shutil.copytree(ROOT / "src", copy, ignore=shutil.ignore_patterns("__pycache__"))
    edit(
        copy / "svsm" / "kernel" / "boot.py",
        "        kernel.serve()\n    except",
        "        told = _origins()\n"
        f"        for at in range(0, len(told), {PART_CHARACTERS}):\n"
        f"            console.event('log', tpm='origins', text=told[at : at + {PART_CHARACTERS}])\n"
        "        kernel.serve()\n    except",
        behind=TELL,
    )
    edit(
        copy / "svsm" / "services" / "vtpm" / "server.py",
        '        """A command of a data client."""\n',
        f'        if command[6:10] == bytes.fromhex("{CODE:08x}"):\n'
        "            at = int(command[10:])\n"
        f"            told = _origins()[at : at + {PART_CHARACTERS}].encode()\n"
        '            return b"\\x80\\x01" + (10 + len(told)).to_bytes(4, "big") + bytes(4) + told\n',
        behind=TELL,
    )
    return copy


@pytest.fixture(scope="module")
def told() -> Iterator[dict[str, Origins]]:
    folder = short_folder()
    environment = {"PYTHONPATH": str(sources(folder)), "PYTHONDONTWRITEBYTECODE": "1"}
    system = System(folder, environment=environment)
    try:
        system.start()
        instance = system.instance
        with TpmClient(system.where) as client:
            text = ""
            while part := answer(client, len(text)):
                text += part
        assert system.stop() == 0
        # The kernel tells its own after it is ready; by its end everything has been read.
        parts = [event["text"] for event in instance.events if event.get("tpm") == "origins"]
        yield {"kernel": json.loads("".join(parts)), "vtpm": json.loads(text)}
    finally:
        system.close()
        shutil.rmtree(folder)


def answer(client: TpmClient, at: int) -> str:
    body = str(at).encode()
    return client.ask(CommandHeader(0x8001, 10 + len(body), CODE).pack() + body)[10:].decode()


@pytest.mark.parametrize("role", ["kernel", "vtpm"])
def test_every_module_is_the_payloads_or_listed_with_its_hash(told: dict[str, Origins], role: str) -> None:
    manifest = build_payload().manifest
    uses = manifest.roles[role]
    standard = os.path.dirname(os.__file__)
    files = {manifest.extensions[name].path for name in uses.extensions}
    files |= {manifest.sources[name].path for name in uses.sources}
    objects = {f"payload:{load.name}" for load in uses.loads}
    inner = re.compile(r"typing\.|_cffi_backend\.|cryptography\.hazmat\.bindings\._rust\.|_openssl")
    for name, origin in told[role].items():
        if origin is None:  # made by code of the payload
            assert name == "__main__" or inner.match(name), name
        elif origin.startswith("payload:"):
            below = f"payload:code/{name.replace('.', '/')}"
            assert origin in {*objects, f"{below}.pyc", f"{below}/__init__.pyc"}, name
        elif origin not in ("built-in", "frozen"):
            assert origin.removeprefix(f"{standard}/") in files, f"{name}: {origin}"


@pytest.mark.parametrize("role", ["kernel", "vtpm"])
def test_svsms_own_modules_are_those_that_the_list_has_for_the_role(told: dict[str, Origins], role: str) -> None:
    rows = re.findall(r"^\| `(svsm[\w.]*)` \|.*\| ([\w, ]+) \|$", tcb_table(), re.M)
    listed = {name for name, roles in rows if role in roles.split(", ")}
    loaded = {name for name in told[role] if name.partition(".")[0] == "svsm"}
    assert loaded <= listed
    assert {"svsm.confine.lists", "svsm.kernel.tpm" if role == "kernel" else "svsm.services.vtpm.tpm"} <= loaded
    assert len(listed - loaded) < len(listed) // 4  # the list is not padded
