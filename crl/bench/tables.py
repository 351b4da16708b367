"""The README's tables, made of the published results: `python -m crl.bench.tables README.md`.

A table stands between `<!-- bench: NAME -->` and `<!-- end -->`, and is that of `crl/bench/results/NAME.json`.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from crl.bench import coverage, curvature, methods, rl, study, supervised
from crl.bench.studies import STUDIES

RESULTS = Path(__file__).resolve().parent / "results"
TABLES = {
    "coverage": coverage.table,
    "curvature": curvature.table,
    "methods": methods.table,
    "rl": rl.table,
    "supervised": supervised.table,
}
MARKED = re.compile(r"(<!-- bench: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(name: str) -> str:
    """The table of a published result."""
    result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return TABLES[name](result) if name in TABLES else study.table(STUDIES[name](), result)


def fill(text: str) -> str:
    """A text with each marked table made anew."""
    return MARKED.sub(lambda found: f"{found[1]}\n{table(found[2])}\n\n{found[3]}", text)


def main(paths: list[str]) -> None:
    """Fill the tables of some files."""
    for path in map(Path, paths):
        path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
