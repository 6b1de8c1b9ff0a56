"""A run's log on disk: one line of JSON per report, in the order of the steps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from sublimate.pipelines.folders import file_written_aside


class Log:
    """`log.jsonl` in a run's folder. A resumed run's equals that of an uninterrupted one.

    Args:
        folder: the run's; made when the first line is written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "log.jsonl"

    def rewind(self, step: int) -> None:
        """Forgets what was reported after a step: the run goes on from there, or another one starts in its place."""
        if not self.path.is_file():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        # A process that was killed while writing leaves half a line.
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        if kept != lines:
            with file_written_aside(self.path) as aside:
                aside.write_text("".join(kept), encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a line: finished steps, and finite numbers by name."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
