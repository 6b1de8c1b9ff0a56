"""Reports: a page that stands alone and parses, the same numbers in JSON, and files that are whole or absent."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sublimate.evaluation.criteria import Criterion
from sublimate.evaluation.intervals import Difference, Rate
from sublimate.evaluation.report import Report
from sublimate.evaluation.report_plot import Axis, axis_strip, forest_strip, rate_strip
from sublimate.evaluation.report_sections import Listing, PictureRow, Pictures, Table, Verdict

VOID = {"meta", "img", "br", "link"}
NASTY = """<script>alert('x')</script> & "it's\""""
MET = Criterion("target", "Is it gone?", 0.01, 0.005, 0.02, 400, 0.03)
MISSED = Criterion("loss", f"What else {NASTY}?", 0.04, 0.025, 0.06, 400, 0.02, unit="points")
FLOOR = Criterion("before", "Was it there?", 0.98, 0.96, 0.99, 400, 0.5, at_least=True)


def picture(size: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.rand(3, size, size, generator=torch.Generator().manual_seed(seed))


def sample(**changes) -> Report:
    made = {
        "title": f"Erasing {NASTY}",
        "lead": f"Lead {NASTY}",
        "command": f"sublimate erase {NASTY}\nsecond line",
        "sections": (
            Verdict((MET, MISSED, FLOOR), note=f"Note {NASTY}"),
            Pictures(
                "Before and after",
                ("base", "edited", f"student {NASTY}"),
                (
                    PictureRow(f"“{NASTY}”", (picture(), picture(seed=1), picture(seed=2))),
                    PictureRow("large", (torch.zeros(3, 500, 500),) * 3),
                ),
            ),
            Table(
                f"Rates {NASTY}",
                ("what", f"rate {NASTY}", "difference", "number", "other"),
                (
                    (NASTY, Rate(1942, 2000), Difference(470, 10, 2, 20), 2.0, -0.25),
                    ("b", Rate(0, 10), Difference(1, 0, 3, 0), 4.0, 12345),
                    ("c", None, None, None, NASTY),
                ),
                note="A note.",
            ),
            Listing("More", (NASTY, "b")),
        ),
        "tried": (f"tried {NASTY}",),
        "not_tried": ("not tried",),
        "provenance": {"hardware": "2 cores", f"base {NASTY}": NASTY},
    }
    return Report(**{**made, **changes})


class Page(HTMLParser):
    """Reads a page, insisting that every tag is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def test_the_page_parses_and_needs_nothing_else():
    html = sample().to_html()
    page = Page(html)
    assert {"script", "link", "iframe"} & {tag for tag, _ in page.tags} == set()
    for _, attrs in page.tags:
        for name in ("src", "href", "srcset", "action", "xlink:href"):
            assert (attrs.get(name) or "data:").startswith("data:")
    assert not re.search(r"https?:|//|url\(|@import", re.sub(r"base64,[^']*", "", html))
    assert page.all("html")[0]["lang"] == "en" and any(meta.get("charset") == "utf-8" for meta in page.all("meta"))
    assert "prefers-color-scheme: dark" in html and "max-width: 720px" in html


def test_nothing_a_user_wrote_becomes_markup():
    page = Page(sample().to_html())
    assert page.text.count(NASTY) == 17  # everywhere it was given, the title and one column twice
    assert len([image for image in page.all("img") if NASTY in image["alt"]]) == 4
    assert page.all("td")[-1]["data-label"] == "other" and any(
        cell.get("data-label") == f"rate {NASTY}" for cell in page.all("td")
    )


def test_pictures_hold_their_pixels_and_say_what_they_show():
    images = Page(sample().to_html()).all("img")
    assert [image["alt"] for image in images[3:5]] == ["base: large", "edited: large"]
    assert images[0]["class"] == "small" and images[3]["class"] == "large"
    opened = [Image.open(BytesIO(base64.b64decode(image["src"].split(",")[1]))) for image in images]
    expected = (picture().permute(1, 2, 0) * 255).round().byte().numpy()
    assert (np.asarray(opened[0]) == expected).all() and opened[3].size == (384, 384)
    assert images[3]["width"] == images[3]["height"] == "500"


def test_numbers_are_printed_with_their_limits():
    text = Page(sample().to_html()).text
    assert "97.1\u202f%[96.3, 97.7] n=2000" in text
    assert "\N{MINUS SIGN}1.6 points[" in text and "+75.0 points[" in text
    assert "\N{MINUS SIGN}0.25" in text and "12,345" in text
    assert "Misses 1 of 3 bars: loss." in text
    assert "bar: at most 2.0\u202fpoints" in text and "bar: at least 50.0\u202f%" in text
    assert text.count("✓ met") == 2 and text.count("✗ missed") == 1


@pytest.mark.parametrize(
    ("criteria", "tone"),
    [
        ((MET, FLOOR), "met"),
        ((MISSED, MET), "missed"),
        ((Criterion("a", "?", 0.0, 0.0, 0.1, 10, 0.03),), "open"),
    ],
)
def test_the_banner_says_met_missed_or_open(criteria, tone):
    page = Page(sample(sections=(Verdict(criteria),)).to_html())
    assert next(div["class"] for div in page.all("div")) == f"verdict {tone}"
    assert [row.get("class") for row in page.all("tr")][1] == tone  # the first criterion's, below the headings


def test_what_is_not_given_leaves_no_empty_heading():
    page = Page(Report("t", "c", (Verdict((MET,)),), tried=("a",)).to_html())
    assert "Measured here" in page.text and "Not measured here" not in page.text
    assert "What this report covers" not in Page(Report("t", "c", ()).to_html()).text


def test_a_page_never_calls_anything_what_it_cannot_show():
    plain = Page(Report("t", "c", (Verdict((MET,)),), tried=("a",), not_tried=("b",)).to_html()).text
    assert not re.search(r"\bsafe(ty|ly)?\b", plain, flags=re.IGNORECASE)


def test_json_holds_the_same_numbers(tmp_path):
    made = sample()
    assert made.write(tmp_path / "new" / "folder") == tmp_path / "new" / "folder" / "report.html"
    read = json.loads((tmp_path / "new" / "folder" / "report.json").read_text(encoding="utf-8"))
    assert read == made.to_dict()
    assert (tmp_path / "new" / "folder" / "report.html").read_text(encoding="utf-8") == made.to_html()
    verdict, pictures, table, listing = read["sections"]
    assert (verdict["kind"], verdict["met"], verdict["sentence"]) == ("verdict", False, "Misses 1 of 3 bars: loss.")
    assert verdict["criteria"][0]["certain"] is True and verdict["criteria"][1]["unit"] == "points"
    assert pictures["captions"] == [f"“{NASTY}”", "large"] and pictures["columns"][0] == "base"
    assert table["rows"][0][1]["hits"] == 1942 and table["rows"][0][1]["high"] == Rate(1942, 2000).high
    assert table["rows"][1][2]["only_second"] == 3 and table["rows"][0][3] == 2.0
    assert table["rows"][2][1:4] == [None, None, None] and listing["items"] == [NASTY, "b"]
    assert read["tried"] == [f"tried {NASTY}"] and read["provenance"][f"base {NASTY}"] == NASTY and read["format"] == 1


def test_a_failed_write_leaves_the_old_report_and_nothing_else(tmp_path, monkeypatch):
    sample(title="old").write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def broken(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        sample(title="new").write(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before and len(before) == 2
    monkeypatch.undo()
    sample(title="new").write(tmp_path)
    assert "new" in (tmp_path / "report.html").read_text(encoding="utf-8")[:200]
    assert (tmp_path / "report.html").stat().st_mode & 0o777 == 0o644


def test_numbers_that_json_cannot_hold_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="Out of range float values"):
        sample(sections=(Table("t", ("a", "b"), (("x", float("nan")),)),)).write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_sections_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="'t' has 2 columns and a row of 1"):
        Table("t", ("a", "b"), (("x",),))
    with pytest.raises(ValueError, match="'cap' has 1 pictures for 2 columns"):
        Pictures("p", ("a", "b"), (PictureRow("cap", (picture(),)),))


def test_the_axis_holds_every_interval_bar_and_zero_on_round_ticks():
    axis = Axis.of([MET, MISSED])
    assert (axis.low, axis.high) == pytest.approx((0, 0.06)) and axis.ticks == pytest.approx(
        (0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06)
    )
    negative = Axis.of([Criterion("a", "?", 0.0, -0.021, 0.021, 10, 0.02)])
    assert negative.low == pytest.approx(-0.03) and negative.high == pytest.approx(0.03) and 0 in negative.ticks
    assert negative.place(0.0) == pytest.approx(50) and negative.place(-0.03) == pytest.approx(0)
    assert Axis.of([Criterion("a", "?", 0.55, 0.5, 0.6, 10, 0.5, at_least=True)]).high == 1.0
    assert Axis.of([Criterion("a", "?", 0.0, 0.0, 0.0, 10, 0.04)]).high == pytest.approx(0.05)
    assert len(Axis.of([Criterion("a", "?", 0.9, -0.9, 1.0, 10, 0.04)]).ticks) <= 8


def test_plots_put_marks_where_the_numbers_are():
    axis = Axis(0.0, 0.08, (0.0, 0.04, 0.08))
    plot = forest_strip(MISSED, axis)
    marks = {attrs["class"]: attrs for _, attrs in Page(plot).tags}
    assert (marks["whisker"]["x1"], marks["whisker"]["x2"]) == ("31.25%", "75.00%")
    assert marks["dot"]["cx"] == "50.00%" and marks["bar"]["x1"] == "25.00%"
    assert (marks["allowed"]["x"], marks["allowed"]["width"]) == ("0.00%", "25.00%")
    assert marks["forest"]["aria-label"] == "4.0 % with interval 2.5 to 6.0 %, bar at most 2.0 %"
    floor = {attrs["class"]: attrs for _, attrs in Page(forest_strip(FLOOR, Axis(0.0, 1.0, (0.0, 1.0)))).tags}
    assert (floor["allowed"]["x"], floor["allowed"]["width"]) == ("50.00%", "50.00%")
    assert floor["forest"]["aria-label"].endswith("bar at least 50.0 %")
    assert Page(axis_strip(axis)).text == "048 %"
    _, track, fill, span = (attrs for _, attrs in Page(rate_strip(Rate(50, 100))).tags)
    assert fill["width"] == "50.00%" and span["x"] == f"{100 * Rate(50, 100).low:.2f}%" and track["width"] == "100%"
