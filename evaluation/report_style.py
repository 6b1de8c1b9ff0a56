"""The look of a report: one style sheet for light and dark, screens wide and narrow, and paper."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf7; --card: #ffffff; --ink: #1c2024; --soft: #62676e; --line: #e3dfd6; --track: #efece5;
  --accent: #24566b; --fill: #a9c6d1; --met: #1b7a4a; --missed: #b4322a; --open: #94640a;
  --met-wash: #e9f4ed; --missed-wash: #fbecea; --open-wash: #f8f0dd;
  --serif: "Iowan Old Style", Charter, "Source Serif 4", Georgia, "DejaVu Serif", serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", sans-serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #131619; --card: #1a1e22; --ink: #e9e6df; --soft: #9aa0a8; --line: #2c3238; --track: #262b31;
    --accent: #8cc4dc; --fill: #3d5c6b; --met: #62c791; --missed: #ff8d82; --open: #e0b252;
    --met-wash: #17271f; --missed-wash: #2d1b1a; --open-wash: #2a2416;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 var(--sans); }
main { max-width: 1040px; margin: 0 auto; padding: 56px 32px 72px; }
header { margin-bottom: 36px; }
.kicker { margin: 0 0 10px; color: var(--accent); font-size: 13px; font-weight: 600; letter-spacing: .09em;
  text-transform: uppercase; }
h1 { margin: 0; font: 400 40px/1.15 var(--serif); letter-spacing: -.012em; text-wrap: balance; }
.lead { margin: 14px 0 0; max-width: 44em; color: var(--soft); font-size: 18px; }
section { margin-top: 48px; }
h2 { margin: 0 0 14px; font: 400 25px/1.25 var(--serif); }
.note { max-width: 50em; margin: 12px 0 0; color: var(--soft); font-size: 14.5px; }
h2 + .note { margin: -6px 0 16px; }

.verdict { padding: 20px 24px; border-left: 5px solid var(--tone); background: var(--wash); border-radius: 4px; }
.verdict p { margin: 0; font: 400 21px/1.4 var(--serif); }
.met { --tone: var(--met); --wash: var(--met-wash); }
.missed { --tone: var(--missed); --wash: var(--missed-wash); }
.open { --tone: var(--open); --wash: var(--open-wash); }

.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 11px 18px; text-align: left; vertical-align: top; border-top: 1px solid var(--line); }
thead th { border-top: 0; padding-bottom: 9px; color: var(--soft); font-size: 13px; font-weight: 600; }
tbody th { font-weight: 500; }
.value { font-weight: 600; white-space: nowrap; }
.limits { margin-left: .55em; color: var(--soft); font-size: 13px; white-space: nowrap; }
.score .limits { display: block; margin: 0; }
.range { display: block; width: 100%; min-width: 110px; height: 6px; margin-top: 5px; }
.range .track { fill: var(--track); }
.range .fill { fill: var(--fill); }
.range .span { fill: var(--accent); }
.none { color: var(--soft); }

.score { margin-top: 16px; }
.score th { width: 36%; }
.score .plot { width: 38%; padding-left: 6px; padding-right: 6px; }
.score tbody td, .score tbody th { vertical-align: middle; }
.score h3 { margin: 0; }
.score .axis td, .score .axis th { padding-top: 2px; padding-bottom: 12px; border-top: 0; }
.badge { display: inline-block; margin-left: -2px; color: var(--tone); font-size: 13.5px; font-weight: 600;
  white-space: nowrap; }
.badge small { display: block; color: var(--soft); font-size: 12.5px; font-weight: 400; }
.bar-text { display: block; color: var(--soft); font-size: 13px; font-weight: 400; }
.forest { display: block; width: 100%; height: 34px; overflow: visible; }
.forest .allowed { fill: var(--met); opacity: .1; }
.forest .bar { stroke: var(--soft); stroke-width: 1.5; stroke-dasharray: 3 3; }
.forest .whisker { stroke: var(--tone); stroke-width: 2.5; stroke-linecap: round; }
.forest .dot { fill: var(--tone); stroke: var(--card); stroke-width: 2; }
.forest .zero { stroke: var(--line); }
.ticks { height: 18px; }
.ticks line { stroke: var(--soft); }
.ticks text { fill: var(--soft); font: 12px var(--sans); text-anchor: middle; }

.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--least)), 1fr)); gap: 16px; }
figure { margin: 0; padding: 14px 16px 12px; }
figcaption { margin-bottom: 10px; font-size: 14.5px; line-height: 1.4; overflow-wrap: anywhere; }
.strip { display: flex; gap: 8px; }
.strip > div { flex: 1; min-width: 0; }
.strip img { display: block; width: 100%; height: auto; border-radius: 4px; background: var(--track); }
.strip img.small { image-rendering: pixelated; }
.strip span { display: block; margin-top: 5px; color: var(--soft); font-size: 12.5px; line-height: 1.3; }

.columns { display: grid; grid-template-columns: 1fr 1fr; gap: 32px; }
h3 { margin: 0 0 8px; font-size: 15px; font-weight: 600; }
ul { margin: 0; padding-left: 1.15em; }
li { margin: 5px 0; }
li::marker { color: var(--soft); }
pre { margin: 0; padding: 14px 18px; font: 14px/1.6 var(--mono); white-space: pre-wrap; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 7px 24px; margin: 18px 0 0; font-size: 14.5px; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
footer { margin-top: 56px; padding-top: 18px; border-top: 1px solid var(--line); color: var(--soft);
  font-size: 13.5px; }

@media (max-width: 720px) {
  main { padding: 32px 16px 48px; }
  h1 { font-size: 31px; }
  .lead { font-size: 17px; }
  section { margin-top: 38px; }
  .verdict { padding: 16px 18px; }
  .verdict p { font-size: 19px; }
  .columns { grid-template-columns: 1fr; gap: 22px; }
  .limits { display: block; margin: 0; }
  thead { display: none; }
  tr { display: grid; grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); gap: 8px 18px; padding: 12px 14px;
    border-top: 1px solid var(--line); }
  tbody:first-of-type tr:first-child { border-top: 0; }
  .score th, .score td, tbody th, td { display: block; width: auto; padding: 0; border: 0; }
  tbody th, .score .plot { grid-column: 1 / -1; }
  tbody th { font-weight: 600; }
  td[data-label]::before { content: attr(data-label); display: block; color: var(--soft); font-size: 12.5px;
    line-height: 1.35; }
  .score tr { grid-template-columns: 1fr auto; gap: 0; }
  .score .plot { width: auto; padding: 6px 4px 2px; }
  .score .result { text-align: right; }
  .score tr.axis { padding-top: 0; border-top: 0; }
  .score .axis th, .score .axis td:not(.plot) { display: none; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 9px; }
}
@media print {
  body { background: #fff; }
  main { max-width: none; padding: 0; }
  figure, tr, .verdict { break-inside: avoid; }
}
"""
