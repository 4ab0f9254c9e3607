# SPDX-License-Identifier: MIT OR Apache-2.0
"""The fuzzing machinery itself: what is a finding, what the engines find, what is left behind."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from svsm.cli.main import main
from svsm.formats.errors import BackendError, FormatError, StateError, SvsmError
from svsm.fuzz.builtin import fuzz, minimised
from svsm.fuzz.choices import Choices
from svsm.fuzz.distil import distilled
from svsm.fuzz.runner import choose_engine, run_target
from svsm.fuzz.target import Broken, Finding, Target, TimeLimit, Verdict, execute, expect
from svsm.fuzz.targets import TARGETS, find


def target(run: Callable[[bytes], None], cpu_seconds: float = 2.0) -> Target:
    return Target("test", "a test", run, cpu_seconds=cpu_seconds)


def gate(data: bytes) -> None:
    """A parser with three checks and, behind them, a defect."""
    for at, wanted in enumerate(b"SVM"):
        if data[at : at + 1] != bytes([wanted]):
            raise FormatError("not this", code=f"gate-{at}")
    if len(data) > 5 and data[5] == 0xFF:
        _ = data[1000]


def test_values_and_refusals_are_no_findings() -> None:
    assert execute(target(gate), b"SVM").verdict is Verdict.ACCEPTED
    refused = execute(target(gate), b"SX")
    assert refused.verdict is Verdict.REFUSED
    assert refused.reason.startswith("gate-1@")


@pytest.mark.parametrize(
    "error",
    [
        IndexError("x"),
        RecursionError(),
        MemoryError(),
        AssertionError(),
        Broken("a does not b"),
        TimeLimit("late"),
        SvsmError("the root is nobody's", code="some-code"),
        FormatError("no code", code=""),
        FormatError("no code", code="Not Kebab"),
        FormatError("unprintable", code="some-code", got="\ud800"),
        FormatError("endless", code="some-code", got="x" * 5000),
    ],
)
def test_everything_else_is_one(error: BaseException) -> None:
    def run(_data: bytes) -> None:
        raise error

    with pytest.raises(Finding) as caught:
        execute(target(run), b"")
    assert caught.value.text.encode()
    assert caught.value.signature.encode()


def test_too_much_processor_time_is_a_finding() -> None:
    def run(_data: bytes) -> None:
        sum(range(300_000))

    with pytest.raises(Finding) as caught:
        execute(target(run, cpu_seconds=0.0001), b"")
    assert caught.value.signature == "slow"


def test_a_broken_invariant_is_named_with_its_place() -> None:
    expect(holds_true(), "never shown")
    with pytest.raises(Finding) as caught:
        execute(target(lambda data: expect(len(data) > 3, "three bytes at least")), b"ab")
    assert caught.value.signature.startswith("three bytes at least at ")


def holds_true() -> bool:
    return True


def test_the_engine_works_its_way_through_checks_to_the_defect() -> None:
    run = fuzz(target(gate), [], seed=3, executions=60_000)
    assert run.reasons == 3
    assert len(run.findings) == 1
    ((data, text),) = run.findings.values()
    assert data.startswith(b"SVM")
    assert "IndexError" in text


def test_the_engine_is_deterministic() -> None:
    first = fuzz(target(gate), [b"SVM"], seed=5, executions=500)
    second = fuzz(target(gate), [b"SVM"], seed=5, executions=500)
    other = fuzz(target(gate), [b"SVM"], seed=6, executions=500)
    assert first == second
    assert first.kept != other.kept or first.findings != other.findings


def test_minimising_keeps_the_finding_and_nothing_else() -> None:
    data, finding = minimised(target(gate), b"SVMxyz"[:5] + b"\xff" + b"tail" * 100)
    assert data == b"SVM\0\0\xff"
    assert finding is not None
    assert minimised(target(gate), b"SVM") == (b"SVM", None)


def test_choices_end_in_zeros_and_edits_change_messages() -> None:
    empty = Choices(b"")
    assert (empty.more, empty.unsigned(8), empty.below(7), empty.flag(), empty.blob(9), empty.number()) == (
        False, 0, 0, False, b"", 0,
    )  # fmt: skip
    assert empty.edited(b"message") == b"message"
    assert Choices(bytes([1, 1, 2, 0, 3])).edited(b"abcd") == b"abkd"
    assert Choices(bytes([1, 4, 2, 0])).edited(b"abcd") == b"ab"


def test_names_are_unique_and_unknown_ones_refused() -> None:
    names = [entry.name for entry in TARGETS]
    assert len(set(names)) == len(names)
    assert find(names[0]).name == names[0]
    with pytest.raises(StateError) as caught:
        find("no-such-target")
    assert caught.value.code == "fuzz-target"


def test_every_seed_runs_and_each_target_has_one() -> None:
    for entry in TARGETS:
        seeds = entry.seeds()
        assert seeds, entry.name
        for seed in seeds:
            assert len(seed) <= entry.max_bytes, entry.name
            execute(entry, seed)


def test_a_run_in_its_own_process_continues_from_its_corpus(tmp_path: Path) -> None:
    corpus, findings = tmp_path / "corpus", tmp_path / "findings"
    (tmp_path / "extra").mkdir()
    (tmp_path / "extra" / "one").write_bytes(b"\1\0\0")
    folders = {"corpus": corpus, "extra": [tmp_path / "extra"], "findings": findings}
    first = run_target("page-states", engine="builtin", seconds=0.3, seed=1, **folders)  # type: ignore[arg-type]
    assert first.executions > 100
    assert first.coverage is None
    assert first.new_inputs == first.corpus_inputs == len(list(corpus.iterdir())) > 0
    again = run_target("page-states", engine="builtin", seconds=0.3, seed=1, **folders)  # type: ignore[arg-type]
    assert again.corpus_inputs >= first.corpus_inputs
    assert again.findings == ()


_HERE = importlib.util.find_spec("atheris") is not None
_ENGINES = ["builtin", pytest.param("atheris", marks=pytest.mark.skipif(not _HERE, reason="atheris is not installed"))]


@pytest.mark.parametrize("engine", _ENGINES)
def test_a_defect_becomes_a_minimised_reproducer(engine: str, tmp_path: Path) -> None:
    done = run_target(
        "raises",
        engine=engine,
        corpus=tmp_path / "c",
        extra=[],
        findings=tmp_path / "f",
        seconds=2,
        seed=1,
        registry="tests.unit.fuzz.defective",
    )
    (found,) = done.findings
    assert found.signature.startswith("KeyError at ")
    data = Path(found.file).read_bytes()
    assert (len(data), data[:3], data[3] > 0x7F) == (4, b"BU\0", True)
    assert "KeyError: 0" in Path(f"{found.file}.txt").read_text()
    assert sorted(path.name for path in (tmp_path / "f").iterdir()) == [
        Path(found.file).name,
        f"{Path(found.file).name}.txt",
    ]


def test_a_process_that_dies_is_no_success(tmp_path: Path) -> None:
    with pytest.raises(BackendError) as caught:
        run_target(
            "dies",
            engine="builtin",
            corpus=tmp_path / "c",
            extra=[],
            findings=tmp_path / "f",
            seconds=1,
            seed=1,
            registry="tests.unit.fuzz.defective",
        )
    assert (caught.value.code, caught.value.details["status"]) == ("fuzz-worker", 7)


@pytest.mark.long
@pytest.mark.parametrize("engine", _ENGINES)
def test_an_input_that_blocks_is_a_finding(engine: str, tmp_path: Path) -> None:
    (tmp_path / "extra").mkdir()
    (tmp_path / "extra" / "one").write_bytes(b"Hxx")
    done = run_target(
        "hangs",
        engine=engine,
        corpus=tmp_path / "c",
        extra=[tmp_path / "extra"],
        findings=tmp_path / "f",
        seconds=2,
        seed=1,
        registry="tests.unit.fuzz.defective",
    )
    (found,) = done.findings
    assert found.signature.startswith("TimeLimit at ")
    assert Path(found.file).read_bytes() == b"H"


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
def test_atheris_sees_coverage(tmp_path: Path) -> None:
    done = run_target(
        "page-states", engine="atheris", corpus=tmp_path / "c", extra=[], findings=tmp_path / "f", seconds=1, seed=1
    )
    assert done.executions > 100
    assert done.coverage is not None
    assert done.coverage > 10
    assert done.corpus_inputs > 0


def test_distilling_keeps_the_smallest_input_for_each_new_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    refused_magic, refused_version = b"x", b"SVSMOWNR"
    for number, data in enumerate((refused_magic, b"yy", refused_version, refused_version + b"\2")):
        (corpus / str(number)).write_bytes(data)
    kept = distilled(find("settings"), [path.read_bytes() for path in corpus.iterdir()])
    assert kept == [refused_magic, refused_version]
    assert main(["fuzz", "settings", "--corpus", str(corpus), "--distil", str(tmp_path / "kept")]) == 0
    assert capsys.readouterr().out == "settings: 2 inputs, 9 bytes\n"
    assert sorted(path.read_bytes() for path in (tmp_path / "kept").iterdir()) == sorted(kept)


def test_the_engine_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert choose_engine("auto") == "builtin"
    with pytest.raises(StateError) as caught:
        choose_engine("atheris")
    assert caught.value.code == "fuzz-engine"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fuzz", "--list"]) == 0
    assert capsys.readouterr().out.count("\n") == len(TARGETS)
    assert main(["fuzz", "settings", "--time", "0.2", "--engine", "builtin", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["schema"], shown["target"], shown["findings"]) == (1, "settings", [])
    assert shown["executions"] > 10
    (tmp_path / "input").write_bytes(b"abc")
    assert main(["fuzz", "settings", "--reproduce", "input"]) == 0
    assert "refused (settings-format@" in capsys.readouterr().out
    assert main(["fuzz", "nothing", "--time", "1"]) == 1
    assert "fuzz-target" in capsys.readouterr().err
