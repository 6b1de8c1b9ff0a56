"""Draws a report as one HTML page that needs nothing else: styles, plots and pictures are inside."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape

from sublimate.evaluation.criteria import Criterion
from sublimate.evaluation.intervals import Difference, Rate
from sublimate.evaluation.report_plot import Axis, axis_strip, forest_strip, rate_strip
from sublimate.evaluation.report_sections import Cell, Listing, Pictures, Section, Table, Verdict
from sublimate.evaluation.report_style import STYLE
from sublimate.pipelines.pictures import to_png

_SMALL = 128  # pictures below this edge are shown with sharp pixels
_LARGEST = 384  # pictures above this edge are shrunk, so that a page stays a few megabytes


def page(
    *,
    title: str,
    lead: str,
    command: str,
    sections: Sequence[Section],
    tried: Sequence[str],
    not_tried: Sequence[str],
    provenance: Mapping[str, str],
) -> str:
    """The whole document; see `Report` for the arguments."""
    body = [
        f"<header><p class='kicker'>sublimate report</p><h1>{escape(title)}</h1>{_paragraph(lead, 'lead')}</header>",
        *(_section(section) for section in sections),
        _scope(tried, not_tried),
        _origin(command, provenance),
        "<footer>Numbers are rates over the prompts and seeds of this report, as one detector sees them. Brackets are "
        "95&#8239;% intervals unless a table says otherwise. The same numbers are in report.json.</footer>",
    ]
    return (
        "<!DOCTYPE html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _section(section: Section) -> str:
    match section:
        case Verdict():
            content = _verdict(section)
        case Table():
            content = _table(section)
        case Pictures():
            content = _pictures(section)
        case Listing():
            content = _items(section.items)
    return f"<section><h2>{escape(section.title)}</h2>{content}</section>"


def _paragraph(text: str, kind: str) -> str:
    return f"<p class='{kind}'>{escape(text)}</p>" if text else ""


def _items(items: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"


def percent(fraction: float) -> str:
    """A fraction as people read it: one decimal, a true minus sign."""
    return _signed(f"{100 * fraction:.1f}")


def _verdict(verdict: Verdict) -> str:
    tone = "missed" if verdict.undone or not verdict.met else "met" if verdict.certain else "open"
    groups = [[c for c in verdict.criteria if c.at_least == at_least] for at_least in (False, True)]
    bodies = "".join(_scores(group) for group in groups if group)
    return (
        f"<div class='verdict {tone}'><p>{escape(verdict.sentence)}</p></div>"
        f"<div class='card score'><table><thead><tr><th scope='col'>Question</th>"
        f"<th scope='col' class='plot'>Against the bar (shaded: met)</th>"
        f"<th scope='col'>Value</th><th scope='col'>Result</th></tr></thead>{bodies}</table></div>"
        f"{_paragraph(verdict.note, 'note')}"
    )


def _scores(criteria: Sequence[Criterion]) -> str:
    """The rows of criteria that share an axis: those with a maximum, or those with a minimum."""
    axis = Axis.of(criteria)
    rows = []
    for criterion in criteria:
        word = "at least" if criterion.at_least else "at most"
        tone = "missed" if not criterion.met else "met" if criterion.certain else "open"
        sign = "&#10003; met" if criterion.met else "&#10007; missed"
        doubt = "" if criterion.certain else "<small>not certain at this n</small>"
        rows.append(
            f"<tr class='{tone}'><th scope='row'>{escape(criterion.question)}"
            f"<span class='bar-text'>bar: {word} {percent(criterion.bar)}&#8239;{escape(criterion.unit)}</span></th>"
            f"<td class='plot'>{forest_strip(criterion, axis)}</td>"
            f"<td class='number'><span class='value'>{percent(criterion.value)}&#8239;{escape(criterion.unit)}</span>"
            f"<span class='limits'>[{percent(criterion.low)}, {percent(criterion.high)}], n={criterion.n}</span></td>"
            f"<td class='result'><span class='badge'>{sign}{doubt}</span></td></tr>"
        )
    ticks = f"<tr class='axis'><th></th><td class='plot'>{axis_strip(axis)}</td><td></td><td></td></tr>"
    return f"<tbody>{''.join(rows)}{ticks}</tbody>"


def _table(table: Table) -> str:
    head = "".join(f"<th scope='col'>{escape(column)}</th>" for column in table.columns)
    rows = []
    for name, *cells in table.rows:
        first = f"<th scope='row'>{escape(str(name))}</th>"
        drawn = "".join(_cell(cell, column) for cell, column in zip(cells, table.columns[1:], strict=True))
        rows.append(f"<tr>{first}{drawn}</tr>")
    return (
        f"<div class='card scroll'><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        f"{_paragraph(table.note, 'note')}"
    )


def _cell(cell: Cell, column: str) -> str:
    # The column's name goes along, for narrow screens: there each row becomes a block of its own.
    return f"<td data-label='{escape(column)}'>{_content(cell)}</td>"


def _content(cell: Cell) -> str:
    match cell:
        case None:
            return "<span class='none'>&ndash;</span>"
        case Rate():
            limits = f"[{percent(cell.low)}, {percent(cell.high)}] n={cell.n}"
            return _number(f"{percent(cell.value)}&#8239;%", limits) + rate_strip(cell)
        case Difference():
            sign = "+" if cell.value > 0 else ""
            limits = f"[{percent(cell.low)}, {percent(cell.high)}]"
            return _number(f"{sign}{percent(cell.value)} points", limits)
        case float():
            return _number(_signed(f"{cell:.4g}"))
        case int():
            return _number(_signed(f"{cell:,}"))
    return escape(cell)


def _signed(number: str) -> str:
    return number.replace("-", "\N{MINUS SIGN}")


def _number(value: str, limits: str = "") -> str:
    below = f"<span class='limits'>{limits}</span>" if limits else ""
    return f"<span class='value'>{value}</span>{below}"


def _pictures(pictures: Pictures) -> str:
    figures = []
    for row in pictures.rows:
        drawn = []
        for column, image in zip(pictures.columns, row.images, strict=True):
            small = max(image.shape[-2:]) < _SMALL
            source = base64.b64encode(to_png(image, largest=_LARGEST)).decode("ascii")
            drawn.append(
                f"<div><img class='{'small' if small else 'large'}' src='data:image/png;base64,{source}' "
                f"width='{image.shape[-1]}' height='{image.shape[-2]}' alt='{escape(f'{column}: {row.caption}')}'>"
                f"<span>{escape(column)}</span></div>"
            )
        figures.append(
            f"<figure class='card'><figcaption>{escape(row.caption)}</figcaption>"
            f"<div class='strip'>{''.join(drawn)}</div></figure>"
        )
    least = 110 * len(pictures.columns) + 30
    return (
        f"{_paragraph(pictures.note, 'note')}<div class='pictures' style='--least: {least}px'>{''.join(figures)}</div>"
    )


def _scope(tried: Sequence[str], not_tried: Sequence[str]) -> str:
    lists = [
        f"<div><h3>{title}</h3>{_items(items)}</div>"
        for title, items in (("Measured here", tried), ("Not measured here", not_tried))
        if items
    ]
    if not lists:
        return ""
    return f"<section><h2>What this report covers</h2><div class='columns'>{''.join(lists)}</div></section>"


def _origin(command: str, provenance: Mapping[str, str]) -> str:
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in provenance.items())
    return (
        f"<section><h2>How to make it again</h2><div class='card'><pre><code>{escape(command)}</code></pre></div>"
        f"{f'<dl>{facts}</dl>' if facts else ''}</section>"
    )
