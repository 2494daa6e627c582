"""Texts and numbers -> the parts of an HTML page and of a Markdown text.

    format_page("A run", "<h1>A run</h1>" + format_html_table(("file", "bytes"), [("a.txt", 12)]))

Invariant: what a caller hands over as text stays text, whatever it holds; and a page has no script and loads
nothing, which its Content-Security-Policy forbids too.
"""

from collections.abc import Iterable, Sequence
from html import escape

from firstwords.schema import mask_control

STYLE = """
:root { color-scheme: light dark; --back: #f6f7f9; --card: #fff; --text: #1b1f24; --soft: #626b76;
  --rule: #e3e6ea; --c0: #2563b8; --c1: #d9622b; --c2: #2f8f5b; --c3: #8b4fb8; --c4: #b8962b;
  --c5: #5b6470; --warn: #fff4e0; --edge: #e0a030; --user: #e4edf9 }
@media (prefers-color-scheme: dark) { :root { --back: #14171b; --card: #1d2126; --text: #e4e7eb;
  --soft: #98a1ad; --rule: #30363d; --c0: #6ea8f0; --c1: #f0945f; --c2: #66c596; --c3: #c08ee8;
  --c4: #dcc060; --c5: #9aa4b0; --warn: #33290f; --edge: #b98a2a; --user: #22324a } }
* { box-sizing: border-box }
body { margin: 0; background: var(--back); color: var(--text); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 60px }
h1 { font-size: 25px; margin: 0 0 6px; overflow-wrap: anywhere }
h2 { font-size: 18px; margin: 0 0 10px }
h3 { font-size: 14px; margin: 14px 0 4px; overflow-wrap: anywhere }
.lead { font-size: 17px; margin: 0 0 18px; max-width: 60em }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  padding: 16px 18px; margin: 0 0 16px }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 10px;
  margin: 0 0 16px }
.tile { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 10px 12px }
.tile b { display: block; font-size: 20px; font-weight: 600; font-variant-numeric: tabular-nums }
.tile span { display: block; color: var(--soft); font-size: 13px }
.tile small { display: block; color: var(--soft); font-size: 10.5px; line-height: 1.3;
  overflow-wrap: anywhere }
.warn { background: var(--warn); border-color: var(--edge) }
.warn ul { margin: 0; padding-left: 20px }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(410px, 1fr)); gap: 14px 22px }
figure { margin: 0; max-width: 640px }
figcaption { font-size: 13px; color: var(--soft); margin-bottom: 2px; overflow-wrap: anywhere }
svg { width: 100%; height: auto; display: block }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft) }
svg .rule { stroke: var(--rule) }
svg line.level { stroke: var(--soft); stroke-dasharray: 5 4; stroke-width: 1.2 }
svg polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round }
svg .bar { fill: var(--c0) }
svg .name { font-weight: 600 }
svg .level { font-weight: 400 }
SWATCHES
table { border-collapse: collapse; margin: 6px 0; font-size: 14px }
th { text-align: left; font-weight: 600 }
td, th { padding: 3px 16px 3px 0; border-bottom: 1px solid var(--rule); vertical-align: top;
  overflow-wrap: anywhere }
td { font-variant-numeric: tabular-nums }
td:first-child { overflow-wrap: normal }
.columns table { display: block; columns: 3; column-gap: 30px } .columns tbody { display: block }
.columns tr { display: flex; justify-content: space-between; border-bottom: 1px solid var(--rule) }
.columns td, .columns th { border: 0; padding-right: 0 }
.source { color: var(--soft); font-size: 12px; margin: 10px 0 0 }
.chat p { max-width: 78%; padding: 7px 12px; border-radius: 12px; margin: 5px 0; width: fit-content;
  overflow-wrap: anywhere }
.chat .user { background: var(--user); margin-left: auto }
.chat .bot { background: var(--back) }
.mark { display: block; color: var(--soft); font-size: 12px }
.none { color: var(--soft) }
td.n { text-align: right; white-space: nowrap }
svg .pad { fill: var(--rule) } svg .inside { fill: var(--card) }
.tokens { font: 13px/1.9 monospace; white-space: pre-wrap; overflow-wrap: anywhere }
.tokens span { border: 1px solid var(--rule); border-radius: 3px }
.tokens .learned { background: color-mix(in srgb, var(--c2) 35%, transparent) }
.tokens .end { border-color: var(--c1) }
details summary { cursor: pointer }
""".replace(
    "SWATCHES",
    "\n".join(
        f"svg polyline.c{n} {{ stroke: var(--c{n}) }} svg circle.c{n}, svg text.c{n} {{ fill: var(--c{n}) }}"
        for n in range(6)
    ),
)


def escape_text(text: object) -> str:
    """Return text as HTML that shows it, in an attribute too; control characters become U+FFFD."""
    return escape(mask_control(str(text).encode("utf-8", "replace").decode()))


def format_page(title: str, body: str) -> str:
    """Return a whole page around HTML that the functions of this module made."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape_text(title)}</title><style>{STYLE}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def list_broken(broken: Sequence[str]) -> str:
    """Return a box that names what could not be read; nothing when all could."""
    if not broken:
        return ""
    lines = "".join(f"<li>{escape_text(line)}</li>" for line in broken)
    return f'<section class="warn"><h2>What could not be read</h2><ul>{lines}</ul></section>'


def format_grid(charts: Sequence[tuple[str, str]]) -> str:
    """Lay pictures beside one another; each is its title and its SVG."""
    figures = (
        f"<figure><figcaption>{escape_text(title)}</figcaption>{svg}</figure>" for title, svg in charts
    )
    return f'<div class="grid">{"".join(figures)}</div>' if charts else ""


def format_sections(title: str, sections: Iterable[tuple[str, str]]) -> str:
    """Return a whole page of cards.

    Args:
        title: plain text.
        sections: of each the heading as plain text, and HTML that this module or `plot` made.
    """
    cards = (f"<section><h2>{escape_text(heading)}</h2>{html}</section>\n" for heading, html in sections)
    return format_page(title, f"<h1>{escape_text(title)}</h1>{''.join(cards)}")


def format_html_table(head: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a table; whole numbers on the right, thousands separated; a head of empty titles is left out."""
    titles = "".join(f"<th>{escape_text(cell)}</th>" for cell in head) if any(head) else ""
    lines = "".join(f"<tr>{''.join(map(_format_cell, row))}</tr>" for row in rows)
    return f"<table>{f'<tr>{titles}</tr>' if titles else ''}{lines}</table>"


def _format_cell(value: object) -> str:
    if isinstance(value, int):
        return f'<td class="n">{value:,}</td>'
    return f"<td>{escape_text('' if value is None else value)}</td>"


def format_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return the same as Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    cells = (
        " | ".join(escape_text(cell).replace("|", "&#124;").replace("\n", " ") for cell in row)
        for row in lines
    )
    return "\n".join(f"| {row} |" for row in cells) + "\n"


def format_count(value: float) -> str:
    """Return a count for people: 950, 12,400, 2.63 M."""
    if value >= 1e9:
        return f"{value / 1e9:.2f} G"
    return f"{value / 1e6:.2f} M" if value >= 1e6 else f"{value:,.0f}"


def format_duration(seconds: float) -> str:
    """Return a length of time: 45 s, 9 min 3 s, 7 h 20 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
