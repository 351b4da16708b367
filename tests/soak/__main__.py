"""`python -m tests.soak --out FOLDER [--part configs --count 1500]`: break runs, and count what is lost or silent.

Not a part of the tests: at full size it takes hours. Each case is one line in FOLDER/cases.jsonl, so a soak that was
stopped goes on where it was, and the table at its end is of all lines. Every part is derived from the case's number.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path

from tests.soak import damage, kills, strange

PARTS = {  # each: what makes a case of a number and a folder, and how many are asked for
    "configs": (strange.config_case, 1500),
    "kills": (kills.kill_case, 200),
    "writes": (kills.write_case, 60),
    "disks": (kills.disk_case, 22),
    "flips": (damage.flip_case, 200),
    "cuts": (damage.cut_case, 60),
    "hostile": (damage.hostile_case, 12),
    "long": (kills.long_case, 1),
}
GOOD = ("same", "refused", "ran", "caught", "flat")  # every other outcome is a finding


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", action="append", choices=tuple(PARTS))
    parser.add_argument("--count", type=int, help="cases of each part (default: the part's own)")
    parser.add_argument("--of", default="1/1", help="a share of the cases, such as 1/2 and 2/2 for two processes")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    share, shares = map(int, asked.of.split("/"))
    log = asked.out / f"cases-{share}-{shares}.jsonl"
    known = {(case["part"], case["number"]) for case in cases(asked.out)}
    for part in asked.part or PARTS:
        make, count = PARTS[part]
        for number in range(asked.count or count):
            if (part, number) in known or number % shares != share - 1:
                continue
            began = time.time()
            try:
                outcome, note = make(number, asked.out)
            except Exception as error:  # a finding too: the soak goes on
                outcome, note = "soak failed", f"{type(error).__name__}: {error}"
            case = {"part": part, "number": number, "outcome": outcome, "note": note[:500]}
            with log.open("a") as file:
                file.write(json.dumps(case | {"seconds": round(time.time() - began, 2)}) + "\n")
    print(table(cases(asked.out)))


def cases(out: Path) -> list[dict[str, object]]:
    """Every case so far, of all processes."""
    return [json.loads(line) for log in sorted(out.glob("cases-*.jsonl")) for line in log.read_text().splitlines()]


def table(found: list[dict[str, object]]) -> str:
    """The figures in Markdown, and every finding below."""
    lines = ["| part | cases | outcomes | findings |", "|---|---|---|---|"]
    for part in PARTS:
        own = [case for case in found if case["part"] == part]
        counts = Counter(str(case["outcome"]) for case in own)
        said = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
        bad = sum(count for outcome, count in counts.items() if outcome not in GOOD)
        lines.append(f"| {part} | {len(own)} | {said or '–'} | {bad} |")
    findings = [f"{c['part']} {c['number']}: {c['outcome']}: {c['note']}" for c in found if c["outcome"] not in GOOD]
    return "\n".join([*lines, "", *findings])


if __name__ == "__main__":
    main()
