"""A regression gate: is ours still as much faster than the plain loop as it was? `make bench-check`.

Both run by turns, briefly, and the median ratio is compared with the newest stored result of the same kind
of machine and the same case. It fails if the ratio fell by more than 5 %; before it says so, it takes
as many turns again. Where no stored result fits it says so, which fails only with --require.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from .cases import CASES
from .machine import RESULTS, kind, machine
from .prepare import prepare
from .report import PLAIN_LOOP, TOLERANCES, check, table
from .run import Bench, cases_here, trainers

TOLERATED_FALL = 0.05
STEPS, WARMUP = {"cpu": 6, "cuda": 60}, {"cpu": 2, "cuda": 20}


class Verdict(NamedTuple):
    """Whether a case passes, and the line that says why."""

    ok: bool
    line: str


def stored_ratio(results: Iterable[dict[str, Any]], here: str, case: str) -> float | None:
    """Return ours over the plain loop for a case, of the newest result on this kind of machine."""
    for result in sorted(results, key=lambda r: str(r["date"]), reverse=True):
        found = result.get("cases", {}).get(case)
        if found is None or kind(result["machine"], found["work"]["device"]) != here:
            continue
        ratio = plain_loop_ratio(found["table"])
        if ratio is not None:
            return ratio
    return None


def plain_loop_ratio(rows: list[dict[str, Any]]) -> float | None:
    """Return ours over the plain loop in steps/s; None where one of them did not run."""
    for row in rows:
        if (row["trained"], row["trainer"]) == ("unet", PLAIN_LOOP):
            return row["ours_over_this"]
    return None


def verdict(case: str, now: float, stored: float | None, *, require: bool) -> Verdict:
    """Compare a ratio with the stored one."""
    if stored is None:
        line = f"{case}: {now:.2f} x the plain loop; no stored result of this kind of machine to compare with"
        return Verdict(not require, f"{'FAILED ' if require else ''}{line}")
    change = now / stored - 1
    line = f"{case}: {now:.2f} x the plain loop, {stored:.2f} x as stored ({change:+.1%})"
    if change < -TOLERATED_FALL:
        return Verdict(False, f"FAILED {line}: it fell by more than {TOLERATED_FALL:.0%}")
    return Verdict(True, f"ok {line}")


def read_results() -> list[dict[str, Any]]:
    """Read all stored results that hold cases."""
    files = sorted(RESULTS.glob("*.json"))
    return [r for r in (json.loads(f.read_text(encoding="utf-8")) for f in files) if "cases" in r]


def main() -> None:
    """Measure, compare, say."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", nargs="*", choices=list(CASES), help="default: those for this machine")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--require", action="store_true", help="fail where no stored result fits")
    args = parser.parse_args()

    chosen, absent = trainers(["ours", PLAIN_LOOP])
    if absent:
        sys.exit("FAILED there is no plain loop to compare with: pip install peft")
    stored, verdicts = read_results(), []
    with tempfile.TemporaryDirectory(prefix="loragraft-gate-") as folder:
        for name in args.case or cases_here():
            device = CASES[name].device
            case = replace(CASES[name], steps=STEPS[device], warmup=WARMUP[device])
            scratch = Path(folder) / name
            made = prepare(scratch, case.resolution, Path(folder), case.architecture)
            bench = Bench(name, case, made, scratch, args.threads)
            before = stored_ratio(stored, kind(machine(args.threads), device), name)
            for attempt in range(2):
                for _ in range(args.turns):
                    bench.turn(chosen, ["unet"], lambda result: None)
                now = plain_loop_ratio(table(bench.runs))
                assert now is not None  # both ran
                found = verdict(name, now, before, require=args.require)
                if found.ok or before is None or attempt:
                    break
            wrong = [x for x in check(bench.runs, TOLERANCES[case.precision]) if x.startswith("WRONG")]
            verdicts += [found, *(Verdict(False, f"FAILED {line}") for line in wrong)]
    print(*(v.line for v in verdicts), sep="\n")
    if not all(v.ok for v in verdicts):
        sys.exit(1)


if __name__ == "__main__":
    main()
