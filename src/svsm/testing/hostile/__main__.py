# SPDX-License-Identifier: MIT OR Apache-2.0
"""``python -m svsm.testing.hostile``: run the attacks, list them, or serve one to somebody else's front-end.

    run [NUMBER …]   run them against this project's driver; exit 0 when everything is as it must be, else 1
    table            the matrix, as in docs/hostile.md
    serve            a hostile vhost-user back-end on a socket, for any front-end; docs/hostile.md shows it
    front-end        one of two front-ends to try it with: this project's, or QEMU with SeaBIOS

Without a word, or with a number first, it is `run`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from svsm.testing.hostile import served
from svsm.testing.hostile.attacks import NUMBERS
from svsm.testing.hostile.matrix import TRANSPORTS, Cell, absent, cells, markdown
from svsm.testing.hostile.own_front_end import drive
from svsm.testing.hostile.qemu_front_end import SECONDS, boot
from svsm.testing.hostile.trial import RINGS


def _arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m svsm.testing.hostile", description=__doc__, add_help=True)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="run the attacks against this project's driver")
    run.add_argument("numbers", nargs="*", type=int, metavar="NUMBER", help="of the attacks; all without one")
    run.add_argument("--transport", choices=TRANSPORTS, default="mmio")
    run.add_argument("--ring", choices=RINGS, help="only this one")
    run.add_argument("--json", action="store_true")
    verbs.add_parser("table", help="the matrix as Markdown")
    serve = verbs.add_parser("serve", help="serve an attack to a front-end")
    serve.add_argument("--socket", type=Path, help="where to listen; by default a fresh folder")
    what = serve.add_mutually_exclusive_group(required=True)
    what.add_argument("--attack", metavar="NAME", help="the case with these words in its name; `honest` for none")
    what.add_argument("--number", type=int, metavar="N", help="every case of this number, one after the other")
    what.add_argument("--all", action="store_true", help="every case, one after the other")
    what.add_argument("--seed", type=int, metavar="N", help="a mixture")
    what.add_argument("--list", action="store_true", help="only name the cases")
    serve.add_argument("--count", type=int, default=1, help="how many mixtures, with seeds from --seed on")
    serve.add_argument("--ring", choices=RINGS, default="split", help="what the back-end offers")
    serve.add_argument("--queues", type=int, default=1)
    serve.add_argument("--size-mib", type=int, default=16, help="of the disk")
    serve.add_argument("--seconds", type=float, default=10.0, help="how long the front-end has, for each case")
    serve.add_argument("--json", action="store_true", help="a line of JSON for each case")
    serve.add_argument("command", nargs="*", help="the front-end, behind `--`; {socket} stands for the path")
    front = verbs.add_parser("front-end", help="a front-end to try `serve` with")
    front.add_argument("kind", choices=("ours", "qemu"))
    front.add_argument("socket")
    front.add_argument("--seconds", type=float, default=SECONDS, help="that a guest has to boot")
    return parser.parse_args(words)


# ---- run ------------------------------------------------------------------------------------------------------------


def _try(cell: Cell, *, as_json: bool) -> bool:
    try:
        outcome = str(cell.run())
    except Exception as error:  # the finding that this program is for
        outcome = f"FINDING {type(error).__name__}: {error}"
    expected = str(cell.expected)
    if as_json:
        record = {"number": cell.number, "name": cell.name, "transport": cell.transport, "ring": cell.ring}
        print(json.dumps({**record, "outcome": outcome, "expected": expected, "ok": outcome == expected}), flush=True)
    else:
        print(f"{cell.number:2}  {cell.ring:13}  {outcome:34}  {cell.name}", flush=True)
        if outcome != expected:
            print(f"    must be: {expected}")
    return outcome == expected


def _run(options: argparse.Namespace) -> int:
    numbers = options.numbers or list(NUMBERS)
    if unknown := sorted(set(numbers) - set(NUMBERS)):
        print(
            f"error: there is no attack {unknown[0]}\nhint: they have the numbers 1 to {max(NUMBERS)}", file=sys.stderr
        )
        return 2
    rings = [options.ring] if options.ring else list(RINGS)
    wrong = count = 0
    for cell in cells(options.transport):
        if cell.number in numbers and cell.ring in rings:
            count += 1
            wrong += not _try(cell, as_json=options.json)
    for number in numbers:
        for ring in rings:
            reason = absent(number, options.transport, ring)
            if not reason:
                continue
            if options.json:
                record = {"number": number, "transport": options.transport, "ring": ring, "absent": reason}
                print(json.dumps(record))
            else:
                print(f"{number:2}  {ring:13}  {'-':34}  {reason}")
    print(f"{count} cells, {wrong} not as they must be", file=sys.stderr if options.json else sys.stdout)
    return 1 if wrong else 0


# ---- serve ----------------------------------------------------------------------------------------------------------


def _chosen(options: argparse.Namespace) -> list[served.Plan]:
    there = [plan for plan in served.plans() if options.ring in plan.rings]
    if options.all or options.list:
        return there
    if options.number is not None:
        return [plan for plan in there if plan.number == options.number]
    if options.seed is not None:
        sources = [random.Random(options.seed + step) for step in range(options.count)]
        return [
            served.seeded(source.randbytes(64), rounds=source.randrange(60), messages=source.random() < 0.3)
            for source in sources
        ]
    if options.attack == served.HONEST.name:
        return [served.HONEST]
    return [plan for plan in there if options.attack in plan.name][:1]


def _serve(options: argparse.Namespace) -> int:
    chosen = _chosen(options)
    if options.list:
        for plan in chosen:
            print(f"{plan.number:2}  {plan.name}")
        return 0
    if not chosen:
        print("error: there is no such case on this ring\nhint: serve --list names them", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="svsm-hostile-") as folder:
        path = options.socket or Path(folder) / "vhost-user.sock"

        def listening() -> None:
            print(f"listening on {path}", file=sys.stderr, flush=True)

        for plan in chosen:
            told = listening if plan is chosen[0] and not options.command else None
            report = served.serve(
                plan,
                path,
                ring=options.ring,
                queues=options.queues,
                size_bytes=options.size_mib << 20,
                seconds=options.seconds,
                command=options.command,
                on_listening=told,
            )
            _print(report, as_json=options.json)
    return 0


def _print(report: served.Report, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(report.as_json()), flush=True)
        return
    counts = f"{report.messages} messages, {report.requests} requests, {report.lies} lies, then {report.requests_after}"
    ended = report.front_end or f"connection: {report.connection}"
    print(f"{report.number:2}  {report.verdict:11}  {report.attack}  ({counts}; {ended})", flush=True)


def _front_end(options: argparse.Namespace) -> int:
    if options.kind == "ours":
        code, words = drive(options.socket)
        print(words)
        return code
    made = boot(options.socket, options.seconds)
    print(json.dumps({"result": made.result, "said": made.said}), flush=True)
    if made.code < 0:
        os.kill(os.getpid(), -made.code)  # end as QEMU did
    return made.code


def main(words: list[str]) -> int:
    """The command line."""
    if not words or words[0].lstrip("-").isdigit():
        words = ["run", *words]
    options = _arguments(words)
    try:
        if options.verb == "table":
            print(markdown(), end="")
            return 0
        verbs = {"run": _run, "serve": _serve, "front-end": _front_end}
        return verbs[options.verb](options)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: {error.strerror or error}{where}", file=sys.stderr)
        for note in getattr(error, "__notes__", ()):
            print(f"hint: {note}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
