"""Runs both property matrices over every family, and writes which method fits which into the README.

Every family is one resumable cell: its outcomes are written to `results/grid.json` when its tests are through.

    python benchmarks/grid.py                             # the families that are missing
    python benchmarks/grid.py --families tiny_sd,tiny_sd3  # these, again
    python benchmarks/grid.py --families tiny_sd --file tests/training/test_exports.py  # what one file's tests add
    python benchmarks/grid.py --table                     # write the README's grid from what is there
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from sublimate.training import registry
from sublimate.training.distill import OBJECTIVES

ROOT = Path(__file__).parent.parent
RESULTS, README = ROOT / "benchmarks" / "results" / "grid.json", ROOT / "README.md"
MATRICES = {
    "objectives": ("tests/training/test_objectives.py", "tests/training/test_exports.py"),
    "erasers": ("tests/erasure/test_erasers.py",),
}
METHODS = {"objectives": OBJECTIVES, "erasers": "sublimate.erasure.methods"}
BEGIN, END = "<!-- grid: benchmarks/grid.py writes this -->", "<!-- end of grid -->"

Outcomes = Mapping[str, str]
"""By row of a matrix: "" where all of its tests passed, else why the method refuses the family."""


def families() -> list[str]:
    """Every tiny checkpoint of the tests."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from checkpoints import modules

    return list(modules())


def run_matrix(files: Sequence[str], family: str) -> dict[str, str]:
    """The outcomes on one family of the tests of a matrix.

    Raises:
        SystemExit: when a test fails: a grid of what does not work is not written.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            *files,
            "--families",
            family,
            f"--junitxml={report}",
        ]
        subprocess.run(command, cwd=ROOT, check=False)
        return read_outcomes(report, family)


def read_outcomes(report: Path, family: str) -> dict[str, str]:
    """What pytest's XML report says of one family, by row: of its tests' refusals the first.

    Raises:
        SystemExit: when a test failed.
    """
    found: dict[str, str] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        name = case.get("name", "")
        if case.find("failure") is not None or case.find("error") is not None:
            raise SystemExit(f"{name} fails, so there is no grid of {family}: mend it, or have the method refuse.")
        matched = re.fullmatch(r"\w+\[(?P<ids>.+)\]", name)
        named = rf"(^|-){family}(-|$)"
        if matched is None or not re.search(named, matched["ids"]):
            continue
        row = re.sub(named, "", matched["ids"])
        skipped = case.find("skipped")
        refusal = "" if skipped is None else sentence(skipped.get("message", ""))
        found[row] = found.get(row) or refusal
    return found


def sentence(refusal: str) -> str:
    """A refusal without what names one checkpoint: its folder, its classes, its components."""
    refusal = re.sub(r"; \S*tiny_\w+ has [^:]+:", ":", refusal)
    refusal = re.sub(r"(?<=\w )\S*/tiny_\w+", "this model", refusal)
    refusal = re.sub(r"\S*/tiny_\w+", "This model", refusal)
    refusal = re.sub(r"\b\w+Pipeline\b", "the stock pipeline", refusal)
    refusal = re.sub("^the stock", "The stock", refusal)
    return re.sub(r"\bAn? \w*(?:UNet|Transformer)\w*", "This network", refusal)


def judged(rows: Outcomes, method: str) -> str:
    """One cell: "" where every row of a method passes, its sentence where all are refused, else both.

    A method's first row bears its name; further ones add to it with a hyphen.
    """
    own = [refusal for row, refusal in rows.items() if row == method or row.startswith(f"{method}-")]
    if not own:
        return "not run: the method is for other models"
    refused = [refusal for refusal in own if refusal]
    if refused and len(refused) < len(own):
        return f"with some of its options; else: {refused[0]}"
    return refused[0] if refused else ""


def table(results: Mapping[str, Mapping[str, Outcomes]]) -> str:
    """The grid as Markdown: a mark, or the number of the sentence that refuses."""
    columns = [family for family in families() if family in results]
    notes: dict[str, int] = {}
    lines = ["| | " + " | ".join(name.removeprefix("tiny_").replace("_", " ") for name in columns) + " |"]
    lines.append("|---" * (1 + len(columns)) + "|")
    for matrix, package in METHODS.items():
        for method in registry.available(package):
            cells = []
            for family in columns:
                reason = judged(results[family][matrix], method)
                cells.append(f"({notes.setdefault(reason, len(notes) + 1)})" if reason else "✓")
            lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"{number}. {sentence}" for sentence, number in notes.items())])


def main() -> None:
    """Runs the families that are missing, one after the other, and writes the grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default="", help="run these, with commas, whether or not they are there")
    every = [file for files in MATRICES.values() for file in files]
    parser.add_argument("--file", choices=every, help="run its tests alone, and add what they refuse to what is there")
    parser.add_argument("--table", action="store_true", help="write the grid and stop")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    asked = [name for name in options.families.split(",") if name]
    # One file adds to families that are there; whole matrices are for those that are missing.
    due = [name for name in families() if (name in results) == bool(options.file)]
    for family in [] if options.table else asked or due:
        print(f"{family} ...", flush=True)
        known = results[family] if options.file else {matrix: {} for matrix in MATRICES}
        for matrix, files in MATRICES.items():
            chosen = [file for file in files if options.file in (None, file)]
            found = run_matrix(chosen, family) if chosen else {}
            known[matrix] = {
                row: known[matrix].get(row) or refusal for row, refusal in (known[matrix] | found).items()
            }
        results[family] = known
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    before, rest = README.read_text().split(BEGIN)
    README.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
