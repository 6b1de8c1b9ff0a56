"""A report: one self-contained HTML page for people, and the same numbers as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sublimate.evaluation.report_page import page
from sublimate.evaluation.report_sections import Section, section_to_dict
from sublimate.pipelines.folders import file_written_aside

FORMAT = 1


@dataclass(frozen=True)
class Report:
    """Everything a reader needs to believe a result, or not.

    Attributes:
        title: what was measured.
        command: what makes this report again.
        sections: in reading order; a `Verdict` comes first where there is one.
        lead: a sentence or two under the title.
        tried: what was measured, and how much of it.
        not_tried: what this report therefore says nothing about.
        provenance: versions, seeds, hardware line, hashes: name -> value.
    """

    title: str
    command: str
    sections: tuple[Section, ...]
    lead: str = ""
    tried: tuple[str, ...] = ()
    not_tried: tuple[str, ...] = ()
    provenance: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, pictures by caption only."""
        return {
            "format": FORMAT,
            "title": self.title,
            "lead": self.lead,
            "command": self.command,
            "sections": [section_to_dict(section) for section in self.sections],
            "tried": list(self.tried),
            "not_tried": list(self.not_tried),
            "provenance": dict(self.provenance),
        }

    def to_html(self) -> str:
        """The whole page; it refers to nothing outside itself."""
        return page(
            title=self.title,
            lead=self.lead,
            command=self.command,
            sections=self.sections,
            tried=self.tried,
            not_tried=self.not_tried,
            provenance=self.provenance,
        )

    def write(self, folder: str | Path) -> Path:
        """Writes `report.json` and `report.html`; each appears complete or not at all.

        Args:
            folder: made if it does not exist.

        Returns:
            The path of the page.

        Raises:
            ValueError: if a number is not finite, which JSON cannot hold.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        html = self.to_html()
        for name, content in (("report.json", text + "\n"), ("report.html", html)):
            with file_written_aside(folder / name) as aside:
                aside.write_text(content, encoding="utf-8")
        return folder / "report.html"
